"""The choice of the backend, and what each backend refuses."""

from typing import Any, get_args

import pytest
import torch

from featup.errors import BackendError
from featup.kernels import Backend
from tests.featup.kernels.support import BACKENDS, BILINEAR, OPERATORS, arguments, bilinear, operators
from tests.featup.support import random


@bilinear
def test_cpu_refuses_second_derivatives(name: str) -> None:
    first, second = arguments(name, 1, (2, 3), (3, 3), (1, 1), 2)
    leaf = first.detach().requires_grad_()
    (grad,) = torch.autograd.grad(BILINEAR[name](leaf, second, (1, 1), "cpu").square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(grad.sum())


@operators
def test_cpu_backend_refuses_what_it_cannot_do(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        with pytest.raises(
            BackendError, match=rf"{name}: the cpu backend takes CPU tensors, all .* got {dtype} on cpu"
        ):
            OPERATORS[name](random(1, 4, 5, 2).to(dtype), "cpu")
    with pytest.raises(BackendError, match=rf"{name}: .* got torch.float32 on meta.*move or cast them"):
        OPERATORS[name](random(1, 4, 5, 2).to("meta"), "cpu")


@bilinear
def test_cpu_backend_refuses_mixed_types(name: str) -> None:
    first, second = arguments(name, 1, (2, 3), (3, 3), (1, 1), 2)
    with pytest.raises(BackendError, match=rf"{name}: .* all float32 or all float64, got torch.float32 on cpu, torch"):
        BILINEAR[name](first, second.double(), (1, 1), "cpu")


@operators
def test_auto_is_the_cpu_backend_with_and_without_gradient(name: str) -> None:
    leaf = random(1, 4, 5, 2).requires_grad_()
    with_gradient = OPERATORS[name](leaf, "auto")
    assert with_gradient.grad_fn is not None
    named_backend = OPERATORS[name](leaf, "cpu")
    assert type(with_gradient.grad_fn) is type(named_backend.grad_fn)
    assert torch.equal(with_gradient, named_backend)
    with torch.no_grad():
        without = OPERATORS[name](leaf, "auto")
    assert without.grad_fn is None
    assert torch.equal(without, with_gradient)


@operators
def test_auto_serves_what_cpu_refuses(name: str) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert OPERATORS[name](random(1, 4, 5, 2).to(dtype), "auto").dtype == dtype


@operators
def test_unknown_backend_is_refused(name: str) -> None:
    """Bug: any unknown name ran the torch backend, without a word."""
    unknown: Any = "cuda"
    with pytest.raises(BackendError, match=rf"{name}: no backend is called 'cuda'; there are auto, naive, torch, cpu"):
        OPERATORS[name](random(1, 4, 5, 2), unknown)
    assert get_args(Backend) == ("auto", *BACKENDS)
