"""Tunes the trajectory on one game and shows what it does on others; makes the tables of docs/trajectory.md.

    python benchmarks/tune_trajectory.py --tune MODEL GAMES --show MODEL GAMES [data.root=FOLDER KEY=VALUE ...]

GAMES as `game8,game10`. The model of `--tune` must not have been trained on its games, nor that of `--show` on its own. The detection
threshold is chosen on the tuning games too. What is wanted is more recall at no loss of precision by `tracknetv2` and by `wasb`, so a
setting is as good as the least of these four gains. Leaving out one clip of the tuning games in turn says how much of it is luck, and
compares with simpler rules. Shown are these settings and, beside them, those with the best mean F1. Intervals: 95 %, 1,000 draws of whole
clips, paired.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tracknet.data.build import build_datasets
from tracknet.data.index import NO_LABEL
from tracknet.evaluation.detection import detect, join_detections
from tracknet.evaluation.threshold import choose_threshold, threshold_counts
from tracknet.inference.track import DETECTED, NO_BALL, BallTrack
from tracknet.inference.trajectory import TUNED, TUNED_FPS, TrajectorySettings, refine
from tracknet.metrics.intervals import bootstrap
from tracknet.metrics.outcomes import Counts, count_outcomes, scores_of
from tracknet.metrics.protocols import TRAINING_PROTOCOLS
from tracknet.models import TrackNetModel
from tracknet.utils.config import build_cfg, typed

SPEEDS = (0.039, 0.047, 0.055, 0.063, 0.078)  # 0.047 of 1280 px: 60 px
GAPS = (1, 2, 3, 4, 6)
SUPPORTS = (1.5, 2.0, 2.5, 3.0, 4.0)
RAISES = (0.6, 0.65, 0.7, 0.75, 0.8)
OTHER_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NEVER = 2.0  # no peak has such a score
SCORES = ("precision", "recall", "f1")
SEED, DRAWS = 0, 1000


class LabelledTrack(NamedTuple):
    """A clip: every frame's peak, visible from the threshold on, and its labels."""

    game: str
    track: BallTrack
    xy_px: NDArray[np.float32]
    visibility: NDArray[np.int8]


Rule = Callable[[BallTrack], BallTrack]
Setting = TypeVar("Setting")


def detected_clips(
    model_folder: str, games: Sequence[str], overrides: Sequence[str], threshold: float | None
) -> tuple[list[LabelledTrack], float]:
    """Runs the network over the clips; without a threshold, the one with the best F1 on them."""
    config = typed(build_cfg("tennis", overrides=[*overrides, f"data.split.val_games=[{','.join(games)}]"], dry_run=True))
    dataset = build_datasets(config.data, SEED).val
    index, model, found = dataset.index, TrackNetModel.from_pretrained(model_folder).eval(), []
    for window in range(len(dataset)):
        found.append(detect(model, dataset.batch([(0, window)]), index, torch.device("cpu"), nullcontext)[0])
    detections = join_detections(found)
    if threshold is None:
        threshold = choose_threshold(threshold_counts(index, detections))
        assert threshold is not None, "the network finds no ball"
    xy_px, score = np.zeros((len(index), 2)), np.zeros(len(index))
    xy_px[detections.row], score[detections.row] = detections.xy_px, detections.score
    clips = []
    for clip in index.clips:
        rows = index.rows(clip)
        visible = score[rows] >= threshold
        track = BallTrack(
            frame=np.arange(clip.length),
            time_s=np.arange(clip.length) / TUNED_FPS,
            visible=visible,
            x=xy_px[rows, 0],
            y=xy_px[rows, 1],
            score=score[rows],
            source=np.where(visible, DETECTED, NO_BALL),
            fps=TUNED_FPS,
            size_wh=clip.size_wh,
        )
        clips.append(LabelledTrack(clip.game, track, index.xy_px[rows], index.visibility[rows]))
    return clips, threshold


def count(clips: Sequence[LabelledTrack], rule: Rule) -> NDArray[np.int64]:
    """(clips, protocols, 5) outcomes in the order of `Counts`."""
    counts = np.zeros((len(clips), len(TRAINING_PROTOCOLS), 5), np.int64)
    for c, clip in enumerate(clips):
        track = rule(clip.track)
        labelled = clip.visibility != NO_LABEL
        xy_px = np.stack([track.x, track.y], axis=1)[labelled]
        for p, protocol in enumerate(TRAINING_PROTOCOLS):
            outcome = count_outcomes(
                protocol, xy_px, track.visible[labelled], clip.xy_px[labelled], clip.visibility[labelled], track.size_wh
            )
            counts[c, p] = [outcome.tp, outcome.fp1, outcome.fp2, outcome.tn, outcome.fn]
    return counts


