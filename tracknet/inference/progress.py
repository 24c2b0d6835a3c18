"""How far a prediction is: a bar where somebody watches a terminal, else a line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_SECONDS = 30.0


class Progress:
    """Counts frames on stderr, with frames/s and, as long as the footage is not longer than it says, the time left.

    Args:
        name: of the footage.
        total: frames that there should be; None where nobody knows.
        done: frames that an earlier run has done.
    """

    def __init__(self, name: str, total: int | None, done: int = 0) -> None:
        self._name, self._total, self._first = name, total, done
        self.frames = done
        self._start = self._last_line = time.monotonic()
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=name, unit="frame", file=sys.stderr, dynamic_ncols=True) if on_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def frames_per_second(self) -> float:
        """Of this run, so far."""
        return (self.frames - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self) -> None:
        """One more frame is done."""
        self.frames += 1
        if self._total is not None and self.frames > self._total:
            self._total = None  # the footage says less than it holds
            if self._bar is not None:
                self._bar.total = None
        if self._bar is not None:
            self._bar.update()
        elif sys.stderr is not None and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            sys.stderr.write(f"{self.line()}\n")

    def line(self) -> str:
        """`rally: 300 of 900 frames, 60.0 frames/s, 0:10 left`."""
        text = f"{self._name}: {self.frames}{f' of {self._total}' if self._total else ''} frames, {self.frames_per_second:.1f} frames/s"
        if not self._total or self.frames == self._first:
            return text
        seconds = round((self._total - self.frames) / self.frames_per_second)
        return f"{text}, {seconds // 60}:{seconds % 60:02d} left"
