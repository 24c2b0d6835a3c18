"""The file in which a prediction grows row by row, so that whatever ends it, what was found is kept."""

import errno
import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
        _write(self._file, self.path, _row(detection))
        self.frames += 1

    def detections(self) -> list[FrameDetection]:
        """All rows. Raises UserError where the file does not hold them any more."""
        try:
            found = [detection for detection, _ in _whole_rows(self.path.read_bytes())]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more ({error.strerror}); start again") from error
        if len(found) != self.frames:
            raise UserError(
                f"{self.path}: holds {len(found)} of the {self.frames} rows that were written, something else changed it; start again"
            )
        return found


@contextmanager
def growing_file(path: Path, about: About, resume_point: Callable[[int], int] | None) -> Iterator[DetectionsFile]:
    """Opens the file for appending; it stays when the block ends, however it ends.

    Args:
        path: of the file; nobody else may be writing it.
        about: what the rows depend on.
        resume_point: None begins anew, and no file may be there. Else a file is gone on with: its last row is left out where it is torn,
            and of the rest so many rows are kept as this says for their number.

    Raises:
        UserError: it is there though it is to be begun; it is something else, or of another source, model or setting, and stays as it is;
            another process writes it; no room.
    """
    opening = _opening(about)
    with _open(path, "xb" if resume_point is None else "ab") as file:
        frames = _cut_back(file, path, about, resume_point) if resume_point else 0
        try:  # from here on the file is ours
            if file.seek(0, os.SEEK_END) == 0:
                _write(file, path, opening)
            yield DetectionsFile(file, path, frames)
        finally:
            if file.seek(0, os.SEEK_END) <= len(opening):
                with suppress(OSError):  # nothing was found, so nothing is kept; if it stays all the same, --resume takes it
                    path.unlink()


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


def _write(file: IO[bytes], path: Path, content: bytes) -> None:
    """All of it. Raises UserError."""
    try:
        written = file.write(content)
    except OSError as error:
        raise cannot_write(path, error) from error
    if written != len(content):  # the last bytes of a disk, say
        raise UserError(f"{path}: cannot be written to its end; make room and go on with --resume, or choose another --output")


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to do about an output that cannot be written."""
    remedy = "choose another --output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"make room and go on with --resume, or {remedy}"
    elif error.errno == errno.ENAMETOOLONG:
        remedy = "give the video a shorter name"
    return UserError(f"{shown(path)}: cannot be written ({error.strerror}); {remedy}")


def _cut_back(file: IO[bytes], path: Path, about: About, resume_point: Callable[[int], int]) -> int:
    """Leaves only what may be kept, and says how many rows that is. Changes nothing where it raises UserError."""
    try:
        content = path.read_bytes()
        opening = _OPENING.match(content)
        if opening is None and _opening(about).startswith(content):  # the process ended while it wrote the first lines
            file.truncate(0)
            return 0
        said = _said(opening)
        if opening is None or said is None:
            raise UserError(f"{path}: is not the file of a stopped run; delete it, or choose another --output")
        check_same(path, said, about)
        ends = [end for _, end in _whole_rows(content)]
        frames = resume_point(len(ends))
        file.truncate(ends[frames - 1] if frames else opening.end())
        return frames
    except OSError as error:
        raise cannot_write(path, error) from error


def _said(opening: re.Match[bytes] | None) -> dict[str, Any] | None:
    """What the rows depend on; None where the file is something else."""
    try:
        said: dict[str, Any] | None = json.loads(opening[1]) if opening else None
    except ValueError:
        return None
    return said


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
