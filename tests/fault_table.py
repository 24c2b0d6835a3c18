"""Counts the trials of `uv run pytest -m faults`: how many faults were made, how many runs survived them, how many were lost."""

import os
import random
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN = "<!-- the fault table begins: `uv run pytest -m faults` writes what stands between this line and its other end -->"
END = "<!-- the fault table ends -->"
SEED_VARIABLE = "FAULTS_SEED"

# The whole set, in the order of the page: each row with the fewest trials that make it whole.
WHOLE = {
    "SIGKILL at a random moment of saving": 60,
    "SIGKILL before each call that changes the disk": 70,
    "SIGKILL after each such call, and halfway through each write": 70,
    "each such call fails once (EIO)": 70,
    "the disk is full from each such call on (ENOSPC)": 70,
    "a full tmpfs, at each page of each file": 20,
    "a bit flips on its way to the disk, in each write": 20,
    "two processes save in one folder": 10,
    "one flipped byte in each file": 200,
    "a file cut short or emptied": 60,
    "a file gone, or something else in its place": 30,
    "a file of another checkpoint in its place": 6,
    "`last` points nowhere, astray, or is no link": 17,
    "saving goes on beside a damaged checkpoint": 6,
    "a hostile folder: one line, and none of its code is run": 40,
    "`kill -9` of a run on real tennis, then `--resume auto`: the weights of the run left alone, bit for bit": 5,
    "SIGTERM or Ctrl-C to a rank or to the launcher: all ranks save one step and leave with 75 or 130 within 10 s, and `auto` goes on": 40,
    "a second Ctrl-C: all leave at once with 130": 7,
    "two machines: a worker killed": 2,
    "two machines: the second killed whole, and started again": 1,
    "two machines: the first killed whole, both started again": 1,
    "two machines: the cable cut for 20 s": 1,
    "two machines: the second gone without a word, and started again": 1,
}


class FaultTable:
    """Rows of trials, filled by the tests of the mark `faults` through the fixture of that name.

    Attributes:
        seed: Of all random moments and places; another one in every session, unless the variable FAULTS_SEED sets it.
        losses: The lost trials, in words.
    """

    def __init__(self) -> None:
        self.seed = int(os.environ.get(SEED_VARIABLE) or secrets.randbelow(2**32))
        self.losses: list[str] = []
        self._survived: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._longest_s: dict[str, float] = {}

    def random(self, name: str) -> random.Random:
        """Random numbers of a test of this name: the same whichever other tests run."""
        return random.Random(f"{self.seed} {name}")

    def record(self, row: str, survived: bool, note: str = "", took_s: float | None = None) -> None:
        """Counts one trial of `row`. A lost one fails its test, but only at the test's end, so that the trials after it count too.

        Args:
            row: The fault in a few words, as the page shall show it.
            survived: True where the run kept its promise under this fault.
            note: What this trial did (a file, a moment), to find it again where it is lost.
            took_s: Until the processes had ended; the page has the longest of the row.
        """
        if took_s is not None:
            self.took(row, took_s)
        (self._survived if survived else self._lost)[row] += 1
        if not survived:
            self.losses.append(f"{row}: {note}" if note else row)

    @contextmanager
    def trial(self, row: str, note: str = "") -> Iterator[None]:
        """One trial, for a test that is one: lost where something is raised inside, which then goes on its way."""
        try:
            yield
        except BaseException as error:
            self.record(row, False, f"{note}: {error}")
            raise
        self.record(row, True, note)

    def took(self, row: str, seconds: float) -> None:
        """Notes how long a trial's processes took to end."""
        self._longest_s[row] = max(seconds, self._longest_s.get(row, 0.0))

    def trials(self, row: str) -> int:
        return self._survived[row] + self._lost[row]

    def is_whole(self) -> bool:
        """True where every row of the page has had all its trials, so that the table may replace the page's."""
        return all(self.trials(row) >= fewest for row, fewest in WHOLE.items())

    def markdown(self) -> str:
        """The table and the seed; empty where nothing was recorded."""
        recorded = self._survived.keys() | self._lost.keys()
        if not recorded:
            return ""
        rows = [row for row in WHOLE if row in recorded] + sorted(recorded - WHOLE.keys())
        lines = [f"| {row} | {self.trials(row)} | {self._survived[row]} | {self._lost[row]} | {self._longest(row)} |" for row in rows]
        head = ["| fault | trials | survived | lost | ended within, s |", "|---|---:|---:|---:|---:|"]
        return "\n".join([*head, *lines, "", f"Random moments and places: `{SEED_VARIABLE}={self.seed}`.", ""])

    def _longest(self, row: str) -> str:
        return f"{self._longest_s[row]:.1f}" if row in self._longest_s else ""

    def write(self, page: Path = PAGE) -> None:
        """Puts the table between the page's two marks and leaves the rest of the page as it is."""
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{page} lacks the two marks of the fault table:\n{BEGIN}\n{END}")
        page.write_text(f"{before}{BEGIN}\n{self.markdown()}{END}{after}", encoding="utf-8")
