"""The state of a checkpoint as a run writes it, in its smallest form, and a model to go with it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tracknet.schema.training import TrainingConfig
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.position import Position
from tracknet.training.saved_state import PHASES

NAMES = ["demo", "demo", "fast"]
MODEL_TEXTS = {"config.json": "{}", "README.md": "# TrackNet\n"}
TENSORS = {"model": {"weight": torch.ones(3)}, "optimizer": {"0.exp_avg": torch.ones(2)}}


def saved_state(
    step: int, *, names: list[str] = NAMES, seed: int = 42, finished: bool = False, launcher: list | None = None
) -> dict[str, Any]:
    """Sound, for a run of these names."""
    data_name, model_name, training_name = names
    runtime = {"data_name": data_name, "model_name": model_name, "training_name": training_name, "seed": seed}
    return {
        "config": {"runtime": runtime, "training": {}},
        "launcher": launcher,
        "position": asdict(Position(step=step, finished=finished)),
        "optimizer": {"optimizer": "AdamW", "shapes": [[2]], "state": {"0": {}}, "groups": [{"parameters": [0]}]},
        "scaler": {},
        "ema_updates": 0,
        "micro_batch_sizes": {phase: MicroBatchSize(8, TrainingConfig()).as_json() for phase in PHASES},
        "wandb_id": None,
    }


def change_manifest(checkpoint: Path, **changes: Any) -> None:
    """Changes entries of a manifest and gives it the hash that belongs to them."""
    file = checkpoint / "manifest.json"
    content = json.loads(file.read_text()) | changes
    del content["sha256"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    file.write_text(json.dumps(content | {"sha256": hashlib.sha256(canonical).hexdigest()}))
