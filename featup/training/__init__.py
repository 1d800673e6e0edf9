"""Training of upsamplers: the terms of the losses, and the two objectives that combine them.

The objectives, in ``multi_view`` and ``crops``, are imported from their modules.
"""

from featup.training.losses import (
    blur_pin,
    explained_variance,
    magnitude,
    reconstruction,
    sample_positions,
    sampled_crf,
    scale_and_shift_invariant,
    total_variation,
)

__all__ = [
    "blur_pin",
    "explained_variance",
    "magnitude",
    "reconstruction",
    "sample_positions",
    "sampled_crf",
    "scale_and_shift_invariant",
    "total_variation",
]
