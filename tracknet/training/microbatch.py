"""How many samples of a step go through the network at once: less when memory runs out, more when it has long been enough."""

import math
from collections.abc import Mapping
from typing import Any

from tracknet.errors import UserError
from tracknet.schema.training import TrainingConfig

MAX_DOUBLINGS = 20  # of the wait for a size that fails and fails


class MicroBatchSize:
    """Samples per micro-batch, the same on all ranks because all ranks tell it the same.

    The sizes are a ladder: the start, then each divided by `mb_backoff_factor`, down to `min_micro_batch_size`. With K =
    `mb_growth_steps`, the next larger size is tried after K steps without a retry; one that failed n times in a row waits
    K * 2^(n-1) steps. Where a trial passes, memory has grown, and the next size is tried K/8 steps later unless it failed more than once.
    A size that lasted for K steps is proven: its failures and those of smaller sizes are forgotten, larger ones wait for K steps again.
    Hence no size fails more than once in K steps, and where the limit of memory stays, ever more rarely.
    """

    def __init__(self, start: int, config: TrainingConfig, *, evaluation: bool = False) -> None:
        """Begins at the largest size.

        Args:
            start: the size to begin with and never to exceed.
            config: the section `training`.
            evaluation: whether it is for the evaluation, whose start another setting lowers.
        """
        self._config = config
        self._start_key = "training.evaluation.batch_size" if evaluation else "training.micro_batch_size"
        self._where = "in the evaluation, " if evaluation else ""
        self._sizes = _ladder(start, config)
        self._rung = 0
        self._failures = [0] * len(self._sizes)
        self._clean_steps = 0
        self._climbing = False  # since the last trial no memory ran out
        self._trials = 0  # since the last clean step: a failed one is no retry that `oom_retries` counts, for the run did not need it

    @property
    def value(self) -> int:
        """The size to use now."""
        return self._sizes[self._rung]

    def back_off(self, retries: int, tried: int | None = None) -> None:
        """Takes the next smaller size after memory ran out.

        Args:
            retries: how often this step was tried again already.
            tried: samples of the largest micro-batch there was; None is the present size. A small batch may have had fewer.

        Raises:
            UserError: the settings allow no further attempt; the message says what to lower.
        """
        config = self._config
        tried = self.value if tried is None else min(tried, self.value)
        at_failure = f"out of memory {self._where}at micro-batches of {tried}"
        if not config.adaptive_micro_batch:
            raise UserError(f"{at_failure}; lower {self._start_key}, or set training.adaptive_micro_batch=true")
        if retries >= config.oom_retries + self._trials:
            raise UserError(
                f"{at_failure} after {retries} {'retry' if retries == 1 else 'retries'} (training.oom_retries={config.oom_retries});"
                f" start lower with {self._start_key}, or allow more retries"
            )
        if tried <= self._sizes[-1]:
            raise UserError(
                f"{at_failure}, the smallest that training.min_micro_batch_size={config.min_micro_batch_size} allows;"
                " lower it if it is above 1, else data.sequence.length, data.preprocess.resize, data.augment.crop or the model"
            )
        while self.value >= tried:
            self._failures[self._rung] += 1
            self._rung += 1
        self._clean_steps, self._climbing = 0, False

    def passed(self, steps: int = 1, tried: int | None = None) -> bool:
        """Counts steps that needed no retry.

        Args:
            steps: how many.
            tried: samples of the largest micro-batch in them; None is the present size. What a smaller size has room for shows nothing.

        Returns:
            whether the next step tries a larger size.
        """
        every_steps = self._config.mb_growth_steps
        shows_nothing = tried is not None and tried <= max(self._sizes[self._rung + 1 :], default=0)
        if every_steps == 0 or not self._config.adaptive_micro_batch or shows_nothing:
            return False
        self._clean_steps += steps
        self._trials = 0
        if self._clean_steps >= every_steps:
            if self._failures[self._rung]:  # it once failed and lasts now: memory has grown
                self._failures[: self._rung] = [min(count, 1) for count in self._failures[: self._rung]]
            self._failures[self._rung :] = [0] * (len(self._sizes) - self._rung)
        if self._rung == 0 or self._clean_steps < self._wait_steps():
            return False
        self._rung -= 1
        self._clean_steps, self._climbing, self._trials = 0, True, 1
        return True

    def _wait_steps(self) -> int:
        """Clean steps before the next larger size is tried."""
        every_steps, failures = self._config.mb_growth_steps, self._failures[self._rung - 1]
        if self._climbing and failures <= 1:
            return math.ceil(every_steps / 8)
        return every_steps * int(2 ** min(MAX_DOUBLINGS, max(0, failures - 1)))

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "sizes": list(self._sizes),
            "value": self.value,
            "failures": list(self._failures),
            "clean_steps": self._clean_steps,
            "climbing": self._climbing,
            "trials": self._trials,
        }

    def restore(self, saved: Mapping[str, Any]) -> bool:
        """Takes everything back from `as_json`; under settings that make other sizes, it stays at the start, as the settings say.

        Returns:
            whether it took it.
        """
        if saved["sizes"] != self._sizes:
            return False
        self._rung = self._sizes.index(saved["value"])
        self._failures, self._clean_steps = list(saved["failures"]), saved["clean_steps"]
        self._climbing, self._trials = saved["climbing"], saved["trials"]
        return True


def is_saved_size(value: object) -> bool:
    """Whether a value out of a file is what `MicroBatchSize.as_json` gives."""
    match value:
        case {
            "sizes": list(sizes),
            "value": int(size),
            "failures": list(failures),
            "clean_steps": int(),
            "climbing": bool(),
            "trials": int(),
        }:
            whole = all(isinstance(number, int) and number >= 0 for number in [*sizes, *failures])
            return whole and size in sizes and len(sizes) == len(failures)
    return False


def _ladder(start: int, config: TrainingConfig) -> list[int]:
    sizes = [start]
    while config.adaptive_micro_batch and sizes[-1] > config.min_micro_batch_size:
        sizes.append(max(config.min_micro_batch_size, sizes[-1] // config.mb_backoff_factor))
    return sizes
