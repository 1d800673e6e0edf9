"""A store as a video: which samples, in which order, in which colours."""

import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from jobs.show import main
from pipeline.errors import ConfigError, EnvironmentFault
from pipeline.options import Size
from pipeline.viewing import feature_video, save_video
from tests.e2e.support import encode, photograph, write_tar
from tests.pipeline.compute.support import make_config, open_store

# Seeds of the photographs, by key; numbers are not all of one length.
FRAMES = {"a/10": 3, "a/9": 1, "a/100": 2, "b/1": 1, "c": 4}


def make(folder: Path, **options: Any) -> str:
    write_tar(folder / "t.tar", [(f"{key}.png", encode(photograph(seed), "PNG")) for key, seed in FRAMES.items()])
    store = open_store(make_config(folder / "t.tar", folder / "out", **options))
    store.run()
    return store.config.out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("frames"), output_size=Size(47, 63))


def decoded(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_frames_come_in_the_order_of_their_numbers(store: str) -> None:
    count, frames = feature_video(store)
    pictures = list(frames)
    assert count == len(pictures) == 5
    assert {picture.shape for picture in pictures} == {(47, 63 + 8 + 63, 3)}
    images = [picture[:, :63] for picture in pictures]
    nearest = []
    for image in images:
        wanted = {seed: np.asarray(photograph(seed))[::4, ::4].mean((0, 1)) for seed in sorted(set(FRAMES.values()))}
        nearest.append(min(wanted, key=lambda seed: abs(wanted[seed] - image.mean((0, 1))).sum()))
    assert nearest == [1, 3, 2, 1, 4]
    assert np.array_equal(pictures[0], pictures[3]), "the same photograph: the same colours in both"
    assert len({picture[:, 71:].tobytes() for picture in pictures}) == 4
    assert (pictures[0][:, 63:71] == 255).all()


def test_the_video_shows_what_the_store_holds(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "v.mp4"
    assert main([store, "--video", str(place), "--key", "a"]) == 0
    assert capsys.readouterr().out == f"video     {place}, 3 frames\n"
    frames = decoded(place)
    assert [frame.shape for frame in frames] == [(48, 134, 3)] * 3, "even sides, as H.264 has them"
    with av.open(str(place)) as container:
        assert container.streams.video[0].average_rate == 25
    for frame, picture in zip(frames, feature_video(store, "a/")[1], strict=True):
        assert abs(frame[:47].astype(int) - picture).mean() < 6
        assert abs(frame[47].astype(int) - frame[46]).mean() < 12, "the last row again"
    assert feature_video(store, "c")[0] == 1
    assert list(tmp_path.iterdir()) == [place]


def test_without_images_there_are_features_alone(tmp_path: Path) -> None:
    out = make(tmp_path, pca=4, store_image=False)
    assert next(feature_video(out)[1]).shape == (64, 64, 3)


def test_what_is_no_video_or_no_key_is_refused(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no sample whose key begins with 'z/'; .* begin with a, b"):
        feature_video(store, "z")
    assert main([store, "--video", str(tmp_path / "v.avi")]) == 1
    assert "--video" in (text := capsys.readouterr().err)
    assert "a MP4 file is written; give a name that ends in .mp4" in text
    assert main([store, "--video", f"{store}/v.mp4"]) == 1
    assert "lies inside of the store" in capsys.readouterr().err
    for words, text in (
        (["--fps", "5"], "--fps is that of a video"),
        (["--video", "v.mp4", "--count", "5"], "--video goes with --key and --fps alone"),
        (["--video", "v.mp4", "--fps", "0"], "'0' must be a number between 0.1 and 1000"),
    ):
        with pytest.raises(SystemExit):
            main([store, *words])
        assert text in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EnvironmentFault, match=r"PyAV, which is not installed here; pip install .*\[video\]"):
        save_video(iter(()), str(tmp_path / "v.mp4"))


def test_a_video_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield np.zeros((16, 16, 3), np.uint8)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        save_video(broken(), str(tmp_path / "v.mp4"))
    assert not list(tmp_path.iterdir())
