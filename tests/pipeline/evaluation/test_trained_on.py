"""What the legend says of the images that a checkpoint was trained on."""

from pathlib import Path
from typing import Any

import pytest

from featup.checkpoints import upsampler_bytes
from featup.upsamplers import Interpolate, create_trainable
from featup.weights import file_digest
from pipeline.config.evaluate import EvaluateConfig
from pipeline.evaluation.methods import UpsamplerMethod
from pipeline.evaluation.trained_on import training_notes


def notes(tmp_path: Path, data: dict[str, Any], **provenance: Any) -> list[str]:
    file = tmp_path / "jbu.safetensors"
    file.write_bytes(upsampler_bytes(create_trainable("jbu", 8), **provenance))
    config = EvaluateConfig(rows=("bilinear", f"jbu={file}"), cam_shards=("c",), out="o")
    methods = [
        UpsamplerMethod("bilinear", Interpolate("bilinear")),
        UpsamplerMethod("jbu", Interpolate("bilinear"), {"checkpoint": file_digest(file)}),
    ]
    return list(training_notes(config, methods, data))


@pytest.mark.parametrize(
    ("facts", "seen"),
    [
        ({"shards": ["/here/imagenet/0001.tar"]}, True),
        ({"shards": ["/here/imagenet/0007.tar"]}, False),
        ({"shards": ["/here/camvid/0001.tar"]}, False),
        ({"shards": ["renamed.tar"], "digest": "abc"}, True),
        ({"shards": ["renamed.tar"], "digest": "abd"}, False),
    ],
    ids=["name", "other-number", "other-folder", "digest", "other-digest"],
)
def test_a_checkpoint_that_has_seen_the_evaluated_images_is_flagged(
    tmp_path: Path, facts: dict[str, Any], seen: bool
) -> None:
    provenance = {"config": {"shards": ["/data/imagenet/{0000..0003}.tar"]}, "identity": {"input digest": "abc"}}
    (line,) = notes(tmp_path, {"CAM": facts, "seg train": {"digest": "abc"}}, **provenance)
    said = "jbu: its checkpoint was trained on /data/imagenet/{0000..0003}.tar"
    assert line == (f"{said}, **which are also the images of CAM**." if seen else f"{said}.")


def test_a_checkpoint_without_a_record(tmp_path: Path) -> None:
    assert notes(tmp_path, {}) == ["jbu: its checkpoint does not record what it was trained on."]
