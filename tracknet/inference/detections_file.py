"""The file in which a prediction grows row by row, so that whatever ends it, what was found is kept."""

import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tracknet.errors import UserError, shown
from tracknet.inference.stream import FrameDetection
from tracknet.inference.track import DECIMALS

COLUMNS = ("frame", "time_s", "x", "y", "score", "width", "height")
About = Mapping[str, Any]  # what the rows depend on, as JSON

_OPENING = re.compile(rb"(\{.*\})\n" + ",".join(COLUMNS).encode() + rb"\n")
_ROW = re.compile(rb"(\d+),(-?[\d.]*),(-?\d+\.\d+),(-?\d+\.\d+),(\d\.\d+),(\d+),(\d+)")


class DetectionsFile:
    """A first line of JSON that says what the rows depend on, a line of column names, then one row per frame, as they are found.

    Args:
        file: positioned at its end; every row goes to the system at once.
        path: of the file, for messages.
        frames: the rows that it holds.
    """

    def __init__(self, file: IO[bytes], path: Path, frames: int) -> None:
        self._file = file
        self.path = path
        self.frames = frames

    def append(self, detection: FrameDetection) -> None:
        """Writes the row of the next frame. Raises UserError where it cannot be written."""
        if detection.number != self.frames:
            raise ValueError(f"frame {detection.number} does not follow {self.frames} rows")
        try:
            self._file.write(_row(detection))
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.frames += 1

    def detections(self) -> list[FrameDetection]:
        """All rows."""
        return [detection for detection, _ in _whole_rows(self.path.read_bytes())]


@contextmanager
def growing_file(path: Path, about: About, resume_point: Callable[[int], int] | None) -> Iterator[DetectionsFile]:
    """Opens the file for appending; it stays when the block ends, however it ends.

    Args:
        path: of the file; nobody else may be writing it.
        about: what the rows depend on.
        resume_point: None begins anew, and no file may be there. Else a file is gone on with: its last row is left out where it is torn,
            and of the rest so many rows are kept as this says for their number.

    Raises:
        UserError: it is there though it is to be begun; it is of another source, model or setting; another process writes it; no room.
    """
    file = _open(path, "xb" if resume_point is None else "ab")
    try:
        try:
            frames = _cut_back(file, path, about, resume_point) if resume_point else 0
            if file.seek(0, os.SEEK_END) == 0:
                file.write(_opening(about))
        except OSError as error:
            raise cannot_write(path, error) from error
        growing = DetectionsFile(file, path, frames)
        yield growing
    finally:
        if file.seek(0, os.SEEK_END) <= len(_opening(about)):
            path.unlink()  # nothing was found, so nothing is kept
        file.close()


def _open(path: Path, mode: str) -> IO[bytes]:
    """The file, locked until it is closed."""
    try:
        file = path.open(mode, buffering=0)
    except FileExistsError:
        raise UserError(f"{path}: an earlier run was stopped there; go on with --resume, or delete the file to begin anew") from None
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path}: another process is writing it; wait for its end, or choose another --output") from None
    except OSError:  # a file system without locks
        pass
    return file


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to do about an output that cannot be written."""
    return UserError(f"{path}: cannot be written ({error.strerror}); make room and go on with --resume, or choose another --output")


def _cut_back(file: IO[bytes], path: Path, about: About, resume_point: Callable[[int], int]) -> int:
    """Leaves only what may be kept, and says how many rows that is."""
    content = path.read_bytes()
    opening = _OPENING.match(content)
    if opening is None:
        if not _is_torn_opening(content):
            raise UserError(f"{path}: is not the file of a stopped run; delete it, or choose another --output")
        file.truncate(0)
        return 0
    check_same(path, json.loads(opening[1]), about)
    ends = [end for _, end in _whole_rows(content)]
    frames = resume_point(len(ends))
    file.truncate(ends[frames - 1] if frames else opening.end())
    return frames


def _is_torn_opening(content: bytes) -> bool:
    """Whether the process can have ended while it wrote the first lines."""
    start = b'{"'
    return content[: len(start)] == start[: len(content)] and content.count(b"\n") <= 1


def _whole_rows(content: bytes) -> Iterator[tuple[FrameDetection, int]]:
    """The rows up to the first that is torn or out of order, each with the position behind its end."""
    opening = _OPENING.match(content)
    end = opening.end() if opening else len(content)
    for number, line in enumerate(content[end:].split(b"\n")[:-1]):
        row = _ROW.fullmatch(line)
        if row is None or int(row[1]) != number:
            return
        end += len(line) + 1
        yield _parsed(row), end


def _parsed(row: re.Match[bytes]) -> FrameDetection:
    number, time_s, x, y, score, width, height = row.groups()
    return FrameDetection(
        number=int(number),
        time_s=float(time_s) if time_s else math.nan,
        x=float(x),
        y=float(y),
        score=float(score),
        original_wh=(int(width), int(height)),
    )


def check_same(path: Path, found: Mapping[str, Any], wanted: About) -> None:
    """Raises UserError where what is on disk was made from something else than what is wanted now; names the first thing that differs."""
    for key, value in wanted.items():
        if _compared(found.get(key)) != _compared(value):
            was, now = (shown(json.dumps(part)) for part in (found.get(key), value))
            raise UserError(
                f"{path}: was made with another {key} ({was}, now {now}); delete it and start without --resume, or choose another --output"
            )


def _compared(value: Any) -> Any:
    """What counts in a comparison: where a source or model lies does not, only what it is."""
    return {key: part for key, part in value.items() if key != "path"} if isinstance(value, Mapping) else value


def _opening(about: About) -> bytes:
    return f"{json.dumps(about, sort_keys=True)}\n{','.join(COLUMNS)}\n".encode()


def _row(detection: FrameDetection) -> bytes:
    time_s = "" if math.isnan(detection.time_s) else f"{detection.time_s:.{DECIMALS['time_s']}f}"
    x, y, score = (f"{getattr(detection, name):.{DECIMALS[name]}f}" for name in ("x", "y", "score"))
    return f"{detection.number},{time_s},{x},{y},{score},{detection.original_wh[0]},{detection.original_wh[1]}\n".encode()
