"""Image files written as WebDataset shards, by the webdataset library."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain

from pipeline.errors import ConfigError, SampleError
from pipeline.inputs import storage
from pipeline.inputs.images import ImageList
from pipeline.inputs.local import make_local_dirs, temporary_beside
from pipeline.inputs.read import Sample, read_samples
from pipeline.inputs.tar import ShardIndex

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
    if not storage.is_local(pattern) or not re.fullmatch(r"[^%]*%\d*d[^%]*", pattern):
        raise ConfigError(f"{pattern!r} must be a local path with one number in it, such as out/train-%06d.tar")
    path = os.path.abspath(storage.local_path(pattern))
    if os.path.exists(path % 0):
        raise ConfigError(f"{path % 0} is there already; give another name, or remove the shards that are there")
    make_local_dirs(os.path.dirname(path))
    keys = _keys([sample.key for sample in images.samples], report)
    tars: list[str] = []
    written = 0
    samples = _readable(images, report)
    following = next(samples, None)
    while following is not None:
        tar = path % len(tars)
        count, following = _write_tar(tar, chain([following], samples), keys, largest_bytes)
        tars.append(tar)
        written += count
        report(f"{tar}: {count} samples, {os.path.getsize(tar)} bytes")
    return tars, len(images.samples) - written


def _readable(images: ImageList, report: Callable[[str], None]) -> Iterator[tuple[str, Sample]]:
    """The samples that can be read, each with its key, one at a time; the others are reported."""
    index = ShardIndex("", 0, "", tuple(images.samples), ())
    for position, entry in enumerate(images.samples):
        (members,) = read_samples(index, position, position + 1)
        if isinstance(members, SampleError):
            report(f"{entry.key} is left out: {members}")
        else:
            yield entry.key, members


def _write_tar(
    path: str, samples: Iterator[tuple[str, Sample]], keys: Mapping[str, str], largest: int
) -> tuple[int, tuple[str, Sample] | None]:
    """Write a tar. Returns how many samples it has, and the one that it has no room for (None: there are no more).

    What counts are the bytes written: a frame has many more than its share of the video.
    """
    import webdataset  # what only reads a store imports this folder, and its install has no webdataset

    count = size = 0
    following = None
    with temporary_beside(path) as temporary:
        with open(temporary, "xb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=_MTIME) as tar:
            for key, members in samples:
                size += sum(map(len, members.values()))
                if count and size > largest:
                    following = key, members
                    break
                tar.write({"__key__": keys[key], **members})
                count += 1
        os.replace(temporary, path)
    return count, following


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
