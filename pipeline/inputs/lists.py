"""Lists of images: text files with a path in each line, and tables with a column of paths."""

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.inputs import storage
from pipeline.inputs.column_types import is_bytes, is_text
from pipeline.inputs.folder import FoundFile, look_up
from pipeline.inputs.read import INLINE
from pipeline.inputs.table_rows import damage_of, row_batches
from pipeline.inputs.tar import Member

__all__ = ["LIST_ENDINGS", "folder_of", "label_ext", "label_member", "list_images_of", "split", "whole_number"]

LIST_ENDINGS = (".txt", ".csv", ".tsv", ".parquet")
_IMAGE_COLUMNS = ("image", "path", "file_name")


def list_images_of(
    place: str,
    label_exts: Mapping[str, Sequence[str]],
    image_column: str | None = None,
    table: pq.ParquetFile | None = None,
) -> Iterator[tuple[FoundFile, list[Member]]]:
    """The images that a list names, each with the labels that it gives it.

    Args:
        place: the list.
        label_exts: the extensions of each kind of label.
        image_column: of a table the column of paths; by default ``image``, ``path`` or ``file_name``.
        table: a list in parquet, open.

    Raises:
        InputError: the list cannot be read, has no such column, or names a file that is not there.
    """
    folder = folder_of(place)
    for row in _rows(place, label_exts, image_column, table):
        image = look_up(row["image"], folder)
        members = []
        for kind, text in row.items():
            if kind == "image" or not text:
                continue
            if kind == "cls" and text.lstrip("-").isdigit():
                members.append(Member("cls", 0, len(text), 0, f"{INLINE}{text}", ""))
                continue
            file = look_up(text, folder)
            members.append(label_member(kind, file, label_exts))
        yield image, members


def split(name: str) -> tuple[str, str]:
    """A path without its extension, and the extension in lower case; '' where there is none."""
    stem, dot, ext = name.rpartition(".")
    return (stem, ext.lower()) if dot and "/" not in ext else (name, "")


def folder_of(place: str) -> str:
    """The folder that a file lies in, by its path or URL."""
    return place.rpartition("/")[0] if "/" in place else "."


def _rows(
    place: str, kinds: Collection[str], image_column: str | None, table: pq.ParquetFile | None
) -> Iterator[dict[str, str]]:
    """The lines of a list: ``image`` and, where there are any, the kinds of labels."""
    if table is not None:
        yield from _table_rows(place, table, kinds, image_column)
        return
    try:
        text = _text(storage.read_bytes(place), place)
    except FileNotFoundError as error:
        raise InputError(f"there is no list of images at {place}; check the path") from error
    if place.lower().endswith(".txt"):
        for line in text.splitlines():
            if line.strip():
                yield {"image": line.strip()}
        return
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if place.lower().endswith(".tsv") else ",")
    columns = list(reader.fieldnames or ())
    yield from _named(place, reader, _path_column(place, columns, columns, image_column), columns, kinds)


def _table_rows(
    place: str, table: pq.ParquetFile, kinds: Collection[str], image_column: str | None
) -> Iterator[dict[str, str]]:
    """The rows of a parquet file; of its columns only those of paths and labels are read."""
    schema = table.schema_arrow
    texts = [name for name in schema.names if is_text(schema.field(name).type)]
    contents = [name for name in schema.names if is_bytes(schema.field(name).type)]
    name = _path_column(place, schema.names, texts, image_column, contents)
    wanted = {name, *(kind for kind in kinds if kind in schema.names)}

    def rows() -> Iterator[dict[str, Any]]:
        for group in range(table.metadata.num_row_groups):
            try:
                for batch in row_batches(table, group, wanted):
                    yield from batch.to_pylist()
            except (pa.ArrowException, OSError) as error:
                damage = damage_of(error)
                if damage is None:
                    raise
                raise InputError(
                    f"{place}: group {group} of its rows cannot be read ({damage}); copy it again"
                ) from error

    yield from _named(place, rows(), name, schema.names, kinds)


def _path_column(
    place: str, columns: Sequence[str], texts: Sequence[str], image_column: str | None, contents: Sequence[str] = ()
) -> str:
    """The column of paths, which is one of ``texts``; ``contents`` are columns that may hold images themselves."""
    names = (image_column,) if image_column else _IMAGE_COLUMNS
    name = next((one for one in names if one in texts), None)
    if name is None:
        others = f"; images themselves may be in {', '.join(contents)}: name that column" if contents else ""
        raise InputError(
            f"{place} has columns {columns}; name that of the paths {' or '.join(names)}, or give its name by "
            f"--image-column{others}"
        )
    return name


def _named(
    place: str, rows: Iterable[Mapping[str, Any]], name: str, columns: Sequence[str], kinds: Collection[str]
) -> Iterator[dict[str, str]]:
    """Rows with the path, which is in the column ``name``, as ``image``, and the labels as text."""
    labels = [kind for kind in kinds if kind in columns and kind != name]
    for number, row in enumerate(rows):
        if not row[name]:
            raise InputError(f"{place}: row {number} names no image; fill the column {name!r}, or leave the row out")
        yield {"image": str(row[name])} | {kind: whole_number(row[kind]) for kind in labels}


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is no UTF-8 text ({error}); save it as UTF-8") from error


def whole_number(value: object) -> str:
    """A label in a table as text: whole numbers without a point, as a column with gaps has them; '' for none."""
    if value is None or value != value:  # NaN
        return ""
    text = str(value)
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else "" if text.lower() == "nan" else text


def label_ext(name: str, extensions: Sequence[str]) -> str:
    """The WebDataset extension of a label file; empty where a kind has no such files."""
    ending = split(name)[1]
    return next((ext for ext in extensions if ext.rpartition(".")[2] == ending), "")


def label_member(kind: str, file: FoundFile, label_exts: Mapping[str, Sequence[str]]) -> Member:
    """A file as a label of a kind.

    Raises:
        InputError: it has not the extension of such labels.
    """
    ext = label_ext(file.name, label_exts[kind])
    if not ext:
        endings = " or ".join("." + one.rpartition(".")[2] for one in label_exts[kind])
        raise InputError(f"{file.url} is named as a label of kind {kind}, which ends in {endings}")
    return file.member(ext)
