"""Image files as input: what a folder or a list holds becomes samples, in manifests that later runs go on with."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputChangedError, InputError
from pipeline.inputs import storage
from pipeline.inputs.folder import FoundFile, list_folder, look_up
from pipeline.inputs.manifest import is_manifest, manifest_bytes, manifest_name, manifest_samples
from pipeline.inputs.read import INLINE
from pipeline.inputs.tar import IndexedSample, Member
from pipeline.redaction import redact

__all__ = ["ImageList", "list_images", "update_manifests"]

_SAMPLES_PER_MANIFEST = 4096
_LIST_ENDINGS = (".txt", ".csv", ".tsv", ".parquet")
_IMAGE_COLUMNS = ("image", "path", "file_name")


@dataclass
class ImageList:
    """Images in order, with their labels, and how many files were ignored by which rule."""

    samples: list[IndexedSample] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def list_images(
    places: Sequence[str],
    image_exts: Sequence[str],
    label_exts: Mapping[str, Sequence[str]],
    label_dirs: Mapping[str, str],
) -> ImageList:
    """The samples of folders, lists and single files.

    A folder is searched with all folders below it. A list is a text file with a path or URL in each line, or a CSV
    (``.csv``, ``.tsv``) or parquet file with a column ``image`` (or ``path``, ``file_name``) and optional columns
    ``seg``, ``depth``, ``cls``; paths in it are relative to the list. The key of an image is its path below the folder
    (or the list's folder) without the extension; where that is another image's key already, with the extension.

    Args:
        places: folders, lists and image files; local paths or fsspec URLs.
        image_exts: extensions that images have, lower case.
        label_exts: the WebDataset extensions of each kind of label, such as ``("depth.png", "depth.npy")``.
        label_dirs: for a kind of label the folder that has a file of the image's own relative name, with another
            extension: ``.png`` for seg, ``.png`` or ``.npy`` for depth, ``.cls`` or ``.txt`` for cls.

    Raises:
        InputError: a place that is not there, a list without an image column, or no image at all.
    """
    listed = ImageList()
    keys: set[str] = set()
    seen: set[str] = set()
    labels = [_labels_below(kind, folder, label_exts) for kind, folder in label_dirs.items()]
    used: dict[str, str] = {}
    label_urls = {label.url for files in labels for label in files.values()}
    for place in places:
        for image, members in _images_of(place, image_exts, label_exts, listed.ignored):
            if image.url in seen:
                raise InputError(
                    f"{redact(image.url)} comes twice; every image may be read once: a list names it twice, or "
                    "two of the places overlap"
                )
            seen.add(image.url)
            if image.url in label_urls:
                continue
            stem, ext = _split(image.name)
            if ext not in image_exts:
                ext = image_exts[0]
            own = [Member(ext, 0, image.size, 0, image.url, image.stamp), *members]
            for files in labels:
                if (label := files.get(stem)) and label.ext not in {member.ext for member in members}:
                    if label.url in used:
                        raise InputError(
                            f"{label.url} would be the label of two images, {used[label.url]} and {image.url}, as both "
                            f"are called {stem} in their folder; label them by a list, or one folder at a time"
                        )
                    own.append(label)
                    used[label.url] = image.url
            key = next(name for name in (stem, image.name, redact(image.url)) if name not in keys)
            keys.add(key)
            listed.samples.append(IndexedSample(key, tuple(own)))
    orphans = sum(label.url not in used for files in labels for label in files.values())
    if orphans:
        listed.ignored["label without an image"] += orphans
    if not listed.samples:
        others = ", ".join(f"{count} {rule}" for rule, count in listed.ignored.items())
        raise InputError(
            f"not one image in {', '.join(places[:3])}{f' ({others})' if others else ''}; images end in "
            f"{', '.join(image_exts)} (--image-exts)"
        )
    return listed


def _images_of(
    place: str, image_exts: Sequence[str], label_exts: Mapping[str, Sequence[str]], ignored: Counter[str]
) -> Iterator[tuple[FoundFile, list[Member]]]:
    """The images of one place, each with the labels that a list gives it."""
    if place.lower().endswith(_LIST_ENDINGS):
        yield from _listed(place, label_exts)
        return
    # A file that is named is taken for an image whatever its own name: the content decides.
    is_file = storage.is_local(place) and os.path.isfile(storage.local_path(place))
    if is_file or place.rpartition(".")[2].lower() in image_exts:
        yield look_up(place, _folder_of(place)), []
        return
    dotted = [ext for extensions in label_exts.values() for ext in extensions if "." in ext and ext != "cls.txt"]
    for file in list_folder(place):
        ext = _split(file.name)[1]
        label = next((one for one in dotted if file.name.lower().endswith(f".{one}")), None)
        if label:
            ignored[f"label beside its image (.{label})"] += 1
        elif ext in image_exts:
            yield file, []
        else:
            ignored[f"no image (.{ext})" if ext else "no image (no extension)"] += 1


def _listed(place: str, label_exts: Mapping[str, Sequence[str]]) -> Iterator[tuple[FoundFile, list[Member]]]:
    folder = _folder_of(place)
    for row in _rows(place, label_exts):
        image = look_up(row["image"], folder)
        members = []
        for kind, text in row.items():
            if kind == "image" or not text:
                continue
            if kind == "cls" and text.lstrip("-").isdigit():
                members.append(Member("cls", 0, len(text), 0, f"{INLINE}{text}", ""))
                continue
            file = look_up(text, folder)
            members.append(_label_member(kind, file, label_exts))
        yield image, members


def _split(name: str) -> tuple[str, str]:
    """A path without its extension, and the extension in lower case; '' where there is none."""
    stem, dot, ext = name.rpartition(".")
    return (stem, ext.lower()) if dot and "/" not in ext else (name, "")


def _folder_of(place: str) -> str:
    return place.rpartition("/")[0] if "/" in place else "."


def _rows(place: str, kinds: Collection[str]) -> Iterator[dict[str, str]]:
    """The lines of a list: ``image`` and, where there are any, the kinds of labels."""
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError as error:
        raise InputError(f"there is no list of images at {place}; check the path") from error
    if place.lower().endswith(".txt"):
        for line in _text(data, place).splitlines():
            if line.strip():
                yield {"image": line.strip()}
        return
    rows: Iterator[Mapping[str, object]]
    if place.lower().endswith(".parquet"):
        try:
            table = pq.ParquetFile(pa.BufferReader(data)).read()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{place} is no parquet file that can be read: {error}") from error
        columns, rows = table.column_names, iter(table.to_pylist())
    else:
        reader = csv.DictReader(
            io.StringIO(_text(data, place)), delimiter="\t" if place.lower().endswith(".tsv") else ","
        )
        columns, rows = list(reader.fieldnames or ()), iter(reader)
    name = next((one for one in _IMAGE_COLUMNS if one in columns), None)
    if name is None:
        raise InputError(f"{place} has columns {columns}; name that of the paths {' or '.join(_IMAGE_COLUMNS)}")
    for number, row in enumerate(rows):
        if not row[name]:
            raise InputError(f"{place}: row {number} names no image; fill the column {name!r}, or leave the row out")
        yield {"image": str(row[name])} | {kind: _cell(row[kind]) for kind in kinds if kind in columns}


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is no UTF-8 text ({error}); save it as UTF-8") from error


def _cell(value: object) -> str:
    """A label in a table as text: whole numbers without a point, as a column with gaps has them; '' for none."""
    if value is None or value != value:  # NaN
        return ""
    text = str(value)
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else "" if text.lower() == "nan" else text


def _labels_below(kind: str, folder: str, label_exts: Mapping[str, Sequence[str]]) -> dict[str, Member]:
    """By relative name without the extension, the labels in a folder."""
    found: dict[str, Member] = {}
    for file in list_folder(folder):
        if _label_ext(file.name, label_exts[kind]):
            found.setdefault(_split(file.name)[0], _label_member(kind, file, label_exts))
    return found


def _label_ext(name: str, extensions: Sequence[str]) -> str:
    """The WebDataset extension of a label file; empty where a kind has no such files."""
    ending = _split(name)[1]
    return next((ext for ext in extensions if ext.rpartition(".")[2] == ending), "")


def _label_member(kind: str, file: FoundFile, label_exts: Mapping[str, Sequence[str]]) -> Member:
    ext = _label_ext(file.name, label_exts[kind])
    if not ext:
        endings = " or ".join("." + one.rpartition(".")[2] for one in label_exts[kind])
        raise InputError(f"{file.url} is named as a label of kind {kind}, which ends in {endings}")
    return Member(ext, 0, file.size, 0, file.url, file.stamp)


def update_manifests(folder: str, listed: ImageList, kept: Sequence[str] = ()) -> list[str]:
    """Write the manifests of images, and return their places.

    Images that are in a manifest stay there with their key, so that the rows of a store stay; new ones come in new
    manifests behind them. Nothing is written before everything was compared.

    Args:
        folder: where the manifests are kept.
        listed: the images as they are now.
        kept: names of the manifests that a store was made from, in its order; any others there are made anew.

    Raises:
        InputChangedError: an image that the store was made from is gone, or has another size or other labels.
        InputError: a manifest of the store is gone or damaged.
    """
    remaining = {sample.members[0].url: sample for sample in listed.samples}
    by_key = {sample.key: sample.members[0].url for sample in listed.samples}
    taken: set[str] = set()
    ignored_then: Counter[str] = Counter()
    rewritten: dict[str, bytes] = {}
    for name in kept:
        place = storage.join(folder, name)
        old, ignored = _stored(place)
        ignored_then.update(ignored)
        own = {sample.members[0].url for sample in old}
        moved = {key: url for key, url in by_key.items() if url not in own}
        urls = [_place_of(sample, remaining, moved) for sample in old]
        gone = [url for url in urls if url not in remaining]
        if gone:
            raise InputChangedError(
                f"{len(gone)} images that the store was made from are gone, first {gone[0]}; put them back (a store "
                "keeps the images it was made from; new ones may be added), or start a new store with another --out"
            )
        now = [replace(remaining.pop(url), key=sample.key) for url, sample in zip(urls, old, strict=True)]
        for before, after in zip(old, now, strict=True):
            _check_same(before, after)
        taken.update(sample.key for sample in now)
        if tuple(now) != old:
            rewritten[place] = manifest_bytes(now, ignored)
    new = [_renamed(sample, taken) for sample in remaining.values()]
    places = [storage.join(folder, name) for name in kept]
    ignored_since = listed.ignored - ignored_then
    for start in range(0, len(new), _SAMPLES_PER_MANIFEST):
        place = storage.join(folder, manifest_name(len(places)))
        samples = new[start : start + _SAMPLES_PER_MANIFEST]
        rewritten[place] = manifest_bytes(samples, {} if start else ignored_since)
        places.append(place)
    for name in storage.list_files(folder):
        if storage.join(folder, name) not in places and is_manifest(name):
            storage.remove(storage.join(folder, name))
    for place, data in rewritten.items():
        storage.write_atomic(place, data)
    return places


def _place_of(sample: IndexedSample, remaining: Mapping[str, IndexedSample], by_key: Mapping[str, str]) -> str:
    """Where an image of the store is now: at its place, or as the image of its key, extension and size elsewhere."""
    image = sample.members[0]
    url = by_key.get(sample.key, image.url)
    if image.url in remaining or url not in remaining:
        return image.url
    other = remaining[url].members[0]
    # What moved is compared byte by byte before anything is added.
    return url if (other.ext, other.size) == (image.ext, image.size) else image.url


def _stored(place: str) -> tuple[tuple[IndexedSample, ...], dict[str, int]]:
    try:
        return manifest_samples(storage.read_bytes(place), place)
    except FileNotFoundError as error:
        raise InputError(
            f"{place} is gone, which lists images that the store was made from; put it back from a copy, or start a "
            "new store with another --out"
        ) from error


def _check_same(before: IndexedSample, after: IndexedSample) -> None:
    was, now = ({member.ext: member for member in one.members} for one in (before, after))
    for ext in sorted(was.keys() | now.keys()):
        old, new = was.get(ext), now.get(ext)
        inline = any(member is not None and member.url.startswith(INLINE) for member in (old, new))
        if old is None or new is None or old.size != new.size or (inline and old.url != new.url):
            then, today = (f"{member.size} bytes" if member else "absent" for member in (old, new))
            place = next(member.url for member in (new, old) if member is not None)
            if inline:
                place, then, today = after.members[0].url, str(old and old.url), str(new and new.url)
            raise InputChangedError(
                f"{place} is not what the store was made from: {today} now, {then} then. Put the old one back, or "
                "start a new store with another --out"
            )


def _renamed(sample: IndexedSample, taken: set[str]) -> IndexedSample:
    """With a key that no earlier image has."""
    image = sample.members[0]
    key = next(name for name in (sample.key, f"{sample.key}.{image.ext}", redact(image.url)) if name not in taken)
    taken.add(key)
    return replace(sample, key=key)
