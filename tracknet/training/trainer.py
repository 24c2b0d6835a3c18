"""The loop: steps, evaluations, checkpoints, until the run is over or was asked to stop."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Protocol

from tracknet.data.batch import Batch
from tracknet.data.loader import EpochLoader
from tracknet.schema.training import TrainingConfig
from tracknet.training.optimization import LearningRate
from tracknet.training.state import TrainingState
from tracknet.training.step import StepResult, TrainingStep

log = logging.getLogger("tracknet")

SELECTION_METRIC = "val/f1_tracknetv2"


class Ending(Enum):
    """Why `Trainer.fit` returned."""

    FINISHED = "finished"
    STOPPED = "stopped"  # asked to, by a signal; saved


class MetricSink(Protocol):
    """Where metrics go; the main rank's tracker and progress display, or a list in a test."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of the state after `step` updates."""


class Trainer:
    """Receives its parts and builds none. All ranks run it in step with each other."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        state: TrainingState,
        training_step: TrainingStep,
        learning_rate: LearningRate,
        batches: EpochLoader,
        total_steps: int,
        backbone_rest_epochs: float,
        evaluate: Callable[[int], Mapping[str, float]],
        save: Callable[[TrainingState, bool], None],
        log_metrics: MetricSink,
        show_step: Callable[[int, StepResult, float], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        """Takes its parts.

        Args:
            config: the section `training`.
            state: model, optimizer and position; changed in place.
            training_step: makes one update of a batch.
            learning_rate: of each update.
            batches: this rank's samples, epoch by epoch.
            total_steps: updates of the whole run.
            backbone_rest_epochs: the backbone is frozen for so many epochs; infinite where it never trains.
            evaluate: step -> metrics over all ranks, with `val/f1_tracknetv2` among them.
            save: writes a checkpoint; its second argument says whether it is the best so far.
            log_metrics: where metrics go.
            show_step: progress display: updates made, the step's result, learning rate.
            stop_requested: whether this rank was asked to stop.
        """
        self._config, self._state = config, state
        self._training_step, self._learning_rate = training_step, learning_rate
        self._loader, self._total_steps = batches, total_steps
        self._evaluate, self._save = evaluate, save
        self._log_metrics, self._show_step, self._stop_requested = log_metrics, show_step, stop_requested
        self._backbone_rest_epochs = backbone_rest_epochs
        self._samples, self._since = 0, time.perf_counter()

    def fit(self) -> Ending:
        """Trains from the state's position to the end of the run."""
        position = self._state.position
        for batch in self._batches():
            lr = self._learning_rate.apply(position.step)
            result = self._training_step(batch, position.step, self._stop_requested())
            if self._state.ema and not result.skipped:
                self._state.ema.update()
            position.step += 1
            self._report(result, lr)
            if result.stop:
                self._save(self._state, False)
                return Ending.STOPPED
            if self._evaluation_is_due():
                self._evaluate_and_save()
                if position.finished:
                    break
        if not position.finished:  # a signal stopped an earlier launch right after the last step
            self._evaluate_and_save()
        return Ending.FINISHED

    def _batches(self) -> Iterator[Batch]:
        """The batches of the steps still to make."""
        position, steps_per_epoch = self._state.position, len(self._loader)
        while position.step < self._total_steps:
            epoch, first_batch = divmod(position.step, steps_per_epoch)
            self._set_backbone_phase(epoch)
            for batch in self._loader.epoch(epoch, first_batch):
                yield batch
                if position.step >= self._total_steps:
                    return

    def _set_backbone_phase(self, epoch: int) -> None:
        rests = epoch < self._backbone_rest_epochs
        model = self._state.model
        if rests != model.backbone_frozen:
            model.freeze_backbone(rests)
            self._training_step.parameters_changed()
            log.info("epoch %d: the backbone %s", epoch, "rests" if rests else "trains from here on")

    def _report(self, result: StepResult, lr: float) -> None:
        step = self._state.position.step
        self._samples += result.samples
        self._show_step(step, result, lr)
        if step % self._config.tracking.log_every_steps == 0 or step == self._total_steps:
            now = time.perf_counter()
            metrics = {
                "epoch": step / len(self._loader),
                "train/loss": result.loss,
                "train/lr": lr,
                "train/grad_norm": result.grad_norm,
                "train/micro_batch_size": result.micro_batch_size,
                "train/oom_retries": result.retries,
                "train/samples_per_s": self._samples / (now - self._since),  # of this rank, evaluations left out
            }
            self._log_metrics(step, metrics)
            self._samples, self._since = 0, now

    def _evaluation_is_due(self) -> bool:
        step = self._state.position.step
        return step % (self._config.evaluation.every_epochs * len(self._loader)) == 0 or step == self._total_steps

    def _evaluate_and_save(self) -> None:
        position, patience = self._state.position, self._config.early_stopping.patience_evaluations
        started = time.perf_counter()
        metrics = self._evaluate(position.step)
        self._log_metrics(position.step, metrics)
        f1, best_before = metrics[SELECTION_METRIC], position.best_f1
        best = f1 > best_before
        position.best_f1 = max(f1, best_before)
        better = best_before < 0 or f1 > best_before + self._config.early_stopping.min_delta
        position.stale_evaluations = 0 if better else position.stale_evaluations + 1
        out_of_patience = 0 < patience <= position.stale_evaluations
        position.finished = out_of_patience or position.step >= self._total_steps
        if out_of_patience:
            log.info("step %d: no better %s in %d evaluations; stopping early", position.step, SELECTION_METRIC, patience)
        self._save(self._state, best)
        self._since += time.perf_counter() - started
