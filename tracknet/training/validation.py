"""The evaluation of a run: every validation frame once over all ranks, metrics and preview pictures."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from tracknet.data.loader import EpochLoader
from tracknet.errors import UserError
from tracknet.evaluation import Detections, Preview, count_by_game, detect, named_scores
from tracknet.training.microbatch import is_out_of_memory
from tracknet.training.ranks import Ranks
from tracknet.training.state import TrainingState


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
        """
        self._state, self._batches, self._ranks = state, batches, ranks
        self._threshold, self._autocast, self._show_previews = threshold, autocast, show_previews
        windows = batches.windows_of_this_rank()
        self._preview_windows = {windows[round(i * (len(windows) - 1) / max(1, previews - 1))] for i in range(previews) if windows}

    def __call__(self, step: int) -> dict[str, float]:
        """Metrics after `step` updates: `val/f1_tracknetv2` and what else `named_scores` has. All ranks call this."""
        detections, previews = self._ranks.together(self._detect)
        self._ranks.on_main(lambda: self._show_previews(step, previews))
        index = self._batches.dataset.index
        counts = torch.from_numpy(count_by_game(index, detections, self._threshold)).to(self._ranks.device)
        return named_scores(self._ranks.sum_(counts).cpu().numpy().astype(np.int64), index.games)

    def _detect(self) -> tuple[Detections, list[Preview]]:
        """What this rank finds in its windows; holds no collective."""
        index = self._batches.dataset.index
        try:
            with self._state.ema.averaged() if self._state.ema else nullcontext():
                return detect(self._state.model, self._batches.epoch(0), index, self._ranks.device, self._autocast, self._preview_windows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("out of memory in the evaluation; lower training.evaluation.batch_size") from error
