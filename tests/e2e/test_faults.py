"""Every bad input that the documentation names, in one set of shards: each gets its result, the rest is stored."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

from pipeline.loader.dataset import FeatureDataset
from tests.e2e import support
from tests.e2e.in_process import run
from tests.e2e.support import encode, good_sample, photograph


def _seg(size: tuple[int, int] = (60, 80)) -> bytes:
    return encode(np.full(size, 3, np.uint8), "PNG")


def _cmyk() -> bytes:
    file = io.BytesIO()
    Image.fromarray(photograph(1)).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


def _palette() -> bytes:
    file = io.BytesIO()
    Image.fromarray(photograph(2)).quantize(64).save(file, "PNG")
    return file.getvalue()


def _animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(photograph(seed)).quantize(64) for seed in (3, 4)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encode(photograph(5, (80, 60)), exif=exif)


@pytest.mark.ray
def test_each_bad_input_gets_its_documented_result(tmp_path: Path) -> None:
    jpeg = encode(photograph(0))
    alpha = np.dstack([photograph(6), np.full((60, 80), 128, np.uint8)])
    cases: dict[str, tuple[str, list[tuple[str, bytes]]]] = {
        "good": ("ok", [("jpg", jpeg)]),
        "png_named_jpg": ("ok", [("jpg", encode(photograph(7), "PNG"))]),
        "turned": ("ok", [("jpg", _turned())]),
        "cmyk": ("ok", [("jpg", _cmyk())]),
        "grey": ("ok", [("png", encode(photograph(8)[..., 0], "PNG"))]),
        "alpha": ("ok", [("png", encode(alpha, "PNG"))]),
        "palette": ("ok", [("png", _palette())]),
        "sixteen": ("ok", [("png", encode(photograph(9)[..., 0].astype(np.uint16) * 257, "PNG"))]),
        "animated": ("ok", [("gif", _animated())]),
        "cut_jpeg": ("truncated", [("jpg", jpeg[: len(jpeg) // 2])]),
        "web_page": ("undecodable", [("jpg", b"<!DOCTYPE html><html>404</html>")]),
        "nothing": ("undecodable", [("jpg", b"")]),
        "large": ("too_large", [("png", encode(np.zeros((400, 400), np.uint8), "PNG"))]),
        "no_image": ("image_missing", [("txt", b"words")]),
    }
    members = []
    for key, (_, files) in cases.items():
        members += [(f"{key}.{ext}", data) for ext, data in files] + [(f"{key}.seg.png", _seg())]
    members += [("no_label.jpg", jpeg)]
    members += [("other_size.jpg", jpeg), ("other_size.seg.png", _seg((30, 40)))]
    members += [("bad_label.jpg", jpeg), ("bad_label.seg.png", b"no picture")]
    # Again a key that this tar had before: the first stays.
    members += [("good.jpg", encode(photograph(11))), ("good.seg.png", _seg())]
    expected = {key: status for key, (status, _) in cases.items()}
    expected |= {"no_label": "label_missing", "other_size": "label_size", "bad_label": "label_undecodable"}
    support.write_tar(tmp_path / "bad-0.tar", members)
    # The same key in another tar is another sample.
    support.write_tar(tmp_path / "bad-1.tar", good_sample("good", 12) + good_sample("last", 13))
    (tmp_path / "bad-2.tar").write_bytes(b"")
    whole = support.write_tar(tmp_path / "bad-3.tar", good_sample("a", 14) + good_sample("b", 15)).read_bytes()
    cut = whole.index(b"b.seg.png") + 512 + 10
    (tmp_path / "bad-3.tar").write_bytes(whole[:cut])

    out = tmp_path / "out"
    options = (*support.TINY, "--labels", "seg", "--rows-per-shard", 8, "--max-pixels", 100_000)
    command = ("--shards", tmp_path / "bad-{0..4}.tar", "--out", out, *options)
    text = run("precompute", *command, status=1)
    samples = len(expected) + 1 + 2 + 2
    failed = sum(status != "ok" for status in expected.values()) + 1 + 1
    assert f"input {samples} = ok {samples - failed} + failed {failed}" in text
    assert f"{failed} of {samples} samples failed" in text
    assert "bad-2.tar: empty" in text
    assert "bad-3.tar: truncated" in text
    assert "bad-4.tar: missing" in text

    index = pq.read_table(out / "index").to_pylist()
    found = {row["key"]: row["reason"] or row["status"] for row in index[: len(expected)]}
    assert found == expected
    rest = [(row["key"], row["shard"][-9:], row["reason"] or row["status"]) for row in index[len(expected) :]]
    assert rest == [
        ("good", "bad-0.tar", "repeated_key"),
        ("good", "bad-1.tar", "ok"),
        ("last", "bad-1.tar", "ok"),
        ("a", "bad-3.tar", "ok"),
        ("b", "bad-3.tar", "tar_truncated"),
    ]
    flags = {row["key"]: row["flags"].split() for row in reversed(index)}
    for key, flag in [("turned", "exif_rotated"), ("cmyk", "cmyk"), ("alpha", "alpha"), ("palette", "palette")]:
        assert flag in flags[key], (key, flags[key])
    assert "animated" in flags["animated"]
    assert "sixteen_bit" in flags["sixteen"]

    # More allowed: the same store, nothing computed again, success.
    text = run("precompute", *command, "--max-failed-fraction", 0.6)
    assert " 0 to do" in text
    assert "clean" in run("verify", out)
    dataset = FeatureDataset(str(out), ["features", "seg"])
    assert len(dataset) == samples - failed
    root = zarr.open(out / "features.zarr", mode="r")
    assert np.isfinite(root["features"][:][dataset.rows]).all()
    bad = np.setdiff1d(np.arange(root["features"].shape[0]), dataset.rows)
    assert np.isnan(root["features"][:][bad]).all()


@pytest.mark.ray
def test_a_shard_replaced_by_one_of_the_same_size_and_time_stops_the_job_and_is_named(tmp_path: Path) -> None:
    """The tar was replaced by one of the same size and time after it was indexed."""
    import os

    first = support.write_tar(tmp_path / "a.tar", [m for n in range(6) for m in good_sample(f"a{n}", n)])
    support.write_tar(tmp_path / "b.tar", [m for n in range(3) for m in good_sample(f"b{n}", n)])
    out = tmp_path / "out"
    command = ("--shards", tmp_path / "[ab].tar", "--out", out, *support.TINY, "--labels", "seg", "--rows-per-shard", 4)
    run("precompute", *command, "--dry-run")
    original, times = first.read_bytes(), first.stat()
    garbage = bytearray(original)
    garbage[: 4 * 512] = bytes(4 * 512)
    first.write_bytes(garbage)
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    text = run("precompute", *command, status=1)
    (line,) = [line for line in text.splitlines() if line.startswith("precompute: ")]
    assert "InputChangedError" in line
    assert "a.tar" in line
    done = len(support.receipts(out))
    assert done < 3
    first.write_bytes(original)
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    text = run("precompute", *command)
    assert f"{done} units done before, {3 - done} to do" in text
    assert "input 9 = ok 9 + failed 0" in text
