"""Which arithmetic a run uses: `training.precision` and `training.amp` against what the device can do."""

import torch

from tracknet.errors import ConfigError
from tracknet.schema.training import TrainingConfig

MIXED_PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}  # accelerate's names


def supported_precisions(device: torch.device) -> tuple[str, ...]:
    """What a device can train in, best first."""
    if device.type != "cuda":
        return ("fp32",)
    # without emulation: a card that only emulates bf16 is slower in it than in fp32
    return ("bf16", "fp16", "fp32") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp16", "fp32")


def resolve_precision(config: TrainingConfig, supported: tuple[str, ...]) -> str:
    """The precision to train in.

    Args:
        config: `precision` null lets `amp` decide: true is `auto`, false is fp32.
        supported: of the device, best first.

    Returns:
        One of fp32, fp16, bf16.

    Raises:
        ConfigError: the device cannot run the precision asked for, or `amp` contradicts it.
    """
    precision = config.precision
    if precision is None:
        precision = "auto" if config.amp else "fp32"
    if precision == "fp32" and config.amp:
        raise ConfigError("training.precision=fp32 contradicts training.amp=true; set training.precision=auto, or training.amp=false")
    if precision == "auto":
        return supported[0]
    if precision not in supported:
        raise ConfigError(f"training.precision={precision} does not run on this device; allowed here: auto, {', '.join(supported)}")
    return precision
