"""The fenced blocks of README, in an order in which each finds what it reads."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "in_order", "read_blocks", "run"]

_OUT = re.compile(r"(--out\s+|\b)(out/[\w.-]+)")
# On its way out of a failed command the shell says which it was; its lines are README's.
_TRAP = "set -E; trap 'echo \"README.md:$LINENO: $BASH_COMMAND\" >&2' ERR"


@dataclass(frozen=True)
class Block:
    """A fenced block: ``line`` is that of its first line of text in README, from 1."""

    section: str
    language: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.language}, {self.section}"

    @property
    def makes(self) -> frozenset[str]:
        """Folders and files that commands in it write: ``out/NAME`` after ``--out``."""
        return frozenset(place for option, place in _OUT.findall(self._commands) if option.startswith("--out"))

    @property
    def reads(self) -> frozenset[str]:
        """Those that must be there before: any other ``out/NAME`` in it."""
        return frozenset(place for _, place in _OUT.findall(self._commands)) - self.makes

    @property
    def _commands(self) -> str:
        return re.sub(r"#.*", "", self.text)


def read_blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text, in its order."""
    blocks: list[Block] = []
    section, language, first = "", None, 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if language is None and line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("```") and language is None:
            language, first = line.removeprefix("```").strip(), number + 1
        elif line.startswith("```") and language is not None:
            blocks.append(Block(section, language, first, "\n".join(lines[first - 1 : number - 1])))
            language = None
    assert language is None, f"README.md:{first}: a block that does not end"
    return blocks


def in_order(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, each after those that make what it reads and after earlier ones of its section.

    So sections may stand in any order, and blocks of one section build on each other from top to bottom.
    """
    ordered: list[Block] = []
    waiting = list(blocks)
    while waiting:
        for block in waiting:
            before = [other for other in waiting if other.section == block.section and other.line < block.line]
            if not before and not any(block.reads & other.makes for other in waiting if other is not block):
                ordered.append(block)
                waiting.remove(block)
                break
        else:
            raise AssertionError(f"blocks that wait for each other: {', '.join(map(str, waiting))}")
    return ordered


def run(block: Block, folder: Path, environment: Mapping[str, str], seconds: float = 300) -> str:
    """Run a block of shell or Python in a folder, and return what it printed.

    A failure names README's line, the command, and the end of what was printed. The environment is all of it: a Ray
    of this test process has its token in its own.
    """
    # Empty lines before it, so that the lines in messages and tracebacks are README's.
    if block.language == "sh":
        script = _TRAP + "\n" * (block.line - 1) + block.text + "\n"
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
    else:
        path = folder / f"README_{block.line}.py"
        path.write_text("\n" * (block.line - 1) + block.text + "\n")
        command = [sys.executable, str(path)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, (
        f"README.md:{block.line} ({block.section}): exit status {done.returncode}\n{block.text}\n"
        f"--- printed, the last lines:\n{done.stdout[-4000:]}"
    )
    return done.stdout
