"""The manifests of a store held against its images as they are now: grown, moved, or changed."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from pipeline.errors import InputChangedError, InputError
from pipeline.inputs import storage
from pipeline.inputs.images import ImageList
from pipeline.inputs.manifest import is_manifest, manifest_bytes, manifest_name, manifest_samples
from pipeline.inputs.places import place_of
from pipeline.inputs.read import INLINE
from pipeline.inputs.tar import IndexedSample, Member
from pipeline.redaction import redact

__all__ = ["update_manifests"]

_SAMPLES_PER_MANIFEST = 4096


def update_manifests(folder: str, listed: ImageList, kept: Sequence[str] = ()) -> list[str]:
    """Write the manifests of images, and return their places.

    Images that are in a manifest stay there with their key, so that the rows of a store stay; new ones come in new
    manifests behind them. Nothing is written before everything was compared. A video of which no frame could be read
    stays the failed sample that it was; once they can be read, its frames are new images.

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
    readable = _videos(listed) if kept else set()
    taken: set[str] = set()
    ignored_then: Counter[str] = Counter()
    rewritten: dict[str, bytes] = {}
    for name in kept:
        place = storage.join(folder, name)
        old, ignored = _stored(place)
        ignored_then.update(ignored)
        own = {sample.members[0].url for sample in old}
        urls = [_place_of(sample, remaining, by_key, own) for sample in old]
        mended = {sample.members[0].url for sample in old if sample.problem} & readable
        gone = [url for url in urls if url not in remaining and url not in mended]
        if gone:
            _check_file(next(sample.members[0] for sample in old if sample.members[0].url == gone[0]), listed)
            raise InputChangedError(
                f"{len(gone)} images that the store was made from are gone, first {gone[0]}; put them back (a store "
                "keeps the images it was made from; new ones may be added), or start a new store with another --out"
            )
        now = [
            sample if url in mended else replace(_sized_as(sample, remaining.pop(url)), key=sample.key)
            for url, sample in zip(urls, old, strict=True)
        ]
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


def _videos(listed: ImageList) -> set[str]:
    """The videos of which frames are listed."""
    places = (place_of(sample.members[0], "frame") for sample in listed.samples)
    return {place.file for place in places if place is not None}


def _check_file(gone: Member, listed: ImageList) -> None:
    """Say why a frame or row is gone whose file is there: it is another file, or others of it are chosen now."""
    whole = place_of(gone)
    marks = {
        place.file: member.mark
        for sample in listed.samples
        for member in sample.members[:1]
        if (place := place_of(member))
    }
    if whole is None or whole.file not in marks:
        return
    if marks[whole.file] == gone.mark:
        raise InputChangedError(
            f"{gone.url} is in the store and not among what is chosen of the file now; give --every and --image-column "
            "as they were (a store keeps the images it was made from; a divisor of --every adds frames), or start a "
            "new store with another --out"
        )
    raise InputChangedError(
        f"{whole.file} is not what the store was made from: its size is another now. Put the old one back, or start a "
        "new store with another --out"
    )


def _place_of(
    sample: IndexedSample, remaining: Mapping[str, IndexedSample], by_key: Mapping[str, str], own: Set[str]
) -> str:
    """Where an image of the store is now: at its place, or as the image of its key, extension and size elsewhere.

    The places in ``own`` are those of its manifest: none of them is where it moved to.
    """
    image = sample.members[0]
    url = by_key.get(sample.key, image.url)
    if image.url in remaining or url in own or url not in remaining:
        return image.url
    other = remaining[url].members[0]
    # What moved is compared byte by byte before anything is added.
    same = (other.ext, other.mark) == (image.ext, image.mark) and (other.size == image.size or _is_cell(image))
    return url if same else image.url


def _is_cell(member: Member) -> bool:
    return place_of(member, "row") is not None


def _sized_as(before: IndexedSample, after: IndexedSample) -> IndexedSample:
    """With the sizes that cells were given: these are estimates, which an earlier program made in another way."""
    sizes = {member.ext: member.size for member in before.members if _is_cell(member)}
    members = (
        replace(one, size=sizes[one.ext]) if one.ext in sizes and _is_cell(one) else one for one in after.members
    )
    return replace(after, members=tuple(members))


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
        sizes = [(member.size, member.mark) if member else None for member in (old, new)]
        if old is None or new is None or sizes[0] != sizes[1] or (inline and old.url != new.url):
            then, today = (f"{member.size} bytes" if member else "absent" for member in (old, new))
            place = next(member.url for member in (new, old) if member is not None)
            if inline:
                place, then, today = after.members[0].url, str(old and old.url), str(new and new.url)
            elif old and new and (whole := place_of(new)):
                place, then, today = whole.file, "another size", f"a file of {storage.stat(whole.file).size} bytes"
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
