"""The file of predictions: a detector's answer for each frame, in original px; TrackNet's own and that of any other program.

    game,clip,frame,visible,x,y,score
    game8,Clip1,0,1,613.250,201.125,0.981250

`frame` is the position in the clip from 0, in the order of the pictures' names. `visible` (0 or 1) says whether the detector claims a ball;
`score` only ranks, for the average precision. x, y and score may be empty where `visible` is 0, and score everywhere.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from tracknet.data.index import NO_LABEL, ClipIndex
from tracknet.errors import ConfigError, DataError, shown

if TYPE_CHECKING:
    from tracknet.evaluation.detection import Detections  # which needs torch, and reading a file does not

COLUMNS = ("game", "clip", "frame", "visible", "x", "y", "score")
VISIBLE = {"0": False, "1": True, "false": False, "true": True}
LAST_FRAME = 10**9
FARTHEST_PX = 10**6
CLIPS_NAMED = 3


@dataclass(frozen=True)
class ClipPredictions:
    """The answers for n frames of a clip.

    Attributes:
        frame: (n,) int64, positions in the clip from 0, rising.
        visible: (n,) whether a ball is claimed.
        xy_px: (n, 2) float64, original px; NaN where there is no position.
        score: (n,) float64, NaN where there is none.
    """

    frame: NDArray[np.int64]
    visible: NDArray[np.bool_]
    xy_px: NDArray[np.float64]
    score: NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """The answers of a detector by clip id, such as `game1/Clip2`."""

    clips: Mapping[str, ClipPredictions]


@dataclass(frozen=True)
class _Row:
    line: int
    frame: int
    visible: bool
    x: float
    y: float
    score: float


def predictions_of(index: ClipIndex, detections: "Detections", threshold: float) -> Predictions:
    """The answers of a network; a peak at or above the threshold is a ball, and the others keep place and score for the ranking.

    Args:
        index: of the data set.
        detections: each frame of it once, in any order.
        threshold: 0 to 1.
    """
    order = np.argsort(detections.row, kind="stable")
    if not np.array_equal(detections.row[order], np.arange(len(index))):
        raise ValueError(f"{len(detections.row)} detections are not one for each of {len(index)} frames")
    xy_px, score = detections.xy_px[order], detections.score[order]
    return Predictions(
        {
            clip.id: ClipPredictions(
                np.arange(clip.length, dtype=np.int64),
                score[index.rows(clip)] >= threshold,
                xy_px[index.rows(clip)],
                score[index.rows(clip)],
            )
            for clip in index.clips
        }
    )


def predictions_csv(predictions: Predictions) -> str:
    """The text of the file: x and y with 3 decimals, score with 6."""
    lines = [",".join(COLUMNS)]
    for clip_id, clip in predictions.clips.items():
        game, _, name = clip_id.partition("/")
        for frame, visible, (x, y), score in zip(clip.frame, clip.visible, clip.xy_px, clip.score, strict=True):
            place = "," if math.isnan(x) else f"{x:.3f},{y:.3f}"
            lines.append(f"{_quoted(game)},{_quoted(name)},{frame},{int(visible)},{place},{'' if math.isnan(score) else f'{score:.6f}'}")
    return "\n".join([*lines, ""])


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(letter in name for letter in ',"\r\n') else name


def read_predictions(path: Path) -> Predictions:
    """Reads a file of predictions; see `parse_predictions`. Raises ConfigError too, where the file is not there or cannot be read."""
    return parse_predictions(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """What a file of predictions holds, which may be a pipe. Raises ConfigError where it is not there or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a CSV with the columns {','.join(COLUMNS)}") from error


def parse_predictions(content: bytes, path: Path) -> Predictions:
    """Parses a file of predictions. Byte order mark, CRLF, columns in another order and further ones, and rows in any order are fine.

    Args:
        content: of the file.
        path: named in errors.

    Raises:
        DataError: a column is missing, a value is none, or a frame has two rows; names the line.
    """
    rows: dict[str, dict[int, _Row]] = {}
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; it must be a CSV with the columns {','.join(COLUMNS)}") from error
    for clip_id, row in _rows(path, io.StringIO(text, newline="")):
        of_clip = rows.setdefault(clip_id, {})
        if row.frame in of_clip:
            first = of_clip[row.frame].line
            raise _wrong(path, row.line, f"frame {row.frame} of {shown(clip_id)} has a row already, in line {first}")
        of_clip[row.frame] = row
    return Predictions({clip_id: _clip([of_clip[frame] for frame in sorted(of_clip)]) for clip_id, of_clip in rows.items()})


def _clip(rows: Sequence[_Row]) -> ClipPredictions:
    return ClipPredictions(
        np.array([row.frame for row in rows], np.int64),
        np.array([row.visible for row in rows], np.bool_),
        np.array([(row.x, row.y) for row in rows], np.float64),
        np.array([row.score for row in rows], np.float64),
    )


