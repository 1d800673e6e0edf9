"""Videos as input: which frames there are, in which order, at which cost, and what becomes of damage."""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.child import ChildProcess
from pipeline.errors import EnvironmentFault, InputError, Reason, SampleError
from pipeline.inputs.folder import look_up
from pipeline.inputs.frames import FrameQuestion, read_ppm
from pipeline.inputs.places import Place
from pipeline.inputs.read import iter_samples, read_samples
from pipeline.inputs.video import FrameLimits, default_reader, frame_table, read_frame
from tests.pipeline.inputs import videos
from tests.pipeline.inputs.videos import CLOSED, OPEN, index_of, listed, number_of, read, write_sound, write_video


def reasons(found: list[object]) -> dict[int, Reason]:
    return {number: one.reason for number, one in enumerate(found) if isinstance(one, SampleError)}


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", CLOSED),
        ("open.mp4", "libx264", OPEN),
        ("a.mkv", "libx264", OPEN),
        ("a.mov", "mjpeg", {}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.mpg", "mpeg2video", {"bf": "2"}),
        ("a.avi", "mpeg4", {"bf": "2"}),
        # AVI does not tell when a frame is shown: these are counted.
        ("counted.avi", "libx264", OPEN),
    ],
)
def test_frames_are_numbered_as_they_are_shown_and_read_in_any_order(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    images = listed(write_video(tmp_path / name, 35, codec=codec, options=options))
    stem = name.partition(".")[0]
    assert [sample.key for sample in images.samples] == [f"{stem}/{number:06d}" for number in range(35)]
    in_order = read(images)
    assert [number_of(one) for one in in_order] == list(range(35))
    numbers = random.Random(0).sample(range(35), 35)
    for number, one in zip(numbers, read(images, *numbers), strict=True):
        assert np.array_equal(one, in_order[number]), number


def test_colours_and_size_are_those_of_the_video(tmp_path: Path) -> None:
    (frame,) = read(listed(write_video(tmp_path / "a.mp4", 1, options={"qp": "0"})))
    assert isinstance(frame, np.ndarray)
    assert frame.shape == (48, 64, 3)
    wanted = videos.picture(0)
    # The colours have half the resolution: the edge of the corner is left out.
    assert abs(frame[:10, :10].astype(int) - wanted[:10, :10]).max() <= 4
    assert abs(frame[25:, 16:].astype(int) - wanted[25:, 16:]).max() <= 2


@pytest.mark.parametrize(
    ("rotation", "mirrored", "corner", "size"),
    [
        (0, False, (0, 0), (48, 64)),
        # Against the clock: what is at the top left comes to the bottom left.
        (90, False, (-1, 0), (64, 48)),
        (180, False, (-1, -1), (48, 64)),
        (270, False, (0, -1), (64, 48)),
        (0, True, (0, -1), (48, 64)),
        (90, True, (-1, -1), (64, 48)),
    ],
)
def test_a_video_is_turned_as_it_is_displayed(
    tmp_path: Path, rotation: int, mirrored: bool, corner: tuple[int, int], size: tuple[int, int]
) -> None:
    images = listed(write_video(tmp_path / "a.mp4", 2, rotation=rotation, mirrored=mirrored))
    for frame in read(images):
        assert isinstance(frame, np.ndarray)
        assert frame.shape == (*size, 3)
        red = frame[..., 0].astype(int) - frame[..., 1]
        corners = {(y, x): red[y, x] for y in (0, -1) for x in (0, -1)}
        assert max(corners, key=corners.__getitem__) == corner


def test_every_nth_frame_is_taken_with_its_own_number(tmp_path: Path) -> None:
    images = listed(write_video(tmp_path / "a.mp4", 35, options=OPEN), every=8)
    assert [sample.key for sample in images.samples] == [f"a/{number:06d}" for number in (0, 8, 16, 24, 32)]
    assert [number_of(one) for one in read(images)] == [0, 8, 16, 24, 32]
    videos.write_video(tmp_path / "b.mp4", 1)
    (tmp_path / "c.png").write_bytes(b"c")
    with pytest.raises(InputError, match=r"every=8 takes frames of videos, and there is none in .*c\.png; leave it"):
        listed(tmp_path / "c.png", every=8)


def test_frames_of_a_variable_rate_are_found_by_their_times(tmp_path: Path) -> None:
    times = [0, 10, 500, 510, 530, 2000, 2001, 2100, 2140, 9000, 9001, 9500]
    images = listed(write_video(tmp_path / "a.mkv", len(times), times=times, options={"bf": "2"}))
    assert [Place.parse(sample.members[0].url).pts for sample in images.samples] == times  # type: ignore[union-attr]
    assert [number_of(one) for one in read(images, 9, 3, 11, 0)] == [9, 3, 11, 0]


def test_a_frame_costs_the_decoding_from_its_keyframe_on_and_the_next_one_its_own(tmp_path: Path) -> None:
    """Not the whole video for each frame."""
    path = write_video(tmp_path / "a.mp4", 100, options=CLOSED)
    table = frame_table(look_up(str(path), "."))
    assert table.pts is not None
    from pipeline.inputs import frames

    video = frames._Video(FrameQuestion(str(path), "", Place("a", "frame", 0, 0), 10**6))
    decoded = []
    plain = video._decode

    def counted(until: int | None) -> object:
        for one in plain(until):
            decoded.append(one[0])
            yield one

    video._decode = counted  # type: ignore[method-assign, assignment]
    try:
        for number in range(84, 90):
            video.frame(Place("a", "frame", number, table.pts[number]))
    finally:
        video.close()
    assert decoded == [table.pts[number] for number in range(80, 90)]


def test_a_video_that_is_cut_short_gives_its_frames_before_the_cut(tmp_path: Path) -> None:
    whole = write_video(
        tmp_path / "whole.mp4", 60, options=CLOSED, noise=200, container_options={"movflags": "faststart"}
    )
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    images = listed(cut)
    assert len(images.samples) == 60, "the header says how many there were"
    found = read(images)
    failed = reasons(found)
    first = min(failed)
    assert 25 < first < 40
    # A frame that is shown later may be stored earlier.
    assert set(range(first + 4, 60)) <= set(failed)
    assert all(number_of(one) == number for number, one in enumerate(found) if number not in failed)
    assert failed[59] is Reason.TRUNCATED
    assert "ends after" in str(found[59])
    assert "of 60 frames: it was cut short" in str(found[59])


@pytest.mark.parametrize(("codec", "options"), [("mjpeg", {}), ("mpeg4", {"bf": "2"}), ("libx264", OPEN)])
def test_an_avi_with_gaps_is_whole_and_one_that_is_cut_is_not(
    tmp_path: Path, codec: str, options: dict[str, str]
) -> None:
    """The ticks of its gaps were counted as frames that were lost."""
    times = [40 * (number + 3 * (number >= 20) + 3 * (number >= 40)) for number in range(60)]
    whole = write_video(tmp_path / "whole.avi", 60, codec=codec, options=options, times=times, ticks=25, noise=200)
    table = frame_table(look_up(str(whole), "."))
    assert (table.count, table.lost) == (60, 0)
    assert [number_of(one) for one in read(listed(whole))] == list(range(60))
    data = whole.read_bytes()
    chunks = [chunk.start() for chunk in re.finditer(b"00dc", data[: data.index(b"idx1")])]
    cut = tmp_path / "cut.avi"
    cut.write_bytes(data[: chunks[-6]])
    table = frame_table(look_up(str(cut), "."))
    assert (table.count, table.lost) == (54, 6)
    failed = reasons(read(listed(cut)))
    assert failed[59] is Reason.TRUNCATED
    assert min(failed) >= 50


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("options", [CLOSED, OPEN], ids=["closed", "open"])
def test_damage_fails_the_frames_that_are_made_from_it_and_no_others(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    """The libraries hide it: frames that look whole are made from what is damaged."""
    path = write_video(tmp_path / name, 40, options=options, noise=200)
    images = listed(path)
    whole = read(images)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = sorted(packet.pts for packet in packets)
    keyframes = [times.index(packet.pts) for packet in packets if packet.is_keyframe]
    # The second half of a frame that the others of its group are made from.
    damaged = packets[11]
    number = times.index(damaged.pts)
    before = max(one for one in keyframes if one <= number)
    after = min(one for one in keyframes if one > number)
    assert damaged.pos is not None
    data = bytearray(path.read_bytes())
    at = data.index(bytes(damaged)[-100:]) + 100
    data[at - damaged.size // 2 : at] = bytes(damaged.size // 2)
    path.write_bytes(data)
    images = listed(path)
    assert len(images.samples) == 40
    found = read(images)
    failed = reasons(found)
    assert set(failed.values()) == {Reason.UNDECODABLE}
    assert number in failed
    assert set(range(number, after)) <= failed.keys() <= set(range(before + 1, after)), "of its own group"
    for number, one in enumerate(found):
        assert number in failed or np.array_equal(one, whole[number]), number
    # Each for itself, from its own keyframe on: the same frames fail.
    alone = read(images, *reversed(range(40)))[::-1]
    assert reasons(alone) == failed


def test_what_is_no_video_is_told_or_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_video(folder / "sub" / "a.mp4", 2)
    write_sound(folder / "sound.m4v")
    (folder / "noise.mp4").write_bytes(b"no video at all" * 100)
    (folder / "empty.avi").write_bytes(b"")
    images = listed(folder)
    assert images.ignored == {"no pictures, sound alone (.m4v)": 1}
    assert [sample.key for sample in images.samples] == ["empty", "noise", "sub/a/000000", "sub/a/000001"]
    found = read(images)
    assert reasons(found) == {0: Reason.UNDECODABLE, 1: Reason.UNDECODABLE}
    assert "noise.mp4 cannot be opened (Invalid data found when processing input)" in str(found[1])
    with pytest.raises(InputError, match=r"sound\.m4v has sound and no pictures; give a video"):
        listed(folder / "sound.m4v")


def test_a_playlist_opens_nothing_else(tmp_path: Path) -> None:
    """FFmpeg knows files by their content, whatever their name."""
    write_video(tmp_path / "a.mpg", 2, codec="mpeg1video")
    playlist = tmp_path / "list.mp4"
    playlist.write_text("ffconcat version 1.0\nfile a.mpg\n")
    (sample,) = listed(playlist).samples
    assert sample.problem is not None
    assert "list.mp4 cannot be opened" in sample.problem[1]


def test_images_and_videos_of_one_folder_are_all_samples(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", 2)
    write_video(tmp_path / "clip.mkv", 1)
    (tmp_path / "b.jpg").write_bytes(b"b")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "000001.png").write_bytes(b"p")
    images = listed(tmp_path)
    keys = ["b", "clip/000000", "clip.mp4/000000", "clip/000001", "clip/000001.png"]
    assert [sample.key for sample in images.samples] == keys


def test_a_video_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    images = listed(write_video(tmp_path / "a.mp4", 2))
    limits = FrameLimits(48 * 64 - 1, 60.0)
    for one in read_samples(index_of(images), 0, 2, limits=limits):
        assert isinstance(one, SampleError)
        assert one.reason is Reason.TOO_LARGE
        assert "(48, 64) is 3072 pixels, more than max_pixels = 3071" in one.detail
    assert not reasons(read(images))


def test_decoding_that_hangs_is_ended_and_the_rest_of_the_video_given_up(tmp_path: Path) -> None:
    images = listed(write_video(tmp_path / "a.mp4", 20))
    samples = iter_samples(index_of(images), 0, 20, limits=FrameLimits(10**8, 0.5))
    found: list[object] = [next(samples) for _ in range(5)]
    pid = default_reader().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    found += samples
    assert time.monotonic() - started < 5, "asked for once"
    assert reasons(found) == dict.fromkeys(range(5, 20), Reason.DECODE_TIMEOUT)
    assert "decoding frame 5 of" in str(found[5])
    assert number_of(read(images, 7)[0]) == 7
    assert default_reader().pid != pid


def test_a_table_of_frames_is_kept_while_the_video_stays(tmp_path: Path) -> None:
    path, cache = write_video(tmp_path / "a.mp4", 5), str(tmp_path / "cache")
    file = look_up(str(path), ".")
    table = frame_table(file, cache)
    assert table.count == 5
    # Read from the cache: the video itself is no more.
    path.write_bytes(b"")
    assert frame_table(file, cache) == table
    assert frame_table(look_up(str(path), "."), cache).problem
    (kept,) = Path(cache).iterdir()
    kept.write_bytes(b"damaged")
    assert frame_table(file, cache).problem, "looked through again"


def test_a_video_in_a_bucket_is_read_from_a_copy(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("FEATUP_CACHE", str(tmp_path / "cache"))
    path = write_video(tmp_path / "a.mp4", 12)
    s3fs.S3FileSystem().put_file(str(path), f"{s3}/in/a.mp4")
    for place, number in ((f"{s3}/in", 7), (f"{s3}/in/a.mp4", 11)):
        images = listed(place)
        assert [sample.key for sample in images.samples] == [f"a/{n:06d}" for n in range(12)]
        assert number_of(read(images, number)[0]) == number
    assert len([file for file in (tmp_path / "cache").rglob("a.mp4")]) == 1


@pytest.fixture
def crashing_reader(tmp_path: Path) -> ChildProcess:
    """A reader that ends at each question, as one that the kernel kills."""
    crashing = tmp_path / "python"
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pickle, sys\n"
        "sys.stdout.buffer.write(pickle.dumps('ready'))\n"
        "sys.stdout.flush()\n"
        "pickle.load(sys.stdin.buffer)\n"
        "os.abort()\n"
    )
    crashing.write_text(f"#!/bin/sh\nexec {sys.executable} {program}\n")
    crashing.chmod(0o755)
    return ChildProcess("none", "video", str(crashing))


def test_a_crash_of_the_reader_fails_the_frame(tmp_path: Path, crashing_reader: ChildProcess) -> None:
    images = listed(write_video(tmp_path / "a.mp4", 2))
    place = Place.parse(images.samples[0].members[0].url)
    assert place is not None
    with pytest.raises(SampleError, match=r"FFmpeg crashed 2 times on frame 0 of .*a\.mp4.*SIGABRT") as caught:
        read_frame(place, "", FrameLimits(10**8, 60.0), crashing_reader)
    assert caught.value.reason is Reason.UNDECODABLE


def test_a_crash_of_the_reader_is_not_kept_of_a_video(tmp_path: Path, crashing_reader: ChildProcess) -> None:
    """One lack of memory lost a video for good."""
    file, cache = look_up(str(write_video(tmp_path / "a.mp4", 2)), "."), tmp_path / "cache"
    table = frame_table(file, str(cache), crashing_reader)
    assert table.problem == "is damaged in a way that FFmpeg does not survive (signal SIGABRT), or memory ran out"
    assert frame_table(file, str(cache)).count == 2
    # As an earlier version kept it.
    (kept,) = cache.iterdir()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"count": 0, "pts": None, "problem": table.problem}))
    assert frame_table(file, str(cache)).count == 2


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EnvironmentFault, match=r"PyAV, which is not installed here; pip install .*\[video\]"):
        read_ppm(FrameQuestion(str(tmp_path / "a.mp4"), "", Place("a.mp4", "frame", 0, 0), 10**6))


def test_lists_name_no_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 1)
    (tmp_path / "list.txt").write_text("a.mp4\n")
    with pytest.raises(InputError, match=r"names a video, .*a\.mp4; lists name images"):
        listed(tmp_path / "list.txt")
