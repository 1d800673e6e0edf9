"""Images that a method fails on: they are left out for all methods, so that every row counts the same images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featup.errors import FeatupError
from pipeline.compute.device import choose_device
from pipeline.evaluation.image_set import ImageSet

__all__ = ["Failures"]


class Failures:
    """Which images of a set some method failed on, and why."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images
        self._reasons: dict[int, str] = {}

    def attempt(self, method: str, upsample: Callable[[slice], Tensor], batch: slice, shape: tuple[int, ...]) -> Tensor:
        """What ``upsample`` gives for a batch of images, ``[B, *shape]``, zero for those on which it fails.

        It fails by an error of the method, or by a result that is not finite. After an error the images of the batch
        are tried one by one.
        """
        try:
            results = [upsample(batch)]
        except FeatupError:
            results = [self._single(method, upsample, number, shape) for number in range(batch.start, batch.stop)]
        result = torch.cat(results)
        finite = result.flatten(1).isfinite().all(1)
        for number in (~finite).nonzero()[:, 0].tolist():
            self._reasons.setdefault(batch.start + number, f"{method}: its result is not finite")
        return result.where(finite.view(-1, *[1] * (result.dim() - 1)), 0.0)

    def _single(self, method: str, upsample: Callable[[slice], Tensor], number: int, shape: tuple[int, ...]) -> Tensor:
        try:
            return upsample(slice(number, number + 1))
        except FeatupError as error:
            self._reasons.setdefault(number, f"{method}: {error}")
            return torch.zeros(1, *shape, device=choose_device(None))

    def kept(self, numbers: Sequence[int]) -> list[int]:
        """Places in ``numbers``, images of the set, of those that no method failed on.

        Raises:
            FeatupError: none is left.
        """
        places = [place for place, number in enumerate(numbers) if number not in self._reasons]
        if not places:
            raise FeatupError(
                f"no image is left that every method serves: {'; '.join(self.reasons[:5])}; leave out the rows that "
                "fail"
            )
        return places

    @property
    def reasons(self) -> list[str]:
        """A line for each image that is left out."""
        return [f"{self._images.keys[number]}: {reason}" for number, reason in sorted(self._reasons.items())]
