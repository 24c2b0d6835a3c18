"""What W&B is to get, read from `metrics.jsonl`, and what it has already, read from the `.wandb` files of earlier launches."""

import importlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracknet.utils.run_directory import write_atomically

NO_STEP = -1
FILE_HEADER, RECORD_HEADER, BLOCK = 7, 7, 32 * 1024  # of a `.wandb` file, in bytes
FULL, FIRST, LAST = 1, 2, 4  # kinds of a piece of a record; 3 is one in the middle


@dataclass(frozen=True)
class Row:
    """Metrics, and files of pictures, of one step."""

    step: int
    values: Mapping[str, float | Path]


@dataclass(frozen=True)
class Reached:
    """How far W&B is.

    Attributes:
        step: the last that it has, NO_STEP without any.
        names: of what it has of that step; None where that is all.
    """

    step: int = NO_STEP
    names: frozenset[str] | None = None


class Unsent:
    """Picks from all rows of a run, in their order, what W&B has not: each step greater than the one before, nothing twice.

    A launch that was stopped between a step and its evaluation has sent that step. What belongs to it and comes later goes out as the step
    after it, together with that step's own metrics if it has any, for W&B takes no more for a step that it has.
    """

    def __init__(self, reached: Reached) -> None:
        self._reached = reached
        self._late: Row | None = None

    def of(self, row: Row) -> Iterator[Row]:
        """What is to be sent of a row."""
        if row.step > self._reached.step:
            if self._late is not None and self._late.step == row.step:
                row = Row(row.step, {**self._late.values, **row.values})
                self._late = None
            yield from self.rest()
            self._reached = Reached(row.step)
            yield row
        elif row.step == self._reached.step and self._reached.names is not None:
            late = {name: value for name, value in row.values.items() if name not in self._reached.names}
            self._late = Row(row.step + 1, late) if late else None

    def rest(self) -> Iterator[Row]:
        """What is to be sent when no row of the next step comes: now, or ever."""
        if self._late is not None:
            late, self._late = self._late, None
            yield late


class MetricsRows:
    """Follows a growing `metrics.jsonl` and joins the lines of a step to one row.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self._open: Row | None = None

    def closed(self) -> Iterator[Row]:
        """The new rows of which nothing more can come, because a line of another step follows."""
        for values in self._new_lines():
            row = Row(int(values.pop("step")), values)
            if self._open is not None and self._open.step != row.step:
                yield self._open
                self._open = row
            else:
                self._open = Row(row.step, {**(self._open.values if self._open else {}), **values})

    def last(self) -> Row | None:
        """The row that may still grow."""
        return self._open

    def _new_lines(self) -> Iterator[dict[str, float]]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._read_bytes += len(line)
                yield {name: math.nan if value is None else value for name, value in json.loads(line).items()}


def locally_reached(folder: Path, wandb_id: str) -> Reached:
    """What the launches so far have kept for `wandb sync`.

    Args:
        folder: the run's folder; W&B makes one folder per launch in its `wandb`, with a `.wandb` file of what `wandb sync` uploads.
        wandb_id: of the run.

    Returns:
        How far that is. The end of a file that a kill cut off counts for nothing: `wandb sync` cannot read it either.
    """
    steps = [_last_step(path) for path in folder.glob(f"wandb/*run-*/run-{wandb_id}.wandb")]
    return reached_with_note(max([*steps, _read_note(folder, wandb_id)[1]]), folder, wandb_id)


def reached_with_note(step: int, folder: Path, wandb_id: str) -> Reached:
    """That W&B has a step, and what of it if a launch ended there: only then is a step sent before a later one has come."""
    names, ended = _read_note(folder, wandb_id)
    if any(noted > step for noted in names):  # a launch could not hand those over after all, and a later one will send all of them
        names = {noted: of for noted, of in names.items() if noted <= step}
        _write_note(folder, wandb_id, names, ended)
    return Reached(step, frozenset(names[step]) if step in names else None)


def note_reached(folder: Path, wandb_id: str, row: Row, *, ended: bool) -> None:
    """Notes the last row of a launch.

    Args:
        folder: the run's folder.
        wandb_id: of the run.
        row: the last one, which may not be all of its step.
        ended: whether W&B has it for certain. From then on the row counts even where `wandb sync --clean` has removed the file.
    """
    names, ended_at = _read_note(folder, wandb_id)
    _write_note(folder, wandb_id, names | {row.step: sorted(row.values)}, row.step if ended else ended_at)


def _read_note(folder: Path, wandb_id: str) -> tuple[dict[int, list[str]], int]:
    """The names in the last row of each launch, by its step, and the last of these rows that W&B has for certain."""
    try:
        content = json.loads(_note(folder, wandb_id).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}, NO_STEP
    return {int(step): names for step, names in content["last_rows"].items()}, content["ended"]


def _write_note(folder: Path, wandb_id: str, names: Mapping[int, list[str]], ended: int) -> None:
    write_atomically(_note(folder, wandb_id), json.dumps({"last_rows": names, "ended": ended}).encode())


def _note(folder: Path, wandb_id: str) -> Path:
    return folder / "wandb" / f"last-rows-{wandb_id}.json"


def _last_step(path: Path) -> int:
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    last = NO_STEP
    for content in _records(path.read_bytes()):
        record = messages.Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            last = max(last, record.history.step.num)
    return last


def _records(content: bytes) -> Iterator[bytes]:
    """The whole records of a LevelDB log (https://github.com/google/leveldb, doc/log_format.md), which W&B begins with 7 bytes of its own.

    A block of 32 KiB holds pieces: CRC-32, length and kind (4, 2 and 1 bytes, little-endian), then the data. No piece spans two blocks.
    """
    at, pieces = FILE_HEADER, b""
    while at + RECORD_HEADER <= len(content):
        left_in_block = BLOCK - at % BLOCK
        if left_in_block < RECORD_HEADER:
            at += left_in_block
            continue
        checksum, length, kind = (int.from_bytes(content[at + start : at + end], "little") for start, end in ((0, 4), (4, 6), (6, 7)))
        data = content[at + RECORD_HEADER : at + RECORD_HEADER + length]
        if len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            return
        at += RECORD_HEADER + length
        pieces = data if kind in (FULL, FIRST) else pieces + data
        if kind in (FULL, LAST):
            yield pieces
