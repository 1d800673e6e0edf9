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
from pipeline.inputs.images import list_images
from pipeline.inputs.places import place_of
from pipeline.inputs.plan import Plan, make_plan
from pipeline.inputs.read import Sample, read_samples
from pipeline.inputs.spread import spread_place
from pipeline.inputs.tar import Member, ShardIndex, describe_ignored
from pipeline.inputs.video import FrameLimits
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
    listed = list_images(
        config.images,
        (*options.image_exts, *sorted(_NOT_READ)),
        {},
        {},
        every=config.every,
        image_column=config.image_column,
    )
    images = [(position, sample.members[0], sample.key) for position, sample in enumerate(listed.samples)]
    chosen = [entry for entry in images if not _is_below(_file(entry[1]), config.out)]
    ignored = listed.ignored + Counter({"output of this job": len(images) - len(chosen)})
    remarks = (f"ignored: {describe_ignored(tuple(ignored.most_common()))}",) if ignored else ()
    if not chosen:
        raise InputError(f"not one image in {list(config.images)} that is no output of this job; look at --images")
    index = ShardIndex("", 0, "", tuple(listed.samples), ())
    limits = FrameLimits(options.max_pixels, options.decode_timeout)

    def read(position: int, image: Member) -> Sample:
        try:
            if place_of(image) is None and listed.samples[position].problem is None:
                check_bytes([(image.url, storage.stat(image.url).size)], options.max_bytes)
                return {options.image_exts[0]: storage.read_bytes(image.url)}
            (members,) = read_samples(index, position, position + 1, limits=limits)
        except (OSError, InputError, EnvironmentFault) as error:
            raise SampleError(Reason.IMAGE_MISSING, f"it cannot be read: {error}") from error
        if isinstance(members, SampleError):
            raise members
        (data,) = members.values()
        return {options.image_exts[0]: data}

    count = min(config.limit or len(chosen), len(chosen))
    chosen = [chosen[spread_place(number, count, len(chosen))] for number in range(count)]
    unique = _UniqueNames()
    each = (Photograph(unique(key), image.url, partial(read, position, image)) for position, image, key in chosen)
    return Photographs(len(chosen), each, remarks)


def _file(image: Member) -> str:
    """The file that an image is, or lies in."""
    place = place_of(image)
    return place.file if place else image.url


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
