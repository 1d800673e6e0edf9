"""Fits that explain far less than those of the data set mostly do are flagged in the index."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.store.parquet import read_columns
from pipeline.store.partitions import PartitionFacts, explained_variance, partition_place, write_partition

__all__ = ["FLAG", "flag_outliers"]

FLAG = "fit_outlier"
# Robust standard deviations below the median.
_OUTLIER = 3.0
# Fits of a set may be so alike that three deviations are nothing: less than this below the median is no outlier.
_SHORTFALL = 0.05


def flag_outliers(out: str, facts: Sequence[PartitionFacts]) -> None:
    """Set the flag ``fit_outlier`` where it belongs, and take it away where it does not any more.

    Two passes over one column; only partitions whose flags change are written again, and their facts updated.

    Args:
        out: the store.
        facts: of all partitions, by number.
    """
    fitted = [number for number, one in enumerate(facts) if one.fits]
    values = {number: _explained(out, number) for number in fitted}
    if not values:
        return
    every = np.concatenate(list(values.values()))
    every = every[np.isfinite(every)]
    median = np.median(every)
    # What a normal distribution's standard deviation is to its median absolute deviation.
    spread = 1.4826 * np.median(np.abs(every - median))
    limit = median - max(_OUTLIER * spread, _SHORTFALL)
    for number in fitted:
        outliers = np.isfinite(values[number]) & (values[number] < limit)
        if outliers.any() or facts[number].outliers:
            _set_flags(out, number, outliers, facts[number])


def _explained(out: str, number: int) -> NDArray[np.float32]:
    return explained_variance(read_columns(partition_place(out, number), ["explained_variance"]))


def _set_flags(out: str, number: int, outliers: NDArray[np.bool_], facts: PartitionFacts) -> None:
    table = read_columns(partition_place(out, number))
    flags: list[str] = table["flags"].to_pylist()
    changed = list(flags)
    flagged = np.fromiter((FLAG in one.split() for one in flags), np.bool_, len(flags))
    for row in np.flatnonzero(outliers | flagged).tolist():
        others = [flag for flag in flags[row].split() if flag != FLAG]
        changed[row] = " ".join([*others, FLAG] if outliers[row] else others)
    if changed == flags:
        return
    facts.outliers = int(outliers.sum())
    place = table.schema.get_field_index("flags")
    write_partition(out, number, [table.set_column(place, "flags", pa.array(changed, pa.string()))], facts)
