"""File names from patterns: braces and globs, local and remote."""

import glob
import os
from collections.abc import Sequence

from pipeline.errors import InputError
from pipeline.inputs.remote import filesystem, is_local, join, local_path
from pipeline.inputs.retry import retried
from pipeline.redaction import redact

__all__ = ["expand"]


def expand(patterns: Sequence[str]) -> list[str]:
    """Names of the files that patterns stand for.

    Braces expand as webdataset writes them (``train-{0000..0099}.tar``), then globs (``*``, ``?``, ``[...]``,
    ``**``; in http URLs ``*`` only). The order is that of the patterns, sorted within a glob. A plain name is
    kept whether or not it exists, so that a shard that is missing is listed as such later.

    Raises:
        InputError: nothing to expand, braces that do not close, a glob that matches nothing, a folder where a
            file is wanted, the same file twice, or URLs that differ in their query alone.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise InputError("no input shards are named; give at least one path, URL or pattern")
    names = [name for pattern in patterns for piece in _braces(pattern) for name in _globs(piece, pattern)]
    seen: set[str] = set()
    repeated = []
    for name in names:
        identity = os.path.abspath(local_path(name)) if is_local(name) else name
        if identity in seen:
            repeated.append(name)
        seen.add(identity)
    if repeated:
        raise InputError(
            f"{len(repeated)} of {len(names)} input names come twice, first {', '.join(repeated[:3])}; "
            "probably two patterns overlap. Every shard may be read once: narrow the patterns"
        )
    by_stored_name: dict[str, str] = {}
    for name in names:
        if by_stored_name.setdefault(redact(name), name) != name:
            raise InputError(
                f"two of the inputs differ only in what follows the question mark of {redact(name)}, and that is left "
                "out of everything that is stored, as it may be a signature; give them different paths, or copy them"
            )
    return names


def _braces(pattern: str) -> list[str]:
    import braceexpand  # what reads a store imports this module, and its install has no braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise InputError(
            f"pattern {pattern!r} cannot be expanded: {error}; close every brace, or escape it by a backslash"
        ) from error


def _globs(name: str, pattern: str) -> list[str]:
    if is_local(name):
        path = local_path(name)
        if os.path.isdir(path):
            raise InputError(f"{name} is a folder, and a tar file is wanted; write {join(name, '*.tar')}")
        if not glob.has_magic(path) or os.path.lexists(path):
            return [name]
        matches = sorted(_with_scheme(name, path, file) for file in glob.glob(path, recursive=True))
    else:
        scheme, _, rest = name.partition("://")
        # A question mark begins the query of an http URL, and brackets may be part of its host or its query.
        magic = "*" if scheme in ("http", "https") else "*?["
        if not any(sign in rest for sign in magic):
            return [name]
        system, stripped = filesystem(name)
        files = retried(lambda: system.glob(stripped), name, "listing")
        matches = sorted(_with_scheme(name, stripped, path) for path in files)
    if not matches:
        part = "" if name == pattern else f" (part of {pattern!r})"
        raise InputError(
            f"pattern {name!r}{part} matches no file; check the path, whether the shards lie on this "
            "machine, and the quotes (a shell expands braces and globs that are not quoted)"
        )
    return matches


def _with_scheme(url: str, stripped: str, path: str) -> str:
    """A path as the file system lists it, as a URL of the form that ``url`` has."""
    if "://" in path:
        return path
    # Everything before the path stays as it was written: some file systems leave the host out of their paths.
    before = url.removesuffix(stripped) if url.endswith(stripped) else url.partition("://")[0] + "://"
    return before + path
