"""Samples that already lie in the tensors of their batch, and what torch's ``default_collate`` makes of them."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data._utils.collate import collate, default_collate_fn_map

__all__ = ["Batch", "Sample"]


class Sample(dict[str, Any]):
    """A sample: a dictionary of its arrays."""


class Batch(list[Sample]):
    """Samples whose tensors are slices of the batch's."""

    def __init__(self, whole: dict[str, Any], count: int) -> None:
        """
        Args:
            whole: tensors ``[B, ...]``, or lists of length B, by name.
            count: B.
        """
        super().__init__(Sample({name: values[n] for name, values in whole.items()}) for n in range(count))
        self.whole = whole
        self._slices = [dict(sample) for sample in self]

    @property
    def untouched(self) -> bool:
        """Whether the samples are still the slices they were."""
        return len(self) == len(self._slices) and all(
            sample.keys() == slices.keys() and all(sample[name] is slices[name] for name in slices)
            for sample, slices in zip(self, self._slices, strict=True)
        )


def _collate_samples(samples: Sequence[Sample], *, collate_fn_map: Any = None) -> dict[str, Any]:
    if isinstance(samples, Batch) and samples.untouched:
        return samples.whole
    batch: dict[str, Any] = collate([dict(sample) for sample in samples], collate_fn_map=collate_fn_map)
    return batch


# The place torch names for types of one's own: a DataLoader needs no collate_fn, and copies nothing.
default_collate_fn_map[Sample] = _collate_samples
