"""Options of decoding are those of the configs, and are checked where they are constructed."""

from typing import Any

import pytest

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.precompute import PrecomputeConfig
from pipeline.config.train import TrainConfig
from pipeline.decode.options import DecodeOptions
from pipeline.errors import ConfigError
from pipeline.options import Size


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": (0, 4)}, "size=.* must be at least 1 on both sides"),
        ({"label_size": (4, 0)}, "must be at least 1 on both sides"),
        ({"geometry": "crop"}, "geometry='crop' must be one of squash"),
        ({"labels": ("boxes",)}, "labels=.* must be one of seg, depth, cls"),
        ({"image_exts": (".jpg",)}, "image_exts=.* must be lower-case"),
        ({"image_exts": ()}, "image_exts=.* must be lower-case"),
        ({"max_pixels": 0}, "max_pixels=0 must be at least 1"),
        ({"max_bytes": 0}, "max_bytes=0 must be at least 1"),
        ({"decode_timeout": 0.0}, "decode_timeout=0.0 must be more than 0"),
        ({"fill": (0, 0, 256)}, "fill=.* must be between 0 and 255"),
        ({"seg_dtype": "int8"}, "seg_dtype='int8' must be one of uint8, uint16"),
        ({"depth_png_scale": 0.0}, "depth_png_scale=0.0 must be more than 0"),
        ({"depth_npy_scale": float("nan")}, "depth_npy_scale=nan must be more than 0"),
        ({"label_orientation": "exif"}, "label_orientation='exif' must be one of"),
    ],
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DecodeOptions(**{"size": Size(8, 8), **options})


def test_a_config_gives_the_options_it_has_and_defaults_for_others() -> None:
    own = {"geometry": "pad", "image_exts": ("png",), "max_pixels": 7, "max_bytes": 8}
    labels = {"decode_timeout": 9.0, "labels": ("seg",), "seg_dtype": "uint16", "label_orientation": "stored"}
    scales = {"depth_png_scale": 2.0, "depth_npy_scale": 3.0}
    size, fill = Size(3, 5), (1, 2, 3)
    store = PrecomputeConfig(shards=("a",), out="o", size=size, **own, **labels, **scales)  # type: ignore[arg-type]
    assert DecodeOptions.of(store, fill=fill) == DecodeOptions(size, None, fill, **own, **labels, **scales)  # type: ignore[arg-type]
    train = TrainConfig(shards=("a",), out="o", size=size, **own)  # type: ignore[arg-type]
    assert DecodeOptions.of(train, fill=fill) == DecodeOptions(size, None, fill, **own)  # type: ignore[arg-type]
    table = EvaluateConfig(cam_shards=("a",), out="o", size=size, **own, **scales)  # type: ignore[arg-type]
    with_depth = DecodeOptions.of(table, fill=fill, labels=("depth",))
    assert with_depth == DecodeOptions(size, None, fill, **own, **scales, labels=("depth",))  # type: ignore[arg-type]
