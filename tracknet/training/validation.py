"""The evaluation of a run: every validation frame once over all ranks, metrics and preview pictures."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracknet.data.batch import Batch
from tracknet.data.loader import EpochLoader
from tracknet.errors import UserError
from tracknet.evaluation.detection import Detections, Preview, count_by_game, detect, join_detections, named_scores
from tracknet.evaluation.diagnosis import diagnose, peak_statistics
from tracknet.evaluation.threshold import THRESHOLD_PROTOCOL, choose_threshold, f1_at, threshold_counts
from tracknet.metrics.protocols import TRAINING_PROTOCOLS
from tracknet.models import TrackNetModel
from tracknet.out_of_memory import is_out_of_memory, release_memory
from tracknet.training.ranks import Ranks
from tracknet.training.state import EVALUATION, TrainingState

log = logging.getLogger("tracknet")


class Validation:
    """Evaluates the averaged weights where there is an average, else the model's own."""

    def __init__(
        self,
        state: TrainingState,
        batches: EpochLoader,
        *,
        ranks: Ranks,
        threshold: float,
        previews: int,
        autocast: Callable[[], AbstractContextManager[None]],
        show_previews: Callable[[int, list[Preview]], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        """Takes its parts.

        Args:
            state: the model and its average.
            batches: this rank's validation windows.
            ranks: the processes that share the windows.
            threshold: a peak at or above it is a detection, 0 to 1.
            previews: pictures per evaluation, from this rank's windows, evenly spread.
            autocast: the precision of the forward pass.
            show_previews: takes the step and the pictures.
            stop_requested: whether this rank was asked to stop.
        """
        self._state, self._batches, self._ranks = state, batches, ranks
        self._size = state.micro_batch_sizes[EVALUATION]
        self._threshold, self._autocast, self._show_previews = threshold, autocast, show_previews
        self._stop_requested = stop_requested
        self._room = torch.zeros(2, dtype=torch.int32, device=ranks.device)  # had before memory is short
        windows = batches.windows_of_this_rank()
        self._preview_windows = {windows[round(i * (len(windows) - 1) / max(1, previews - 1))] for i in range(previews) if windows}

    def __call__(self, step: int) -> dict[str, float] | None:
        """Metrics after `step` updates: `val/f1_tracknetv2` and what else `named_scores` has, and the best threshold. All ranks call this.

        The threshold becomes the state's `detection`, which each checkpoint from here on has in its `config.json`.

        Returns:
            None where any rank was asked to stop before the last batch; nothing is shown then.

        Raises:
            UserError: a rank could not go on; on all ranks alike.
        """
        size_before = self._size.as_json()
        self._state.gather()
        detections, previews = self._detect()
        self._agree(size_before, 0 if detections is None else len(self._batches))
        if detections is None:
            return None
        if self._ranks.is_main:
            self._show_previews(step, previews)
        index = self._batches.dataset.index
        by_game, by_threshold, peaks = self._summed(
            count_by_game(index, detections, self._threshold, TRAINING_PROTOCOLS),
            threshold_counts(index, detections),
            peak_statistics(index, detections, self._threshold),
        )
        if problem := diagnose(peaks):
            log.warning("step %d: %s", step, problem)
        chosen = choose_threshold(by_threshold)
        self._state.detection = None if chosen is None else self._detection(chosen, by_threshold, step)
        return named_scores(by_game, index.games, TRAINING_PROTOCOLS) | self._threshold_metrics()

    def _summed(self, *counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Whole numbers of all ranks added up, each array in its shape. All ranks call this."""
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in counts])).to(self._ranks.device)
        parts = np.split(self._ranks.sum_(flat).cpu().numpy(), np.cumsum([array.size for array in counts])[:-1])
        return [part.reshape(array.shape) for part, array in zip(parts, counts, strict=True)]

    def _detection(self, threshold: float, by_threshold: NDArray[np.int64], step: int) -> dict[str, Any]:
        """The chosen threshold and how it was chosen; the field `detection` of `TrackNetConfig`."""
        return {
            "threshold": threshold,
            "protocol": THRESHOLD_PROTOCOL.name,
            "f1": f1_at(threshold, by_threshold),
            "games": list(self._batches.dataset.index.games),
            "frames": int(by_threshold[0].sum()),
            "step": step,
        }

    def _threshold_metrics(self) -> dict[str, float]:
        """What was chosen, as metrics; where no threshold finds a ball there is no best one."""
        chosen = self._state.detection
        if chosen is None:
            return {"val/f1_at_best_threshold": 0.0}
        return {"val/best_threshold": chosen["threshold"], "val/f1_at_best_threshold": chosen["f1"]}

    def _detect(self) -> tuple[Detections | None, list[Preview]]:
        """What this rank finds in its windows; None where any rank was asked to stop before the last batch. All ranks call this."""
        found: list[Detections] = []
        previews: list[Preview] = []
        with ExitStack() as stack:
            model = self._ranks.together(lambda: self._enter(stack))
            for number, batch in enumerate(self._batches.epoch(0), 1):  # the same number of batches on all ranks
                failure = None
                try:
                    if isinstance(batch, UserError):
                        raise batch
                    for detections, shown in self._detect_batch(model, batch):
                        found.append(detections)
                        previews += shown
                except Exception as error:
                    if not isinstance(error, UserError) and not is_out_of_memory(error):
                        raise
                    failure = error
                if self._stops_after(failure) and number < len(self._batches):
                    break
            else:
                return self._ranks.together(lambda: self._leave(stack, found)), previews
            return self._ranks.together(lambda: self._leave(stack, None)), []

    def _enter(self, stack: ExitStack) -> TrackNetModel:
        """The model to evaluate, in evaluation mode until the stack is closed."""
        model = stack.enter_context(self._state.finished_model())
        stack.callback(model.train, model.training)
        model.train(False)
        return model

    def _leave(self, stack: ExitStack, found: list[Detections] | None) -> Detections | None:
        stack.close()
        return None if found is None else join_detections(found)

    def _stops_after(self, failure: Exception | None) -> bool:
        """Whether any rank was asked to stop; what keeps any rank from going on is raised on all. All ranks call this after each batch."""
        told = torch.tensor([self._stop_requested(), failure is not None], dtype=self._room.dtype)
        stop, failed = self._ranks.sum_(self._room.copy_(told)).tolist()
        if failed:
            self._ranks.together(lambda: _raise(failure))
        return bool(stop)

    def _detect_batch(self, model: TrackNetModel, batch: Batch) -> list[tuple[Detections, list[Preview]]]:
        """A batch in pieces that fit into memory. A rank falls back alone here, for a window's result does not depend on the others."""
        index, device = self._batches.dataset.index, self._ranks.device
        retries = 0
        while True:
            found = []
            out_of_memory = False
            try:
                for part in batch.split(self._size.value):
                    found.append(detect(model, part, index, device, self._autocast, self._preview_windows))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = True
            if not out_of_memory:
                break
            release_memory(device)  # not in the `except` block: the traceback keeps the tensors alive
            self._size.back_off(retries, min(self._size.value, len(batch)))
            retries += 1
        return found

    def _agree(self, size_before: Mapping[str, Any], batches: int) -> None:
        """Gives all ranks the smallest size that any of them fell to, so that a checkpoint has that of all. All ranks call this.

        Args:
            size_before: as it was before the evaluation, `as_json`.
            batches: of a whole evaluation; 0 for one that ended early, which will be made again and is not counted.
        """
        smallest = min(self._ranks.gather([self._size.as_json()]), key=itemgetter("value"))
        self._size.restore(smallest)
        before = size_before["value"]
        if self._size.value < before:
            log.warning("evaluation: out of memory at %d; now %d windows at once", before, self._size.value)
        elif batches and self._size.passed(batches):
            log.info("evaluation: the next one tries %d windows at once again", self._size.value)


def _raise(failure: Exception | None) -> None:
    if failure:
        raise failure
