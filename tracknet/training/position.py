"""How far a run has come, counted so that another number of processes can go on from there."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

LARGEST_COUNT = 2**53  # beyond it a float is no longer exact


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: updates made.
        epoch: the present one, from 0.
        windows_seen: windows of the present epoch that all processes together have seen; 0 at its start.
        windows_per_epoch: of the data set; 0 before the first launch.
        windows_per_step: of all processes together, at the last launch; 0 before the first one.
        evaluated_step: updates made at the last evaluation.
        best_f1: highest val/f1_tracknetv2 so far; -1 before the first evaluation.
        patience_f1: what an evaluation must exceed by `early_stopping.min_delta` to count as better; -1 before the first one.
        stale_evaluations: evaluations since one was.
        finished: whether the run ended by itself, by its length or by early stopping.
    """

    step: int = 0
    epoch: int = 0
    windows_seen: int = 0
    windows_per_epoch: int = 0
    windows_per_step: int = 0
    evaluated_step: int = 0
    best_f1: float = -1.0
    patience_f1: float = -1.0
    stale_evaluations: int = 0
    finished: bool = False


def is_saved_position(value: object) -> bool:
    """Whether a value out of a file is a `Position` as JSON."""
    if not isinstance(value, dict) or set(value) != {entry.name for entry in fields(Position)}:
        return False
    counts = [value[entry.name] for entry in fields(Position) if entry.type is int]
    scores = [value["best_f1"], value["patience_f1"]]
    return (
        all(type(count) is int and 0 <= count < LARGEST_COUNT for count in counts)
        and value["windows_seen"] <= value["windows_per_epoch"]  # beyond it an epoch would have no step, and never end
        and value["evaluated_step"] <= value["step"]
        and all(isinstance(score, int | float) and -1 <= score <= 1 for score in scores)
        and isinstance(value["finished"], bool)
    )


def from_format_1(saved: Mapping[str, Any], windows_per_epoch: int, windows_per_step: int) -> dict[str, Any]:
    """The position in a checkpoint of format 1, which counted in steps of always the same number of processes.

    Args:
        saved: with `steps_per_epoch`, and without what counts windows.
        windows_per_epoch: of the launch that resumes it, which must have as many steps per epoch.
        windows_per_step: of the same.
    """
    rest = {name: value for name, value in saved.items() if name != "steps_per_epoch"}
    epoch, steps = divmod(saved["step"], max(1, saved["steps_per_epoch"]))
    counted = {"windows_seen": steps * windows_per_step, "windows_per_epoch": windows_per_epoch, "windows_per_step": windows_per_step}
    return rest | {"epoch": epoch} | counted
