"""Training of upsamplers: the terms of the loss, and the multi-view objective that combines them.

The objective, in ``objective``, is imported from its module.
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
