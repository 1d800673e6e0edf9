"""Names of the classes of a segmentation, and their colours in pictures."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featup import pictures
from pipeline.errors import ConfigError
from pipeline.inputs import storage

__all__ = ["class_names", "class_palette", "read_classes"]


_COLOUR = re.compile(r"(?P<name>.*?)\s*#(?P<colour>[0-9a-fA-F]{6})\s*")


def read_classes(url: str, classes: int) -> tuple[str, ...]:
    """The lines of a file that names classes, from class 0 on: a name each, or a name and a colour ``#rrggbb``.

    Raises:
        FileNotFoundError: there is no file.
        ConfigError: it is no text, or has another number of lines than there are classes.
    """
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"names={url!r} is no UTF-8 text ({error}); give a text file with a class in each line"
        ) from error
    lines = tuple(line.strip() for line in text.rstrip().splitlines())
    if len(lines) != classes:
        raise ConfigError(
            f"names={url!r} has {len(lines)} lines and there are {classes} classes; give one line for each class, from "
            "class 0 on"
        )
    return lines


def class_names(lines: Sequence[str], classes: int) -> list[str]:
    """The names in the lines of :func:`read_classes`; without lines, the class ids."""
    parts = (_COLOUR.fullmatch(line) for line in lines)
    names = [part["name"] if part else line for part, line in zip(parts, lines, strict=True)]
    return names or [str(number) for number in range(classes)]


def class_palette(classes: int, lines: Sequence[str] = ()) -> NDArray[np.uint8]:
    """A colour for each class, uint8 ``[classes, 3]``: that of its line, else one that follows from its id."""
    colours: NDArray[np.uint8] = pictures.class_palette(classes)
    for number, line in enumerate(lines):
        if part := _COLOUR.fullmatch(line):
            colours[number] = list(bytes.fromhex(part["colour"]))
    return colours
