"""README's listings of files: what they name must be there."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.readme.blocks import Block

__all__ = ["absent_entries", "entries"]

# Words of a description that make an entry one of some stores only.
_CONDITIONAL = ("while a job runs", "of a depth probe", "with --geometry pad")
# Arrays for labels: the store has those that it was asked for.
_LABELS = {"seg", "depth", "cls"}
_FILE = re.compile(r"\b[\w-]+\.(?:py|md|yaml|txt)\b")


def entries(block: Block) -> Iterator[tuple[int, str, str]]:
    """(indentation, names, description) of every entry of a listing; lines that go on are part of the description."""
    found: list[tuple[int, str, str]] = []
    for line in block.text.splitlines():
        indentation = len(line) - len(line.lstrip())
        names, _, description = line.strip().partition("  ")
        if found and indentation > 8:
            at, before, text = found.pop()
            found.append((at, before, f"{text} {line.strip()}"))
        elif names:
            found.append((indentation, names, description.strip()))
    yield from found


def absent_entries(block: Block, folder: Path) -> list[str]:
    """What a listing names and the folder lacks, with README's words.

    An entry ``seg/NAME.png`` stands for any file of that kind, ``a.py b.py`` for both. Files named in a description
    lie in the entry's folder or below it.
    """
    absent = []
    parents: dict[int, Path] = {}
    for indentation, names, description in entries(block):
        parent = max(((at, path) for at, path in parents.items() if at < indentation), default=(0, folder))[1]
        parents = {at: path for at, path in parents.items() if at < indentation}
        if any(words in description for words in _CONDITIONAL):
            continue
        place = parent
        for name in names.replace(",", " ").split():
            place = parent / name
            if name.startswith("."):  # The second of ``NAME.png .npy``.
                continue
            if not (any(parent.glob(name.replace("NAME", "*"))) or name in _LABELS):
                absent.append(f"{place.relative_to(folder)} ({names}  {description})")
        if names.endswith("/"):
            parents[indentation] = place
        below = place if names.endswith("/") else parent
        absent += [
            f"{below.relative_to(folder)}/.../{name} ({names}  {description})"
            for name in _FILE.findall(description)
            if not any(below.rglob(name))
        ]
    return absent
