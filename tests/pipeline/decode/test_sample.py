"""Preparing whole samples: image and labels stay aligned."""

from typing import Any, get_args

import numpy as np
import pytest

from pipeline.decode.geometry import Geometry, apply_image, apply_label, orient
from pipeline.decode.labels import decode_label
from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import decode_image, prepare_sample
from pipeline.errors import Reason, SampleError
from tests.pipeline.decode.pictures import (
    FILES,
    encode,
    gradient,
    sample,
)

ALL = ("seg", "depth", "cls")


def test_prepared_sample_is_aligned_and_complete() -> None:
    options = DecodeOptions(size=(32, 32), geometry="pad", labels=ALL, fill=(9, 8, 7))
    members = sample()
    prepared = prepare_sample(members, options)
    assert prepared.image.shape == (32, 32, 3)

    assert (prepared.decoder, prepared.orientation, prepared.flags) == ("simplejpeg", 1, ())
    assert set(prepared.labels) == set(ALL)
    seg, depth, cls = (prepared.labels[kind] for kind in ALL)
    assert [str(label.dtype) for label in (seg, depth, cls)] == ["uint8", "float32", "int64"]
    assert (seg.shape, depth.shape, cls.shape, int(cls)) == ((32, 32), (32, 32), (), 3)
    valid = prepared.valid
    assert (valid.sum(), valid.shape) == (32 * 21, (32, 32))
    assert (prepared.image[~valid] == (9, 8, 7)).all()
    assert (seg[~valid] == 255).all()
    assert np.isnan(depth[~valid]).all()
    known = valid & (seg > 0)
    np.testing.assert_allclose(depth[known], seg[known] * 0.1, rtol=1e-6)
    assert np.isnan(depth[valid & (seg == 0)]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("grid", ["displayed", "stored"])
@pytest.mark.parametrize("size", [(60, 90), (70, 70)], ids=["oblong", "square"])
def test_labels_of_a_turned_photograph(orientation: int, grid: Any, size: tuple[int, int]) -> None:
    """A class map that marks the photograph's bright-red side must mark it still."""
    stored = (gradient(*size)[:, :, 0] > 127).astype(np.uint8) + 2 * (gradient(*size)[:, :, 1] > 127)
    label = stored if grid == "stored" else orient(stored, orientation)
    members = sample(size, orientation) | {"seg.png": encode(label.astype(np.uint8), "PNG")}
    prepared = prepare_sample(
        members, DecodeOptions((40, 40), geometry="squash", labels=("seg",), label_orientation=grid)
    )
    expected = (prepared.image[:, :, 0] > 127) + 2 * (prepared.image[:, :, 1] > 127)
    assert (prepared.labels["seg"] == expected).mean() > 0.93
    assert ("label_reoriented" in prepared.flags) == (grid == "stored" and orientation > 1)
    assert prepared.orientation == orientation


@pytest.mark.parametrize("grid", ["displayed", "stored"])
def test_size_decides_the_grid_of_a_label_before_the_option_does(grid: str) -> None:
    members = sample((60, 90), 6, label_size=(60, 90) if grid == "stored" else (90, 60))
    other: Any = "displayed" if grid == "stored" else "stored"
    options = DecodeOptions((30, 20), geometry="squash", labels=("seg",), label_orientation=other)
    prepared = prepare_sample(members, options)
    label = decode_label("seg", "seg.png", members["seg.png"])
    upright = np.rot90(label, -1) if grid == "stored" else label
    np.testing.assert_array_equal(prepared.labels["seg"], apply_label(upright, prepared.transform, 255))
    assert ("label_reoriented" in prepared.flags) == (grid == "stored")


def test_scaled_decoding_changes_pixels_hardly() -> None:
    members = sample((801, 643), 6)
    scaled = prepare_sample(members, DecodeOptions((64, 48), geometry="center_crop", labels=("seg",)))
    whole = decode_image(members["jpg"], max_pixels=10**6)
    assert "dct_scaled" in scaled.flags
    assert "dct_scaled" not in whole.flags
    assert scaled.transform.source_size == whole.source_size == (643, 801)
    assert np.abs(scaled.image.astype(int) - apply_image(whole.pixels, scaled.transform)).mean() < 1


def test_first_image_extension_present_wins_whatever_its_content() -> None:
    members = {"__key__": b"a", "png": FILES["png"], "jpg": FILES["webp"], "txt": b""}
    assert prepare_sample(members, DecodeOptions((8, 8))).decoder == "pillow"
    options = DecodeOptions((8, 8), image_exts=("jpeg", "gif"))
    with pytest.raises(SampleError, match=r"no image \(jpeg, gif\) in the sample") as caught:
        prepare_sample(members, options)
    assert caught.value.reason is Reason.IMAGE_MISSING


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        (
            {"seg.png": None},
            Reason.LABEL_MISSING,
            r"no seg label \(seg.png\) in the sample",
        ),
        ({"cls": None}, Reason.LABEL_MISSING, r"no cls label \(cls, cls.txt\)"),
        (
            {"seg.png": sample((30, 45))["seg.png"]},
            Reason.LABEL_SIZE,
            r"seg.png has size .* = \(30, 45\), its image \(60, 90\)",
        ),
        ({"seg.png": sample((90, 60))["seg.png"]}, Reason.LABEL_SIZE, r"\(90, 60\), its image \(60, 90\)"),
        (
            {"seg.png": encode(np.full((60, 90), 300, np.uint16), "PNG")},
            Reason.LABEL_RANGE,
            "class id 300, more than uint8 can; set seg_dtype to uint16",
        ),
        ({"jpg": FILES["jpeg"][:300]}, Reason.TRUNCATED, "jpeg cannot be decoded"),
    ],
)
def test_samples_that_cannot_be_used(changes: dict[str, bytes | None], reason: Reason, text: str) -> None:
    members = {ext: data for ext, data in (sample() | changes).items() if data is not None}
    with pytest.raises(SampleError, match=text) as caught:
        prepare_sample(members, DecodeOptions((32, 32), labels=ALL))
    assert caught.value.reason is reason


