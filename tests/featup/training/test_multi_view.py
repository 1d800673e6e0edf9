"""The multi-view objective: what a projection changes, what the seed decides, and that it can be learned."""

import pytest
import torch
from torch import Tensor

from featup.backbones import Backbone, create_backbone
from featup.errors import GeometryError
from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.multiview.views import Jitter
from featup.projection import orthonormal_directions
from featup.training.losses import sample_positions, sampled_crf
from featup.training.multi_view import LogSigma, MultiViewObjective
from featup.training.objective import seeded
from featup.upsamplers import Interpolate, Upsampler, create_trainable
from featup.upsamplers.jbu import IMAGENET_MEAN, IMAGENET_STD, JBU

SIZE = (32, 48)
JITTER = Jitter(max_pad=5, zoom=(1.0, 1.5))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """test_vit: stride 16, 64 channels, random weights that the name decides."""
    return create_backbone("test_vit", stride=16, image_size=SIZE)


def photographs(count: int = 2) -> Tensor:
    """Smooth blobs, uint8 [B, H, W, 3]."""
    noise = torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(noise, SIZE, mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def make(
    backbone: Backbone, upsampler: Upsampler | None = None, attention: bool = True, **options: object
) -> MultiViewObjective:
    torch.manual_seed(7)
    down = (
        AttentionDownsampler(backbone.channels, backbone.stride, backbone.stride, dropout=0.0)
        if attention
        else BlurDownsampler(backbone.stride, backbone.stride)
    )
    upsampler = upsampler or JBU(backbone.channels, dropout=0.0, end_dropout=0.0)
    return MultiViewObjective(upsampler, down, **{"jitter": JITTER, "jitters": 2, **options})


def loss(objective: MultiViewObjective, backbone: Backbone, step: int = 1, images: Tensor | None = None) -> Tensor:
    return objective(backbone, photographs() if images is None else images, seed=5, step=step)["loss"]


@pytest.mark.parametrize(("count", "channels"), [(1, 5), (7, 30), (30, 31), (31, 31), (40, 31)])
def test_directions_are_orthonormal(count: int, channels: int) -> None:
    directions = orthonormal_directions(count, channels, seeded(1))
    assert directions.shape == (min(count, channels), channels)
    torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)), atol=1e-6, rtol=0)
    assert torch.equal(directions, orthonormal_directions(count, channels, seeded(1)))


def test_numbers_follow_from_the_key_alone() -> None:
    numbers_of = {key: torch.rand(4, generator=seeded(*key)) for key in [(0,), (1,), (1, 2), (2, 1), (1, 2, 3)]}
    for key, numbers in numbers_of.items():
        assert torch.equal(numbers, torch.rand(4, generator=seeded(*key)))
        assert not any(torch.equal(numbers, other) for name, other in numbers_of.items() if name != key)


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "blur"])
def test_an_orthonormal_basis_gives_the_loss_of_all_channels(backbone: Backbone, attention: bool) -> None:
    weights = {"crf": 0.3, "crf_positions": 50, "total_variation": 2.0, "magnitude": 0.1}
    whole = make(backbone, attention=attention, projections=None, **weights)
    turned = make(backbone, attention=attention, projections=backbone.channels, **weights)
    with torch.no_grad():
        expected = whole(backbone, photographs(), seed=5, step=1)
        found = turned(backbone, photographs(), seed=5, step=1)
    assert found.keys() == expected.keys() == {"loss", "reconstruction", "crf", "total_variation", "magnitude"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def test_a_few_random_channels_give_it_on_average(backbone: Backbone) -> None:
    """Of one and the same view; others would add their own spread."""
    still = {"jitter": Jitter(0, (1.0, 1.0), flip=False), "jitters": 1}
    with torch.no_grad():
        whole = loss(make(backbone, projections=None, **still), backbone).item()
        few = make(backbone, projections=9, **still)
        found = torch.tensor([loss(few, backbone, step).item() for step in range(1, 41)])
    error = (found.mean() - whole).abs() / (found.std() / len(found) ** 0.5)
    assert error < 3, f"{found.mean()} +- {found.std()} of 40 projections, all channels give {whole}"
    assert found.std() < 0.5 * whole


def test_what_is_compared(backbone: Backbone) -> None:
    """Against the definition, view by view, with all channels at high resolution and each image on its own."""
    from featup.multiview.views import warp

    objective = make(backbone, projections=None, attention=False)
    images = photographs()
    plain = backbone.normalise(images).permute(0, 2, 3, 1)
    errors = []
    with torch.no_grad():
        for place in range(2):
            one = slice(place, place + 1)
            features = objective.upsampler(backbone(images[one]), images[one], SIZE)
            for view in JITTER.sample(2, SIZE, seeded(5, 0, 1, place)):
                seen = objective.downsampler(warp(features, [view], 5), (2, 3))
                target = backbone.features(warp(plain[one], [view], 5).permute(0, 3, 1, 2))
                errors.append((seen - target).square().mean())
        found = loss(objective, backbone)
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "blur"])
@pytest.mark.parametrize("name", ["jbu", "resize_conv", "carafe", "sapa", "ifa", "anyup"])
def test_gradients_reach_every_weight(backbone: Backbone, name: str, attention: bool) -> None:
    """After a step, as some last layers start at zero and let nothing through."""
    torch.manual_seed(0)
    upsampler = create_trainable(name, backbone.channels, stages=4, width=16)  # type: ignore[arg-type]
    objective = make(backbone, upsampler, attention, projections=12, uncertainty=LogSigma(backbone.channels))
    optimiser = torch.optim.SGD(objective.parameters(), lr=1e-2)
    for step in (1, 2):
        optimiser.zero_grad()
        loss(objective, backbone, step).backward()
        optimiser.step()
    without = [name for name, one in objective.named_parameters() if one.grad is None or not one.grad.abs().sum()]
    # The attention's own bias shifts all logits of a window alike where the upsampler's rows sum to one.
    shifts = {"downsampler.attention.bias"} if name != "jbu" else set()
    # AnyUp's state dict has an output projection that the original does not use either.
    shifts |= {f"upsampler.cross_decode.cross_attn.attention.out_proj.{leaf}" for leaf in ("weight", "bias")}
    assert set(without) <= shifts, without
    assert not any(one.requires_grad or one.grad is not None for one in backbone.parameters())


