"""What a run folder tells of a run: its metrics over the steps, its configuration and its launches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracknet.errors import UserError
from tracknet.utils.run_directory import RunDirectory


@dataclass(frozen=True)
class Series:
    """One metric over the steps: where a run was resumed, its last word on each step.

    Attributes:
        step: (n,) int64, rising.
        value: (n,) float64, finite.
    """

    step: NDArray[np.int64]
    value: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder has it.

    Attributes:
        path: the folder.
        rows: of `metrics.jsonl`, by rising step; a step that stands there twice (logged and evaluated) is one row.
        info: `run.json`; empty lists and nulls where there is none.
        config_yaml: the text of `config.yaml`.
        torn_lines: lines of `metrics.jsonl` that are no metrics, as a crash leaves them.
    """

    path: Path
    rows: Sequence[Mapping[str, Any]]
    info: Mapping[str, Any]
    config_yaml: str
    torn_lines: int

    def series(self, name: str) -> Series:
        """The finite values of a metric; none where the run never logged it."""
        values = [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]
        return Series(np.array([step for step, _ in values], np.int64), np.array([value for _, value in values], np.float64))

    def names(self, start: str) -> list[str]:
        """The metrics whose names begin so, in the order in which they first came."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name.startswith(start)))


def read_history(run_folder: Path) -> RunHistory:
    """Reads a run folder.

    Raises:
        UserError: it is none, has no metrics yet, or a file in it cannot be read.
    """
    run = RunDirectory(run_folder)
    if not run.config_file.is_file() or not run.metrics_file.is_file():
        lacks = run.config_file.name if not run.config_file.is_file() else run.metrics_file.name
        hint = "give the folder of a run, outputs/logs/run-...; a checkpoint's folder is another one"
        raise UserError(f"{run_folder}: has no {lacks}; {hint}")
    try:
        lines = run.metrics_file.read_bytes().splitlines()
        config_yaml = run.config_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{run_folder}: cannot be read ({' '.join(str(error).split())})") from error
    rows: dict[int, dict[str, Any]] = {}
    torn_lines = 0
    for line in lines:
        row = _row(line)
        if row is None:
            torn_lines += 1
        else:
            rows.setdefault(row["step"], {}).update(row)
    if not rows:
        raise UserError(f"{run.metrics_file}: holds no metrics yet; the run has to make its first steps before there is anything to report")
    return RunHistory(run_folder, [rows[step] for step in sorted(rows)], run.read_run_info(), config_yaml, torn_lines)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
