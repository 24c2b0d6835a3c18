"""Where a run stands in its data and how many steps it still has, in the steps that this launch makes."""

import logging
from collections.abc import Mapping
from typing import Any

from tracknet.data.loader import EpochLoader
from tracknet.errors import ConfigError
from tracknet.schema.root import Config
from tracknet.schema.training import TrainingConfig
from tracknet.training.position import Position, from_format_1

log = logging.getLogger("tracknet")


def restored_position(saved: Mapping[str, Any], batches: EpochLoader) -> Position:
    """The position in a checkpoint of any format, checked against the batches that a resumed run will have; the log says what changed.

    Raises:
        ConfigError: the place in the order of the data means something else with these batches.
    """
    per_epoch, per_step = batches.windows_per_epoch, batches.windows_per_step
    if "steps_per_epoch" in saved:
        if saved["steps_per_epoch"] not in (0, len(batches)):
            raise ConfigError(
                f"--resume: the run had {saved['steps_per_epoch']} steps per epoch and would now have {len(batches)}; its checkpoint is of"
                " an older version: give it the same number of processes, training.batch_size and clips"
            )
        return Position(**from_format_1(saved, windows_per_epoch=per_epoch, windows_per_step=per_step))
    position = Position(**saved)
    if position.windows_per_epoch not in (0, per_epoch):
        raise ConfigError(
            f"--resume: the run had {position.windows_per_epoch} windows of training data and would now have {per_epoch};"
            " give it the same clips, or start a new run from its weights with training.init_from"
        )
    if position.windows_per_step not in (0, per_step):
        log.warning(
            "a step now has %d windows where it had %d: the order of windows goes on where it stopped, and the schedule counts in the new"
            " steps; the weights will no longer be those of the undisturbed run",
            *(per_step, position.windows_per_step),
        )
    if position.windows_seen and not batches.steps_left(position.windows_seen):  # the rest of the epoch is less than a step: dropped
        position.epoch, position.windows_seen = position.epoch + 1, 0
    return position


def plan_steps(config: Config, position: Position, batches: EpochLoader) -> int:
    """The updates of the whole run, those made before this launch among them; notes in the position what it is counted in.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    training, steps_per_epoch = config.training, len(batches)
    position.windows_per_epoch, position.windows_per_step = batches.windows_per_epoch, batches.windows_per_step
    warmup_steps = training.scheduler.warmup_epochs * steps_per_epoch
    if position.step == 0 and warmup_steps > schedule_steps(training, steps_per_epoch):
        raise ConfigError(
            f"training.scheduler.warmup_epochs={training.scheduler.warmup_epochs:g} is {warmup_steps:.0f} steps,"
            f" longer than the run's {schedule_steps(training, steps_per_epoch)}; lower it"
        )
    epochs_left = training.epochs - 1 - position.epoch
    left = batches.steps_left(position.windows_seen) + epochs_left * steps_per_epoch
    return training.max_steps or position.step + max(0, left)


def schedule_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    """The length of the learning rate's schedule, in steps of this launch."""
    return training.max_steps or training.epochs * steps_per_epoch
