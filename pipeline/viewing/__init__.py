"""Looking at a store: what it is, in words, and pictures of its samples. Only reads."""

from pipeline.viewing.description import describe_store
from pipeline.viewing.files import picture_place, save_picture
from pipeline.viewing.neighbours import Neighbour, similarity_picture
from pipeline.viewing.samples import contact_sheet, describe_sample, sample_picture
from pipeline.viewing.video import feature_video, save_video

__all__ = [
    "Neighbour",
    "contact_sheet",
    "describe_sample",
    "describe_store",
    "feature_video",
    "picture_place",
    "sample_picture",
    "save_picture",
    "save_video",
    "similarity_picture",
]
