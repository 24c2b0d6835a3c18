"""Reads one label file; every mistake in it is named with its file and line.

`read_labels` looks at each field by itself and knows what to say of it. `read_plain_labels` reads the same from files in which nothing is
unusual, whole columns at a time, in a tenth of the time; of any other it says only that it is not plain.
"""

import csv
import math
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from tracknet.errors import DataError

VISIBILITIES = (0, 1, 2, 3)  # no ball to see, easy, hard, occluded
PLAIN_VISIBILITIES = {f"{number}{tail}": number for number in VISIBILITIES for tail in ("", ".0")}


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; others may stand beside them."""

    frame: str
    visibility: str
    x: str
    y: str

    @property
    def names(self) -> tuple[str, str, str, str]:
        """All four, in order."""
        return (self.frame, self.visibility, self.x, self.y)


TRACKNET = Columns("file name", "visibility", "x-coordinate", "y-coordinate")  # Label.csv (arXiv 1907.03698)
TRACKNET_V2 = Columns("Frame", "Visibility", "X", "Y")  # one CSV per video (TrackNetV2)


@dataclass(frozen=True)
class LabelRow:
    """One frame's label; `line` counts from 1 in the file."""

    line: int
    frame: str  # what the first column says: a file name or a frame number
    visibility: int
    xy_px: tuple[float, float]  # original px; 0, 0 where visibility is 0


@dataclass(frozen=True)
class LabelColumns:
    """The labels of a file, in the order of its rows."""

    frames: list[str]  # what the first column says
    visibility: NDArray[np.int8]  # (n,)
    xy_px: NDArray[np.float64]  # (n, 2), original px; 0, 0 where visibility is 0


def fail(path: Path, line: int, text: str) -> NoReturn:
    """Raises the error of one line of a file."""
    raise DataError(f"{path}:{line}: {text}")


def read_labels(path: Path, columns: Columns) -> list[LabelRow]:
    """All rows of a CSV with a header, in the order of the file.

    Args:
        path: UTF-8, with or without byte order mark; any line ends.
        columns: names to look for, whatever their case.

    Raises:
        DataError: the file cannot be read, a column is missing, a field is not what it should be, or there is no row.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            places = _places(path, header, columns)
            rows = [_row(path, reader.line_num, fields, columns, places) for fields in reader if any(field.strip() for field in fields)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is no CSV text ({error})") from error
    if not rows:
        raise DataError(f"{path}: has no rows below its header; one row per frame is needed")
    return rows


def _places(path: Path, header: list[str], columns: Columns) -> list[int]:
    """The position of each column."""
    lowered = [name.lower() for name in header]
    missing = [name for name in columns.names if name.lower() not in lowered]
    if missing:
        found = " ".join(", ".join(header).split()) if any(header) else "none"
        advice = "; separate the columns by commas" if any(mark in name for name in header for mark in ";\t") else ""
        fail(path, 1, f"column missing: {', '.join(missing)}; the columns needed are {','.join(columns.names)}, found: {found}{advice}")
    return [lowered.index(name.lower()) for name in columns.names]


def _row(path: Path, line: int, fields: list[str], columns: Columns, places: list[int]) -> LabelRow:
    """One row, checked by itself."""
    if len(fields) <= max(places):
        fail(path, line, f"has {len(fields)} fields, but the header has {max(places) + 1} or more")
    frame, visibility_text, x_text, y_text = (fields[place].strip() for place in places)
    visibility = _number(path, line, columns.visibility, visibility_text)
    if visibility not in VISIBILITIES:
        fail(path, line, f"{columns.visibility} is {visibility_text!r}; allowed are 0 (no ball), 1 (easy), 2 (hard), 3 (occluded)")
    x, y = _number(path, line, columns.x, x_text), _number(path, line, columns.y, y_text)
    if visibility == 0:
        return LabelRow(line, frame, 0, (0.0, 0.0))
    if x is None or y is None:
        fail(path, line, f"{columns.x} or {columns.y} is empty, but visibility {int(visibility)} needs both (0 means no ball)")
    return LabelRow(line, frame, int(visibility), (x, y))


def _number(path: Path, line: int, column: str, text: str) -> float | None:
    """The finite number in a field; None if the field is empty."""
    if not text:
        return None
    try:
        value = math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        fail(path, line, f"{column} is {text!r}, which is not a number")
    return value


def read_plain_labels(path: str | Path, columns: Columns) -> LabelColumns | None:
    """What `read_labels` gives of a file in which nothing is unusual; None of any other, be it right or wrong.

    Positions may also be not finite, which lies in no picture.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            text = file.read().decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n")
        header, _, rows = text.partition("\n")
        names = [name.strip().lower() for name in header.split(",")]
        places = [names.index(name.lower()) for name in columns.names]
        fields = _plain_fields(text, rows, len(names), places)
        return None if fields is None else _plain_columns(*fields)
    except (OSError, ValueError, KeyError):
        return None


def _plain_fields(text: str, rows: str, count: int, places: list[int]) -> list[list[str]] | None:
    """The fields of some columns; None where a row may have other than `count` fields or fields may hold more than meets the eye.

    Without quotes a field ends at a comma, a row at a line end, and all can be cut at once. Each line end stays with the field behind it,
    so the rows are as long as each other if every `count`-th field has one.
    """
    if '"' in text or "\r" in text or not rows:
        return None
    fields = rows.replace("\n", ",\n").split(",")
    first_column = "".join(fields[::count]).split("\n")
    if not len(fields) == count * len(first_column) == count * (rows.count("\n") + 1):
        return None
    if len(text) > csv.field_size_limit() and max(map(len, fields)) > csv.field_size_limit():
        return None
    return [fields[place::count] if place else first_column for place in places]


def _plain_columns(frames: list[str], visibility_texts: list[str], x: list[str], y: list[str]) -> LabelColumns | None:
    """The columns as numbers; x and y may be empty in rows without a ball. Raises ValueError or KeyError where they are none."""
    visibilities = bytes(map(PLAIN_VISIBILITIES.__getitem__, visibility_texts))
    visibility = np.frombuffer(visibilities, np.int8)
    is_seen = visibility > 0
    not_seen = (~is_seen).tobytes()
    seen = [*compress(x, visibilities), *compress(y, visibilities)]
    unseen = {*compress(x, not_seen), *compress(y, not_seen)} - {""}
    if "_" in "".join([*seen, *unseen]) or not all(map(math.isfinite, map(float, unseen))):  # Python reads 1_0 as 10
        return None
    xy_px = np.zeros((len(frames), 2))
    xy_px[is_seen] = np.array(list(map(float, seen))).reshape(2, -1).T
    return LabelColumns(frames, visibility, xy_px)
