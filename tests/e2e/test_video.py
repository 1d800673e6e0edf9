"""A video to a store, and the store to a video of its features."""

import os
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.loader.dataset import FeatureDataset
from tests.e2e import support
from tests.e2e.in_process import run
from tests.pipeline.inputs.videos import OPEN, number_of, write_video

OPTIONS = (*support.TINY, "--stride", 16, "--upsampler", "bilinear", "--rows-per-shard", 16)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred frames, of which each shows its number."""
    return write_video(tmp_path_factory.mktemp("in") / "clip.mp4", 100, options=OPEN, size=(64, 64))


@pytest.fixture(scope="module")
def store(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "clip"
    text = run("precompute", "--images", clip.parent, "--out", out, *OPTIONS)
    assert "100 samples in 7 units" in text
    assert "input 100 = ok 100 + failed 0" in text
    return out


def images(store: Path) -> dict[str, np.ndarray]:
    return {sample["key"]: sample["image"].numpy() for sample in FeatureDataset(str(store), ["image"])}


def test_every_frame_is_in_its_row(store: Path) -> None:
    found = images(store)
    assert list(found) == [f"clip/{number:06d}" for number in range(100)]
    assert [number_of(image) for image in found.values()] == list(range(100))
    rows = pq.read_table(store / "index").to_pylist()
    assert {(row["height"], row["width"], row["flags"]) for row in rows} == {(64, 64, "")}
    assert "clean: " in run("verify", store)


def test_its_features_come_back_as_a_video(store: Path, tmp_path: Path) -> None:
    text = run("show", store, "--video", tmp_path / "features.mp4", "--fps", 10)
    assert f"video     {tmp_path}/features.mp4, 100 frames" in text
    with av.open(str(tmp_path / "features.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 10)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert [number_of(frame[:, :64]) for frame in frames] == list(range(100))
    assert {frame.shape for frame in frames} == {(64, 64 + 8 + 64, 3)}
    assert all(frame[:, 72:].std() > 10 for frame in frames)
    assert list(tmp_path.iterdir()) == [tmp_path / "features.mp4"]


def test_touched_it_is_compared_and_a_new_video_is_appended(store: Path, clip: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    command = ("--images", folder, "--out", out, *OPTIONS)
    run("precompute", *command, "--every", 10)
    assert list(images(out)) == [f"clip/{number:06d}" for number in range(0, 100, 10)]
    assert " 0 to do" in run("precompute", *command, "--every", 10)
    os.utime(folder / "clip.mp4", (0, 0))
    write_video(folder / "a.avi", 3, options=OPEN, size=(64, 64))
    text = run("precompute", *command, "--every", 10)
    assert "10 samples of 1 of its 1 finished units compared with their receipts, their bytes are the same" in text
    assert "1 to do with 1 samples" in text
    # All frames: those that are there stay, the others come behind them.
    assert "92 samples" in run("precompute", *command)
    found = images(out)
    assert len(found) == 103
    assert all(number_of(image) == int(key.rpartition("/")[2]) for key, image in found.items())
    whole = {sample["key"]: sample["features"] for sample in FeatureDataset(str(store))}
    again = {sample["key"]: sample["features"] for sample in FeatureDataset(str(out))}
    assert all(bool((again[key] == features).all()) for key, features in whole.items())
    text = run("show", out, "--video", tmp_path / "one.mp4", "--key", "a")
    assert "one.mp4, 3 frames" in text
    text = run("show", out, "--video", tmp_path / "none.mp4", "--key", "cl", status=1)
    assert "no sample whose key begins with 'cl/'; its keys are clip/000000" in text
    assert "begin with a, clip" in text


def test_packed_as_shards_its_frames_have_the_same_features(store: Path, clip: Path, tmp_path: Path) -> None:
    assert "100 samples in 1 shards" in run("pack", clip, tmp_path / "p-%d.tar")
    run("precompute", "--shards", tmp_path / "p-0.tar", "--out", tmp_path / "out", *OPTIONS)
    assert support.array_files(tmp_path / "out") == support.array_files(store)


def test_a_video_that_is_cut_short_is_accounted_for(tmp_path: Path) -> None:
    whole = write_video(
        tmp_path / "w.mp4", 40, options=OPEN, size=(64, 64), noise=99, container_options={"movflags": "faststart"}
    )
    cut = tmp_path / "in" / "cut.mp4"
    cut.parent.mkdir()
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    command = ("--images", cut, "--out", tmp_path / "out", *OPTIONS, "--max-failed-fraction", 0.9)
    text = run("precompute", *command)
    rows = pq.read_table(tmp_path / "out" / "index").to_pylist()
    good = [row["key"] for row in rows if row["status"] == "ok"]
    assert f"input 40 = ok {len(good)} + failed {40 - len(good)}" in text
    assert 10 < len(good) < 30
    assert rows[39]["reason"] == "truncated"
    found = images(tmp_path / "out")
    assert all(number_of(image) == int(key.removeprefix("cut/")) for key, image in found.items())
