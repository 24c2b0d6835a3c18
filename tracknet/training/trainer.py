"""The loop: steps, evaluations, checkpoints, until the run is over or was asked to stop."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from enum import Enum

from tracknet.data.batch import Batch
from tracknet.data.loader import EpochLoader
from tracknet.errors import UserError
from tracknet.out_of_memory import peak_memory_gb
from tracknet.schema.training import TrainingConfig
from tracknet.training.optimization import LearningRate
from tracknet.training.progress import Progress
from tracknet.training.sharded_step import ShardedStep
from tracknet.training.state import TrainingState
from tracknet.training.step import StepResult, TrainingStep

log = logging.getLogger("tracknet")

SELECTION_METRIC = "val/f1_tracknetv2"
Step = TrainingStep | ShardedStep


class Ending(Enum):
    """Why `Trainer.fit` returned."""

    FINISHED = "finished"
    STOPPED = "stopped"  # asked to, by a signal; saved


class Trainer:
    """Receives its parts and builds none. All ranks run it in step with each other."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        state: TrainingState,
        training_step: Step,
        learning_rate: LearningRate,
        batches: EpochLoader,
        total_steps: int,
        backbone_frozen_epochs: float,
        evaluate: Callable[[int], Mapping[str, float]],
        save: Callable[[TrainingState, bool], None],
        log_metrics: Callable[[int, Mapping[str, float]], None],
        progress: Progress,
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
            backbone_frozen_epochs: the backbone is frozen for so many epochs; infinite where it never trains.
            evaluate: step -> metrics over all ranks, with `val/f1_tracknetv2` among them.
            save: writes a checkpoint; its second argument says whether it is the best so far.
            log_metrics: takes the updates made and the metrics of the state after them.
            progress: display of the main rank; disabled on the others.
            stop_requested: whether this rank was asked to stop.
        """
        self._config, self._state = config, state
        self._training_step, self._learning_rate = training_step, learning_rate
        self._loader, self._total_steps = batches, total_steps
        self._evaluate, self._save = evaluate, save
        self._log_metrics, self._progress, self._stop_requested = log_metrics, progress, stop_requested
        self._backbone_frozen_epochs = backbone_frozen_epochs
        self._retries = 0  # since they were last logged

    def fit(self, save_first: bool = False) -> Ending:
        """Trains from the state's position to the end of the run; `save_first` writes a checkpoint before the first step."""
        position = self._state.position
        if save_first:
            self._save(self._state, False)
        with closing(self._progress):
            if self._evaluation_is_due():  # a signal stopped an earlier launch between the step and its evaluation
                self._evaluate_and_save()
            for batch in self._batches():
                lr = self._learning_rate.apply(position.step)
                result = self._training_step(batch, position.step, self._stop_requested())
                self._retries += result.retries
                if self._state.ema and not result.skipped:
                    self._state.ema.update()
                position.step += 1
                self._report(result, lr)
                if result.stop:
                    self._training_step.raise_any_failure()
                    self._save(self._state, False)
                    return Ending.STOPPED
                if self._evaluation_is_due():
                    self._training_step.raise_any_failure()
                    self._evaluate_and_save()
        return Ending.FINISHED

    def _batches(self) -> Iterator[Batch | UserError]:
        """The batches of the steps still to make, or why one cannot be had; ends early when patience does."""
        position, steps_per_epoch = self._state.position, len(self._loader)
        while position.step < self._total_steps and not position.finished:
            epoch, first_batch = divmod(position.step, steps_per_epoch)
            self._set_backbone_phase(epoch)
            for batch in self._loader.epoch(epoch, first_batch):
                yield batch
                if position.step >= self._total_steps or position.finished:
                    return

    def _set_backbone_phase(self, epoch: int) -> None:
        frozen = epoch < self._backbone_frozen_epochs
        model = self._state.model
        if frozen != model.backbone_frozen:
            model.freeze_backbone(frozen)
            self._training_step.begin_phase(self._state.micro_batch_size)
            log.info("epoch %d: the backbone %s", epoch, "is frozen" if frozen else "trains from here on")

    def _report(self, result: StepResult, lr: float) -> None:
        step = self._state.position.step
        self._progress.update(step, loss=result.loss, lr=lr, samples=result.samples)
        if step % self._config.tracking.log_every_steps == 0 or step == self._total_steps:
            metrics = {
                "epoch": step / len(self._loader),
                "train/loss": result.loss,
                "train/lr": lr,
                "train/grad_norm": result.grad_norm,
                "train/micro_batch_size": result.micro_batch_size,
                "train/oom_retries": self._retries,
                "train/peak_memory_gb": peak_memory_gb(self._state.model.device),
                "train/skipped": result.skipped,
                "train/samples_per_s": self._progress.samples_per_s,
            }
            self._log_metrics(step, metrics)
            self._retries = 0

    def _evaluation_is_due(self) -> bool:
        position, every_steps = self._state.position, self._config.evaluation.every_epochs * len(self._loader)
        at_a_mark = position.step % every_steps == 0 or position.step >= self._total_steps
        return at_a_mark and position.step > position.evaluated_step

    def _evaluate_and_save(self) -> None:
        position, stopping = self._state.position, self._config.early_stopping
        try:
            with self._progress.paused():
                metrics = self._evaluate(position.step)
        except UserError:
            self._save(self._state, False)  # the training so far is sound; a resumed run evaluates first
            raise
        self._log_metrics(position.step, metrics)
        f1 = metrics[SELECTION_METRIC]
        self._progress.show(F1=f1)
        best = f1 > position.best_f1
        position.best_f1 = max(f1, position.best_f1)
        if position.patience_f1 < 0 or f1 > position.patience_f1 + stopping.min_delta:
            position.patience_f1, position.stale_evaluations = f1, 0
        else:
            position.stale_evaluations += 1
        out_of_patience = 0 < stopping.patience_evaluations <= position.stale_evaluations
        if out_of_patience:
            log.info("step %d: no better %s in %d evaluations; stopping early", position.step, SELECTION_METRIC, position.stale_evaluations)
        position.finished = out_of_patience or position.step >= self._total_steps
        position.evaluated_step = position.step
        self._save(self._state, best)
