"""Fixtures every test may use."""

import os
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# How long an example takes says nothing: the first may compile a kernel, and the machine may have other work.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference values, labelled images and trained weights that may lie beside a checkout."""
    path = Path(os.environ.get("FEATUP_SHARED", ROOT.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(
            f"reference data not found at {path}; set FEATUP_SHARED to the folder that holds golden/, data/, weights/"
        )
    return path


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """One OpenMP thread: on small inputs more only spin, and two test processes would fight for the cores."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)
