"""Quality of features: metrics, linear probes, class activation maps, and baselines that need no upsampler.

Class activation maps, in ``cam``, and the baselines, in ``large_image``, need timm and are imported from their modules.
"""

from featup.evaluation.metrics import bootstrap, difference_interval, mean_iou, pixel_accuracy
from featup.evaluation.probes import Probe, fit_depth, fit_segmentation

__all__ = ["Probe", "bootstrap", "difference_interval", "fit_depth", "fit_segmentation", "mean_iou", "pixel_accuracy"]
