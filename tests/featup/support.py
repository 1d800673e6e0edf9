"""Inputs and comparisons that the tests of the method share."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
CHANNELS = 5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def picture(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


def images(*size: int, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=generator)


def normalised(pictures: Tensor, mean: Any, std: Any) -> Tensor:
    """The input of a backbone, computed by numpy in float64."""
    values = (pictures.numpy() / 255.0 - np.array(mean)) / np.array(std)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32))


def relative_error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    # NaN stays NaN, and NaN is not below any tolerance.
    return float((result.double() - expected.double()).abs().max() / expected.double().abs().max())


def close(result: Tensor, expected: Tensor, name: str) -> None:
    error = relative_error(result, expected)
    assert error < 1e-4, f"{name} are off by {error:.1e} of their largest value"


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the elements of the largest tensor that torch's operators return inside it, except ``out``."""

    def __init__(self, out: Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0
        self.out = None if out is None else out.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.out:
                self.elements = max(self.elements, tensor.numel())
        return result


def run_python(code: str, **env: str) -> str:
    """Run code in a process of its own, where every warning is an error, and return its output."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout
