"""Tars for tests, and the same tars as tarfile and webdataset read them."""

import gc
import io
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import webdataset as wds

from pipeline.inputs.read import Sample, read_samples
from pipeline.inputs.tar import BLOCK, ShardIndex, index_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_bytes(
    files: Iterable[tuple[str, bytes]],
    kind: int = tarfile.PAX_FORMAT,
    change: Callable[[tarfile.TarInfo], None] = lambda info: None,
) -> bytes:
    """A tar of ``(name, data)`` members; ``change`` may alter each header before it is written."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def members_of(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Key and members of every sample, as webdataset itself reads them."""
    with warnings.catch_warnings():
        # webdataset leaves the file for the garbage collector to close.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(wds.WebDataset(str(path), shardshuffle=False))
        gc.collect()
    return keys_and_members(samples)


def grouped_by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """The same by the two functions that do it within webdataset, which is faster."""
    with path.open("rb") as stream:
        files = wds.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        return keys_and_members(wds.tariterators.group_by_keys(files))


def keys_and_members(samples: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (sample["__key__"], {ext: data for ext, data in sample.items() if not ext.startswith("__")})
        for sample in samples
    ]


def iterate_tar(url: str) -> Iterator[tuple[str, Sample]]:
    """Key and members (bytes by extension) of every sample of a tar that can be read, in order."""
    index = index_tar(url)
    for position, entry in enumerate(index.samples):
        for sample in read_samples(index, position, position + 1):
            if isinstance(sample, dict):
                yield entry.key, sample


def layout(index: ShardIndex) -> list[tuple[str, list[str]]]:
    return [(sample.key, [member.ext for member in sample.members]) for sample in index.samples]


def index_bytes(folder: Path, data: bytes, name: str = "shard.tar") -> ShardIndex:
    (folder / name).write_bytes(data)
    return index_tar(str(folder / name))


def three(count: int = 4, size: int = 700) -> list[tuple[str, bytes]]:
    """Samples of three members of sizes around the block's, with bytes that tell them apart."""
    return [
        (f"{i:04d}.{ext}", bytes([i + 1]) * length)
        for i in range(count)
        for ext, length in (("jpg", size + i), ("seg.png", BLOCK), ("cls", 1))
    ]
