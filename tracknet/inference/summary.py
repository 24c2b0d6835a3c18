"""What stands beside a track's CSV: from what it was made, how, and what came out."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from tracknet.errors import UserError
from tracknet.inference.network import device_of, model_hash, runs_in_onnx
from tracknet.inference.picture_folder import pictures_in
from tracknet.inference.source import FrameSource
from tracknet.inference.track import DETECTED, INTERPOLATED, BallTrack
from tracknet.inference.tracker import BallTracker
from tracknet.inference.whole_file import written_whole

MADE_BY = "tracknet.scripts.predict"
READ_AGAIN = {
    "source": dict,
    "frames": int,
    "detected": int,
    "interpolated": int,
    "fps": float | None,
    "size": list,
    "notes": list,
    "frames_per_second": float,
}
PACKAGES = ("tracknet", "torch", "av", "numpy", "opencv-python-headless")


def model_about(folder: Path) -> dict[str, str]:
    """Which model it is. Raises ConfigError where a file of it cannot be read."""
    return {"path": str(folder.absolute()), "sha256": model_hash(folder)}


def detections_about(source: FrameSource, model: dict[str, str], tracker: BallTracker) -> dict[str, Any]:
    """What the peaks of the frames depend on; `model` is of `model_about`."""
    return {
        "source": {"path": str(source.info.path.absolute()), "fingerprint": fingerprint(source.info.path)},
        "model": model,
        "device": device_of(tracker.network),
        "batch_windows": tracker.batch_windows,
    }


def track_about(detections: dict[str, Any], tracker: BallTracker) -> dict[str, Any]:
    """What the table depends on."""
    trajectory = None if tracker.trajectory is None else asdict(tracker.trajectory)
    return {**detections, "threshold": tracker.threshold, "trajectory": trajectory}


def fingerprint(path: Path) -> str:
    """Changes with the name, the size and the time of the video, or of any picture of the folder. Raises UserError where it is gone."""
    files = pictures_in(path) if path.is_dir() else [path]  # nothing else of a folder, for the output may lie there
    try:
        states = [(file.name, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read any more ({error.strerror})") from error
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def summarise(
    about: dict[str, Any], tracker: BallTracker, track: BallTrack, notes: Sequence[str], frames_per_second: float
) -> dict[str, Any]:
    """The content of `<name>.json`; `about` is that of `track_about`, by which a later run knows the file again.

    `overlay` becomes true before an overlay is made: what lies under its name is this program's then.
    """
    packages = PACKAGES + (("onnxruntime",) if runs_in_onnx(Path(about["model"]["path"])) else ())
    return {
        "made_by": MADE_BY,
        **about,
        "threshold_from": tracker.threshold_from,
        "frames": len(track),
        "detected": int(np.count_nonzero(track.source == DETECTED)),
        "interpolated": int(np.count_nonzero(track.source == INTERPOLATED)),
        "fps": track.fps,
        "size": list(track.size_wh),
        "overlay": False,
        "notes": list(notes),
        "frames_per_second": round(frames_per_second, 2),
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Writes the JSON, whole or not at all. Raises OSError where it cannot be written."""
    with written_whole(path) as file:
        json.dump(summary, file, indent=2)
        file.write("\n")


def read_summary(path: Path) -> dict[str, Any] | None:
    """A JSON that `write_summary` wrote; None where there is no file, or another one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(content, dict) and content.get("made_by") == MADE_BY
    return content if is_ours and all(isinstance(content.get(name), kind) for name, kind in READ_AGAIN.items()) else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
