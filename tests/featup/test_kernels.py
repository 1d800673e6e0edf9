"""Every backend of every operator against the formula in float64, on memory poisoned with NaN."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import BackendError, GeometryError
from featup.kernels import Backend
from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import Interpolation, Taps, interpolation_taps, resample
from featup.kernels.window_correlation import window_correlation

TOLERANCE = 1e-5
BACKENDS: list[Backend] = ["naive", "torch", "cpu"]
KINDS: list[Interpolation] = ["nearest", "bilinear", "bicubic"]

SIZES = [(1, 1), (1, 9), (5, 3), (7, 11), (17, 4)]
SQUARE_WINDOWS = [(1, 1), (3, 3), (5, 5), (7, 7), (9, 9)]
OTHER_WINDOWS = [(3, 7), (9, 1), (1, 8), (2, 15)]
CHANNELS = [1, 3, 64, 67]


def named(*names: str) -> Callable[[Any], str]:
    """Readable ids: pairs as 3x7, the rest with the given name in front."""
    return lambda value: f"{names[0]}{'x'.join(map(str, value)) if isinstance(value, tuple) else value}"


size_ids, window_ids, stride_ids, channel_ids = (named(n) for n in ("map", "window", "stride", "channels"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that ``torch.empty`` hands out holds NaN, so that whatever is left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inside_nan(tensor: Tensor) -> Tensor:
    """The same values as a non-contiguous view whose surroundings, on every axis, are NaN."""
    host = torch.full([side + 3 for side in tensor.shape], torch.nan, dtype=tensor.dtype)
    view = host[tuple(slice(1, 1 + side) for side in tensor.shape)]
    return view.copy_(tensor)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    # NaN stays NaN, and NaN is not below any tolerance.
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def source_for(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], channels: int) -> Tensor:
    height, width = ((n - 1) * s + k for n, s, k in zip(size, stride, window, strict=True))
    return random(2, height, width, channels)


def read_by(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Which source positions the windows cover: ``[Hs, Ws]``."""
    axes = []
    for n, k, s in zip(size, window, stride, strict=True):
        axis = torch.zeros((n - 1) * s + k, dtype=torch.bool)
        for start in range(0, n * s, s):
            axis[start : start + k] = True
        axes.append(axis)
    return axes[0][:, None] & axes[1]


def check_adaptive_conv(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], channels: int, backend: Backend
) -> None:
    source = source_for(size, window, stride, channels)
    filters = random(2, *size, *window, seed=1)
    expected = adaptive_conv(source.double(), filters.double(), stride, "naive")
    unread = ~read_by(size, window, stride)
    poisoned = source.masked_fill(unread[None, :, :, None], torch.nan)
    found = adaptive_conv(inside_nan(poisoned), inside_nan(filters), stride, backend)
    assert relative_error(found, expected) <= TOLERANCE, "output"
    out = torch.full_like(found, torch.nan)
    assert adaptive_conv(poisoned, filters, stride, backend, out) is out
    assert relative_error(out, expected) <= TOLERANCE, "out="


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS, ids=channel_ids)
@pytest.mark.parametrize("window", SQUARE_WINDOWS + OTHER_WINDOWS, ids=window_ids)
def test_adaptive_conv_windows(window: tuple[int, int], channels: int, backend: Backend) -> None:
    check_adaptive_conv((5, 3), window, (1, 1), channels, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 4)], ids=stride_ids)
@pytest.mark.parametrize("window", [(1, 1), (7, 7), (3, 2)], ids=window_ids)
@pytest.mark.parametrize("size", SIZES, ids=size_ids)
def test_adaptive_conv_sizes_and_strides(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], backend: Backend
) -> None:
    check_adaptive_conv(size, window, stride, 5, backend)


def test_adaptive_conv_is_the_formula() -> None:
    """One loop per index, so that naive itself is held to something."""
    source, filters = random(2, 8, 8, 2).double(), random(2, 3, 4, 4, 2, seed=1).double()
    expected = torch.zeros(2, 3, 4, 2, dtype=torch.float64)
    for b, y, x, i, j, c in product(range(2), range(3), range(4), range(4), range(2), range(2)):
        expected[b, y, x, c] += filters[b, y, x, i, j] * source[b, 2 * y + i, 2 * x + j, c]
    found = adaptive_conv(source, filters, (2, 2), "naive")
    assert relative_error(found, expected) <= TOLERANCE, "output"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [1, 3, 4, 32, 67], ids=named("depth"))
