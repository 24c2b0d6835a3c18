"""Types and defaults of `configs/training/*.yaml`; `optimizer.name` and `scheduler.name` choose their arguments."""

from dataclasses import dataclass, field
from typing import Any

from tracknet.schema.bounds import bounded


@dataclass
class AdamWConfig:
    name: str = bounded("adamw", choices=("adamw",))
    lr: float = bounded(1e-3, above=0.0)
    weight_decay: float = bounded(0.01, low=0.0)
    betas: list[float] = bounded(factory=lambda: [0.9, 0.999], low=0.0, below=1.0, length=2)
    eps: float = bounded(1e-8, above=0.0)


@dataclass
class AdamConfig:
    name: str = bounded("adam", choices=("adam",))
    lr: float = bounded(1e-3, above=0.0)
    weight_decay: float = bounded(0.0, low=0.0)
    betas: list[float] = bounded(factory=lambda: [0.9, 0.999], low=0.0, below=1.0, length=2)
    eps: float = bounded(1e-8, above=0.0)


@dataclass
class SgdConfig:
    name: str = bounded("sgd", choices=("sgd",))
    lr: float = bounded(1e-2, above=0.0)
    weight_decay: float = bounded(0.0, low=0.0)
    momentum: float = bounded(0.9, low=0.0, high=1.0)
    nesterov: bool = False


@dataclass
class AdadeltaConfig:
    name: str = bounded("adadelta", choices=("adadelta",))
    lr: float = bounded(1.0, above=0.0)
    weight_decay: float = bounded(0.0, low=0.0)
    rho: float = bounded(0.9, low=0.0, high=1.0)
    eps: float = bounded(1e-6, above=0.0)


OPTIMIZERS: dict[str, type] = {"adamw": AdamWConfig, "adam": AdamConfig, "sgd": SgdConfig, "adadelta": AdadeltaConfig}


@dataclass
class CosineConfig:
    name: str = bounded("cosine", choices=("cosine",))
    warmup_epochs: float = bounded(0.0, low=0.0)
    min_lr_ratio: float = bounded(0.01, low=0.0, high=1.0)  # of the learning rate, at the end


@dataclass
class LinearConfig:
    name: str = bounded("linear", choices=("linear",))
    warmup_epochs: float = bounded(0.0, low=0.0)
    min_lr_ratio: float = bounded(0.0, low=0.0, high=1.0)


@dataclass
class ConstantConfig:
    name: str = bounded("constant", choices=("constant",))
    warmup_epochs: float = bounded(0.0, low=0.0)


@dataclass
class StepConfig:
    name: str = bounded("step", choices=("step",))
    warmup_epochs: float = bounded(0.0, low=0.0)
    step_epochs: float = bounded(10.0, above=0.0)  # every so many epochs ...
    gamma: float = bounded(0.1, above=0.0, high=1.0)  # ... the learning rate is multiplied by this


SCHEDULERS: dict[str, type] = {"cosine": CosineConfig, "linear": LinearConfig, "constant": ConstantConfig, "step": StepConfig}


@dataclass
class LossConfig:
    name: str = bounded("mse", choices=("mse", "focal"))
    alpha: float = bounded(2.0, low=0.0)  # focal only; an override that changes it under mse is refused
    beta: float = bounded(4.0, low=0.0)  # the same


@dataclass
class DataLoaderConfig:
    """With `num_workers: 0`, `prefetch_factor` and `persistent_workers` do not apply."""

    num_workers: int = bounded(2, low=0)
    pin_memory: bool = True
    persistent_workers: bool = True
    prefetch_factor: int = bounded(2, low=1)
    drop_last: bool = False


@dataclass
class EarlyStoppingConfig:
    patience_evaluations: int = bounded(0, low=0)  # without a better val/f1_tracknetv2; 0 never stops early
    min_delta: float = bounded(0.0, low=0.0)


@dataclass
class EvaluationConfig:
    every_epochs: int = bounded(1, low=1)  # the last step is always evaluated
    batch_size: int = bounded(0, low=0)  # windows per process; 0 is training.batch_size
    threshold: float = bounded(0.5, low=0.0, high=1.0)


@dataclass
class CheckpointConfig:
    keep_last: int = bounded(2, low=1)  # newest checkpoints kept, beside the best one
    every_steps: int = bounded(500, low=0)  # between checkpoints, besides those after each evaluation; 0 only those


@dataclass
class TrackingConfig:
    log_every_steps: int = bounded(10, low=1)
    previews: int = bounded(4, low=0)  # pictures per evaluation
    wandb: str = bounded("disabled", choices=("online", "offline", "disabled"))
    project: str = "tracknet"


@dataclass
class TrainingConfig:
    seed: int = bounded(42, low=0, high=2**32 - 1)
    batch_size: int = bounded(8, low=1)  # samples per process and optimizer step
    epochs: int = bounded(10, low=1)
    max_steps: int = bounded(0, low=0)  # above 0 it ends the run, whatever epochs says
    precision: str | None = bounded("auto", choices=("auto", "fp32", "fp16", "bf16"))
    channels_last: bool = True  # order in memory of weights and features; last bits depend on it; sharded weights never lie so
    num_threads: int = bounded(0, low=0, high=1024)  # of PyTorch, per process; 0: as PyTorch or the launcher chose; last bits depend on it
    amp: bool = False  # decides only where precision is null; a YAML with amp and without precision (an old one) has it null
    grad_clip: float = bounded(1.0, low=0.0)  # bound of the gradient's L2 norm; 0 does not clip
    grad_clip_norm: float = bounded(0.0, low=0.0)  # another name of grad_clip; see `gradient_bound`
    adaptive_micro_batch: bool = True
    micro_batch_size: int = bounded(0, low=0)  # 0: the whole batch; adaptive_micro_batch decides whether it may fall
    min_micro_batch_size: int = bounded(1, low=1)
    mb_backoff_factor: int = bounded(2, low=2)
    mb_growth_steps: int = bounded(500, low=0)  # after so many steps without a retry a larger size is tried again; 0 never grows
    oom_retries: int = bounded(8, low=0)  # per step
    optimizer: Any = field(default_factory=AdamWConfig)  # one of OPTIMIZERS
    scheduler: Any = field(default_factory=CosineConfig)  # one of SCHEDULERS
    loss: LossConfig = bounded(factory=LossConfig, null_is_default=True)  # null or an empty `loss:` is mse
    ema_decay: float = bounded(0.0, low=0.0, below=1.0)  # 0 keeps no average
    backbone_freeze_epochs: int = bounded(0, low=0)  # the backbone rests for so many epochs
    init_from: str | None = None  # a saved model folder whose weights the run starts from
    data_loader: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    output_dir: str = bounded("outputs", null_is_default=True)  # null is "outputs"
    log_dir: str | None = None  # null: <output root>/logs
    ckpt_dir: str | None = None  # null: <output root>/checkpoints


def gradient_bound(training: TrainingConfig) -> float:
    """The bound of the gradient's L2 norm that `grad_clip` and `grad_clip_norm` name together; 0 does not clip.

    The one above 0 holds; `schema.validation` refuses two different ones.
    """
    return max(training.grad_clip, training.grad_clip_norm)
