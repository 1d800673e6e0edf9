"""Where pictures go: the working folder or a file that is named, never into the store."""

import os
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.inputs import storage

__all__ = ["picture_place", "save_picture"]


def picture_place(store: str, out: str | None, *what: object, option: str = "--out", ending: str = ".png") -> str:
    """The file of a picture or video: ``out``, or ``STORE-WHAT.png`` in the working folder.

    Args:
        store: what is shown.
        out: the file that was named by ``option``; None where none was.
        what: words of its name where none was.
        option: names it in texts.
        ending: which its name must have.

    Raises:
        ConfigError: it is no such file, lies inside of the store, or its folder is not there.
    """
    folder = storage.local_path(store) if storage.is_local(store) else None
    if out is None:
        path = store.rstrip("/") if folder is None else os.path.abspath(folder)
        words = [os.path.basename(path), *map(str, what)]
        out = "-".join(re.sub(r"[^\w.+-]+", "_", word) for word in words) + ending
    if not out.lower().endswith(ending):
        raise ConfigError(f"{option} {out}: a {ending[1:].upper()} file is written; give a name that ends in {ending}")
    parent = os.path.dirname(os.path.realpath(out))
    if folder is not None:
        inside = os.path.realpath(folder)
        if os.path.commonpath([inside, parent]) == inside:
            raise ConfigError(
                f"{out} lies inside of the store {store}, where nothing else belongs; give another {option}"
            )
    if not os.path.isdir(parent):
        raise ConfigError(f"{option} {out}: there is no folder {parent}; make it, or give another {option}")
    return out


def save_picture(pixels: NDArray[np.uint8], place: str) -> None:
    """Write a picture uint8 ``[H, W, 3]`` as PNG."""
    Image.fromarray(pixels).save(place, "PNG")
