"""Reads a config from the command line and from YAML."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import jsonargparse
from jsonargparse.typing import register_type

from pipeline.config.base import Config
from pipeline.errors import ConfigError
from pipeline.options import Size

__all__ = ["parse_args"]


# Headings of the help, in their order.
_GROUPS = {
    "input": "input and output",
    "backbone": "backbone",
    "decoding": "decoding and labels",
    "upsampler": "upsampler",
    "training": "training",
    "probe": "probe",
    "evaluation": "evaluation",
    "store": "store",
    "run": "run: how the job runs, not what it makes",
}

register_type(Size, serializer=str, deserializer=Size.parse, fail_already_registered=False)


# What jsonargparse calls a value's type, and what a user calls it.
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "JSON, {...}"}


class _Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The default with each option; the description and its examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        if action.default in (None, [], {}, argparse.SUPPRESS) or "%(default)" in text:
            return text
        words = action.default if isinstance(action.default, list) else [action.default]
        shown = " ".join(str(word).lower() if isinstance(word, bool) else str(word) for word in words)
        return f"{text} (default: {shown})"


class _Parser(jsonargparse.ArgumentParser):
    """Ends the program with one line where an option is wrong; of an unknown one it names the nearest."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [action.dest for action in self._actions]
        hints = []
        for name in re.findall(r"--([\w-]+)|(?:[Kk]ey|[Oo]ption) ['\"]([\w.-]+)['\"]", message):
            unknown = name[0].replace("-", "_") or name[1]
            if unknown not in known:
                near = get_close_matches(unknown, known, 1, 0.5)
                hints.append(f"unknown option {unknown!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        self.fail("; ".join(dict.fromkeys(hints)) or _plain(message))

    def fail(self, text: str) -> NoReturn:
        """End the program: one line, exit status 2."""
        self.exit(2, f"{self.prog}: error: {text} (--help lists the options)\n")

    def _check_value_key(self, action: argparse.Action, value: Any, *args: Any, **kwargs: Any) -> Any:
        # A YAML file may name one word where several are possible; its letters would be taken for the words.
        if action.nargs == "*" and isinstance(value, str):
            value = [value]
        return super()._check_value_key(action, value, *args, **kwargs)


def _plain(message: str) -> str:
    """A message of jsonargparse as one line without names of Python types."""
    text = re.sub(r"Not of type \w+: ", "", " ".join(message.split()))
    if missing := re.fullmatch(r"the following arguments are required: (.*)", text):
        return "give " + ", ".join(f"--{name}" for name in missing[1].split(", "))
    name, value = (re.search(pattern, text) for pattern in (r'Parser key "([\w.]+)"', r"(?:Got|Given) value: (.*)"))
    literals = re.findall(r"Expected a typing\.Literal\[(.+?)\]", text)
    types = [_TYPES.get(kind, kind) for kind in re.findall(r"Expected a <class '(\w+)'>", text) if kind != "NoneType"]
    if not (name and value and (literals or types)):
        return re.sub(r'Parser key "([\w.]+)"', r"\1", text)
    words = ", ".join(literals).replace("'", "")
    expected = (
        " or ".join([*types, words]) if types and literals else f"one of {words}" if literals else " or ".join(types)
    )
    return f"{name[1]}={value[1]} must be {expected}"


def _metavar(one: Field[Any], hint: Any) -> dict[str, str]:
    """How the help calls the option's value; choices name themselves."""
    kinds = {kind for part in (hint, *get_args(hint)) for kind in (part, get_origin(part), *get_args(part))}
    if any(get_origin(kind) is Literal for kind in kinds) and not {int, float} & kinds:
        return {}
    names = {Size: "HEIGHTxWIDTH", dict: "JSON", bool: "", int: "N", float: "X"}
    name = next((name for kind, name in names.items() if kind in kinds), "PATH" if one.metadata["path"] else "TEXT")
    return {"metavar": name} if name else {}


def _several_words(hint: Any) -> dict[str, Any]:
    """Arguments for an option that takes several words, where its type is a tuple (or none)."""
    for one in (hint, *get_args(hint)):
        if get_origin(one) is tuple:
            of, *rest = get_args(one)
            return {"type": of, "nargs": "*" if rest == [Ellipsis] else 1 + len(rest)}
    return {}


def _add_option(group: Any, one: Field[Any], hint: Any) -> None:
    bounds = one.metadata["bounds"]
    text = one.metadata["help"] + (f"; {bounds}" if bounds else "")
    kwargs: dict[str, Any] = {"help": text.replace("%", "%%"), "type": hint}
    if one.default is not MISSING:
        kwargs["default"] = one.default
    elif one.default_factory is not MISSING:
        kwargs["default"] = one.default_factory()
    else:
        kwargs["required"] = True
    kwargs |= _several_words(hint) | _metavar(one, hint)
    if isinstance(kwargs.get("default"), tuple) and not isinstance(kwargs["default"], Size):
        kwargs["default"] = list(kwargs["default"])
    group.add_argument(f"--{one.name}", **kwargs)


def parse_args(
    config: type[Config],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    prog: str | None = None,
    extra: Callable[[jsonargparse.ArgumentParser], None] | None = None,
) -> tuple[Config, Any]:
    """Read a config from ``--config FILE.yaml`` and ``--option value``, the later of two winning.

    ``-`` and ``_`` are the same in an option's name on the command line. Options that are unknown, also those in the
    file, or have values that cannot be, end the program with one line and exit status 2.

    Args:
        config: The dataclass.
        description: Of the command, with examples.
        prog: The command, as a user types it.
        extra: Adds arguments that are not part of the config.

    Returns:
        The config, and the namespace with all values.
    """
    every = fields(config)  # type: ignore[arg-type]
    needed = [one.name for one in every if one.default is MISSING and one.default_factory is MISSING]
    usage = " ".join(["%(prog)s [--config FILE]", *(f"--{name} ..." for name in needed), "[--option VALUE ...]"])
    parser = _Parser(prog=prog, usage=usage, description=description, allow_abbrev=False, formatter_class=_Formatter)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    if extra is not None:
        extra(parser)
    hints = get_type_hints(config)
    for name, title in _GROUPS.items():
        members = [one for one in every if one.metadata["group"] == name]
        group = parser.add_argument_group(title) if members else None
        for one in members:
            _add_option(group, one, hints[one.name])
    for action in parser._actions:
        if any(name.endswith(".help") for name in action.option_strings):
            action.help = argparse.SUPPRESS  # jsonargparse's own, for the class of a size
    words = list(sys.argv[1:] if argv is None else argv)
    words = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]
    namespace = parser.parse_args(words)
    values = {one.name: namespace[one.name] for one in every}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return config(**values), namespace
    except ConfigError as error:
        parser.fail(str(error))
