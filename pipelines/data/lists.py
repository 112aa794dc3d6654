"""Reads list files: one image per line, optionally with its class, separated by a tab or as CSV.

    photos/1.jpg                  a path per line
    photos/1.jpg<TAB>cat          or `photos/1.jpg 3`, with a number after a space
    path,label                    CSV, with or without a line of column names; fields may be quoted
    photos/1.jpg,cat

Paths are relative to the folder of the list; `~/` is the home folder. Text is UTF-8, or UTF-16 with a byte-order mark.
The same readers give the classes that a table beside the images states (`metadata.csv`, `metadata.jsonl`,
`metadata.parquet`, `val_annotations.txt`).
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipelines.data.decode import printable
from pipelines.data.file_kinds import ARRAY, EXTENSIONS, begins_like_image, is_image, may_be_image
from pipelines.data.files import ImageFiles
from pipelines.data.formats.unsupported import describe
from pipelines.errors import DataError
from pipelines.reads import Timed, check_length, open_regular

PATH_COLUMNS = ("path", "file_name", "filename", "file", "filepath", "file_path", "image", "image_path", "img", "name")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "labels", "label_name")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "val_annotations.txt")
"""Files beside images that state their classes: of Hugging Face's imagefolder, and of tiny-imagenet-200."""

_PROBE_BYTES = 4096
_MAX_BYTES = 2**30  # ten million paths of a hundred letters
_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_EXPECTED = "expected text with one image path per line"


class _Row(NamedTuple):
    line: int
    image: str
    label: str | None


def read_list(path: str) -> ImageFiles:
    """The images of a list file and their classes. Keeps order and repetitions.

    Raises DataError with the line number for a line that names no image.
    """
    folder = os.path.dirname(os.path.abspath(path))
    paths: list[str] = []
    classes: list[str | None] = []
    for row in _rows(path):
        image = os.path.expanduser(row.image) if row.image.startswith("~/") else row.image
        image = os.path.join(folder, image)
        if "\0" in f"{image}{row.label}" or not (_named_like_image(image) or is_image(image)):
            raise DataError(
                f"line {row.line} of {printable(path)} is '{printable(row.image[:80])}'; expected the path of an image "
                f"({', '.join(EXTENSIONS)}), then nothing, or a tab and a class, or CSV with columns path and label"
            )
        paths.append(image)
        classes.append(row.label)
    if not paths:
        raise DataError(f"{printable(path)} names no images; expected one path per line")
    name = printable(os.path.basename(path))
    if all(label is None for label in classes):
        return ImageFiles(tuple(paths), None, f"{name} has no column of labels")
    return ImageFiles(tuple(paths), tuple(classes), f"labels in {name}")


def read_table(path: str) -> dict[str, str]:
    """The class of each image that a table of `TABLES` states, by its path in the table; empty if it states none.

    Raises DataError for a table that cannot be read.
    """
    if path.endswith(".jsonl"):
        return dict(_json_lines(path))
    if path.endswith(".parquet"):
        return _parquet(path)
    return {row.image: row.label for row in _rows(path) if row.label is not None}


def _rows(path: str) -> Iterator[_Row]:
    text = _text(path)
    first = next((line for line in text.split("\n") if line.strip()), "").rstrip("\r")
    for delimiter in (",", ";", "\t"):
        fields = next(csv.reader([first], delimiter=delimiter), [])
        if _named_columns(fields) is not None and (len(fields) > 1 or delimiter == ","):
            return _csv_rows(text, path, delimiter)
    fields = next(csv.reader([first]), [])
    if path.lower().endswith(".csv"):
        return _csv_rows(text, path, ";" if len(fields) == 1 and ";" in first else ",")
    is_csv = len(fields) > 1 and not _named_like_image(first.partition("\t")[0]) and _image_column(fields) is not None
    return _csv_rows(text, path, ",") if is_csv else _plain_rows(text)


def _named_like_image(path: str) -> bool:
    name = os.path.basename(path.strip())
    return may_be_image(name) is True or name.lower().endswith(ARRAY)


