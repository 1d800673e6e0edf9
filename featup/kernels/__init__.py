"""Operators over small windows, one folder each: ``naive.py`` is the formula, the others are fast.

Every operator has one signature and one dispatcher, which picks a backend when it is called:
``cpu`` (numba, float32, no gradient) for plain inference on a CPU, ``torch`` (shifted slices, any device,
differentiable) for everything else. A backend asked for by name runs or raises; it is never replaced silently.
"""

from typing import Literal, get_args

import torch

from featup.errors import BackendError

__all__ = ["Backend", "choose_backend"]

Backend = Literal["auto", "naive", "torch", "cpu"]


def choose_backend(wanted: Backend, operator: str, *tensors: torch.Tensor) -> Backend:
    """The backend that runs ``operator`` on these tensors.

    Raises:
        BackendError: there is no backend of that name, or it is ``"cpu"`` and the tensors are not float32 on the CPU
            without gradient.
    """
    if wanted not in get_args(Backend):
        raise BackendError(f"{operator}: no backend is called {wanted!r}; there are {', '.join(get_args(Backend))}")
    numba_fits = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors) and not (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )
    if wanted == "cpu" and not numba_fits:
        seen = ", ".join(f"{t.dtype} on {t.device}{' with gradient' if t.requires_grad else ''}" for t in tensors)
        raise BackendError(
            f"{operator}: the cpu backend takes float32 CPU tensors without gradient, got {seen}; "
            "move or cast them, wrap the call in torch.no_grad(), or ask for backend='auto'"
        )
    if wanted == "auto":
        return "cpu" if numba_fits else "torch"
    return wanted