@pytest.mark.parametrize("window", SQUARE_WINDOWS + OTHER_WINDOWS, ids=window_ids)
def test_window_correlation_windows(window: tuple[int, int], depth: int, backend: Backend) -> None:
    check_window_correlation((5, 3), window, depth, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(7, 7), (1, 4)], ids=window_ids)
@pytest.mark.parametrize("size", SIZES, ids=size_ids)
def test_window_correlation_sizes(size: tuple[int, int], window: tuple[int, int], backend: Backend) -> None:
    check_window_correlation(size, window, 32, backend)


def check_window_correlation(size: tuple[int, int], window: tuple[int, int], depth: int, backend: Backend) -> None:
    query, key = random(2, *size, depth), source_for(size, window, (1, 1), depth)
    expected = window_correlation(query.double(), key.double(), "naive")
    found = window_correlation(inside_nan(query), inside_nan(key), backend)
    assert relative_error(found, expected) <= TOLERANCE, "output"


def test_window_correlation_is_the_formula() -> None:
    query, key = random(2, 3, 4, 2).double(), random(2, 5, 4, 2, seed=1).double()
    expected = torch.zeros(2, 3, 4, 3, 1, dtype=torch.float64)
    for b, y, x, i, d in product(range(2), range(3), range(4), range(3), range(2)):
        expected[b, y, x, i, 0] += query[b, y, x, d] * key[b, y + i, x, d]
    assert relative_error(window_correlation(query, key, "naive"), expected) <= TOLERANCE, "output"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS, ids=channel_ids)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [(5, 3), (10, 6), (11, 7), (3, 2)], ids=named("to"))
def test_resample(to: tuple[int, int], kind: Interpolation, channels: int, backend: Backend) -> None:
    source = random(2, 5, 3, channels)
    rows, cols = (interpolation_taps(kind, n, m, reflect=2) for n, m in zip((5, 3), to, strict=True))
    expected = resample(source.double(), rows, cols, "naive")
    found = resample(inside_nan(source), rows, cols, backend)
    assert relative_error(found, expected) <= TOLERANCE, "output"


@pytest.mark.parametrize("backend", BACKENDS)
def test_resample_by_any_taps(backend: Backend) -> None:
    """Tap counts that no interpolation has, and another one on each axis."""
    source = random(2, 6, 4, 3)
    rows = Taps(torch.tensor([[5, 0, 2], [1, 1, 1]]), random(2, 3), 6)
    cols = Taps(torch.arange(15).remainder(4).view(3, 5), random(3, 5), 4)
    expected = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    for y, s, x, t in product(range(2), range(3), range(3), range(5)):
        weight = rows.weight[y, s] * cols.weight[x, t]
        expected[:, y, x] += (weight * source[:, rows.index[y, s], cols.index[x, t]]).double()
    assert relative_error(resample(inside_nan(source), rows, cols, backend), expected) <= TOLERANCE, "output"


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    leaves = tuple(inside_nan(one.double()).requires_grad_() for one in inputs)
    return torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=stride_ids)
@pytest.mark.parametrize("window", [(3, 3), (1, 2)], ids=window_ids)
def test_gradients_of_adaptive_conv(window: tuple[int, int], stride: tuple[int, int]) -> None:
    source, filters = source_for((2, 3), window, stride, 2), random(2, 2, 3, *window)
    assert gradcheck(lambda s, f: adaptive_conv(s, f, stride, "torch"), source, filters)


def test_gradients_of_window_correlation() -> None:
    query, key = random(2, 2, 3, 2), source_for((2, 3), (3, 2), (1, 1), 2)
    assert gradcheck(lambda q, k: window_correlation(q, k, "torch"), query, key)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_resample(kind: Interpolation) -> None:
    rows, cols = interpolation_taps(kind, 2, 4, reflect=1), interpolation_taps(kind, 3, 5)
    assert gradcheck(lambda s: resample(s, rows, cols, "torch"), random(2, 2, 3, 2))


def test_gradients_of_torch_equal_those_of_naive_at_full_size() -> None:
    found: dict[str, list[Tensor]] = {}
    for backend in ("naive", "torch"):
        source = source_for((6, 5), (7, 7), (1, 1), 67).requires_grad_()
        keys = random(2, 12, 11, 32, seed=2).requires_grad_()
        filters = window_correlation(keys[:, 3:-3, 3:-3], keys, backend).flatten(-2).softmax(-1).view(2, 6, 5, 7, 7)
        torch.autograd.backward(adaptive_conv(source, filters, backend=backend).square().sum())
        assert source.grad is not None
        assert keys.grad is not None
        found[backend] = [source.grad, keys.grad]
    for name, ours, naive in zip(("source", "keys"), found["torch"], found["naive"], strict=True):
        assert relative_error(ours, naive) <= TOLERANCE, f"gradient of {name}"