def _image_column(fields: Sequence[str]) -> int | None:
    return next((column for column, field in enumerate(fields) if _named_like_image(field)), None)


def _named_columns(fields: Sequence[str]) -> tuple[int, int | None] | None:
    """Columns of the path and of the label, if these fields are names of columns."""
    names = [name.strip().lower() for name in fields]
    path = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    return None if path is None else (path, label)


def _plain_rows(text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        image, _, label = line.rstrip("\r").partition("\t")
        if not image:
            continue
        before, space, last = image.rpartition(" ")
        if not label and space and last.isascii() and last.isdigit() and _named_like_image(before):
            image, label = before, last  # as the lists of Caffe
        yield _Row(number, image, label.split("\t")[0].strip() or None)


def _csv_rows(text: str, path: str, delimiter: str) -> Iterator[_Row]:
    columns: tuple[int, int | None] | None = None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for fields in reader:
            if not any(fields):
                continue
            if columns is None:
                columns = _named_columns(fields)
                if columns is not None:
                    continue
                columns = _unnamed_columns(fields, path)
            image, label = columns
            if image >= len(fields) or not fields[image].strip():
                raise DataError(f"line {reader.line_num} of {printable(path)} has no path; expected one in each line")
            stated = fields[label].strip() if label is not None and label < len(fields) else ""
            yield _Row(reader.line_num, fields[image].strip(), stated or None)
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {printable(path)} is no CSV ({error}); fix it") from error


def _unnamed_columns(fields: Sequence[str], path: str) -> tuple[int, int | None]:
    if len(fields) > 2:
        raise DataError(
            f"{printable(path)} has {len(fields)} columns without names; expected a first line that names them, with "
            f"path and label"
        )
    image = _image_column(fields) or 0
    return image, 1 - image if len(fields) == 2 else None


def _json_lines(path: str) -> Iterator[tuple[str, str]]:
    for line in _text(path).split("\n"):
        try:
            values = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            image = next((values[name] for name in PATH_COLUMNS if name in values), None)
            label = next((values[name] for name in LABEL_COLUMNS if name in values), None)
            if isinstance(image, str) and isinstance(label, str | int):
                yield image, str(label)


def _parquet(path: str) -> dict[str, str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{printable(os.path.basename(path))} is not read: pip install pyarrow") from None
    try:
        check_length(os.stat(path).st_size, _MAX_BYTES)
        names = parquet.read_schema(path).names
        columns = _named_columns(names)
        if columns is None or columns[1] is None:
            return {}
        image, label = (names[column] for column in columns)
        table = parquet.read_table(path, columns=[image, label])
    except (ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{printable(os.path.basename(path))} is not read ({printable(reason[:120])})") from error
    pairs = zip(table[image].to_pylist(), table[label].to_pylist(), strict=True)
    return {name: str(value) for name, value in pairs if isinstance(name, str) and isinstance(value, str | int)}


def _no_list(path: str, head: bytes) -> str:
    """That a file that begins so is no list, and what it is instead if that is known."""
    if begins_like_image(head):
        return f"{printable(path)} is a single image; expected a folder of images, or a list of their paths"
    kind = describe(head)
    return f"{printable(path)} is neither a folder nor a list{f': {kind}' if kind else ''}; {_EXPECTED}"


def _text(path: str) -> str:
    """The content of a list file. Raises DataError if it cannot be read or is no text."""
    try:
        with Timed(path):
            descriptor, status = open_regular(path)
        with open(descriptor, "rb") as file, Timed(path):
            head = file.read(_PROBE_BYTES)
            encoding = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), "utf-8")
            if encoding != "utf-16" and b"\0" in head:
                raise DataError(_no_list(path, head))
            check_length(status.st_size, _MAX_BYTES)
            file.seek(0)
            data = file.read(status.st_size)
    except OSError as error:
        raise DataError(f"cannot read {printable(path)} ({error.strerror or error}); {_EXPECTED}") from error
    try:
        return data.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape")
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(path)} begins like UTF-16 and is not ({error.reason}); {_EXPECTED}") from error
