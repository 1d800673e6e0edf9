"""One label's part: the methods' settings, images that a method fails on, and the probe of the field's protocol."""

from typing import Any

import pytest
import torch
from torch import Tensor

from featup.errors import FeatupError, GeometryError
from featup.evaluation.pixel_probe import PixelProbeRecipe
from featup.upsamplers import ChannelMap, Interpolate, NormBilinear
from pipeline.config.evaluate import EvaluateConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.image_set import ImageSet
from pipeline.evaluation.label_maps import evaluate_labels
from pipeline.evaluation.methods import Method, UpsamplerMethod
from pipeline.evaluation.protocol_448 import Protocol448
from pipeline.options import Size
from pipeline.training.tasks import SegmentationTask

CLASSES, CHANNELS, GRID, SIZE = 3, 6, (2, 3), (16, 24)
TASK = SegmentationTask(CLASSES)
BILINEAR = UpsamplerMethod("bilinear", Interpolate("bilinear"))


def image_set(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (count, *GRID), generator=generator)
    features = torch.randn(count, *GRID, CHANNELS, generator=generator)
    features[..., :CLASSES] += 2 * torch.nn.functional.one_hot(classes, CLASSES)
    labels = classes.repeat_interleave(8, 1).repeat_interleave(8, 2).int()
    images = (labels[..., None] * 80).to(torch.uint8).expand(-1, -1, -1, 3).contiguous()
    return ImageSet(images, features, labels, tuple(f"{n % 2}_{n}" for n in range(count)), {"images": count})


TRAIN, VAL = image_set(6, 1), image_set(5, 2)


def config(**more: Any) -> EvaluateConfig:
    values: dict[str, Any] = {"train": ("t",), "val": ("v",), "classes": CLASSES, "out": "o", "size": Size(*SIZE)}
    values |= {"resamples": 10, "pictures": 1, "batch_size": 2, "retrained": False}
    return EvaluateConfig(**values | more)


class FailsOn(UpsamplerMethod):
    """Bilinear, but with an error, or without a result, for some images."""

    def __init__(self, name: str, errors: tuple[int, ...] = (), not_finite: tuple[int, ...] = ()) -> None:
        super().__init__(name, Interpolate("bilinear"))
        self.errors, self.not_finite = errors, not_finite

    def predict(self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]) -> Tensor:
        result = super().predict(images, features, projection, size).clone()
        for place, feature in enumerate(features):
            (number,) = [n for n in range(len(VAL)) if torch.equal(VAL.features[n], feature)]
            if number in self.errors:
                raise GeometryError(f"image {number} cannot be fitted")
            if number in self.not_finite:
                result[place, 0, 0, 0] = torch.nan
        return result


def drop_in(methods: list[Method], val: ImageSet) -> dict[str, dict[str, Any]]:
    part = evaluate_labels(config(), methods, "bilinear", TASK, TRAIN, val)
    return {name: numbers["drop-in"]["measures"] for name, numbers in part.methods.items()}


def test_an_image_that_one_method_fails_on_is_left_out_for_all() -> None:
    """The figures are those of a set without it; the others of its batch are kept."""
    methods: list[Method] = [BILINEAR, FailsOn("fit", errors=(1,)), FailsOn("prior", not_finite=(4,))]
    part = evaluate_labels(config(), methods, "bilinear", TASK, TRAIN, VAL)
    kept = [0, 2, 3]
    keys = tuple(VAL.keys[n] for n in kept)
    remaining = ImageSet(VAL.images[kept], VAL.features[kept], VAL.labels[kept], keys, {})
    expected = drop_in([BILINEAR], remaining)["bilinear"]
    assert expected != drop_in([BILINEAR], VAL)["bilinear"]
    for name, numbers in part.methods.items():
        assert numbers["drop-in"]["measures"] == pytest.approx(expected), name
    assert part.data["seg val"]["left out"] == [
        "1_1: fit: image 1 cannot be fitted", "0_4: prior: its result is not finite"
    ]  # fmt: skip
    assert part.pairs["drop-in"]["fit"]["bilinear"]["high"] == 0


def test_a_method_that_fails_everywhere_ends_the_evaluation() -> None:
    with pytest.raises(FeatupError, match=r"no image is left .* fit: image 0 cannot be fitted"):
        drop_in([BILINEAR, FailsOn("fit", errors=tuple(range(5)))], VAL)


