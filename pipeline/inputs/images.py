"""Images as input: what a folder, a list, a table or a video holds becomes samples."""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow.parquet as pq

from pipeline.errors import InputError, Reason
from pipeline.inputs import storage
from pipeline.inputs.folder import FoundFile, list_folder, look_up
from pipeline.inputs.found import FoundSample
from pipeline.inputs.frames import FrameTable
from pipeline.inputs.lists import LIST_ENDINGS, folder_of, label_ext, label_member, list_images_of, split
from pipeline.inputs.places import file_mark
from pipeline.inputs.table_rows import open_parquet
from pipeline.inputs.tables import choose_columns, is_saved_dataset, list_parquet, list_saved_dataset
from pipeline.inputs.tar import IndexedSample, Member
from pipeline.inputs.video import FRAME_EXT, frame_table, frames_of, is_video
from pipeline.redaction import redact

__all__ = ["ImageList", "list_images"]


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
    *,
    every: int = 1,
    image_column: str | None = None,
    label_columns: Collection[str] | None = None,
    cache_dir: str | None = None,
) -> ImageList:
    """The samples of folders, lists, tables, data sets, videos and single files.

    A folder is searched with all folders below it; its images, videos and parquet files of images are all samples. A
    list is a text file with a path or URL in each line, or a CSV (``.csv``, ``.tsv``) or parquet file with a column
    ``image`` (or ``path``, ``file_name``) of paths and optional columns ``seg``, ``depth``, ``cls``; paths in it are
    relative to the list. A parquet file whose image column holds the images themselves, and the folder of a data set
    that the ``datasets`` library saved, have a sample in each row (:func:`pipeline.inputs.tables.choose_columns`).

    The key of an image is its path below the folder (or the list's folder) without the extension; of a frame, that of
    the video and the frame's number, ``clip/000123``; of a row its column ``key`` or ``id``, else the row's number,
    behind the name of a parquet file: ``000123``, ``train-00000-of-00002/000123``. Where that is another image's key
    already, the extension is in it.

    Args:
        places: folders, lists and image files; local paths or fsspec URLs.
        image_exts: extensions that images have, lower case.
        label_exts: the WebDataset extensions of each kind of label, such as ``("depth.png", "depth.npy")``.
        label_dirs: for a kind of label the folder that has a file of the image's own relative name, with another
            extension: ``.png`` for seg, ``.png`` or ``.npy`` for depth, ``.cls`` or ``.txt`` for cls.
        every: of the frames of a video the first is taken, and then each ``every``-th.
        image_column: of tables the column of images.
        label_columns: kinds of labels that are taken from tables of images; by default all of ``label_exts``.
        cache_dir: where is kept which frames a video has, so that it is looked through once.

    Raises:
        InputError: a place that is not there, a table without an image column, an option that does not fit the
            places, or no image at all.
        EnvironmentFault: what reads videos or data sets is not installed.
    """
    # Else a file's place would be taken as relative to its own folder.
    places = [os.path.abspath(storage.local_path(place)) if storage.is_local(place) else place for place in places]
    listed = ImageList()
    keys: set[str] = set()
    seen: set[str] = set()
    labels = [_labels_below(kind, folder, label_exts) for kind, folder in label_dirs.items()]
    used: dict[str, str] = {}
    label_urls = {label.url for files in labels for label in files.values()}
    kinds = label_exts.keys() if label_columns is None else set(label_columns) & label_exts.keys()
    search = _Search(image_exts, label_exts, kinds, every, image_column, cache_dir, listed.ignored)
    for place in places:
        for found in search.images_of(place):
            url = found.image.url
            if url in seen:
                raise InputError(
                    f"{redact(url)} comes twice; every image may be read once: a list names it twice, or "
                    "two of the places overlap"
                )
            seen.add(url)
            if url in label_urls:
                continue
            # What is called otherwise is an image all the same: the content decides.
            image = found.image if found.image.ext in image_exts else replace(found.image, ext=image_exts[0])
            own = [image, *found.labels]
            for files in labels:
                if (label := files.get(found.keys[0])) and label.ext not in {member.ext for member in found.labels}:
                    if label.url in used:
                        raise InputError(
                            f"{label.url} would be the label of two images, {used[label.url]} and {url}, as both "
                            f"are called {found.keys[0]} in their folder; label them by a list, or one folder at a time"
                        )
                    own.append(label)
                    used[label.url] = url
            key = next(name for name in (*found.keys, redact(url)) if name not in keys)
            keys.add(key)
            listed.samples.append(IndexedSample(key, tuple(own), found.problem))
    search.check_options(places)
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


