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
from tracknet.training.farewell import OutOfStepError
from tracknet.training.optimization import LearningRate
from tracknet.training.progress import Progress
from tracknet.training.refusals import HalfMadeUpdateError
from tracknet.training.saving import Saving
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
        evaluate: Callable[[int], Mapping[str, float] | None],
        saving: Saving,
        log_metrics: Callable[[int, Mapping[str, float]], None],
        settle_previews: Callable[[], None],
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
            evaluate: step -> metrics over all ranks, with `val/f1_tracknetv2` among them; None where any rank was asked to stop meanwhile.
            saving: writes checkpoints.
            log_metrics: takes the updates made and the metrics of the state after them.
            settle_previews: returns when the pictures of the last evaluation are written.
            progress: display of the main rank; disabled on the others.
            stop_requested: whether this rank was asked to stop.
        """
        self._config, self._state = config, state
        self._training_step, self._learning_rate = training_step, learning_rate
        self._loader, self._total_steps = batches, total_steps
        self._evaluate, self._saving = evaluate, saving
        self._log_metrics, self._progress, self._stop_requested = log_metrics, progress, stop_requested
        self._settle_previews = settle_previews
        self._backbone_frozen_epochs = backbone_frozen_epochs
        self._retries = 0  # since they were last logged
        self._log_failure: UserError | None = None

    def fit(self, save_first: bool) -> Ending:
        """Trains from the state's position to the end of the run, and returns when its last checkpoint is on the disk.

        Args:
            save_first: writes a checkpoint before the first step.

        Raises:
            UserError: the run cannot go on; on all ranks.
        """
        try:
            if save_first:
                self._saving.save(self._state)
                self._saving.wait()  # a run that cannot save ends here, and not after hours
            with closing(self._progress):
                ending = self._train()
            self._saving.wait()
            self._tell_of(self._settle_previews)
            self._training_step.failed_update.raise_on_all(self._log_failure)
        except Exception:
            self._saving.let_finish()
            raise
        return ending

    def _train(self) -> Ending:
        # a signal may have stopped an earlier launch between a step and its evaluation
        if self._evaluation_is_due() and not self._evaluate_and_save():
            return self._stop()
        for batch in self._batches():
            try:
                stop = self._make_step(batch).stop
            except (OutOfStepError, HalfMadeUpdateError):
                raise
            except UserError as error:
                self._saving.save_after(error, self._state)  # the step was not made; those before it are sound
                raise
            if stop:
                return self._stop()
            if self._evaluation_is_due():
                if not self._evaluate_and_save():
                    return self._stop()
            elif self._checkpoint_is_due():
                self._training_step.failed_update.raise_on_all()
                self._saving.save(self._state)
        return Ending.FINISHED

    def _batches(self) -> Iterator[Batch | UserError]:
        """The batches of the steps still to make, or why one cannot be had; ends early when patience does."""
        position = self._state.position
        while not self._is_over():
            self._set_backbone_phase(position.epoch)
            if self._loader.starts_workers:
                self._tell_of(self._settle_previews)  # a worker forked now would inherit what the drawing thread holds
            for batch in self._loader.epoch(position.epoch, position.windows_seen):
                yield batch
                if self._is_over():
                    return

    def _is_over(self) -> bool:
        position, config = self._state.position, self._config
        at_the_end = position.step >= config.max_steps if config.max_steps else position.epoch >= config.epochs
        return at_the_end or position.finished

    def _make_step(self, batch: Batch | UserError) -> StepResult:
        """One update, counted and reported. Metrics that could not be written are told to the other ranks in place of a batch."""
        self._saving.check()
        position = self._state.position
        lr = self._learning_rate.apply(self._place_in_schedule())
        result = self._training_step(self._log_failure or batch, position.step, self._stop_requested())
        self._retries += result.retries
        if self._state.ema and not result.skipped:
            self._state.ema.update()
        position.step += 1
        position.windows_seen += result.samples
        if self._loader.steps_left(position.windows_seen) == 0:
            position.epoch, position.windows_seen = position.epoch + 1, 0
        self._report(result, lr)
        return result

    def _place_in_schedule(self) -> float:
        """Where the learning rate stands: in updates made, or where epochs end the run, in steps of this launch for what it has seen."""
        return self._state.position.step if self._config.max_steps else self._steps_for_windows_seen()

    def _steps_for_windows_seen(self) -> float:
        """Updates made, had all launches had as many processes as this one; exact where they had."""
        position = self._state.position
        return position.epoch * len(self._loader) + position.windows_seen / position.windows_per_step

    def _set_backbone_phase(self, epoch: int) -> None:
        frozen = epoch < self._backbone_frozen_epochs
        model = self._state.model
        if frozen != model.backbone_frozen:
            model.freeze_backbone(frozen)
            self._training_step.begin_phase(self._state.micro_batch_size)
            log.info("epoch %d: the backbone %s", epoch, "is frozen" if frozen else "trains from here on")

    def _stop(self) -> Ending:
        self._training_step.failed_update.raise_on_all()
        self._saving.save(self._state)
        self._training_step.failed_update.raise_on_all(self._log_failure)
        return Ending.STOPPED

    def _report(self, result: StepResult, lr: float) -> None:
        step = self._state.position.step
        self._progress.update(step, loss=result.loss, lr=lr, samples=result.samples)
        if step % self._config.tracking.log_every_steps == 0 or step == self._total_steps:
            metrics = {
                "epoch": self._steps_for_windows_seen() / len(self._loader),
                "train/loss": result.loss,
                "train/lr": lr,
                "train/grad_norm": result.grad_norm,
                "train/micro_batch_size": result.micro_batch_size,
                "train/oom_retries": self._retries,
                "train/peak_memory_gb": peak_memory_gb(self._state.model.device),
                "train/skipped": result.skipped,
                "train/samples_per_s": self._progress.samples_per_s,
            }
            self._log(step, metrics)
            self._retries = 0

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tell_of(lambda: self._log_metrics(step, metrics))

    def _tell_of(self, writing: Callable[[], None]) -> None:
        """On the main rank it may fail alone; the others hear of it in the next step, or before the next checkpoint."""
        try:
            writing()
        except UserError as error:
            self._log_failure = error

    def _checkpoint_is_due(self) -> bool:
        every_steps = self._config.checkpoint.every_steps
        return every_steps > 0 and self._state.position.step % every_steps == 0

    def _evaluation_is_due(self) -> bool:
        position, every_epochs = self._state.position, self._config.evaluation.every_epochs
        at_a_mark = position.windows_seen == 0 and position.epoch % every_epochs == 0
        return (at_a_mark or self._is_over()) and position.step > position.evaluated_step

    def _evaluate_and_save(self) -> bool:
        """Whether it came to an end; False where any rank was asked to stop meanwhile."""
        self._training_step.failed_update.raise_on_all()
        position, stopping = self._state.position, self._config.early_stopping
        try:
            with self._progress.paused():
                metrics = self._evaluate(position.step)
        except OutOfStepError:
            raise
        except UserError as error:
            self._saving.save_after(error, self._state)  # the training so far is sound; a resumed run evaluates first
            raise
        if metrics is None:
            return False
        self._log(position.step, metrics)
        f1 = metrics[SELECTION_METRIC]
        self._progress.show(F1=f1)
        if position.patience_f1 < 0 or f1 > position.patience_f1 + stopping.min_delta:
            position.patience_f1, position.stale_evaluations = f1, 0
        else:
            position.stale_evaluations += 1
        out_of_patience = 0 < stopping.patience_evaluations <= position.stale_evaluations
        if out_of_patience:
            log.info("step %d: no better %s in %d evaluations; stopping early", position.step, SELECTION_METRIC, position.stale_evaluations)
        position.finished = out_of_patience or self._is_over()
        position.evaluated_step = position.step
        self._saving.save(self._state, f1)
        self._training_step.failed_update.raise_on_all(self._log_failure)
        return True