def test_scores_are_probabilities_upsampled() -> None:
    """By hand, with the coarse cells' argmax where the map is that of nearest neighbours."""
    nearest = UpsamplerMethod("nearest", Interpolate("nearest"))
    norm = UpsamplerMethod("norm_bilinear", NormBilinear())
    part = evaluate_labels(config(), [nearest, BILINEAR, norm], "bilinear", TASK, TRAIN, VAL)
    assert part.methods["nearest"]["scores"]["measures"] == part.methods["nearest"]["drop-in"]["measures"]
    assert "scores" in part.methods["bilinear"]
    assert "scores" not in part.methods["norm_bilinear"], "it is not linear over space"
    assert part.pairs["scores"].keys() == {"nearest", "bilinear"}


def test_scores_differ_from_features() -> None:
    weight = 3 * torch.randn(CLASSES, CHANNELS, generator=torch.Generator().manual_seed(0))
    probe = ChannelMap(weight, torch.zeros(CLASSES))
    scores = VAL.filter_scores(BILINEAR, slice(0, 5), probe)
    expected = Interpolate("bilinear")((VAL.features @ probe.weight.T).softmax(-1), VAL.images, SIZE)
    assert torch.allclose(scores, expected, atol=1e-6)
    assert (scores.argmax(-1) != VAL.upsample(BILINEAR, slice(0, 5), probe).argmax(-1)).any()


def test_the_protocol_trains_on_images_and_mirror_images() -> None:
    mirrored = ImageSet(
        TRAIN.images.flip(2), TRAIN.features.flip(2).contiguous(), TRAIN.labels.flip(2), TRAIN.keys, TRAIN.facts
    )
    protocol = Protocol448(TASK, TRAIN, mirrored, PixelProbeRecipe(epochs=8, learning_rate=0.1))
    counted: list[int] = []
    for name, method in {"bilinear": BILINEAR, "norm": UpsamplerMethod("norm", NormBilinear())}.items():
        moved = protocol.train(method, 0, lambda images, loss: counted.append(images))
        plain = protocol.train(method, 0, lambda images, loss: None, moved=False)
        assert torch.allclose(moved.weight, plain.weight, rtol=1e-4, atol=1e-5), name
    assert sum(counted) == 2 * protocol.upsamplings == 2 * 8 * len(TRAIN)
    part = evaluate_labels(config(seeds=2), [BILINEAR], "bilinear", TASK, TRAIN, VAL, protocol)
    numbers = part.methods["bilinear"]["448"]
    assert numbers["epochs"] == 8
    assert numbers["seconds_per_epoch"] > 0
    assert numbers["spread"].keys() == {"mIoU", "accuracy"}, "over the seeds"
    assert numbers["measures"]["accuracy"] > 60


def test_the_protocol_upsamples_first_where_a_method_may_not_be_differentiable() -> None:
    class Detached:
        """A method of another kind."""

        name, per_image = "detached", False

        def __init__(self) -> None:
            self.digests: dict[str, str] = {}

        def predict(
            self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]
        ) -> Tensor:
            assert projection is None, "the probe cannot be moved through it"
            return BILINEAR.predict(images, features, None, size).detach()

    protocol = Protocol448(TASK, TRAIN, TRAIN, PixelProbeRecipe(epochs=2))
    found = protocol.train(Detached(), 0, lambda images, loss: None)
    assert torch.allclose(found.weight, protocol.train(BILINEAR, 0, lambda images, loss: None).weight, atol=1e-5)


def test_clusters_are_checked_before_anything_is_computed() -> None:
    with pytest.raises(ConfigError, match="finds no cluster in 5 of 5 keys"):
        evaluate_labels(config(cluster_by="(sequence)"), [], "bilinear", TASK, TRAIN, VAL)


def test_sequences_widen_the_intervals() -> None:
    """Resampled as a whole, two sequences of frames have three outcomes."""
    nearest = UpsamplerMethod("nearest", Interpolate("nearest"))
    part = evaluate_labels(config(cluster_by="^(.)_"), [BILINEAR, nearest], "bilinear", TASK, TRAIN, VAL)
    apart = evaluate_labels(config(), [BILINEAR, nearest], "bilinear", TASK, TRAIN, VAL)
    assert part.pairs["drop-in"]["nearest"]["bilinear"] != apart.pairs["drop-in"]["nearest"]["bilinear"]
