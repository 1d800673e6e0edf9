import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.store.writer import round_mantissa


def rounded_by_arithmetic(values: NDArray[np.float16], bits: int) -> NDArray[np.float16]:
    """float16 values rounded in float64, half to even; those that do not fit, and those not finite, as they are."""
    exact = values.astype(np.float64)
    finite = np.isfinite(exact)
    size = np.abs(np.where(finite & (exact != 0), exact, 1.0))
    # Numbers below 2^-14 have the spacing of those just above.
    step = 2.0 ** (np.maximum(np.floor(np.log2(size)), -14) - bits)
    near = np.round(np.where(finite, exact, 0.0) / step) * step
    fits = finite & (np.abs(near) <= float(np.finfo(np.float16).max))
    return np.where(fits, np.where(fits, near, 0.0).astype(np.float16), values)


@pytest.mark.parametrize("bits", range(1, 11))
def test_rounding_every_number_there_is(bits: int) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    found = every.copy()
    round_mantissa(found, bits)
    wanted = rounded_by_arithmetic(every, bits)
    different = found.view(np.uint16) != wanted.view(np.uint16)
    assert not different.any(), [(every[i], found[i], wanted[i]) for i in np.flatnonzero(different)[:5]]
    again = found.copy()
    round_mantissa(again, bits)
    settled = np.abs(found.astype(np.float64)) < 65504
    assert np.array_equal(again[settled], found[settled]), "rounding twice is rounding once"


def test_rounding_in_place_keeps_the_shape() -> None:
    block = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float16)
    wanted = rounded_by_arithmetic(block, 4)
    round_mantissa(block, 4)
    assert np.array_equal(block, wanted)
    assert len(np.unique(block.view(np.uint16) & 0b111111)) == 1
