"""The recipes in configs/: each is one that the job takes, for a model that timm has."""

from pathlib import Path

import pytest
import torch

from featup._timm import timm
from featup.backbones import create_backbone
from pipeline.config.base import InputConfig
from pipeline.config.parser import parse_args
from pipeline.config.precompute import PrecomputeConfig
from pipeline.config.train import TrainConfig

RECIPES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))


def kind_of(path: Path) -> type[InputConfig]:
    return TrainConfig if path.stem.startswith("train_") else PrecomputeConfig


def config_of(path: Path) -> InputConfig:
    argv = ["--config", str(path), "--shards", "a.tar", "b.tar", "--out", "out"]
    config, _ = parse_args(kind_of(path), argv, description="")
    return config


def test_the_recipes_are_there() -> None:
    assert [path.name for path in RECIPES] == ["clip_b16.yaml", "dinov2_s14.yaml", "resnet50.yaml", "train_jbu.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_leaves_shards_and_out_to_the_command_line(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    config = config_of(path)
    assert (config.shards, config.out) == (("a.tar", "b.tar"), "out")
    assert config != kind_of(path)(shards=("a.tar", "b.tar"), out="out"), "a recipe that says nothing"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_timm_has_its_model_with_trained_weights(path: Path) -> None:
    config = config_of(path)
    assert config.pretrained
    assert config.backbone in timm.list_pretrained(), f"timm {timm.__version__} has no weights {config.backbone}"


@pytest.mark.parametrize(
    ("recipe", "grid", "channels"),
    [
        ("dinov2_s14", (16, 16), 384),
        ("clip_b16", (14, 14), 768),
        ("resnet50", (14, 14), 1024),
        ("train_jbu", (16, 16), 384),
    ],
)
def test_its_features_have_the_size_the_comment_says(recipe: str, grid: tuple[int, int], channels: int) -> None:
    (path,) = [path for path in RECIPES if path.stem == recipe]
    config = config_of(path)
    backbone = create_backbone(
        config.backbone, layer=config.layer, stride=config.stride, norm=config.norm, image_size=config.size
    )
    with torch.inference_mode():
        features = backbone(torch.zeros(1, *config.size, 3, dtype=torch.uint8))
    assert features.shape == (1, *grid, channels)
    assert f"{grid[0]}x{grid[1]}" in path.read_text().splitlines()[0]
    if isinstance(config, PrecomputeConfig):
        assert config.pca is not None
        assert config.pca <= channels
