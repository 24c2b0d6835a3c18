"""A trained network with its threshold and trajectory, ready for footage."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracknet.errors import ConfigError, shown
from tracknet.evaluation.threshold import detection_threshold
from tracknet.inference.array_source import ArraySource
from tracknet.inference.network import Network, load_network
from tracknet.inference.source import FrameSource
from tracknet.inference.stream import FrameDetection, detect_stream, first_needed
from tracknet.inference.track import DETECTED, NO_BALL, BallTrack, TrackRow, join_tracks, track_of
from tracknet.inference.trajectory import TUNED, TrajectorySettings, refine
from tracknet.inference.video import open_source

BATCH_WINDOWS = 4


class BallTracker:
    """Finds the ball in videos, folders of pictures and arrays.

    Args:
        network: what to run.
        threshold: a peak at or above it is a ball, above 0 and below 1; None takes the one that was chosen in training.
        trajectory: how detections become the path of one ball; None leaves them as they are.
        batch_windows: windows that go through the network together; at least 1.

    Raises:
        ConfigError: a threshold or a number of windows outside those.
    """

    def __init__(
        self,
        network: Network,
        *,
        threshold: float | None = None,
        trajectory: TrajectorySettings | None = TUNED,
        batch_windows: int = BATCH_WINDOWS,
    ) -> None:
        if threshold is not None and not 0 < threshold < 1:
            raise ConfigError(f"threshold {threshold}: must be above 0 and below 1")
        if batch_windows < 1:
            raise ConfigError(f"batch_windows {batch_windows}: must be at least 1")
        self.network = network
        chosen = detection_threshold(network.config, threshold)
        self.threshold, self.threshold_from = chosen.value, chosen.origin
        self.trajectory = trajectory
        self.batch_windows = batch_windows

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        threshold: float | None = None,
        trajectory: bool = True,
        batch_windows: int = BATCH_WINDOWS,
    ) -> "BallTracker":
        """The tracker of a checkpoint or exported folder.

        Args:
            folder: with `config.json` and `model.safetensors` or `model.onnx`.
            device: `cpu`, `cuda`, `cuda:1`, `mps`; None takes the accelerator where there is one.
            threshold: see the class.
            trajectory: whether jumps are dropped and short gaps filled.
            batch_windows: see the class.

        Raises:
            ConfigError: the folder cannot be used, the device is not there, or see the class.
        """
        network = load_network(Path(folder), device)
        return cls(network, threshold=threshold, trajectory=TUNED if trajectory else None, batch_windows=batch_windows)

    def track(self, source: str | Path | Iterable[NDArray[np.uint8]], *, fps: float | None = None) -> BallTrack:
        """The ball in every frame.

        What is not as it should be with the footage, such as a file that breaks off, is told by `warnings.warn`, once for each thing.

        Args:
            source: a video file, a folder of pictures, or pictures (H, W, 3) uint8 RGB.
            fps: frames per second of pictures, for `time_s` and the speed of the ball; a video has its own.

        Raises:
            UserError: the source cannot be read; a video with `fps`.
        """
        if fps is not None and not 0 < fps < float("inf"):
            raise ConfigError(f"fps {fps}: must be above 0")
        if not isinstance(source, str | Path):
            return self._track(ArraySource(source, fps))
        opened = open_source(Path(source))
        if fps is not None and opened.info.fps is not None:
            raise ConfigError(f"fps {fps}: {shown(source)} has times of its own; leave fps out")
        return self._track(opened, fps)

    def _track(self, source: FrameSource, fps: float | None = None) -> BallTrack:
        found = list(self.detections(source))
        for note in source.notes:
            warnings.warn(f"{source.info.path}: {note}", stacklevel=3)
        if fps is not None:
            found = [replace(detection, time_s=detection.number / fps) for detection in found]
        return self.path(found, fps or source.info.fps, source.info.size_wh)

    def detections(self, source: FrameSource, answer_from: int = 0) -> Iterator[FrameDetection]:
        """The highest peak of every frame from `answer_from` on, which is a `resume_point`."""
        width, height = self.network.config.input_size
        frames = source.frames((width, height), first_needed(answer_from, self.network))
        return detect_stream(frames, self.network, self.batch_windows, answer_from)

    def path(self, found: Sequence[FrameDetection], fps: float | None, size_wh: tuple[int, int]) -> BallTrack:
        """The table of all frames' peaks: those that are the ball, and what the trajectory adds.

        Each picture size is a path by itself; a part with fewer frames than a path needs is left as it is.
        """
        if not found:
            return track_of([], fps, size_wh)
        parts = []
        for original_wh, group in groupby(found, key=lambda detection: detection.original_wh):
            part = track_of([self._row(detection) for detection in group], fps, original_wh)
            if self.trajectory is not None and len(part) >= self.trajectory.min_frames:
                part = refine(part, self.trajectory)
            parts.append(part)
        return join_tracks(parts).without_peaks()

    def _row(self, found: FrameDetection) -> TrackRow:
        is_ball = found.score >= self.threshold
        return TrackRow(found.number, found.time_s, is_ball, found.x, found.y, found.score, DETECTED if is_ball else NO_BALL)
