"""The geometric transforms, against analytic positions and Pillow's own crop-after-resize."""

import json
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.decode.geometry import (
    Geometry,
    Size,
    Transform,
    apply_image,
    apply_label,
    orient,
    orient_window,
    plan_transform,
    valid_mask,
)
from pipeline.errors import ConfigError

KINDS = get_args(Geometry)
SIZES = [
    ((97, 131), (56, 56)),
    ((131, 97), (45, 71)),
    ((240, 240), (224, 112)),
    ((51, 60), (101, 77)),
    ((201, 37), (33, 64)),
    ((37, 240), (64, 33)),
]
sides = st.integers(1, 400)
sizes = st.tuples(sides, sides)


def expected_centres(kind: str, source: Size, output: Size) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Source coordinates (rows, columns) under output pixels' centres, from the definition of each kind."""
    (h, w), (H, W) = source, output
    rows, columns = np.arange(H) + 0.5, np.arange(W) + 0.5
    if kind == "squash":
        return rows * h / H, columns * w / W
    scale = max(H / h, W / w) if kind == "center_crop" else min(H / h, W / w)
    return (rows - H / 2) / scale + h / 2, (columns - W / 2) / scale + w / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "output"), SIZES)
def test_the_window_is_where_the_definition_puts_it(kind: Geometry, source: Size, output: Size) -> None:
    transform = plan_transform(kind, source, output)
    for axis, expected in enumerate(expected_centres(kind, source, output)):
        start, length = transform.source_window[axis], transform.source_window[axis + 2]
        first, count = transform.output_window[axis], transform.output_window[axis + 2]
        step = length / count
        actual = start + (np.arange(output[axis]) + 0.5 - first) * step
        inside = slice(first, first + count)
        # Padding is whole pixels: its window may be rounded by half a pixel on each side, and move by half.
        tolerance = (1.0 if kind == "pad" else 1e-9) * step
        np.testing.assert_allclose(actual[inside], expected[inside], atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "output"), SIZES)
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("scaled", [1, 2, -2], ids=["full", "half", "half_mirrored"])
def test_image_and_label_agree_within_half_an_output_pixel(
    kind: Geometry, source: Size, output: Size, axis: int, scaled: int
) -> None:
    """A bright half and a dark half: the edge lies at the same place in image, label and on paper."""
    edge = source[axis] * 2 // 3
    line = np.arange(source[axis]) >= edge
    label = np.broadcast_to(line[:, None] if axis == 0 else line[None, :], source).astype(np.int32)
    image = np.repeat((label * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    extent = None
    if scaled != 1:  # what a JPEG decoder delivers: sizes rounded up, the last pixel (turned: the first) repeated
        mirrored, scaled = scaled < 0, abs(scaled)
        excess = [-side % scaled for side in source]
        image = np.pad(image, [(n, 0) if mirrored else (0, n) for n in excess] + [(0, 0)], mode="edge")
        image = image.reshape(image.shape[0] // scaled, scaled, image.shape[1] // scaled, scaled, 3)
        image = image.mean(axis=(1, 3)).round().astype(np.uint8)
        first_row, first_column = (n / scaled if mirrored else 0.0 for n in excess)
        extent = (first_row, first_column, source[0] / scaled, source[1] / scaled)
    transform = plan_transform(kind, source, output)
    out_label = apply_label(label, transform, -1)
    out_image = apply_image(image, transform, (9, 9, 9), extent)

    assert out_label.dtype == np.int32
    assert out_label.shape == output
    assert out_image.shape == (*output, 3)
    valid = valid_mask(transform)
    np.testing.assert_array_equal(out_label == -1, ~valid)
    assert (out_image[~valid] == 9).all()

    start, length = transform.source_window[axis], transform.source_window[axis + 2]
    first, count = transform.output_window[axis], transform.output_window[axis + 2]
    position = first + (edge - start) * count / length
    centres = np.arange(output[axis]) + 0.5
    decided = np.abs(centres - position) > 0.5 + 1e-6
    decided_grid = valid & (decided[:, None] if axis == 0 else decided[None, :])
    after = centres > position
    truth = np.broadcast_to(after[:, None] if axis == 0 else after[None, :], output)
    assert decided_grid.any()
    np.testing.assert_array_equal(out_label[decided_grid] == 1, truth[decided_grid])
    np.testing.assert_array_equal(out_image[decided_grid][:, 0] > 127, truth[decided_grid])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_match_a_loop_over_pixel_centres(kind: Geometry) -> None:
    label = np.random.default_rng(0).integers(0, 60000, (37, 61)).astype(np.uint16)
    transform = plan_transform(kind, label.shape, (23, 40))
    out = apply_label(label, transform, 65535)
    top, left, height, width = transform.source_window
    y, x, rows, columns = transform.output_window
    expected = np.full((23, 40), 65535, np.uint16)
    for i in range(rows):
        for j in range(columns):
            expected[y + i, x + j] = label[
                int(top + (i + 0.5) * height / rows), int(left + (j + 0.5) * width / columns)
            ]
    np.testing.assert_array_equal(out, expected)


def test_center_crop_is_resize_to_cover_then_crop(photograph: npt.NDArray[np.uint8]) -> None:
    """As timm's evaluation does it; sizes where its rounding to whole pixels is exact."""
    out = apply_image(photograph, plan_transform("center_crop", (120, 200), (60, 60)))
    whole = Image.fromarray(photograph).resize((100, 60), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((20, 0, 80, 60)))
    assert np.abs(out.astype(int) - expected).max() <= 1


def test_squash_and_pad_are_one_antialiased_bicubic_resize(photograph: npt.NDArray[np.uint8]) -> None:
    image = Image.fromarray(photograph)
    out = apply_image(photograph, plan_transform("squash", (120, 200), (31, 47)))
    np.testing.assert_array_equal(out, np.asarray(image.resize((47, 31), Image.Resampling.BICUBIC)))
    assert out.flags.writeable
    assert out.flags.c_contiguous

    out = apply_image(image, plan_transform("pad", (120, 200), (50, 50)), fill=(1, 2, 3))
    np.testing.assert_array_equal(out[10:40], np.asarray(image.resize((50, 30), Image.Resampling.BICUBIC)))
    assert (out[:10] == (1, 2, 3)).all()
    assert (out[40:] == (1, 2, 3)).all()


def test_extent_is_the_part_that_shows_the_source(photograph: npt.NDArray[np.uint8]) -> None:
    transform = plan_transform("center_crop", (120, 200), (60, 60))
    framed = np.pad(photograph, [(7, 4), (5, 9), (0, 0)], mode="reflect")
    out = apply_image(framed, transform, extent=(7.0, 5.0, 120.0, 200.0))
    error = np.abs(out.astype(int) - apply_image(photograph, transform))
    assert error[4:-4, 4:-4].max() <= 1


@pytest.fixture
def photograph() -> npt.NDArray[np.uint8]:
    noise = np.random.default_rng(1).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((200, 120), Image.Resampling.BICUBIC))


@given(kind=st.sampled_from(KINDS), source=sizes, output=sizes)
@settings(max_examples=200)
def test_any_size_works(kind: Geometry, source: Size, output: Size) -> None:
    transform = plan_transform(kind, source, output)
    assert Transform.from_row(json.loads(json.dumps(transform.to_row()))) == transform
    image = np.full((*source, 3), 200, np.uint8)
    out_image = apply_image(image, transform)
    out_label = apply_label(np.full(source, 7, np.uint8), transform, 255)
    valid = valid_mask(transform)
    assert valid.any()
    if kind != "pad":
        assert valid.all()
    np.testing.assert_array_equal(out_image, np.where(valid[:, :, None], 200, 0) * np.ones(3, int))
    np.testing.assert_array_equal(out_label, np.where(valid, 7, 255))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [(1, 1000), (1000, 1), (1, 1), (2, 3)])
def test_degenerate_sizes(kind: Geometry, source: Size) -> None:
    transform = plan_transform(kind, source, (224, 224))
    label = np.arange(source[0] * source[1]).reshape(source)
    out = apply_label(label, transform, -1)
    top, left, height, width = transform.output_window
    middle = out[top + height // 2, left + width // 2]
    step = max(1, source[0] // 224, source[1] // 224)
    assert abs(middle - label[source[0] // 2, source[1] // 2]) <= step
    assert apply_image(np.zeros((*source, 3), np.uint8), transform).shape == (224, 224, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(14, 14), (112, 168), (61, 35), (1, 2)])
def test_resized_is_the_same_view_at_another_size(kind: Geometry, size: Size) -> None:
    """Also where the two outputs differ in aspect, and planning anew would crop another window."""
    transform = plan_transform(kind, (201, 97), (56, 48))
    resized = transform.resized(size)
    assert resized.source_window == transform.source_window
    assert resized.output_size == size
    for axis in (0, 1):
        ratio = size[axis] / transform.output_size[axis]
        first, count = transform.output_window[axis], transform.output_window[axis + 2]
        new_first, new_count = resized.output_window[axis], resized.output_window[axis + 2]
        assert abs(new_first - first * ratio) <= 0.5
        assert abs(new_first + new_count - (first + count) * ratio) <= 0.5
    assert transform.resized((56, 48)) == transform
    assert plan_transform("pad", (1, 1000), (224, 224)).resized((7, 7)).output_window == (3, 0, 1, 7)
    corner = Transform((4, 4), (0.0, 0.0, 4.0, 4.0), (10, 10), (9, 9, 1, 1))
    assert corner.resized((1, 1)).output_window == (0, 0, 1, 1)


def test_float_labels_keep_nan_and_are_never_mixed() -> None:
    label = np.full((20, 20), 2.5, np.float32)
    label[:, 10:] = np.nan
    out = apply_label(label, plan_transform("squash", (20, 20), (7, 7)), np.nan)
    assert out.dtype == np.float32
    assert set(out[~np.isnan(out)]) == {np.float32(2.5)}
    assert np.isnan(out[:, 4:]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orient_is_what_pillow_does(orientation: int) -> None:
    image = np.random.default_rng(2).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tagged = Image.fromarray(image)
    tagged.getexif()[274] = orientation
    np.testing.assert_array_equal(orient(image, orientation), np.asarray(ImageOps.exif_transpose(tagged)))

    marked = np.zeros((5, 7), bool)
    marked[1:3, 2:6] = True
    (top, left, height, width), size = orient_window((1, 2, 2, 4), (5, 7), orientation)
    turned = np.zeros(size, bool)
    turned[int(top) : int(top + height), int(left) : int(left + width)] = True
    np.testing.assert_array_equal(orient(marked, orientation), turned)


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown geometry 'crop'; choose one of squash, center_crop, pad"):
        plan_transform("crop", (3, 3), (2, 2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sizes must be positive, got source .* = \(0, 3\)"):
        plan_transform("pad", (0, 3), (2, 2))
    with pytest.raises(ConfigError, match=r"source window .* does not lie inside"):
        Transform((4, 4), (1.0, 0.0, 4.0, 4.0), (2, 2), (0, 0, 2, 2))
    with pytest.raises(ConfigError, match=r"output window .* does not lie inside"):
        Transform((4, 4), (0.0, 0.0, 4.0, 4.0), (2, 2), (0, 0, 2, 0))
    with pytest.raises(ConfigError, match=r"source window .*nan"):
        Transform((4, 4), (0.0, float("nan"), 4.0, 4.0), (2, 2), (0, 0, 2, 2))
    with pytest.raises(ConfigError, match="not a row of a Transform"):
        Transform.from_row({"source_size": [1, 2, 3]})
    transform = plan_transform("pad", (4, 4), (2, 2))
    with pytest.raises(ConfigError, match=r"label of shape \(4, 5\) does not fit a source of size \(4, 4\)"):
        apply_label(np.zeros((4, 5)), transform, 0)
    with pytest.raises(ConfigError, match="must be RGB"):
        apply_image(np.zeros((4, 4), np.uint8), transform)