@dataclass
class _Search:
    """How places are searched, and what was found: which options had a use."""

    image_exts: Sequence[str]
    label_exts: Mapping[str, Sequence[str]]
    kinds: Collection[str]
    every: int
    image_column: str | None
    cache_dir: str | None
    ignored: Counter[str]
    videos: int = 0
    tables: int = 0

    def images_of(self, place: str) -> Iterator[FoundSample]:
        """The images of one place, each with the labels that a list or table gives it."""
        if place.lower().endswith(LIST_ENDINGS):
            yield from self._listed(place)
            return
        # A file that is named is taken for an image whatever its own name, unless it is a video.
        is_file = storage.is_local(place) and os.path.isfile(storage.local_path(place))
        if is_video(place) and (is_file or not storage.is_local(place)):
            frames = self._video(look_up(place, folder_of(place)))
            if frames is None:
                raise InputError(f"{place} has sound and no pictures; give a video, or leave it out")
            yield from frames
            return
        if is_file or place.rpartition(".")[2].lower() in self.image_exts:
            yield _image(look_up(place, folder_of(place)))
            return
        if is_saved_dataset(place):
            self.tables += 1
            yield from list_saved_dataset(place, self.image_column, self.kinds, self.label_exts)
            return
        yield from self._folder(place)

    def _folder(self, place: str) -> Iterator[FoundSample]:
        dotted = [ext for exts in self.label_exts.values() for ext in exts if "." in ext and ext != "cls.txt"]
        for file in list_folder(place):
            ext = split(file.name)[1]
            label = next((one for one in dotted if file.name.lower().endswith(f".{one}")), None)
            if label:
                self.ignored[f"label beside its image (.{label})"] += 1
            elif ext in self.image_exts:
                yield _image(file)
            elif is_video(file.name):
                frames = self._video(file)
                if frames is None:
                    self.ignored[f"no pictures, sound alone (.{ext})"] += 1
                else:
                    yield from frames
            elif ext == "parquet" and (samples := self._rows(file, open_parquet(file.url))):
                self.tables += 1
                yield from samples
            else:
                self.ignored[f"no image (.{ext})" if ext else "no image (no extension)"] += 1

    def _listed(self, place: str) -> Iterator[FoundSample]:
        if not place.lower().endswith(".txt"):
            self.tables += 1
        # Its footer is read once, whichever kind of table it is.
        table = open_parquet(place) if place.lower().endswith(".parquet") else None
        if table is not None and (samples := self._rows(look_up(place, folder_of(place)), table)):
            yield from samples
            return
        for file, members in list_images_of(place, self.label_exts, self.image_column, table):
            if is_video(file.name):
                raise InputError(f"{place} names a video, {file.url}; lists name images: give videos by --images")
            yield replace(_image(file), labels=tuple(members))

    def _rows(self, file: FoundFile, table: pq.ParquetFile) -> Iterator[FoundSample] | None:
        """The rows of a parquet file; None where none of its columns holds images."""
        columns = choose_columns(table.schema_arrow, file.url, self.image_column, self.kinds)
        return list_parquet(file, table, columns, self.label_exts) if columns else None

    def _video(self, file: FoundFile) -> Iterator[FoundSample] | None:
        """The frames of a video; None where it has no pictures."""
        self.videos += 1
        table = frame_table(file, self.cache_dir)
        return _frames(file, table, self.every) if table.pictures else None

    def check_options(self, places: Sequence[str]) -> None:
        """Refuse options that nothing of what was found makes use of."""
        if self.every != 1 and not self.videos:
            raise InputError(
                f"every={self.every} takes frames of videos, and there is none in {', '.join(places[:3])}; leave it out"
            )
        if self.image_column is not None and not self.tables:
            raise InputError(
                f"image_column={self.image_column!r} is a column of a table, and there is none in "
                f"{', '.join(places[:3])}; leave it out"
            )


def _frames(file: FoundFile, table: FrameTable, every: int) -> Iterator[FoundSample]:
    """The frames of a video as samples; a video that has none that can be read is one that fails."""
    stem = split(file.name)[0]
    if table.problem:
        detail = f"{file.url} {table.problem}; copy or encode the video again"
        yield FoundSample((stem, file.name), file.member(FRAME_EXT), (), (Reason.UNDECODABLE, detail))
        return
    size, mark = file.size // (table.count + table.lost), file_mark(file.size)
    for place, error in frames_of(table, file.url, every):
        image = Member(FRAME_EXT, 0, size, mark, str(place), file.stamp)
        keys = (f"{stem}/{place.number:06d}", f"{file.name}/{place.number:06d}")
        yield FoundSample(keys, image, (), (error.reason, error.detail) if error else None)


def _image(file: FoundFile) -> FoundSample:
    stem, ext = split(file.name)
    return FoundSample((stem, file.name), file.member(ext))


def _labels_below(kind: str, folder: str, label_exts: Mapping[str, Sequence[str]]) -> dict[str, Member]:
    """By relative name without the extension, the labels in a folder."""
    found: dict[str, Member] = {}
    for file in list_folder(folder):
        if label_ext(file.name, label_exts[kind]):
            found.setdefault(split(file.name)[0], label_member(kind, file, label_exts))
    return found
