"""The checkpoints of a run: what goes into them, and how all ranks hear of one that could not be written."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from tracknet.errors import UserError
from tracknet.training.position import Position
from tracknet.training.ranks import Ranks
from tracknet.training.saver import BackgroundSaver
from tracknet.training.state import TrainingState

log = logging.getLogger("tracknet")


class Saving:
    """Saves a run's state without waiting for the disk; the main rank writes."""

    def __init__(
        self,
        saver: BackgroundSaver,
        constant: Mapping[str, Any],
        tracking: Callable[[], Mapping[str, Any]],
        *,
        ranks: Ranks,
    ) -> None:
        """Takes its parts.

        Args:
            saver: writes, on the main rank.
            constant: of the run, for each of its checkpoints: the configuration, and who launched it.
            tracking: what a checkpoint holds of the tracker.
            ranks: the processes of the run.
        """
        self._saver, self._constant, self._tracking, self._ranks = saver, constant, tracking, ranks
        self._is_main = ranks.is_main
        self._best_f1_before: float | None = None  # the last checkpoint, if it was the best one

    def save(self, state: TrainingState, f1: float | None = None) -> None:
        """Copies the state and has it written meanwhile; waits for an earlier one first. All ranks call this.

        What cannot be written is told in the log, and training goes on: the disk may have room again at the next checkpoint.

        Args:
            state: of the run.
            f1: of these weights, where they were evaluated; what exceeds that of the best checkpoint on the disk is the best from here on.
        """
        best = self._is_best(state.position, f1)
        content = dict(self._constant) | state.as_json() | dict(self._tracking())
        tensors = state.tensors(keep=self._ranks.is_main)
        if self._ranks.is_main:
            self._saver.save(state.position.step, state.model_texts(), tensors, content, best)

    def _is_best(self, position: Position, f1: float | None) -> bool:
        if self._is_main and self._saver.settle() and self._best_f1_before is not None:
            position.best_f1 = self._best_f1_before  # the checkpoint of the best one is not there
        best = f1 is not None and f1 > position.best_f1
        self._best_f1_before = position.best_f1 if best else None
        if f1 is not None:
            position.best_f1 = max(f1, position.best_f1)
        return best

    def check(self) -> None:
        """Raises an error of the program that has ended the writing meanwhile."""
        self._saver.check()

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk. All ranks call this.

        Raises:
            UserError: it could not be written.
        """
        self._ranks.on_main(self._saver.wait)

    def save_after(self, reason: UserError, state: TrainingState) -> None:
        """Saves a sound state of a run that ends for another reason, which a failure here must not hide. All ranks call this."""
        self.save(state)
        try:
            self.wait()
        except UserError as error:
            if self._ranks.is_main:
                log.error("%s; and the run ends because of this: %s", error, reason)

    def let_finish(self) -> None:
        """Lets this rank write what it has begun, when the run ends by an error."""
        self._saver.close()
