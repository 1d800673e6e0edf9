"""Where numba keeps compiled kernels: some folder that can be written to, whoever runs the program."""

import os
import tempfile
from pathlib import Path

import numba

__all__ = ["ensure_cache_folder"]


def ensure_cache_folder() -> None:
    """Point numba to a folder of this user's among the temporary files where it would find none to write to.

    Numba takes ``NUMBA_CACHE_DIR``, else ``__pycache__`` beside the kernels, else a folder under the user's home. Where
    none of them can be written to (a container's read-only install, a user without a home) it raises at import.
    """
    beside = Path(__file__).resolve().parent
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if numba.config.CACHE_DIR or _is_writable(beside) or _is_writable(home):
        return
    folder = Path(tempfile.gettempdir()) / f"featup-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        # Compiled code is loaded from there: never from a folder that belongs to somebody else.
        folder = Path(tempfile.mkdtemp(prefix="featup-kernels-"))
    numba.config.CACHE_DIR = str(folder)


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