def test_labels_at_another_size_show_the_window_of_the_image() -> None:
    """The aspects differ: planning the crop for the labels alone would show another window."""
    stored = (gradient(120, 90)[:, :, 0] > 127).astype(np.uint8) + 2 * (gradient(120, 90)[:, :, 1] > 127)
    members = sample((120, 90)) | {"seg.png": encode(stored.astype(np.uint8), "PNG")}
    for geometry in get_args(Geometry):
        options = DecodeOptions((40, 60), label_size=(80, 60), geometry=geometry, labels=("seg", "cls"))
        prepared = prepare_sample(members, options)
        seg = prepared.labels["seg"]
        assert prepared.image.shape == (40, 60, 3)
        assert prepared.valid.shape == seg.shape == prepared.transform.output_size == (80, 60)
        shown = np.repeat(prepared.image, 2, axis=0)
        expected = (shown[:, :, 0] > 127) + 2 * (shown[:, :, 1] > 127)
        assert (seg == expected)[prepared.valid].mean() > 0.93


def test_seg_as_uint16() -> None:
    members = sample() | {"seg.png": encode(np.full((60, 90), 300, np.uint16), "PNG")}
    options = DecodeOptions((30, 30), geometry="pad", labels=("seg",), seg_dtype="uint16")
    seg = prepare_sample(members, options).labels["seg"]
    assert seg.dtype == np.uint16
    assert set(np.unique(seg)) == {300, 65535}
    eight_bit = prepare_sample(sample(), options).labels["seg"]
    assert eight_bit.dtype == np.uint16


def test_a_sample_without_a_label_is_kept_and_flagged_where_that_is_asked_for() -> None:
    options = DecodeOptions((8, 8), labels=("seg", "cls"), missing_label="keep")
    whole = prepare_sample(sample(), options)
    assert "no_seg" not in whole.flags
    members = {ext: data for ext, data in sample().items() if ext != "seg.png"}
    kept = prepare_sample(members, options)
    assert kept.labels.keys() == {"cls"}
    assert "no_seg" in kept.flags
    assert np.array_equal(kept.image, whole.image)
    # A label that is there and damaged still fails its sample.
    with pytest.raises(SampleError):
        prepare_sample(members | {"seg.png": b"no label"}, options)
