"""Pictures: shared colours, black for what is not finite, panels where they should be."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featup.pictures import (
    class_colours,
    class_palette,
    component_colours,
    pca_colours,
    sheet,
    side_by_side,
    value_colours,
)


def features(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def apart(one: NDArray[Any], other: NDArray[Any]) -> int:
    """The greatest difference of two pictures in grey levels."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def where(matches: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels all of whose colours match: ``[H, W, 3]`` to ``[H, W]``."""
    pixels: NDArray[np.bool_] = np.asarray(matches.all(-1))
    return pixels


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equal_features_have_equal_colours_in_all_maps(dtype: Any) -> None:
    coarse = features(4, 5, 16).astype(dtype)
    fine = coarse.repeat(3, 0).repeat(2, 1)
    other = features(7, 3, 16, seed=1).astype(dtype)
    pictures = pca_colours([coarse, fine, other])
    assert [one.shape for one in pictures] == [(4, 5, 3), (12, 10, 3), (7, 3, 3)]
    assert {one.dtype for one in pictures} == {np.dtype(np.uint8)}
    assert apart(pictures[0].repeat(3, 0).repeat(2, 1), pictures[1]) <= 1, "coarse against fine"
    assert apart(pictures[0], pca_colours([coarse])[0]) > 1, "the other maps have a part in the basis and the scale"


def test_different_features_have_different_colours() -> None:
    regions = np.zeros((6, 6, 8), dtype=np.float32)
    regions[:3, :3, 0] = regions[:3, 3:, 1] = regions[3:, :3, 2] = 1
    (picture,) = pca_colours([regions])
    colours = [picture[y, x].astype(int) for y in (0, 5) for x in (0, 5)]
    for place, one in enumerate(colours):
        for other in colours[:place]:
            assert np.abs(one - other).max() > 50, (one, other)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 4


def test_the_scale_is_used_and_outliers_do_not_spoil_it() -> None:
    plain = features(40, 40, 6)
    spoilt = plain.copy()
    spoilt[7, 9] *= 1e3
    for maps in ([plain], [spoilt]):
        (picture,) = pca_colours(maps)
        assert (np.ptp(picture, axis=(0, 1)) == 255).all()
        # Apart from the outlier's own direction, which is the first.
        assert (picture.std((0, 1))[1:] > 40).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_black(bad: float) -> None:
    """Bug: infinite vectors were coloured, and could be the end of the scale."""
    clean = features(9, 11, 6)
    holed = clean.copy()
    holed[2, 3, 4], holed[5] = bad, bad
    holes = np.zeros((9, 11), dtype=bool)
    holes[2, 3], holes[5] = True, True
    (picture,) = pca_colours([holed])
    assert not picture[holes].any(), "black"
    rest = clean[~holes][:, None]
    assert apart(picture[~holes][:, None], pca_colours([rest])[0]) <= 1, "the rest as if they were not there"
    assert np.array_equal(holed[2, 3, :4], clean[2, 3, :4]), "the caller's map was written to"


def test_nothing_finite_is_all_black() -> None:
    pictures = pca_colours([np.full((3, 4, 8), np.nan, dtype=np.float32), np.full((1, 2, 8), np.inf)])
    assert [one.shape for one in pictures] == [(3, 4, 3), (1, 2, 3)]
    assert not any(one.any() for one in pictures)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_few_channels_leave_colours_empty(channels: int) -> None:
    (picture,) = pca_colours([features(8, 9, channels)])
    assert picture.shape == (8, 9, 3)
    assert (np.ptp(picture, axis=(0, 1)) > 0).tolist() == [place < channels for place in range(3)]


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 3, 8), (2, 2, 8)], ids=str)
def test_few_vectors(shape: tuple[int, int, int]) -> None:
    (picture,) = pca_colours([features(*shape)])
    assert picture.shape == (*shape[:2], 3)


def test_constant_features_are_one_colour() -> None:
    (picture,) = pca_colours([np.tile(features(1, 1, 30), (20, 21, 1))])
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1


def test_read_only_maps() -> None:
    """Bug: a map as a store hands it out made torch warn that it might be written to."""
    one = features(4, 5, 6)
    one.setflags(write=False)
    assert pca_colours([one])[0].shape == (4, 5, 3)