def score(counts: NDArray[np.int64], protocol: int, name: str) -> float:
    """Of counts (5,)."""
    return float(getattr(scores_of(TRAINING_PROTOCOLS[protocol], Counts(*counts.tolist())), name))


def mean_f1(counts: NDArray[np.int64]) -> float:
    """Of (clips, protocols, 5): over all clips, the mean of the protocols."""
    total = counts.sum(axis=0)
    return float(np.mean([score(total[p], p, "f1") for p in range(len(total))]))


def least_gain(counts: NDArray[np.int64], without: NDArray[np.int64]) -> float:
    """What precision or recall gains at least, by either protocol, in per cent; both (clips, protocols, 5)."""
    new, old = counts.sum(axis=0), without.sum(axis=0)
    return min(100 * (score(new[p], p, name) - score(old[p], p, name)) for p in range(len(new)) for name in ("precision", "recall"))


def runs(track: BallTrack, speed: float, gap: int, length: int) -> BallTrack:
    """The simple rule: neighbours near enough make a run, runs shorter than `length` go, shortest first; gaps within a run are filled."""
    visible = track.visible.copy()
    while visible.any():
        row = np.flatnonzero(visible)
        apart, moved_px = np.diff(row), np.hypot(np.diff(track.x[row]), np.diff(track.y[row]))
        run = np.cumsum(np.concatenate([[0], (apart > gap + 1) | (moved_px > speed * track.size_wh[0] * apart)]))
        size = np.bincount(run)
        if size.min() >= length:
            break
        visible[row[run == size.argmin()]] = False
    x, y, row = track.x.copy(), track.y.copy(), np.flatnonzero(visible)
    for start, end in itertools.pairwise(row):
        near = np.hypot(x[end] - x[start], y[end] - y[start]) <= speed * track.size_wh[0] * (end - start)
        if 1 < end - start <= gap + 1 and near:
            between = np.arange(start + 1, end)
            x[between], y[between] = (np.interp(between, [start, end], values[[start, end]]) for values in (x, y))
            visible[between] = True
    return BallTrack(track.frame, track.time_s, visible, x, y, track.score, track.source, track.fps, track.size_wh)


def tune(clips: list[LabelledTrack], name: str, rules: Iterable[tuple[Setting, Rule]], by_f1: bool = False) -> Setting:
    """Prints and returns the best of these settings, and prints what is left when each clip is scored with the best of the other clips."""
    without = count(clips, _as_it_is)
    counts = {setting: count(clips, rule) for setting, rule in rules}

    def value(setting: Setting, of: NDArray[np.intp]) -> float:
        return mean_f1(counts[setting][of]) if by_f1 else least_gain(counts[setting][of], without[of])

    everywhere = np.arange(len(clips))
    best = max(counts, key=lambda setting: value(setting, everywhere))
    left_out = np.zeros_like(without)
    for c in everywhere:
        others = everywhere[everywhere != c]
        left_out[c] = counts[max(counts, key=lambda setting: value(setting, others))][c]
    gains = " | ".join(f"{_brief(counts_)} | {least_gain(counts_, without):+.1f}" for counts_ in (counts[best], left_out))
    print(f"| {name} | {len(counts)} | {gains} | {best} |")
    return best


def _as_it_is(track: BallTrack) -> BallTrack:
    return track


def _brief(counts: NDArray[np.int64]) -> str:
    total = counts.sum(axis=0)
    return " | ".join(["/".join(f"{100 * score(total[p], p, name):.1f}" for name in SCORES) for p in range(len(total))])


def settings_grid(raises: Sequence[float]) -> Iterable[tuple[TrajectorySettings, Rule]]:
    """All combinations with these values of `raise_score`."""
    for values in itertools.product(SPEEDS, GAPS, SUPPORTS, raises):
        settings = TrajectorySettings(*values)
        yield settings, partial(refine, settings=settings)


