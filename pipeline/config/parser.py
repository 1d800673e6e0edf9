"""Reads a config from the command line and from YAML."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import jsonargparse

from pipeline.config.base import Config, Size
from pipeline.errors import ConfigError

__all__ = ["parse_args"]


class _Parser(jsonargparse.ArgumentParser):
    """Names the nearest option when one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [action.dest for action in self._actions]
        hints = []
        for name in re.findall(r"--([\w-]+)|(?:[Kk]ey|[Oo]ption) ['\"]([\w.-]+)['\"]", message):
            unknown = name[0].replace("-", "_") or name[1]
            if unknown not in known:
                near = get_close_matches(unknown, known, 1, 0.5)
                hints.append(f"unknown option {unknown!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        super().error("; ".join([*hints, message.strip()]) if hints else message, ex)

    def _check_value_key(self, action: argparse.Action, value: Any, *args: Any, **kwargs: Any) -> Any:
        # A YAML file may name one word where several are possible; its letters would be taken for the words.
        if action.nargs == "*" and isinstance(value, str):
            value = [value]
        return super()._check_value_key(action, value, *args, **kwargs)


def _several_words(hint: Any) -> dict[str, Any]:
    """Arguments for an option that takes several words, where its type is a tuple (or none)."""
    for one in (hint, *get_args(hint)):
        if get_origin(one) is tuple:
            of, *rest = get_args(one)
            return {"type": of, "nargs": "*" if rest == [Ellipsis] else 1 + len(rest)}
    return {}


def parse_args(
    config: type[Config],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extra: Callable[[jsonargparse.ArgumentParser], None] | None = None,
) -> tuple[Config, Any]:
    """Read a config from ``--config FILE.yaml`` and ``--option value``, the later of two winning.

    ``-`` and ``_`` are the same in an option's name on the command line. Unknown options, also those in the file, end
    the program with the nearest known name.

    Args:
        config: The dataclass.
        extra: Adds arguments that are not part of the config.

    Returns:
        The config, and the namespace with all values.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    if extra is not None:
        extra(parser)
    hints = get_type_hints(config)
    for one in fields(config):  # type: ignore[arg-type]
        kwargs: dict[str, Any] = {"help": one.metadata["help"], "type": hints[one.name]}
        if one.default is not MISSING:
            kwargs["default"] = one.default
        elif one.default_factory is not MISSING:
            kwargs["default"] = one.default_factory()
        else:
            kwargs["required"] = True
        kwargs |= _several_words(hints[one.name])
        if isinstance(kwargs.get("default"), tuple) and not isinstance(kwargs["default"], Size):
            kwargs["default"] = list(kwargs["default"])
        parser.add_argument(f"--{one.name}", **kwargs)
    words = list(sys.argv[1:] if argv is None else argv)
    words = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]
    namespace = parser.parse_args(words)
    values = {one.name: namespace[one.name] for one in fields(config)}  # type: ignore[arg-type]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return config(**values), namespace
    except ConfigError as error:
        parser.error(str(error))