Operator = Callable[[Tensor, Backend], Tensor]
OPERATORS: dict[str, Operator] = {
    "adaptive_conv": lambda t, backend: adaptive_conv(t, torch.ones(1, 2, 3, 3, 3, dtype=t.dtype), backend=backend),
    "window_correlation": lambda t, backend: window_correlation(t[:, 1:-1, 1:-1], t, backend),
    "resample": lambda t, backend: resample(
        t, interpolation_taps("bicubic", 4, 7), interpolation_taps("bicubic", 5, 9), backend
    ),
}
operators = pytest.mark.parametrize("name", OPERATORS)


@operators
def test_cpu_backend_refuses_what_it_cannot_do(name: str) -> None:
    with pytest.raises(BackendError, match=rf"{name}: the cpu backend takes float32 .* got torch\.float64 on cpu"):
        OPERATORS[name](random(1, 4, 5, 2).double(), "cpu")
    leaf = random(1, 4, 5, 2).requires_grad_()
    with pytest.raises(BackendError, match=rf"{name}: .* on cpu with gradient.*torch\.no_grad\(\)"):
        OPERATORS[name](leaf, "cpu")
    with torch.no_grad():
        assert OPERATORS[name](leaf, "cpu").isfinite().all()


@operators
def test_auto_serves_what_cpu_refuses(name: str) -> None:
    leaf = random(1, 4, 5, 2).requires_grad_()
    assert OPERATORS[name](leaf, "auto").requires_grad
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert OPERATORS[name](leaf.detach().to(dtype), "auto").dtype == dtype


@operators
def test_unknown_backend_is_refused(name: str) -> None:
    """Bug: any unknown name ran the torch backend, without a word."""
    unknown: Any = "cuda"
    with pytest.raises(BackendError, match=rf"{name}: no backend is called 'cuda'; there are auto, naive, torch, cpu"):
        OPERATORS[name](random(1, 4, 5, 2), unknown)
    assert get_args(Backend) == ("auto", *BACKENDS)


