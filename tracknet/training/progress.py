"""Progress of the training loop: a bar on a terminal, plain lines elsewhere; `train.log` has the lines in both cases."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from tqdm import tqdm

from tracknet.utils.logging import FILE_ONLY

log = logging.getLogger("tracknet")


class Progress:
    """Shows step, loss, learning rate, samples per second and the time left.

    Args:
        total_steps: step at which the run ends.
        start_step: steps done before this launch; they count as progress but not for the rate.
        enabled: false on all ranks but the main one; then nothing is shown.
        log_every_steps: a plain line stands at every multiple of this, and at the end.
    """

    def __init__(self, total_steps: int, start_step: int, enabled: bool, log_every_steps: int) -> None:
        self._total, self._start, self._enabled, self._every = total_steps, start_step, enabled, log_every_steps
        self._values: dict[str, float] = {}
        self._began = self._interval_began = monotonic()
        self._interval_samples = 0
        self._rate = 0.0
        self._bar: Any = None
        if enabled and _has_room_for_a_bar():
            self._bar = tqdm(total=total_steps, initial=start_step, file=sys.stderr, unit="step", dynamic_ncols=True)

    def update(self, step: int, *, loss: float, lr: float, samples: int) -> None:
        """Call after each step.

        Args:
            step: number of steps done.
            loss: of this step.
            lr: learning rate of this step.
            samples: windows of this step, of all ranks together.
        """
        if not self._enabled:
            return
        self._interval_samples += samples
        line_is_due = step % self._every == 0 or step == self._total
        if line_is_due:
            self._measure_rate()
        if self._bar is not None:
            rate = [f"{self._rate:.3g} samples/s"] if self._rate else []
            self._bar.set_postfix_str("  ".join([f"loss {loss:.4f}", *rate, *self._extra()]), refresh=False)
            self._bar.update(step - self._bar.n)
        if line_is_due:
            parts = [f"step {step}/{self._total}", f"loss {loss:.4f}", f"lr {lr:.1e}", f"{self._rate:.3g} samples/s", *self._extra()]
            log.info("  ".join([*parts, f"left {self._time_left(step)}"]), extra={FILE_ONLY: self._bar is not None})

    @property
    def samples_per_s(self) -> float:
        """Windows of all ranks per second between the last two plain lines, pauses left out; 0 before the first one."""
        return self._rate

    def show(self, **values: float) -> None:
        """Values to show from now on beside the loss, for example `show(F1=0.83)` after an evaluation."""
        self._values.update(values)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around an evaluation: its time counts for the time left, but not for the samples per second."""
        began = monotonic()
        try:
            yield
        finally:
            self._interval_began += monotonic() - began

    def close(self) -> None:
        """Leaves the bar as it stands, on its own line."""
        if self._bar is not None:
            self._bar.close()

    def _measure_rate(self) -> None:
        now = monotonic()
        self._rate = self._interval_samples / max(now - self._interval_began, 1e-9)
        self._interval_began, self._interval_samples = now, 0

    def _extra(self) -> list[str]:
        return [f"{name} {value:.3f}" for name, value in self._values.items()]

    def _time_left(self, step: int) -> str:
        """At the mean pace of this launch, pauses included, as h:mm:ss."""
        seconds = round((monotonic() - self._began) / max(step - self._start, 1) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _has_room_for_a_bar() -> bool:
    """Whether stderr is a terminal that knows its width; some containers' terminals say 0, where a bar would be empty."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
