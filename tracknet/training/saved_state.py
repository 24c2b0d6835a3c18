"""What `state.json` of a run's checkpoint must hold. It is a file, so anything may stand in it."""

import re
from pathlib import Path
from typing import Any

from tracknet.models.configuration import is_detection
from tracknet.training.checkpoint import STATE_FILE, CheckpointError, CheckpointInfo
from tracknet.training.microbatch import is_saved_size
from tracknet.training.optimizer_state import is_saved_optimizer
from tracknet.training.position import LARGEST_COUNT, from_format_1, is_saved_position
from tracknet.training.state import EVALUATION, FROZEN_BACKBONE, WHOLE_MODEL

PHASES = {FROZEN_BACKBONE, WHOLE_MODEL, EVALUATION}


def check_saved_state(info: CheckpointInfo) -> None:
    """Refuses a checkpoint whose state is not that of a run.

    Raises:
        CheckpointError: names what is not as it should be.
    """
    state = info.state
    sound = {
        "config": _is_saved_config(state.get("config")),
        "position": _is_position(info),
        "optimizer": is_saved_optimizer(state.get("optimizer")),
        "scaler": _is_saved_scaler(state.get("scaler")),
        "ema_updates": type(state.get("ema_updates")) is int and state["ema_updates"] >= 0,
        "micro_batch_sizes": _are_saved_sizes(state.get("micro_batch_sizes")),
        "wandb_id": _is_wandb_id(state.get("wandb_id", 0)),
        "detection": is_detection(state.get("detection")),  # not in older checkpoints
    }
    wrong = [key for key, is_sound in sound.items() if not is_sound]
    if wrong:
        raise _damaged(info.path, f"its {wrong[0]} is not that of a run")
    if set(info.tensor_names) not in ({"optimizer"}, {"optimizer", "weights"}):
        raise _damaged(info.path, "beside the model it has other tensors than those of a run")


def _damaged(folder: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{folder / STATE_FILE}: {problem}; the checkpoint is damaged")


def _is_saved_config(value: Any) -> bool:
    match value:
        case {"runtime": {"data_name": str(), "model_name": str(), "training_name": str(), "seed": int()}, "training": dict()}:
            return True
    return False


def _is_position(info: CheckpointInfo) -> bool:
    position: Any = info.state.get("position")
    match position:
        case {"step": int(), "steps_per_epoch": int(steps)} if info.format_version == 1 and steps >= 0:
            position = from_format_1(position, windows_per_epoch=steps, windows_per_step=1)
    return is_saved_position(position) and position["step"] == info.step


def _is_wandb_id(value: Any) -> bool:
    """It becomes part of file names and addresses."""
    return value is None or (isinstance(value, str) and re.fullmatch(r"[\w-]{1,128}", value) is not None)


def _is_saved_scaler(value: Any) -> bool:
    """As `GradScaler.state_dict` gives it, which is empty where it is off."""
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    return value == {} or (
        isinstance(value, dict)
        and value.keys() == names
        and all(isinstance(number, int | float) and 0 <= number < LARGEST_COUNT for number in value.values())
    )


def _are_saved_sizes(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == PHASES and all(map(is_saved_size, value.values()))