def test_side_by_side() -> None:
    red = np.full((10, 20, 3), (255, 0, 0), dtype=np.uint8)
    blue = np.full((30, 15, 3), (0, 0, 255), dtype=np.uint8)
    sheet = side_by_side([("red", red), ("blue", blue)], height=60)
    is_red, is_blue = where(sheet == (255, 0, 0)), where(sheet == (0, 0, 255))
    for name, found, width in (("red", is_red, 120), ("blue", is_blue, 30)):
        rows, columns = np.nonzero(found)
        assert len(rows) == 60 * width, f"{name}: area"
        assert np.ptp(rows) + 1 == 60, f"{name}: height"
        assert np.ptp(columns) + 1 == width, f"{name}: width"
    assert np.nonzero(is_red)[1].max() < np.nonzero(is_blue)[1].min(), "from left to right"
    assert np.nonzero(is_red)[0].min() == np.nonzero(is_blue)[0].min(), "in one row"
    top = int(np.nonzero(is_red)[0].min())
    gap = int(np.nonzero(is_red)[1].min())
    assert sheet.dtype == np.uint8
    assert sheet.shape == (60 + top + gap, 120 + 30 + 3 * gap, 3)
    dark = where(sheet < 100)
    assert not dark[top:].any()
    for found in (is_red, is_blue):
        columns = np.nonzero(found)[1]
        assert dark[:top, columns.min() : columns.max() + 1].any(), "a title above each panel"


def test_panels_are_scaled_without_smoothing() -> None:
    board = np.zeros((2, 2, 3), dtype=np.uint8)
    board[0, 0] = board[1, 1] = (0, 200, 0)
    sheet = side_by_side([("", board)], height=50)
    green = where(sheet == (0, 200, 0))
    black = where(sheet == 0)
    assert green.sum() == black.sum() == 2 * 25 * 25


def test_a_long_title_does_not_run_into_the_next_panel() -> None:
    white = np.full((100, 100, 3), 255, np.uint8)
    alone = side_by_side([("", white), ("", white)], 100)
    titled = side_by_side([("a title of many, many words", white), ("", white)], 100)
    changed = np.flatnonzero((alone != titled).any((0, 2)))
    assert len(changed)
    assert changed.max() < 8 + 100


def test_stored_components_share_one_scale() -> None:
    one = features(4, 5, 8)
    pictures = component_colours([one, one.repeat(2, 0), features(3, 3, 8, seed=1)])
    assert np.array_equal(pictures[0].repeat(2, 0), pictures[1])
    more = one.copy()
    more[..., 3:] = 7
    assert np.array_equal(component_colours([one])[0], component_colours([more])[0]), "the first three alone"
    (two,) = component_colours([one[..., :2]])
    assert (np.ptp(two, axis=(0, 1)) > 0).tolist() == [True, True, False]


def test_classes_have_colours_of_their_own() -> None:
    picture = class_colours(np.array([[0, 1, 2], [2, 255, -1]]), class_palette(3))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 4
    assert np.array_equal(picture[0, 2], picture[1, 0])
    assert not picture[1, 1:].any(), "black where there is no class"


def test_values_go_from_dark_to_bright() -> None:
    picture = value_colours(np.array([[0.0, 1.0, 2.0, 3.0, np.nan, np.inf]]), 1, 2)
    bright = picture.sum(-1)[0]
    assert bright[0] == bright[1] < bright[2] == bright[3], "clipped at both ends"
    assert not picture[0, 4:].any()
    assert value_colours(np.full((2, 2), 3.0), 3, 3).shape == (2, 2, 3)


def test_a_sheet_is_filled_line_by_line() -> None:
    pictures = [np.full((10 + n, 20 - n, 3), 50 * n, np.uint8) for n in range(3)]
    whole = sheet(pictures, 2)
    assert whole.shape == (2 * 12, 2 * 20, 3)
    assert [whole[0, 0, 0], whole[0, 20, 0], whole[12, 0, 0], whole[12, 20, 0]] == [0, 50, 100, 255]
    assert (whole[11, :20] == 255).all(), "white beside what is smaller"
