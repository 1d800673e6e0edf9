"""Images that lie in tables: parquet files as the Hugging Face hub has them, and data sets that were saved to disk.

An image is a cell of bytes, or a struct of ``bytes`` and ``path``. It stays where it is: a sample is a row of a file.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from pipeline.errors import EnvironmentFault, InputError, Reason
from pipeline.inputs import storage
from pipeline.inputs.column_types import is_bytes, is_text, is_whole
from pipeline.inputs.folder import FoundFile, look_up
from pipeline.inputs.found import FoundSample
from pipeline.inputs.lists import folder_of, label_member, split, whole_number
from pipeline.inputs.places import Place, file_mark
from pipeline.inputs.read import INLINE
from pipeline.inputs.table_rows import column_bytes, damage_of, open_arrow, row_batches
from pipeline.inputs.tar import Member

__all__ = ["Columns", "choose_columns", "is_saved_dataset", "list_parquet", "list_saved_dataset"]

# Columns that a label may have, of those the first that is there; of seg and depth they hold images, of cls numbers.
_SEG, _OTHER_SEG = "seg", ("annotation", "mask", "segmentation", "label")
_CLS = ("cls", "label")
_KEYS = ("key", "id")


@dataclass(frozen=True)
class Columns:
    """Columns of a table: of images, of labels by kind, of keys (None: rows are numbered)."""

    image: str
    labels: Mapping[str, str]
    key: str | None


def is_saved_dataset(place: str) -> bool:
    """Whether a local folder is a data set that the ``datasets`` library saved.

    Raises:
        InputError: it holds several, a split each.
    """
    if not storage.is_local(place):
        return False
    folder = storage.local_path(place)
    if os.path.isfile(root := os.path.join(folder, "dataset_dict.json")):
        with open(root, encoding="utf-8") as stream:
            splits = json.load(stream)["splits"]
        raise InputError(
            f"{place} is a data set of {len(splits)} splits, {', '.join(splits)}; give that of the splits that is "
            f"meant, such as --images {os.path.join(place, splits[0]) if splits else place}, or several"
        )
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_info.json"))


def list_saved_dataset(
    place: str, chosen: str | None, kinds: Collection[str], label_exts: Mapping[str, Sequence[str]]
) -> Iterator[FoundSample]:
    """The rows of a data set that ``Dataset.save_to_disk`` wrote, in order.

    Args:
        place: its folder.
        chosen: the column of images; None: see :func:`choose_columns`.
        kinds: of labels that are wanted.
        label_exts: the WebDataset extensions of each kind of label.

    Raises:
        InputError: it cannot be read, or its columns do not tell which holds the images or labels.
        EnvironmentFault: the ``datasets`` library is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"{place} is a Hugging Face data set, which the package 'datasets' reads; pip install 'featup-datasets[hf]'"
        ) from error
    try:
        dataset = datasets.load_from_disk(os.path.abspath(storage.local_path(place)), keep_in_memory=False)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{place} is a data set that cannot be read ({error}); save it again") from error
    columns = choose_columns(dataset.data.schema, place, chosen, kinds)
    if columns is None:
        raise InputError(
            f"{place} has columns {dataset.column_names} and none of images; give it one by "
            'dataset.cast_column("NAME", datasets.Image()), or name one of bytes by --image-column'
        )
    folder = storage.local_path(place)
    name = os.path.basename(os.path.abspath(folder))
    first = 0
    for entry in dataset.cache_files:
        file = look_up(entry["filename"], folder)
        table = open_arrow(file.url)
        rows = _Rows(file, columns, label_exts)
        for batch in table.select(_needed(columns)).to_batches():
            sizes = {one: batch.column(one).nbytes // max(1, batch.num_rows) for one in _images(columns)}
            yield from rows.samples(
                pa.table(batch), sizes, lambda row, at=first: (f"{at + row:06d}", f"{name}/{at + row:06d}")
            )
        first += table.num_rows


def list_parquet(
    file: FoundFile, table: pq.ParquetFile, columns: Columns, label_exts: Mapping[str, Sequence[str]]
) -> Iterator[FoundSample]:
    """The rows of a parquet file with images in it. Of the images only paths and gaps are read.

    Args:
        file: where it lies.
        table: the same, open.
        columns: of it, as :func:`choose_columns` finds them.
        label_exts: the WebDataset extensions of each kind of label.

    Raises:
        InputError: it cannot be read, or names a file that is not there.
    """
    stem = split(file.name)[0]
    rows = _Rows(file, columns, label_exts)
    for group in range(table.metadata.num_row_groups):
        facts = table.metadata.row_group(group)
        chunks = {facts.column(n).path_in_schema: facts.column(n) for n in range(facts.num_columns)}
        names, contents = [], []
        for name in _needed(columns):
            bytes_name, path_name = f"{name}.bytes", f"{name}.path"
            if name not in _images(columns):
                names.append(name)
                continue
            own = bytes_name if bytes_name in chunks else name
            statistics = chunks[own].statistics
            if statistics is None or not statistics.has_null_count or statistics.null_count:
                contents.append(own)
            if path_name in chunks:
                names.append(path_name)
        sizes = {one: column_bytes(table, group, [one]) // max(1, facts.num_rows) for one in _images(columns)}
        for block in _blocks(file.url, table, group, names, contents):
            yield from rows.samples(block, sizes, lambda row: (f"{stem}/{row:06d}", f"{file.name}/{row:06d}"))


def _blocks(
    url: str, file: pq.ParquetFile, group: int, names: Sequence[str], contents: Sequence[str]
) -> Iterator[pa.Table]:
    """A group of rows by parts; of ``contents``, the images, no more than up to damage: reading them will say of it."""
    count, done = file.metadata.row_group(group).num_rows, 0
    wanted = [*names, *contents]
    while wanted:
        at = 0
        try:
            for batch in row_batches(file, group, wanted):
                at += len(batch)
                if at > done:
                    new, done = batch.slice(max(0, len(batch) - (at - done))), at
                    yield pa.Table.from_batches([new])
            return
        except (pa.ArrowException, OSError) as error:
            damage = damage_of(error)
            if damage is None:
                raise
            if wanted == names:
                raise InputError(
                    f"{url}: {', '.join(names)} in group {group} of its rows cannot be read ({damage}); copy it again"
                ) from error
            wanted = [*names]
    yield pa.table({"": pa.nulls(count - done)})


def choose_columns(schema: pa.Schema, place: str, chosen: str | None, kinds: Collection[str]) -> Columns | None:
    """Which columns hold the images, the labels and the keys.

    Images are in the column that is chosen; else in ``image``; else in the only one of images whose name is none of a
    label's. Labels ``seg`` are images in a column ``seg``, else in the only one of ``annotation``, ``mask``,
    ``segmentation`` and ``label``; ``depth`` in ``depth``; ``cls`` are whole numbers in ``cls``, else in ``label``.
    Keys are texts or whole numbers in ``key``, else in ``id``.

    Args:
        schema: the table's, with the features of a Hugging Face data set where it is one.
        place: names it in texts.
        chosen: the name of the column of images, or None.
        kinds: of labels that are wanted.

    Returns:
        The columns; None where none holds images.

    Raises:
        InputError: the column that is chosen holds none, or several may be meant.
    """
    images = _image_columns(schema)
    if chosen is not None:
        if chosen not in images and not (chosen in schema.names and is_bytes(schema.field(chosen).type)):
            if chosen in schema.names and is_text(schema.field(chosen).type):
                return None  # a list of paths
            raise InputError(
                f"{place} has no images in a column {chosen!r} (--image-column); its columns are {schema.names}, of "
                f"images {images}"
            )
        image = chosen
    else:
        candidates = ["image"] if "image" in images else [n for n in images if n not in (_SEG, *_OTHER_SEG, "depth")]
        if len(candidates) > 1:
            raise InputError(
                f"{place} has several columns of images, {', '.join(candidates)}; name the one that is meant by "
                "--image-column"
            )
        if not candidates:
            return None
        (image,) = candidates
    labels: dict[str, str] = {}
    others = [name for name in images if name != image]
    if "seg" in kinds:
        named = [_SEG] if _SEG in others else [name for name in _OTHER_SEG if name in others]
        if len(named) > 1:
            raise InputError(f"{place} may have seg labels in {', '.join(named)}; call the column that is meant 'seg'")
        if named:
            labels["seg"] = named[0]
    if "depth" in kinds and "depth" in others:
        labels["depth"] = "depth"
    numbers = [name for name in schema.names if is_whole(schema.field(name).type)]
    if "cls" in kinds and (cls := next((name for name in _CLS if name in numbers), None)):
        labels["cls"] = cls
    texts = [name for name in schema.names if is_text(schema.field(name).type)]
    return Columns(image, labels, next((name for name in _KEYS if name in [*numbers, *texts]), None))


def _image_columns(schema: pa.Schema) -> list[str]:
    """Columns of images: of a Hugging Face data set those of its feature Image, else by their type."""
    about = (schema.metadata or {}).get(b"huggingface")
    if about is not None:
        features: dict[str, Any] = json.loads(about).get("info", {}).get("features") or {}
        return [
            name
            for name in schema.names
            if isinstance(features.get(name), dict) and features[name].get("_type") == "Image"
        ]
    return [
        field.name
        for field in schema
        if (pt.is_struct(field.type) and {"bytes", "path"} >= {part.name for part in field.type} >= {"bytes"})
        or (field.name == "image" and is_bytes(field.type))
    ]


def _images(columns: Columns) -> list[str]:
    return [columns.image, *(name for kind, name in columns.labels.items() if kind != "cls")]


def _needed(columns: Columns) -> list[str]:
    key = [columns.key] if columns.key else []
    return list(dict.fromkeys([*_images(columns), *columns.labels.values(), *key]))


class _Rows:
    """Samples of a file's rows, block by block."""

    def __init__(self, file: FoundFile, columns: Columns, label_exts: Mapping[str, Sequence[str]]) -> None:
        self.file, self.columns, self.label_exts = file, columns, label_exts
        self.sizes: Mapping[str, int] = {}
        self.mark = file_mark(file.size)
        self.next = 0

    def samples(self, block: pa.Table, sizes: Mapping[str, int], names: Any) -> Iterator[FoundSample]:
        """The rows that follow those of before, as a block.

        Args:
            block: their columns, without what of images need not be read.
            sizes: the mean bytes of a cell of each column of images: what its cells are taken to have.
            names: of a row, the keys of one that has none itself.
        """
        self.sizes = sizes
        contents = {name: _contents(block, name) for name in _images(self.columns)}
        key, cls = self.columns.key, self.columns.labels.get("cls")
        keys = block.column(key).to_pylist() if key else [None] * block.num_rows
        classes = block.column(cls).to_pylist() if cls else [None] * block.num_rows
        for offset in range(block.num_rows):
            row = self.next + offset
            image = self._member(self.columns.image, row, *contents[self.columns.image][offset], "")
            labels = []
            for kind, name in self.columns.labels.items():
                if kind != "cls":
                    labels.append(self._member(name, row, *contents[name][offset], kind))
            text = whole_number(classes[offset])
            # Hugging Face data sets write -1 where a class is not known.
            if text and text != "-1":
                labels.append(Member("cls", 0, len(text), 0, f"{INLINE}{text}"))
            problem = None
            if image is None:
                image = self._at(self.columns.image, row, "")
                problem = (Reason.IMAGE_MISSING, f"row {row} of {self.file.url} has no {self.columns.image}")
            own = whole_number(keys[offset])
            found = names(row)
            yield FoundSample((own, *found) if own else found, image, tuple(one for one in labels if one), problem)
        self.next += block.num_rows

    def _member(self, column: str, row: int, there: bool, path: str, kind: str) -> Member | None:
        """The image or label in a cell; that of a cell with a path alone is a file of its own."""
        ext = self.label_exts[kind][0] if kind else split(path)[1]
        if there:
            return self._at(column, row, ext)
        if not path:
            return None
        file = look_up(path, folder_of(self.file.url))
        return label_member(kind, file, self.label_exts) if kind else file.member(ext)

    def _at(self, column: str, row: int, ext: str) -> Member:
        url = str(Place(self.file.url, "row", row, column=column))
        return Member(ext, 0, self.sizes[column], self.mark, url, self.file.stamp)


def _contents(block: pa.Table, name: str) -> list[tuple[bool, str]]:
    """For each row whether its cell has bytes, and its path. What was not read of a cell is there."""
    there, paths = [True] * block.num_rows, [""] * block.num_rows
    if name not in block.column_names:
        return list(zip(there, paths, strict=True))
    column = block.column(name)
    if not pt.is_struct(column.type):
        return [(one, "") for one in column.is_valid().to_pylist()]
    fields = {part.name for part in column.type}
    if "bytes" in fields:
        there = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    if "path" in fields:
        paths = [path or "" for path in pc.struct_field(column, "path").to_pylist()]
    return list(zip(there, paths, strict=True))
