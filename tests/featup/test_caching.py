"""A user without a writable home: numba keeps compiled kernels where it can, and says nothing."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_DROP_CAPABILITY, _OVERRIDE = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
SCRIPT = """
import torch
from featup.kernels.resample import interpolation_taps, resample
taps = interpolation_taps("bilinear", 4, 8)
print(resample(torch.ones(1, 4, 4, 2), taps, taps).sum().item())
import numba
print(numba.config.CACHE_DIR)
"""


def keep_to_permissions() -> None:
    """Also root is then held to what a folder's mode allows."""
    ctypes.CDLL(None).prctl(_DROP_CAPABILITY, _OVERRIDE)


def test_kernels_run_for_a_user_who_can_write_neither_here_nor_at_home(tmp_path: Path) -> None:
    """numba #5566: "cannot cache function: no locator available", at import."""
    copy, home, work = tmp_path / "install", tmp_path / "home", tmp_path / "work"
    shutil.copytree(ROOT / "featup", copy / "featup", ignore=shutil.ignore_patterns("__pycache__"))
    home.mkdir()
    work.mkdir()
    for folder in (home, copy, *(path for path in copy.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=keep_to_permissions,
        env={"PYTHONPATH": str(copy), "HOME": str(home), "TMPDIR": str(work), "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["128.0", str(work / f"featup-kernels-{os.getuid()}")]
