"""The frames that a model got most wrong, with truth and prediction drawn."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.data.frames import FrameStore
from tracknet.data.index import NO_LABEL, Clip, ClipIndex
from tracknet.evaluation.detection import Detections
from tracknet.geometry import resize_points
from tracknet.metrics.outcomes import outcome_of_frames
from tracknet.metrics.protocols import TRACKNETV2
from tracknet.report.charts import ErrorMap
from tracknet.visualize import draw_comparison

OUTCOMES = ("TP", "FP1", "FP2", "TN", "FN")  # in the order of `Counts`
APART_FRAMES = 5  # neighbours of a frame show the same mistake once more
WHY = {
    "FP1": "A ball is there, and the detection is too far from it. Farthest first.",
    "FP2": "There is no ball, and yet a detection. Highest score first.",
    "FN": "A ball is there, and no detection. Clearly visible ones first, then those with the lowest peak.",
}


@dataclass(frozen=True)
class Verdicts:
    """What became of the labelled frames that a model has looked at, M of them, by the TrackNetV2 rule.

    Attributes:
        found: the frames' peaks.
        outcome: (M,) int, places in `OUTCOMES`.
        distance_px: (M,) float64, from detection to label in original px; NaN where one of them is missing.
    """

    found: Detections
    outcome: NDArray[np.int64]
    distance_px: NDArray[np.float64]


@dataclass(frozen=True)
class Mistake:
    """One frame of the gallery.

    Attributes:
        kind: FP1, FP2 or FN.
        caption: which frame it is, and how wrong.
        picture: RGB (H', W', 3).
    """

    kind: str
    caption: str
    picture: NDArray[np.uint8]


def judge(index: ClipIndex, detections: Detections, visible: NDArray[np.bool_]) -> Verdicts:
    """The outcome of each frame that has a label.

    Args:
        index: the labels.
        detections: a peak for each frame of interest.
        visible: (M,) whether the peak counts as a detection.
    """
    labelled = index.visibility[detections.row] != NO_LABEL
    row = detections.row[labelled]
    found = Detections(row, detections.xy_px[labelled], detections.score[labelled])
    detected, truth = visible[labelled], index.xy_px[row].astype(np.float64)
    outcome = np.zeros(len(row), np.int64)
    clip_of = index.clip_of_row[row]
    for number in np.unique(clip_of):
        of_clip = clip_of == number
        size_wh = index.clips[number].size_wh
        visibility = index.visibility[row[of_clip]]
        outcome[of_clip] = outcome_of_frames(TRACKNETV2, found.xy_px[of_clip], detected[of_clip], truth[of_clip], visibility, size_wh)
    has_both = detected & (index.visibility[row] >= 1)
    distance_px = np.where(has_both, np.linalg.norm(found.xy_px - truth, axis=1), np.nan)
    return Verdicts(found, outcome, distance_px)


def worst(index: ClipIndex, verdicts: Verdicts, kind: str, count: int) -> NDArray[np.int64]:
    """Places in `verdicts` of the worst frames of one kind, the worst first, none within `APART_FRAMES` of a worse one of its clip."""
    places = np.flatnonzero(verdicts.outcome == OUTCOMES.index(kind))
    row, score = verdicts.found.row[places], verdicts.found.score[places]
    if kind == "FN":
        order = np.lexsort((score, index.visibility[row].astype(np.float32)))
    else:
        order = np.argsort(-verdicts.distance_px[places] if kind == "FP1" else -score, kind="stable")
    chosen: list[int] = []
    for place in places[order]:
        if len(chosen) == count:
            break
        mine = verdicts.found.row[place]
        near = [other for other in chosen if abs(int(verdicts.found.row[other]) - int(mine)) < APART_FRAMES]
        if not any(index.clip_of_row[verdicts.found.row[other]] == index.clip_of_row[mine] for other in near):
            chosen.append(int(place))
    return np.array(chosen, np.int64)


def draw_mistake(index: ClipIndex, verdicts: Verdicts, place: int, store: FrameStore) -> Mistake:
    """Draws a frame from the store's cache, which has been prepared."""
    row, score = int(verdicts.found.row[place]), float(verdicts.found.score[place])
    clip = index.clips[index.clip_of_row[row]]
    kind, size_wh = OUTCOMES[verdicts.outcome[place]], store.size_wh(clip)
    number = row - clip.first_row
    has_ball, detected = index.visibility[row] >= 1, kind in ("FP1", "FP2")
    picture = draw_comparison(
        np.array(store.window(clip, number, 1)[0]),
        predicted_xy_input=resize_points(verdicts.found.xy_px[place], clip.size_wh, size_wh) if detected else None,
        truth_xy_input=resize_points(index.xy_px[row].astype(np.float64), clip.size_wh, size_wh) if has_ball else None,
    )
    return Mistake(kind, _caption(clip, number, kind, score, float(verdicts.distance_px[place]), int(index.visibility[row])), picture)


def map_errors(index: ClipIndex, verdicts: Verdicts, store: FrameStore, game: str) -> ErrorMap:
    """The positions of a game's errors, over the background of its first clip."""
    clips = [clip for clip in index.clips if clip.game == game]
    of_game = np.array([index.clips[number].game == game for number in index.clip_of_row[verdicts.found.row]], bool)
    positions = {}
    for kind in ("FP1", "FP2", "FN"):
        places = np.flatnonzero(of_game & (verdicts.outcome == OUTCOMES.index(kind)))
        row = verdicts.found.row[places]
        xy_px = index.xy_px[row].astype(np.float64) if kind == "FN" else verdicts.found.xy_px[places]
        own_wh = np.array([index.clips[number].size_wh for number in index.clip_of_row[row]]).reshape(-1, 2)
        positions[kind] = xy_px / own_wh * np.array(clips[0].size_wh)
    return ErrorMap(game, np.array(store.background(clips[0])), clips[0].size_wh, positions)


def _caption(clip: Clip, number: int, kind: str, score: float, distance_px: float, visibility: int) -> str:
    parts = [f"{clip.id} frame {number}"]
    if kind == "FP1":
        parts.append(f"{distance_px:.0f} px away")
    if kind == "FN":
        parts.append({1: "easy to see", 2: "hard to see", 3: "occluded"}.get(visibility, f"visibility {visibility}"))
    if not np.isnan(score):
        parts.append(f"score {score:.2f}")
    return ", ".join(parts)
