"""The photographs of a prediction: files, those of folders, or samples of shards."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from pipeline.compute.load import read_members
from pipeline.config.predict import PredictConfig
from pipeline.decode.members import check_bytes
from pipeline.decode.options import DecodeOptions, LabelKind
from pipeline.errors import EnvironmentFault, InputError, Reason, SampleError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, make_plan
from pipeline.inputs.read import Sample
from pipeline.inputs.tar import describe_ignored
from pipeline.redaction import redact

__all__ = ["Photograph", "Photographs", "find_photographs"]


# Images of formats that are not read: they are listed as failed, and not ignored.
_NOT_READ = frozenset({"heic", "heif", "jxl"})


@dataclass(frozen=True)
class Photograph:
    """One photograph.

    Attributes:
        name: Of what is written for it, below a folder and without a suffix; no two photographs share one.
        place: Where it is, without credentials.
        read: Its image and labels as bytes by extension; raises SampleError where that cannot be.
    """

    name: str
    place: str
    read: Callable[[], Sample]


@dataclass(frozen=True)
class Photographs:
    """All photographs: how many, one after the other, and what was found beside them, in words."""

    count: int
    each: Iterator[Photograph]
    remarks: tuple[str, ...]


def find_photographs(config: PredictConfig, options: DecodeOptions, label: LabelKind) -> Photographs:
    """The photographs that the options name.

    Args:
        config: Names them.
        options: Of decoding: extensions and limits.
        label: The kind of labels that samples of shards may have.

    Raises:
        InputError: a file or folder that is not there, or not one image in all.
    """
    return _of_shards(config, replace(options, labels=(label,))) if config.shards else _of_files(config, options)


def _of_shards(config: PredictConfig, options: DecodeOptions) -> Photographs:
    index_dir = storage.join(config.out, "plan", "index")
    storage.make_dirs(index_dir)
    plan = Plan(make_plan(config.shards, index_dir, config.limit), 1, index_dir)
    remarks = [f"input fault: {fault}" for fault in plan.faults]
    if plan.ignored:
        remarks.append(f"ignored by rule: {describe_ignored(plan.ignored)}")

    def read(shard: int, position: int) -> Sample:
        (members,) = read_members(plan.index(shard), position, position + 1, options)
        if isinstance(members, SampleError):
            raise members
        return members

    def each() -> Iterator[Photograph]:
        unique = _UniqueNames()
        for shard, position in map(plan.sample, range(plan.samples)):
            key = plan.index(shard).samples[position].key
            yield Photograph(unique(key), redact(f"{plan.shards[shard].url}: {key}"), partial(read, shard, position))

    return Photographs(plan.samples, each(), tuple(remarks))


def _of_files(config: PredictConfig, options: DecodeOptions) -> Photographs:
    files: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    extensions = _NOT_READ.union(options.image_exts)
    for path in config.images:
        names = _names_below(path)
        if names is None:
            files.setdefault(path, os.path.splitext(path.rstrip("/").rpartition("/")[2])[0])
            continue
        for name in names:
            place = storage.join(path, name)
            rule = _ignored_by(name, extensions, inside=_is_below(place, config.out))
            if rule:
                ignored[rule] += 1
            else:
                files.setdefault(place, os.path.splitext(name)[0])
    remarks = (f"ignored, no image: {describe_ignored(tuple(ignored.most_common()))}",) if ignored else ()
    if not files:
        raise InputError(f"not one image in {list(config.images)}" + "".join(f"; {remark}" for remark in remarks))

    def read(path: str) -> Sample:
        try:
            check_bytes([(redact(path), storage.stat(path).size)], options.max_bytes)
            return {options.image_exts[0]: storage.read_bytes(path)}
        except (OSError, EnvironmentFault) as error:
            raise SampleError(Reason.IMAGE_MISSING, f"it cannot be read: {error}") from error

    chosen = list(files.items())[: config.limit]
    unique = _UniqueNames()
    each = (Photograph(unique(name), redact(path), partial(read, path)) for path, name in chosen)
    return Photographs(len(chosen), each, remarks)


def _names_below(path: str) -> list[str] | None:
    """The files of a folder, relative to it; ``None`` for a file.

    Raises:
        InputError: there is neither.
    """
    is_folder = storage.is_local(path) and os.path.isdir(storage.local_path(path))
    # A remote folder is what has files below it.
    names = storage.list_files(path) if is_folder or not storage.is_local(path) else []
    if names or is_folder:
        return names
    if not storage.exists(path):
        raise InputError(f"{redact(path)}: there is no such image or folder; look at --images")
    return None


def _ignored_by(name: str, extensions: frozenset[str], inside: bool) -> str:
    """The rule by which a file of a folder is ignored; empty where it is an image."""
    parts = name.split("/")
    if inside:
        return "output of this job"
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return "hidden or system file"
    suffix = os.path.splitext(name)[1].lower()
    return "" if suffix[1:] in extensions else suffix or "no extension"


def _is_below(place: str, folder: str) -> bool:
    if not (storage.is_local(place) and storage.is_local(folder)):
        return place.startswith(folder.rstrip("/") + "/")
    root = os.path.abspath(storage.local_path(folder))
    return os.path.commonpath([os.path.abspath(storage.local_path(place)), root]) == root


class _UniqueNames:
    """Names of files that lie below their folder, each given once: a number is added to later ones."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, name: str) -> str:
        plain = "/".join(part for part in name.split("/") if part not in ("", ".", "..")) or "image"
        unique, number = plain, 1
        while unique in self._given:
            number += 1
            unique = f"{plain}_{number}"
        self._given.add(unique)
        return unique
