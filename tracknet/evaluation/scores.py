"""Scores of predictions under protocols: over all, by game, by clip and by how well the ball can be seen."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracknet.data.index import NO_LABEL, ClipIndex
from tracknet.evaluation.predictions import Predictions
from tracknet.metrics.intervals import bootstrap
from tracknet.metrics.outcomes import TP, Counts, frame_weights, outcome_of_frames, pixel_error, scores_of
from tracknet.metrics.protocols import Protocol
from tracknet.metrics.ranking import average_precision

INTERVALS = ("f1", "precision", "recall")


@dataclass(frozen=True)
class _Frames:
    """The N frames with a label, under one protocol; each stands here as often as the protocol counts it.

    Attributes:
        protocol: the rule.
        is_ranked: whether all claimed balls have a score.
        clip: (N,) number of the frame's clip.
        visibility: (N,) label, 0 to 3.
        truth_xy_px: (N, 2) label, original px.
        xy_px: (N, 2) prediction, original px; NaN where there is none.
        score: (N,) of the prediction; NaN where there is none.
        outcome: (N,) as `outcome_of_frames` gives them.
        right: (N,) whether the predicted place is right, claimed or not.
    """

    protocol: Protocol
    is_ranked: bool
    clip: NDArray[np.int64]
    visibility: NDArray[np.int8]
    truth_xy_px: NDArray[np.float64]
    xy_px: NDArray[np.float64]
    score: NDArray[np.float64]
    outcome: NDArray[np.int8]
    right: NDArray[np.bool_]


def score(predictions: Predictions, index: ClipIndex, protocols: Sequence[Protocol], seed: int = 0) -> dict[str, Any]:
    """What `scores.json` holds of the scores.

    Args:
        predictions: one for each frame of the index (`fit_to_labels`).
        index: the labels.
        protocols: the rules.
        seed: of the bootstrap.

    Returns:
        `clips`, `frames` (with a label), `frames_without_label`, `seed`, and under `protocols` for each its `declaration`, `all`, and by
        name `games`, `clips` and `visibility`. Each entry has the counts tp, fp1, fp2, tn, fn; precision, recall, f1, accuracy
        (fractions); ap (null without scores or without a ball); error_px of the true positives (null where there is none). `all` and
        `games` have the 95 % `intervals` of f1, precision and recall over clips (null where there is one clip alone).
    """
    labelled = int((index.visibility != NO_LABEL).sum())
    return {
        "clips": len(index.clips),
        "frames": labelled,
        "frames_without_label": len(index) - labelled,
        "seed": seed,
        "protocols": {protocol.name: _under(protocol, predictions, index, seed) for protocol in protocols},
    }


def _under(protocol: Protocol, predictions: Predictions, index: ClipIndex, seed: int) -> dict[str, Any]:
    frames = _frames(protocol, predictions, index)
    clips = np.arange(len(index.clips))
    of_game = {game: np.array([clip.game == game for clip in index.clips]) for game in index.games}
    by_clip = np.array([_counts(frames, frames.clip == number) for number in clips], np.int64).reshape(-1, 5)
    return {
        "declaration": asdict(protocol),
        "all": _entry(frames, frames.clip >= 0) | {"intervals": _intervals(protocol, by_clip, seed)},
        "games": {
            game: _entry(frames, member[frames.clip]) | {"intervals": _intervals(protocol, by_clip[member], seed)}
            for game, member in of_game.items()
        },
        "clips": {clip.id: _entry(frames, frames.clip == number) for number, clip in enumerate(index.clips)},
        "visibility": {
            str(kind): _entry(frames, frames.visibility == kind) for kind in np.unique(index.visibility[index.visibility != NO_LABEL])
        },
    }


def _frames(protocol: Protocol, predictions: Predictions, index: ClipIndex) -> _Frames:
    """Puts all clips' frames that have a label one behind the other."""
    parts: list[tuple[NDArray[Any], ...]] = []
    is_ranked = True
    for number, clip in enumerate(index.clips):
        rows, found = index.rows(clip), predictions.clips[clip.id]
        labelled = index.visibility[rows] != NO_LABEL
        truth, visibility = index.xy_px[rows][labelled].astype(np.float64), index.visibility[rows][labelled]
        xy_px, visible, value = found.xy_px[labelled], found.visible[labelled], found.score[labelled]
        outcomes = functools.partial(outcome_of_frames, protocol, xy_px, truth_xy_px=truth, visibility=visibility, size_wh=clip.size_wh)
        right = outcomes(detected=np.ones(len(visible), np.bool_)) == TP
        times = frame_weights(protocol, clip.length)[labelled]
        is_ranked &= not np.isnan(value[visible]).any()
        columns = (np.full(len(visible), number), visibility, truth, xy_px, value, outcomes(detected=visible), right)
        parts.append(tuple(np.repeat(column, times, axis=0) for column in columns))
    joined: Any = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    return _Frames(protocol, is_ranked, *joined)


def _counts(frames: _Frames, chosen: NDArray[np.bool_]) -> list[int]:
    """In the order of `Counts`."""
    counts: list[int] = np.bincount(frames.outcome[chosen], minlength=5).tolist()
    return counts


def _entry(frames: _Frames, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """The scores are None where the protocol counts no frame."""
    counts = Counts(*_counts(frames, chosen))
    found = asdict(scores_of(frames.protocol, counts))
    off = pixel_error(frames.xy_px[chosen], frames.truth_xy_px[chosen], frames.outcome[chosen])
    return (
        asdict(counts)
        | (found if chosen.any() else dict.fromkeys(found))
        | {"ap": _average_precision(frames, chosen), "error_px": None if off is None else asdict(off)}
    )


def _average_precision(frames: _Frames, chosen: NDArray[np.bool_]) -> float | None:
    """None where a claimed ball has no score."""
    if not frames.is_ranked:
        return None
    ball = np.isin(frames.visibility[chosen], frames.protocol.ball)
    candidate = ~np.isnan(frames.score[chosen]) & ~np.isnan(frames.xy_px[chosen, 0])
    return average_precision(frames.right[chosen][candidate], frames.score[chosen][candidate], int(ball.sum()))


def _intervals(protocol: Protocol, by_clip: NDArray[np.int64], seed: int) -> dict[str, list[float] | None]:
    """The 95 % intervals over the clips whose (clips, 5) counts these are, from the draws in which the score is defined."""

    def statistic(name: str) -> Callable[[NDArray[np.int64]], float]:
        return lambda drawn: float(getattr(scores_of(protocol, Counts(*by_clip[drawn].sum(axis=0).tolist()), math.nan), name))

    found = {name: bootstrap(len(by_clip), statistic(name), seed) for name in INTERVALS}
    return {name: None if ends is None else list(ends) for name, ends in found.items()}
