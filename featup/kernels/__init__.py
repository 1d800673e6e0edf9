"""Operators over small windows, one folder each: ``naive.py`` is the formula, the others are fast.

Every operator has one signature and one dispatcher, which picks a backend when it is called: ``cpu`` (numba) for
float32 on a CPU, ``torch`` (shifted slices, any device and type) for everything else. All are differentiable, ``cpu``
once. A backend asked for by name runs or raises; it is never replaced silently.
"""

from typing import Literal, get_args

import torch

from featup.errors import BackendError
from featup.kernels.caching import ensure_cache_folder

__all__ = ["Backend", "choose_backend", "wants_gradient"]

ensure_cache_folder()

Backend = Literal["auto", "naive", "torch", "cpu"]


def choose_backend(wanted: Backend, operator: str, *tensors: torch.Tensor) -> Backend:
    """The backend that runs ``operator`` on these tensors.

    Asked for by name, ``"cpu"`` takes float64 too, which ``"auto"`` never gives it.

    Raises:
        BackendError: there is no backend of that name, or it is ``"cpu"`` and the tensors are not on the CPU, or not
            all float32, or all float64.
    """
    if wanted not in get_args(Backend):
        raise BackendError(f"{operator}: no backend is called {wanted!r}; there are {', '.join(get_args(Backend))}")
    if wanted not in ("auto", "cpu"):
        return wanted
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    if wanted == "auto":
        return "cpu" if on_cpu and dtypes == {torch.float32} else "torch"
    if not on_cpu or dtypes not in ({torch.float32}, {torch.float64}):
        seen = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise BackendError(
            f"{operator}: the cpu backend takes CPU tensors, all float32 or all float64, got {seen}; "
            "move or cast them, or ask for backend='auto'"
        )
    return "cpu"


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd has to hear of an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
