"""How well a network finds the ball: whole pictures in, integer counts per game and protocol out."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tracknet.data.batch import Batch, as_stored
from tracknet.data.index import NO_LABEL, ClipIndex
from tracknet.errors import UserError
from tracknet.evaluation.forward import logits_of
from tracknet.geometry import resize_points
from tracknet.heatmap import decode_peaks
from tracknet.metrics.outcomes import Counts, count_outcomes
from tracknet.metrics.protocols import TRAINING_PROTOCOLS, Protocol

XY_DECIMALS = 3
SCORE_DECIMALS = 6


@dataclass(frozen=True)
class Detections:
    """The peak of some frames of a data set, M of them.

    They have the decimals that a file of predictions has, so that training, the file and the scores agree to the integer.

    Attributes:
        row: (M,) int64, the frames' rows in the `ClipIndex`.
        xy_px: (M, 2) float64, original px, of `XY_DECIMALS` decimals.
        score: (M,) float64, the peak's probability, 0 to 1, of `SCORE_DECIMALS` decimals.
    """

    row: NDArray[np.int64]
    xy_px: NDArray[np.float64]
    score: NDArray[np.float64]


@dataclass(frozen=True)
class Preview:
    """A frame with what the network made of it.

    Attributes:
        row: the frame's row in the `ClipIndex`.
        frame: (H, W, 3) uint8 RGB, as the network got it.
        probability: (h, w) float32, 0 to 1.
        xy_input: (2,) float64, the peak, input px.
        score: the peak's probability.
    """

    row: int
    frame: NDArray[np.uint8]
    probability: NDArray[np.float32]
    xy_input: NDArray[np.float64]
    score: float


@torch.no_grad()
def detect(
    model: nn.Module,
    batch: Batch,
    index: ClipIndex,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    preview_windows: Collection[int] = (),
) -> tuple[Detections, list[Preview]]:
    """Runs the network over windows and keeps the peak of each frame that a window answers for.

    Args:
        model: `(frames, background, dropout_keys) -> logits`, in evaluation mode.
        batch: at least one window.
        index: of the data set that the windows come from.
        device: to compute on.
        autocast: the precision of the forward pass.
        preview_windows: from these (by sample index) the first counted frame is returned as a preview.

    Raises:
        UserError: the network's output is not finite.
    """
    with autocast():
        logits = logits_of(model, batch.frames.to(device), None if batch.background is None else batch.background.to(device))
    xy_input, score = _peaks(logits, input_wh=(batch.frames.shape[-1], batch.frames.shape[-2]))
    windows = enumerate(batch.sample_index.tolist())
    previews = [_preview(batch, position, logits, xy_input, score) for position, window in windows if window in preview_windows]
    return _counted(batch, xy_input, score, index), previews


def join_detections(parts: Sequence[Detections]) -> Detections:
    """All frames of the parts, in their order."""
    none = Detections(np.zeros(0, np.int64), np.zeros((0, 2)), np.zeros(0))
    return Detections(*(np.concatenate(columns) for columns in zip(*(astuple(part) for part in [none, *parts]), strict=True)))


def _peaks(logits: Tensor, input_wh: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Each frame's peak: (B, T, 2) float64 in input px, and its score (B, T); in host memory."""
    xy_heatmap, score = (value.cpu() for value in decode_peaks(logits))
    if not torch.isfinite(score).all():
        raise UserError("evaluation: the network's output is not finite; lower training.optimizer.lr or set training.precision=fp32")
    return resize_points(xy_heatmap.double(), (logits.shape[-1], logits.shape[-2]), input_wh), score


def _counted(batch: Batch, xy_input: Tensor, score: Tensor, index: ClipIndex) -> Detections:
    """The peaks of the frames that the batch answers for, in their clips' original px."""
    input_wh = (batch.frames.shape[-1], batch.frames.shape[-2])
    row, xy = batch.frame_row[batch.counted].numpy(), xy_input[batch.counted].numpy()
    clip_of = index.clip_of_row[row]
    xy_px = np.empty_like(xy)
    for number in np.unique(clip_of):
        of_clip = clip_of == number
        xy_px[of_clip] = resize_points(xy[of_clip], input_wh, index.clips[number].size_wh)
    return Detections(row, np.round(xy_px, XY_DECIMALS), np.round(score[batch.counted].double().numpy(), SCORE_DECIMALS))


def _preview(batch: Batch, window: int, logits: Tensor, xy_input: Tensor, score: Tensor) -> Preview:
    frame = int(torch.nonzero(batch.counted[window])[0])
    return Preview(
        row=int(batch.frame_row[window, frame]),
        frame=as_stored(batch.frames)[window, frame].clone().numpy(),  # a view would hold the whole batch until it is drawn
        probability=torch.sigmoid(logits[window, frame].float()).cpu().numpy(),
        xy_input=xy_input[window, frame].clone().numpy(),
        score=float(score[window, frame]),
    )


def count_by_game(
    index: ClipIndex, detections: Detections, threshold: float, protocols: Sequence[Protocol] = TRAINING_PROTOCOLS
) -> NDArray[np.int64]:
    """Outcomes of the detected frames that have a label.

    Args:
        index: the labels.
        detections: each frame at most once.
        threshold: a peak at or above it is a detection.
        protocols: the rules.

    Returns:
        (protocols, games, 5) counts in the order of `Counts`; games as in `index.games`. Counts of several ranks may be added.
    """
    counts = np.zeros((len(protocols), len(index.games), 5), dtype=np.int64)
    clip_of = index.clip_of_row[detections.row]
    labeled = index.visibility[detections.row] != NO_LABEL
    for number in np.unique(clip_of):
        clip = index.clips[number]
        of_clip = (clip_of == number) & labeled
        row = detections.row[of_clip]
        detected = detections.score[of_clip] >= threshold
        for p, protocol in enumerate(protocols):
            outcome = count_outcomes(protocol, detections.xy_px[of_clip], detected, index.xy_px[row], index.visibility[row], clip.size_wh)
            counts[p, index.games.index(clip.game)] += [outcome.tp, outcome.fp1, outcome.fp2, outcome.tn, outcome.fn]
    return counts


def named_scores(counts: NDArray[np.int64], games: Sequence[str], protocols: Sequence[Protocol] = TRAINING_PROTOCOLS) -> dict[str, float]:
    """Counts as metrics: `val/f1_<protocol>` over all games (counts added, not scores averaged), `val/<game>/f1_<protocol>` for each.

    Args:
        counts: (protocols, games, 5) as `count_by_game` gives them.
        games: their names.
        protocols: their rules.

    Returns:
        For each protocol, over all games and per game: f1, precision, recall (fractions 0 to 1) and tp, fp1, fp2, tn, fn.
    """
    scores: dict[str, float] = {}
    for p, protocol in enumerate(protocols):
        places = {"val": counts[p].sum(axis=0)} | {f"val/{game}": counts[p, g] for g, game in enumerate(games)}
        for place, values in places.items():
            outcome = Counts(*(int(value) for value in values))
            named = {"f1": outcome.f1, "precision": outcome.precision, "recall": outcome.recall}
            named |= {"tp": outcome.tp, "fp1": outcome.fp1, "fp2": outcome.fp2, "tn": outcome.tn, "fn": outcome.fn}
            scores |= {f"{place}/{key}_{protocol.name}": value for key, value in named.items()}
    return scores
