"""Image files written as WebDataset shards, by the webdataset library."""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress

from pipeline.errors import ConfigError, SampleError
from pipeline.inputs import storage
from pipeline.inputs.images import ImageList
from pipeline.inputs.local import TEMPORARY, make_local_dirs
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import IndexedSample, ShardIndex

__all__ = ["pack"]

# A fixed time, so that the same images make the same bytes.
_MTIME = 0.0


def pack(
    images: ImageList, pattern: str, largest_bytes: int = 1 << 30, report: Callable[[str], None] = print
) -> tuple[list[str], int]:
    """Write images and their labels as tars, in their order; a tar appears when it is whole.

    The key of a sample ends at the first dot of a member's file name, so other dots in a key become underscores.

    Args:
        images: what is written.
        pattern: names of the tars, local, with one number such as ``out/train-%06d.tar``.
        largest_bytes: a tar is ended before its files exceed so many bytes.
        report: prints a line.

    Returns:
        The tars' paths, and how many samples could not be read (frames that are damaged, rows without an image): these
        are named, and left out.

    Raises:
        ConfigError: a pattern without a number, that is no local path, or whose first tar is there already.
        InputChangedError: a file changed since it was listed.
    """
    import webdataset  # what only reads a store imports this folder, and its install has no webdataset

    if not storage.is_local(pattern) or not re.fullmatch(r"[^%]*%\d*d[^%]*", pattern):
        raise ConfigError(f"{pattern!r} must be a local path with one number in it, such as out/train-%06d.tar")
    path = os.path.abspath(storage.local_path(pattern))
    if os.path.exists(path % 0):
        raise ConfigError(f"{path % 0} is there already; give another name, or remove the shards that are there")
    make_local_dirs(os.path.dirname(path))
    keys = _keys([sample.key for sample in images.samples], report)
    tars = []
    failed = 0
    for number, samples in enumerate(_shards(images.samples, largest_bytes)):
        index = ShardIndex(pattern, 0, "", tuple(samples), ())
        written = 0
        temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}{TEMPORARY}")
        try:
            with open(temporary, "xb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=_MTIME) as tar:
                for position, entry in enumerate(samples):
                    (members,) = read_samples(index, position, position + 1)
                    if isinstance(members, SampleError):
                        failed += 1
                        report(f"{entry.key} is left out: {members}")
                        continue
                    tar.write({"__key__": keys[entry.key], **members})
                    written += 1
            os.replace(temporary, path % number)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        tars.append(path % number)
        report(f"{path % number}: {written} samples, {os.path.getsize(path % number)} bytes")
    return tars, failed


def _shards(samples: list[IndexedSample], largest: int) -> Iterator[list[IndexedSample]]:
    shard: list[IndexedSample] = []
    size = 0
    for sample in samples:
        own = sum(member.size for member in sample.members)
        if shard and size + own > largest:
            yield shard
            shard, size = [], 0
        shard.append(sample)
        size += own
    yield shard


def _keys(keys: list[str], report: Callable[[str], None]) -> dict[str, str]:
    """For each key the one it has in a tar."""
    plain = {key for key in keys if "." not in key.rpartition("/")[2]}
    taken = set(plain)
    packed = {key: key for key in plain}
    for key in keys:
        if key in plain:
            continue
        folder, slash, base = key.rpartition("/")
        name = f"{folder}{slash}{base.replace('.', '_')}"
        while name in taken:
            name += "_"
        taken.add(name)
        packed[key] = name
    changed = [f"{key} is {name}" for key, name in packed.items() if key != name]
    if changed:
        report(f"{len(changed)} keys with dots are written without: {', '.join(sorted(changed)[:5])}")
    return packed
