"""Scores as text for a terminal of 100 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

NAME_WIDTH = 16
PLACES_IN_A_ROW = 8
LONGEST_NAME = 9
VISIBILITY = {"0": "no ball", "1": "easy", "2": "hard", "3": "hidden"}
LEGEND = (
    "in %: F1 with its interval over clips, precision P, recall R, AP; px: median error of TP, original",
    "FP1: ball there, detection too far off; FP2: detection without a ball; right: share of TP and TN",
)
COUNTS = ("tp", "fp1", "fp2", "tn", "fn")


def scores_table(scores: Mapping[str, Any]) -> str:
    """All protocols side by side, then the F1 of each game and the share of right frames by the label's visibility.

    Args:
        scores: as `evaluation.scores.score` gives them.

    Returns:
        Lines of at most 100 characters; what does not fit stands in scores.json alone.
    """
    protocols = scores["protocols"]
    games = list(next(iter(protocols.values()))["games"])
    kinds = [kind for kind in VISIBILITY if any(kind in found["visibility"] for found in protocols.values())]
    blocks = [_overview(protocols)]
    if len(games) > 1:
        for start in range(0, len(games), PLACES_IN_A_ROW):
            blocks.append(_f1_by_game(protocols, games[start : start + PLACES_IN_A_ROW]))
    blocks.append(_right_by_visibility(protocols, kinds))
    return "\n\n".join("\n".join(block) for block in [*blocks, LEGEND]) + "\n"


def _overview(protocols: Mapping[str, Any]) -> list[str]:
    width = {name: max(5, *(len(str(found["all"][name])) for found in protocols.values())) + 1 for name in COUNTS}
    head = f"{'protocol':{NAME_WIDTH}}{'F1':>5}{'95 %':>13}{'P':>7}{'R':>7}{'AP':>7}{'px':>6} "
    lines = [head + "".join(f"{name.upper():>{width[name]}}" for name in COUNTS)]
    for name, found in protocols.items():
        whole = found["all"]
        interval = whole["intervals"]["f1"]
        between = "-" if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"
        off = "-" if whole["error_px"] is None else f"{whole['error_px']['median']:.1f}"
        rates = _percent(whole["f1"], 5) + f"{between:>13}" + "".join(_percent(whole[key], 7) for key in ("precision", "recall", "ap"))
        lines.append(f"{name:{NAME_WIDTH}}{rates}{off:>6} " + "".join(f"{whole[key]:>{width[key]}}" for key in COUNTS))
    return lines


def _f1_by_game(protocols: Mapping[str, Any], games: Sequence[str]) -> list[str]:
    lines = [f"{'F1 by game':{NAME_WIDTH}}" + "".join(f"{_short(game):>{LONGEST_NAME + 1}}" for game in games)]
    for name, found in protocols.items():
        lines.append(f"{name:{NAME_WIDTH}}" + "".join(_percent(found["games"][game]["f1"], LONGEST_NAME + 1) for game in games))
    return lines


def _right_by_visibility(protocols: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    lines = [f"{'right by label':{NAME_WIDTH}}" + "".join(f"{VISIBILITY[kind]:>{LONGEST_NAME + 1}}" for kind in kinds)]
    once = next((found for found in protocols.values() if found["declaration"]["window"] == 1), None)
    if once is not None:
        frames = [sum(once["visibility"][kind][name] for name in COUNTS) for kind in kinds]
        lines.append(f"{'(frames)':{NAME_WIDTH}}" + "".join(f"{number:>{LONGEST_NAME + 1}}" for number in frames))
    for name, found in protocols.items():
        shares = [found["visibility"][kind]["accuracy"] for kind in kinds]
        lines.append(f"{name:{NAME_WIDTH}}" + "".join(_percent(share, LONGEST_NAME + 1) for share in shares))
    return lines


def _percent(fraction: float | None, width: int) -> str:
    return f"{'-' if fraction is None else f'{100 * fraction:.1f}':>{width}}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 2]}.."