def test_uncertainty_is_equation_2(backbone: Backbone) -> None:
    """On features of the views, all channels; the held-out loss leaves it out."""
    from featup.multiview.views import warp

    torch.manual_seed(0)
    log_sigma = LogSigma(backbone.channels)
    with torch.no_grad():
        log_sigma.linear.weight.mul_(20)
    objective = make(backbone, projections=None, attention=False, uncertainty=log_sigma)
    images = photographs()
    plain = backbone.normalise(images).permute(0, 2, 3, 1)
    terms = []
    with torch.no_grad():
        for place in range(2):
            one = slice(place, place + 1)
            features = objective.upsampler(backbone(images[one]), images[one], SIZE)
            for view in JITTER.sample(2, SIZE, seeded(5, 0, 1, place)):
                predicted = objective.downsampler(warp(features, [view], 5), (2, 3))
                target = backbone.features(warp(plain[one], [view], 5).permute(0, 3, 1, 2))
                normal = (target - target.mean(-1, keepdim=True)) / target.std(-1, unbiased=False, keepdim=True)
                sigma = (normal @ log_sigma.linear.weight.T + log_sigma.linear.bias + 0.1).exp()
                terms.append(((predicted - target).square() / (2 * sigma**2) + sigma.log()).mean())
        found = loss(objective, backbone)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-4, atol=0)
    plain_objective = make(backbone, projections=None, attention=False)
    assert objective.evaluate(backbone, [images], 5) == plain_objective.evaluate(backbone, [images], 5)


def test_initial_uncertainty_is_near_one() -> None:
    features = 50 * torch.randn(3, 4, 5, 64, generator=torch.Generator().manual_seed(0))
    log_sigma = LogSigma(64)(features)
    assert log_sigma.shape == (3, 4, 5, 1)
    assert log_sigma.exp().min() > 0
    assert 0.7 < log_sigma.exp().median() < 1.6
    certain = LogSigma(4)
    certain.linear.bias.data.fill_(-100.0)
    assert certain(features[..., :4]).exp().min().item() == pytest.approx(1e-4)


