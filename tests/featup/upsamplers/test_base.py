"""Channel maps, stage sizes and guidance sizes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featup.errors import GeometryError
from featup.upsamplers import ChannelMap
from featup.upsamplers.base import stage_sizes
from featup.upsamplers.joint import resize_guidance
from tests.featup.support import TOLERANCE, random, relative_error


def test_channel_maps_chain() -> None:
    first, second = ChannelMap(random(4, 3), random(4)), ChannelMap(random(2, 4, seed=1), random(2, seed=1))
    both, x = second.after(first), random(7, 3)
    expected = (x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert relative_error(x @ both.weight.T + both.bias, expected) <= TOLERANCE
    assert second.after(None) is second


sides = st.integers(1, 400)


@given(low=st.tuples(sides, sides), more=st.tuples(sides, sides))
def test_stage_sizes(low: tuple[int, int], more: tuple[int, int]) -> None:
    high = (low[0] + more[0] - 1, low[1] + more[1] - 1)
    sizes = [low, *stage_sizes(low, high)]
    assert sizes[-1] == high
    for before, after in pairwise(sizes):
        assert all(b <= a <= 2 * b for b, a in zip(before, after, strict=True)), (before, after)
    # No fewer stages would do: after one less, a side could not have grown so far.
    fewer = len(sizes) - 2
    assert low == high or any(side << fewer < top for side, top in zip(low, high, strict=True))


def test_stage_sizes_of_patch_14_and_16() -> None:
    assert stage_sizes((16, 16), (224, 224)) == [(32, 32), (64, 64), (128, 128), (224, 224)]
    assert stage_sizes((22, 30), (352, 480)) == [(44, 60), (88, 120), (176, 240), (352, 480)]
    assert stage_sizes((5, 5), (5, 5)) == []


@pytest.mark.parametrize(("low", "high"), [((8, 8), (7, 9)), ((8, 8), (9, 7)), ((0, 4), (4, 4))], ids=str)
def test_stages_do_not_go_down(low: tuple[int, int], high: tuple[int, int]) -> None:
    with pytest.raises(GeometryError, match=r"stages go up from at least 1x1: cannot reach"):
        stage_sizes(low, high)


def test_guidance_going_down_is_the_mean_of_each_cell() -> None:
    image = random(2, 12, 20, 3)
    expected = image.reshape(2, 4, 3, 5, 4, 3).mean((2, 4))
    assert relative_error(resize_guidance(image, (4, 5)), expected) <= TOLERANCE
    assert resize_guidance(image, (12, 20)) is image
