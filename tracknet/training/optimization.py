"""Optimizer and learning-rate schedule from their configuration."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer

from tracknet.schema.training import ConstantConfig, CosineConfig, LinearConfig, StepConfig

OPTIMIZER_CLASSES: dict[str, type[Optimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD, "adadelta": Adadelta}
Schedule = CosineConfig | LinearConfig | ConstantConfig | StepConfig


def build_optimizer(config: Any, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """One of `schema.training.OPTIMIZERS`; matrices decay by `weight_decay`, biases and normalisation weights (1-d) do not."""
    arguments = asdict(config)
    optimizer_class = OPTIMIZER_CLASSES[arguments.pop("name")]
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if issubclass(optimizer_class, Adam) and all(p.device.type == "cpu" and type(p.data) is Tensor for p in parameters):
        # one pass over the memory in place of ten; elsewhere, and for sharded parameters, torch chooses
        arguments["fused"] = True
    return optimizer_class([group for group in groups if group["params"]], **arguments)


def state_tensors(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the tensors that torch's optimizer keeps for each parameter that it has updated; `step` is one number, all others are of the
    parameter's size.
    """
    match optimizer:
        case Adam():  # AdamW is one
            return "step", "exp_avg", "exp_avg_sq"
        case Adadelta():
            return "step", "square_avg", "acc_delta"
        case _:
            return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


def lr_factor(config: Schedule, step: float, total_steps: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied by in a step.

    The first `warmup_epochs` rise linearly to 1; the rest follows the schedule, which counts from the end of the warm-up.

    Args:
        config: the schedule.
        step: 0 is the first update; in between where a resumed run has other steps than before.
        total_steps: updates of the whole run.
        steps_per_epoch: updates of one epoch.

    Returns:
        0 to 1.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    match config:
        case CosineConfig():
            return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        case LinearConfig():
            return 1 - (1 - config.min_lr_ratio) * done
        case StepConfig():
            return config.gamma ** math.floor((step - warmup_steps) / (config.step_epochs * steps_per_epoch))
        case ConstantConfig():
            return 1.0


class LearningRate:
    """Sets the learning rate of each update. A pure function of the place in the run, so a resumed run needs no state for it."""

    def __init__(self, config: Schedule, optimizer: Optimizer, *, base: float, total_steps: int, steps_per_epoch: int) -> None:
        self._config, self._optimizer, self._base = config, optimizer, base
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch

    def apply(self, step: float) -> float:
        """Sets and returns the learning rate of the update number `step`, as in `lr_factor`."""
        lr = self._base * lr_factor(self._config, step, self._total_steps, self._steps_per_epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        return lr
