"""Runs every benchmark, one after the other, and writes docs/benchmarks.md: `uv run python benchmarks/all.py`, about half an hour.

Each group runs in a process of its own. `--only GROUP ...` runs some and keeps what docs/benchmarks.json has of the others.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from footage import NoFootageError
from ratios import Row, Spread

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.json"
GROUPS = {
    "reading": "From the disk to the batch",
    "training": "The step",
    "predicting": "From the video to the ball",
    "starting": "Start-up",
    "index": "A data set of a million frames",
}
INTRODUCTION = """# Benchmarks

Written by `{command}`; the figures stand in `docs/benchmarks.json` too. Absolute times mean nothing on
shared machines, so every figure is a ratio of medians: both sides take turns in one run. In brackets its 95 % interval (bootstrap over
the pairs; where there are fewer than six, from the least to the most of the pairs' own ratios) and the number of pairs.
What was found on the way there is in [performance.md](performance.md).
"""


def measured(group: str) -> list[dict[str, Any]]:
    """The rows of one group, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        subprocess.run([sys.executable, __file__, "--rows-of", group, "--into", str(path)], check=True)
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def write_rows(group: str, path: Path) -> None:
    """Measures a group here."""
    try:
        rows: list[Row] = importlib.import_module(group).rows()
    except NoFootageError as error:
        sys.exit(f"{group}: {error}")
    path.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def where() -> str:
    """The machine and the versions, in a line."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    names = ("torch", "accelerate", "transformers", "av", "opencv-python-headless", "pillow", "onnxruntime")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0))
    return f"{datetime.date.today()}, {model or platform.machine()}, {cores} cores, Python {platform.python_version()}, {versions}"


def page(figures: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [INTRODUCTION.format(command="uv run python benchmarks/all.py")]
    for group, title in GROUPS.items():
        if group not in figures:
            continue
        parts.append(f"## {title}\n`uv run python benchmarks/all.py --only {group}`. {figures[group]['where']}.\n")
        parts.append("| what | against | target | measured | in this run |\n|---|---|---|---|---|")
        for row in figures[group]["rows"]:
            spread = Spread(**row["measured"])
            parts.append(f"| {row['what']} | {row['against']} | {row['target']} | **{spread}** | {row['remark']} |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rows-of", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows_of:
        write_rows(arguments.rows_of, arguments.into)
        return
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    for group in arguments.only:
        print(f"{group} ...", flush=True)
        figures[group] = {"where": where(), "rows": measured(group)}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")  # a group that fails leaves those before it
    PAGE.write_text(page(figures), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
