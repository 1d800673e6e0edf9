"""The command ``featup``: the jobs as sub-commands."""

import ast
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

__all__ = ["COMMANDS", "main"]


# Each is the module of this name, with a ``main(argv)``; the first line of its docstring is its help.
COMMANDS = (
    "precompute",
    "pack",
    "status",
    "show",
    "verify",
    "train",
    "train_jbu",
    "train_probe",
    "predict",
    "evaluate",
    "demo",
)


def main(argv: list[str] | None = None) -> int:
    """Run the sub-command that is named. Exit status as it gives, 2 for one that there is not."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(version("featup-datasets"))
        return 0
    name = words[0].replace("-", "_")
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"featup: error: unknown command {words[0]!r}, {hint}", file=sys.stderr)
        return 2
    status: int = import_module(f".{name}", __package__).main(words[1:])
    return status


def _help() -> str:
    lines = [
        "usage: featup COMMAND [--option VALUE ...]",
        "",
        "High-resolution dense visual features for whole data sets: WebDataset shards in, a verified Zarr store out.",
        "",
        *(f"  {name:<12} {_first_line(name)}" for name in COMMANDS),
        "",
        "featup COMMAND --help lists the options of a command.",
    ]
    return "\n".join(lines)


def _first_line(name: str) -> str:
    """Of a command's docstring, without importing it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