def _rows(path: Path, file: TextIO) -> Iterator[tuple[str, _Row]]:
    """Clip id and row of each line."""
    lines = csv.reader(file, strict=True)
    try:
        place = _places(path, [name.strip().lower() for name in next(lines, [])])
        for cells in lines:
            if any(cell.strip() for cell in cells):
                if len(cells) <= max(place.values()):
                    raise _wrong(path, lines.line_num, f"has {len(cells)} values, fewer than the header has columns")
                yield _row(path, lines.line_num, {name: cells[number].strip() for name, number in place.items()})
    except csv.Error as error:
        raise _wrong(path, lines.line_num, f"is no line of a CSV ({error})") from error


def _places(path: Path, header: list[str]) -> dict[str, int]:
    """The number of each column."""
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise DataError(f"{path}:1: columns must be separated by commas; the first line must name {','.join(COLUMNS)}")
    for name in COLUMNS:
        if header.count(name) != 1:
            why = f"has the column {name} twice" if name in header else f"has no column {name}"
            raise DataError(f"{path}:1: {why}; the first line must name {','.join(COLUMNS)}")
    return {name: header.index(name) for name in COLUMNS}


def _row(path: Path, line: int, cells: dict[str, str]) -> tuple[str, _Row]:
    for name in ("game", "clip"):
        if not cells[name] or "/" in cells[name]:
            raise _wrong(path, line, f"{name} is {shown(cells[name])!r}; it must be the name of a {name}, as the data set has it")
    frame = cells["frame"]
    if not (frame.isascii() and frame.isdecimal() and len(frame) < len(str(LAST_FRAME))):
        raise _wrong(path, line, f"frame is {shown(frame)!r}; it must be the position in the clip, a whole number from 0 on")
    if cells["visible"].lower() not in VISIBLE:
        raise _wrong(path, line, f"visible is {shown(cells['visible'])!r}; it must be 0 or 1")
    visible = VISIBLE[cells["visible"].lower()]
    x, y, score = (_number(path, line, name, cells[name]) for name in ("x", "y", "score"))
    if math.isnan(x) != math.isnan(y):
        raise _wrong(path, line, "has one of x and y; give both or neither")
    if visible and math.isnan(x):
        raise _wrong(path, line, "is visible but has no x and y")
    return f"{cells['game']}/{cells['clip']}", _Row(line, int(frame), visible, x, y, score)


def _number(path: Path, line: int, name: str, text: str) -> float:
    """A finite number; NaN of nothing."""
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in text or not text.isascii():
        raise _wrong(path, line, f"{name} is {shown(text)!r}, which is no number")
    if name != "score" and abs(value) > FARTHEST_PX:
        raise _wrong(path, line, f"{name} is {shown(text)!r}; it must be in px of the picture, at most {FARTHEST_PX} either way")
    return value


def _wrong(path: Path, line: int, what: str) -> DataError:
    return DataError(f"{path}:{line}: {what}")


def fit_to_labels(predictions: Predictions, index: ClipIndex, path: Path) -> tuple[Predictions, list[str]]:
    """The answers for the clips of a data set, one for each frame; a frame without label and without row becomes one without ball.

    Args:
        predictions: as they were read.
        index: of the data set.
        path: of the file, for messages.

    Returns:
        Predictions whose clips are those of the index, in its order and at full length; and a line for what was left out.

    Raises:
        DataError: a frame with a label has no row, or a row is of a frame that its clip does not have; with the number of such frames.
    """
    fitted, missing, beyond = {}, [], []
    for clip in index.clips:
        given = predictions.clips.get(clip.id, _clip([]))
        inside = given.frame < clip.length
        beyond += [f"{clip.id} has {clip.length} frames, but a row for frame {frame}" for frame in given.frame[~inside]]
        answered = np.zeros(clip.length, np.bool_)
        answered[given.frame[inside]] = True
        lacking = np.flatnonzero(~answered & (index.visibility[index.rows(clip)] != NO_LABEL))
        missing += [f"frame {frame} of {clip.id}" for frame in lacking]
        fitted[clip.id] = _spread(given, inside, clip.length)
    if missing:
        remedy = f"frames count from 0 within a clip, yet {beyond[0]}" if beyond else "give each a row, visible 0 or 1"
        raise DataError(f"{path}: no row for {missing[0]}, which has a label ({len(missing)} such frames); {remedy}")
    if beyond:
        raise DataError(f"{path}: {beyond[0]} ({len(beyond)} such rows); frames count from 0 within a clip")
    others = sorted(set(predictions.clips) - set(fitted))
    named = ", ".join(shown(clip_id) for clip_id in others[:CLIPS_NAMED]) + (" ..." if len(others) > CLIPS_NAMED else "")
    notes = [f"left out of the file, because not in the split ({len(others)}): {named}"] if others else []
    return Predictions(fitted), notes


def _spread(given: ClipPredictions, kept: NDArray[np.bool_], length: int) -> ClipPredictions:
    """The rows at their places among `length` frames."""
    visible, xy_px, score = np.zeros(length, np.bool_), np.full((length, 2), np.nan), np.full(length, np.nan)
    place = given.frame[kept]
    visible[place], xy_px[place], score[place] = given.visible[kept], given.xy_px.reshape(-1, 2)[kept], given.score[kept]
    return ClipPredictions(np.arange(length, dtype=np.int64), visible, xy_px, score)