def test_the_crf_compares_colours_in_the_normalisation_of_imagenet(backbone: Backbone) -> None:
    """With the backbone's own, of deviation 0.5 say, squared distances of colours were 4.8 times too small."""
    images, terms = photographs(), []
    for mean, std in ((0.5, 0.5), (0.0, 1.0)):
        other = create_backbone("test_vit", stride=16, image_size=SIZE, mean=[mean] * 3, std=[std] * 3)
        objective = make(other, attention=False, projections=None, crf=1.0, crf_positions=200)
        features = objective.upsampler(other(images), images, SIZE).detach()
        rows, cols = sample_positions(SIZE, 200, seeded(5, 3, 1))
        colours = (images / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        with torch.no_grad():
            found = objective(other, images, seed=5, step=1)["crf"]
        torch.testing.assert_close(found, sampled_crf(features, colours, rows, cols), rtol=1e-4, atol=0)
        terms.append(found)
    assert terms[0] != terms[1], "the features of the two are the same"


def test_the_loss_follows_from_seed_and_step(backbone: Backbone) -> None:
    objective = make(backbone, projections=8)
    with torch.no_grad():
        first = loss(objective, backbone)
        torch.rand(3)
        assert torch.equal(loss(objective, backbone), first)
        assert not torch.equal(loss(objective, backbone, step=2), first)
        assert not torch.equal(objective(backbone, photographs(), seed=6, step=1)["loss"], first)


def test_shares_of_a_batch_are_the_batch(backbone: Backbone) -> None:
    """Also with the attention's dropout, and terms that are means over the batch."""
    objective = make(backbone, projections=8, crf=0.1, crf_positions=40, total_variation=0.1, magnitude=0.1)
    assert isinstance(objective.downsampler, AttentionDownsampler)
    objective.downsampler.dropout.p = 0.5
    images = photographs(4)
    with torch.no_grad():
        whole = objective(backbone, images, seed=5, step=3)
        shares = [objective(backbone, images[at : at + 2], seed=5, step=3, first=at) for at in (0, 2)]
        apart = objective(backbone, images[2:], seed=5, step=3)
    for name, value in whole.items():
        torch.testing.assert_close((shares[0][name] + shares[1][name]) / 2, value, rtol=1e-5, atol=0)
    assert not torch.allclose(apart["reconstruction"], shares[1]["reconstruction"], rtol=1e-3)


def test_cells_whose_logits_are_dropped_have_the_weights_of_the_taps_alone(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make(backbone, projections=8)
    down = objective.downsampler
    assert isinstance(down, AttentionDownsampler)
    down.dropout.p = 0.5
    down.perturb_taps(torch.Generator().manual_seed(2))
    assert float(down.scale.detach().std()) == pytest.approx(0.01, rel=0.3)
    assert float(down.bias.detach().std()) == pytest.approx(0.01, rel=0.3)
    kept: list[tuple[int, ...]] = []

    def none(rate: float, generator: torch.Generator, *shape: int) -> Tensor:
        kept.append(shape)
        return torch.zeros(shape)

    with torch.no_grad():
        monkeypatch.setattr(down, "sample_kept", none)
        dropped = loss(objective, backbone)
        monkeypatch.undo()
        assert kept == [(2, *backbone.grid(SIZE))] * 2, "one for each view of each image"
        assert not torch.allclose(dropped, loss(objective, backbone), rtol=1e-6)
        down.attention.weight.zero_()
        down.attention.bias.zero_()
        torch.testing.assert_close(dropped, loss(objective, backbone), rtol=1e-6, atol=0)


def test_dropout_is_for_training_only(backbone: Backbone) -> None:
    objective = make(backbone, JBU(backbone.channels), projections=8)
    with torch.no_grad():
        torch.manual_seed(1)
        first = loss(objective, backbone)
        torch.manual_seed(2)
        assert not torch.equal(loss(objective, backbone), first)
        torch.manual_seed(1)
        assert torch.equal(loss(objective, backbone), first)
        without = make(backbone, JBU(backbone.channels, dropout=0.0, end_dropout=0.0), projections=8)
        without.load_state_dict(objective.state_dict())
        assert objective.evaluate(backbone, [photographs()], 5) == without.evaluate(backbone, [photographs()], 5)
    assert objective.training


@pytest.mark.parametrize(("dropout", "end"), [(-0.1, 0.2), (0.1, 1.0)])
def test_dropouts_that_cannot_be(dropout: float, end: float) -> None:
    with pytest.raises(GeometryError, match=rf"dropout={dropout} and end_dropout={end} must be at least 0 and below 1"):
        JBU(5, dropout=dropout, end_dropout=end)


def test_evaluation_does_not_depend_on_the_batches(backbone: Backbone) -> None:
    objective = make(backbone, projections=8)
    images = photographs(3)
    whole = objective.evaluate(backbone, [images], 5)
    assert tuple(whole) == pytest.approx(tuple(objective.evaluate(backbone, images.split(1), 5)), rel=1e-6)
    assert whole == objective.evaluate(backbone, [images], 5)
    assert whole != objective.evaluate(backbone, [images], 6)
    assert whole.explained_variance < 1
    assert whole.loss > 0


def test_exact_features_explain_everything(backbone: Backbone) -> None:
    """Views that are the image, nearest neighbours and their means: the way back is exact."""
    still = Jitter(0, (1.0, 1.0), flip=False)
    down = BlurDownsampler(backbone.stride, backbone.stride)
    objective = MultiViewObjective(Interpolate("nearest"), down, jitter=still, projections=None)
    found = objective.evaluate(backbone, [photographs()], 5)
    assert found.explained_variance == pytest.approx(1, abs=1e-6)
    assert found.loss < 1e-8
    assert loss(objective, backbone).item() < 1e-8


def test_training_explains_more(backbone: Backbone) -> None:
    objective = make(backbone, projections=16)
    optimiser = torch.optim.NAdam(objective.parameters(), lr=3e-3)
    before = objective.evaluate(backbone, [photographs()], 5)
    for step in range(1, 26):
        optimiser.zero_grad()
        loss(objective, backbone, step).backward()
        optimiser.step()
    after = objective.evaluate(backbone, [photographs()], 5)
    assert after.explained_variance > before.explained_variance + 0.1
    assert after.loss < before.loss


def test_counts_that_cannot_be(backbone: Backbone) -> None:
    for options in ({"jitters": 0}, {"projections": 0}):
        with pytest.raises(GeometryError, match=r"(jitters|projections)=0 must be at least 1"):
            make(backbone, **options)
    with pytest.raises(GeometryError, match="do not fit the stride"):
        loss(make(backbone), backbone, images=torch.zeros(1, 33, 48, 3, dtype=torch.uint8))
