"""The only module that imports numba: it gives numba a writable folder for compiled kernels.

Use ``from featup.kernels.caching import numba`` in place of ``import numba``.
"""

import os
import tempfile
from pathlib import Path

import numba

__all__ = ["numba"]


def _ensure_cache_folder() -> None:
    """Set numba's cache to a temporary folder of this user, if its default folders are not writable.

    Numba uses ``NUMBA_CACHE_DIR``, else ``__pycache__`` beside the kernels, else a folder under the user's home. If
    none is writable (a read-only install in a container, a user without a home), it raises when a kernel is defined.
    """
    beside = Path(__file__).resolve().parent
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if numba.config.CACHE_DIR or _is_writable(beside) or _is_writable(home):
        return
    folder = Path(tempfile.gettempdir()) / f"featup-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        # Compiled code is loaded from this folder, so it must not belong to another user.
        folder = Path(tempfile.mkdtemp(prefix="featup-kernels-"))
    numba.config.CACHE_DIR = str(folder)


def _is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder, or in its nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


_ensure_cache_folder()