def show(clips: list[LabelledTrack], settings: TrajectorySettings) -> None:
    """Prints the scores without and with the trajectory, per game and over all, and their paired difference; then the counts."""
    without, refined = count(clips, _as_it_is), count(clips, partial(refine, settings=settings))
    games = list(dict.fromkeys(clip.game for clip in clips))
    places = [(game, np.array([clip.game == game for clip in clips])) for game in games] + [("all", np.ones(len(clips), np.bool_))]
    print(f"\n{settings}\n\n| protocol | games | score | without | with | difference |\n|---|---|---|---|---|---|")
    for p, protocol in enumerate(TRAINING_PROTOCOLS):
        for (place, chosen), name in itertools.product(places, SCORES):
            print(f"| {protocol.name} | {place} | {name} | {_cells(without[chosen, p], refined[chosen, p], p, name)} |")
    for p, protocol in enumerate(TRAINING_PROTOCOLS):
        for label, counts in (("without", without), ("with", refined)):
            print(f"{protocol.name} {label}: {Counts(*counts[:, p].sum(axis=0).tolist())}")


def _cells(without: NDArray[np.int64], refined: NDArray[np.int64], p: int, name: str) -> str:
    """Without, with and their difference in per cent, each with its interval."""

    def without_of(drawn: NDArray[np.int64]) -> float:
        return 100 * score(without[drawn].sum(axis=0), p, name)

    def with_of(drawn: NDArray[np.int64]) -> float:
        return 100 * score(refined[drawn].sum(axis=0), p, name)

    def difference_of(drawn: NDArray[np.int64]) -> float:
        return with_of(drawn) - without_of(drawn)

    cells = []
    for statistic, sign in ((without_of, ""), (with_of, ""), (difference_of, "+")):
        interval = bootstrap(len(without), statistic, SEED, DRAWS)
        assert interval is not None, "a game of one clip has no interval"
        cells.append(f"{statistic(np.arange(len(without))):{sign}.1f} ({interval[0]:{sign}.1f} to {interval[1]:{sign}.1f})")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", nargs=2, required=True, metavar=("MODEL", "GAMES"))
    parser.add_argument("--show", nargs=2, required=True, metavar=("MODEL", "GAMES"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    for folder in (arguments.tune[0], arguments.show[0]):
        if not (Path(folder) / "config.json").is_file():
            parser.error(f"{folder} is no model folder: it has no config.json")
    clips, threshold = detected_clips(arguments.tune[0], arguments.tune[1].split(","), arguments.overrides, None)
    print(f"threshold {threshold} chosen on {arguments.tune[1]}\n")
    print("precision/recall/F1 in per cent by " + ", ".join(protocol.name for protocol in TRAINING_PROTOCOLS) + ", and the least gain")
    print("| rule | settings tried | best | | gain | clip left out | | gain | best setting |\n|---|---|---|---|---|---|---|---|---|")
    tune(clips, "no trajectory", [("none", _as_it_is)])
    tune(clips, "simple: runs", [(values, partial(_runs_of, values)) for values in itertools.product(SPEEDS, GAPS, (2, 3, 4, 5))])
    tune(clips, "paths, none raised", settings_grid([NEVER]))
    best = tune(clips, "paths", settings_grid(RAISES))
    best_f1 = tune(clips, "paths, by F1", settings_grid(RAISES), by_f1=True)
    print(f"\nTUNED is {'the best' if best == TUNED else f'another: {TUNED}'}")
    show_other_thresholds(clips)
    shown, _ = detected_clips(arguments.show[0], arguments.show[1].split(","), arguments.overrides, threshold)
    for settings in (TUNED, best_f1):
        show(shown, settings)


def show_other_thresholds(clips: list[LabelledTrack]) -> None:
    """Prints what TUNED does where the detection threshold is another."""
    print("\n| threshold | without | | with | |\n|---|---|---|---|---|")
    for threshold in OTHER_THRESHOLDS:
        moved = []
        for clip in clips:
            visible = clip.track.score >= threshold
            moved.append(clip._replace(track=replace(clip.track, visible=visible, source=np.where(visible, DETECTED, NO_BALL))))
        print(f"| {threshold} | {_brief(count(moved, _as_it_is))} | {_brief(count(moved, refine))} |")


def _runs_of(values: tuple[float, int, int], track: BallTrack) -> BallTrack:
    return runs(track, *values)


if __name__ == "__main__":
    main()
