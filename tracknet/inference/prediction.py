"""One video to its files: the table grows beside its name, and what is finished stays whatever ends the run."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracknet.errors import UserError, shown
from tracknet.inference.detections_file import cannot_write, check_same, growing_file
from tracknet.inference.outputs import Outputs
from tracknet.inference.overlay import write_overlay
from tracknet.inference.progress import Progress
from tracknet.inference.source import FrameSource
from tracknet.inference.stream import resume_point
from tracknet.inference.summary import detections_about, read_summary, summarise, track_about, write_summary
from tracknet.inference.track import BallTrack, read_track
from tracknet.inference.tracker import BallTracker
from tracknet.inference.video import open_source


@dataclass(frozen=True)
class Request:
    """How videos are to be predicted.

    Attributes:
        tracker: finds the ball.
        model: which one it is, of `summary.model_about`.
        resume: whether a stopped run is gone on with and a finished one left as it is.
        overlay: whether a video with the ball is made as well.
    """

    tracker: BallTracker
    model: dict[str, str]
    resume: bool
    overlay: bool


def predict(path: Path, outputs: Outputs, request: Request, say: Callable[[str], None]) -> str:
    """Writes `<name>.csv` and `<name>.json`, and the overlay where it is wanted.

    Args:
        path: a video or a folder of pictures.
        outputs: where to.
        request: how.
        say: takes what is not as it should be, line by line.

    Returns:
        What came out, in one line.

    Raises:
        UserError: the footage cannot be read, the files cannot be written, or they are of something else. No file under its final name is
            half-written, and what was found stays in `<name>.csv.part`.
    """
    source = open_source(path)
    _make_folder(outputs)
    about = detections_about(source, request.model, request.tracker)
    outputs.check_theirs(path, about["source"], request.overlay)
    summary = _finished(outputs, track_about(about, request.tracker)) if request.resume else None
    if summary is None:
        track, summary = _predicted(source, outputs, request, about, say)
    else:
        track = read_track(outputs.csv, summary["fps"], (summary["size"][0], summary["size"][1]))
        if not request.overlay or os.path.isfile(outputs.overlay):
            return f"{outputs.csv}: finished before, left as it is"
    if request.overlay:
        _write_overlay(path, track, outputs, summary, say)
    return (
        f"{outputs.csv}: {summary['frames']} frames, {summary['detected']} detected, {summary['interpolated']} interpolated, "
        f"{summary['frames_per_second']:.1f} frames/s"
    )


def _write_overlay(path: Path, track: BallTrack, outputs: Outputs, summary: dict[str, Any], say: Callable[[str], None]) -> None:
    """Writes the overlay, and what is to be said of it into the summary."""
    _write_summary(outputs, summary | {"overlay": True})
    new = [note for note in write_overlay(path, track, outputs.overlay) if note not in summary["notes"]]
    for note in new:
        say(f"{path}: {note}")
    if new:
        _write_summary(outputs, summary | {"overlay": True, "notes": [*summary["notes"], *new]})


def _write_summary(outputs: Outputs, summary: dict[str, Any]) -> None:
    try:
        write_summary(outputs.summary, summary)
    except OSError as error:
        raise cannot_write(outputs.summary, error) from error


def _make_folder(outputs: Outputs) -> None:
    try:
        outputs.folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{shown(outputs.folder)}: there is a file; --output names a folder") from error
    except OSError as error:
        raise cannot_write(outputs.folder, error) from error


def _finished(outputs: Outputs, about: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that has come to its end. Raises UserError where that was made from something else."""
    summary = read_summary(outputs.summary)
    if summary is None or not os.path.exists(outputs.csv) or os.path.exists(outputs.part):
        return None
    check_same(outputs.csv, summary, about)
    return summary


def _predicted(
    source: FrameSource, outputs: Outputs, request: Request, about: dict[str, Any], say: Callable[[str], None]
) -> tuple[BallTrack, dict[str, Any]]:
    tracker = request.tracker

    def kept(frames: int) -> int:
        return resume_point(frames, tracker.network, tracker.batch_windows)

    with growing_file(outputs.part, about, kept if request.resume else None) as file:
        if file.frames:
            say(f"{outputs.part}: goes on behind {file.frames} frames")
        with Progress(source.info.name, source.info.frame_count_reported, file.frames) as progress:
            for detection in tracker.detections(source, file.frames):
                file.append(detection)
                progress.advance()
        found = file.detections()
    for note in source.notes:
        say(f"{source.info.path}: {note}")
    track = tracker.path(found, source.info.fps, source.info.size_wh)
    summary = summarise(track_about(about, tracker), tracker, track, source.notes, progress.frames_per_second)
    try:
        outputs.drop_overlay()
        write_summary(outputs.summary, summary)
        track.write_csv(outputs.csv)
        outputs.part.unlink()
    except OSError as error:
        raise cannot_write(outputs.csv, error) from error
    return track, summary
