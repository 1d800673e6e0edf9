"""Operators over small windows, one folder each: ``naive.py`` is the formula, the other backends are fast.

Every operator has one signature and one dispatcher, which chooses the backend at the call: ``cpu`` (numba) for float32
on a CPU, ``torch`` (shifted slices, any device and type) for everything else. All backends are differentiable, ``cpu``
once. A backend that is chosen by name runs or raises; it is never replaced silently.
"""

from typing import Literal, get_args

import torch

from featup.errors import BackendError

__all__ = ["Backend", "choose_backend", "wants_gradient"]

Backend = Literal["auto", "naive", "torch", "cpu"]


def choose_backend(requested: Backend, operator: str, *tensors: torch.Tensor) -> Backend:
    """The backend that runs ``operator`` on these tensors.

    By name, ``"cpu"`` also takes float64; ``"auto"`` sends float64 to ``"torch"``.

    Raises:
        BackendError: there is no backend of that name, or it is ``"cpu"`` and the tensors are not on the CPU, or not
            all float32, or all float64.
    """
    if requested not in get_args(Backend):
        raise BackendError(f"{operator}: no backend is called {requested!r}; there are {', '.join(get_args(Backend))}")
    if requested not in ("auto", "cpu"):
        return requested
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    if requested == "auto":
        return "cpu" if on_cpu and dtypes == {torch.float32} else "torch"
    if not on_cpu or dtypes not in ({torch.float32}, {torch.float64}):
        types = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise BackendError(
            f"{operator}: the cpu backend takes CPU tensors, all float32 or all float64, got {types}; "
            "move or cast them, or ask for backend='auto'"
        )
    return "cpu"


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