@pytest.mark.parametrize(
    ("source", "filters"),
    [
        ((1, 4, 5, 2), (1, 2, 4, 3, 3)),
        ((1, 5, 5, 2), (1, 2, 3, 3, 3)),
        ((2, 4, 5, 2), (1, 2, 3, 3, 3)),
        ((4, 5, 2), (1, 2, 3, 3, 3)),
        ((1, 4, 5), (1, 2, 3, 3, 3)),
        ((1, 4, 5, 2), (2, 3, 3, 3)),
    ],
    ids=["width", "height", "batch", "no-batch", "no-channels", "filters-without-batch"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_conv_refuses_shapes(source: tuple[int, ...], filters: tuple[int, ...], backend: Backend) -> None:
    with pytest.raises(GeometryError, match=r"adaptive_conv: .*need a source (of )?\["):
        adaptive_conv(random(*source), random(*filters), backend=backend)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(1, 2, 3, 3),
        torch.zeros(1, 1, 3, 2),
        torch.zeros(1, 2, 3, 2, dtype=torch.float16),
        torch.zeros(1, 2, 2, 3).transpose(2, 3),
    ],
    ids=["channels", "height", "dtype", "strides"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_conv_refuses_out(out: Tensor, backend: Backend) -> None:
    """Bug: the cpu backend wrote past the end of an ``out`` that was too small."""
    with pytest.raises(GeometryError, match=r"out must be contiguous \[1, 2, 3, 2\] torch.float32, got"):
        adaptive_conv(random(1, 4, 5, 2), random(1, 2, 3, 3, 3), backend=backend, out=out)


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((1, 4, 5, 2), (1, 3, 5, 2)),
        ((1, 4, 5, 2), (1, 4, 4, 2)),
        ((1, 4, 5, 2), (1, 6, 7, 3)),
        ((2, 4, 5, 2), (1, 6, 7, 2)),
        ((4, 5, 2), (1, 6, 7, 2)),
        ((1, 4, 5, 2), (6, 7, 2)),
    ],
    ids=["height", "width", "depth", "batch", "query-without-batch", "keys-without-batch"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_window_correlation_refuses_shapes(query: tuple[int, ...], key: tuple[int, ...], backend: Backend) -> None:
    with pytest.raises(GeometryError, match=r"window_correlation: .*(needs keys of|need a query) \["):
        window_correlation(random(*query), random(*key), backend)


@pytest.mark.parametrize("shape", [(1, 3, 5, 2), (1, 4, 6, 2), (4, 5, 2)], ids=["height", "width", "no-batch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resample_refuses_taps_of_another_size(shape: tuple[int, ...], backend: Backend) -> None:
    """Bug: the cpu backend read outside a map smaller than the one the taps were made for."""
    rows, cols = interpolation_taps("bilinear", 4, 8), interpolation_taps("bilinear", 5, 8)
    with pytest.raises(GeometryError, match=r"resample: these taps read a source of \[B, 4, 5, C\], got \("):
        resample(random(*shape), rows, cols, backend)


def test_empty_axes_are_refused() -> None:
    for size, out_size in ((0, 4), (4, 0)):
        with pytest.raises(GeometryError, match=rf"from {size} to {out_size} positions: both must be at least 1"):
            interpolation_taps("bilinear", size, out_size)


UP = [(4, 4), (4, 8), (7, 16), (5, 13), (1, 6), (2, 3), (6, 7), (2, 82), (14, 224)]
DOWN = [(8, 4), (16, 7), (13, 5), (6, 1), (3, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "out_size"), UP + DOWN, ids=str)
@pytest.mark.parametrize("reflect", [0, 3], ids=named("reflect"))
def test_taps_interpolate_as_torch_does_and_reflect_the_result(
    kind: Interpolation, size: int, out_size: int, reflect: int
) -> None:
    """In float64: in float32 torch's own nearest is off by one position for some ratios, 2 to 82 among them."""
    source = random(1, size, size + 1, 3).double()
    corners = {} if kind == "nearest" else {"align_corners": False}
    planes = functional.interpolate(source.movedim(-1, 1), (out_size, out_size + 2), mode=kind, **corners)
    # numpy's reflection goes back and forth on short axes, where torch's refuses.
    beyond = ((0, 0), (reflect, reflect), (reflect, reflect), (0, 0))
    expected = torch.from_numpy(np.pad(planes.movedim(1, -1).numpy(), beyond, mode="reflect"))
    rows = interpolation_taps(kind, size, out_size, reflect)
    cols = interpolation_taps(kind, size + 1, out_size + 2, reflect)
    assert len(rows) == out_size + 2 * reflect
    assert relative_error(resample(source, rows, cols, "torch"), expected) <= TOLERANCE, "output"
    if reflect and out_size > reflect:
        padded = functional.pad(planes, (reflect,) * 4, mode="reflect").movedim(1, -1)
        assert relative_error(resample(source, rows, cols, "torch"), padded) <= TOLERANCE, "padded by torch"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("out_size", [1, 2, 3, 4])
def test_tiny_axes_reflect_back_and_forth(kind: Interpolation, size: int, out_size: int) -> None:
    inner = interpolation_taps(kind, size, out_size)
    beyond = interpolation_taps(kind, size, out_size, reflect=3)
    at = np.pad(np.arange(out_size), 3, mode="reflect")
    assert torch.equal(beyond.index, inner.index[at]), "index"
    assert torch.equal(beyond.weight, inner.weight[at]), "weight"
    assert int(beyond.index.min()) >= 0
    assert int(beyond.index.max()) < size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_taps_give_slices_of_the_map(kind: Interpolation, backend: Backend) -> None:
    source = random(1, 5, 4, 3)
    rows, cols = interpolation_taps(kind, 5, 13, reflect=3), interpolation_taps(kind, 4, 9, reflect=3)
    whole = resample(source, rows, cols, backend)
    for part in (slice(0, 1), slice(2, 9), slice(18, 19), slice(None)):
        assert torch.equal(resample(source, rows[part], cols, backend), whole[:, part]), f"rows {part}"
        assert torch.equal(resample(source, rows, cols[part], backend), whole[:, :, part]), f"columns {part}"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_one(kind: Interpolation) -> None:
    for size, out_size in UP + DOWN:
        weight = interpolation_taps(kind, size, out_size, reflect=3).weight
        assert (weight.sum(1) - 1).abs().max() <= TOLERANCE, (size, out_size)


def test_taps_made_in_inference_mode_serve_training() -> None:
    """Bug: the cached taps of a job's inference could not be saved for the backward pass of a later training."""
    interpolation_taps.cache_clear()
    with torch.inference_mode():
        interpolation_taps("bicubic", 3, 7)
    taps = interpolation_taps("bicubic", 3, 7)
    leaf = random(1, 3, 3, 2).requires_grad_()
    torch.autograd.backward(resample(leaf, taps, taps).sum())
    assert leaf.grad is not None
    assert relative_error(leaf.grad.sum(), torch.tensor(2 * 49.0)) <= TOLERANCE
