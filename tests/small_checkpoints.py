"""Small checkpoints whose every value is known, for the tests of what is written and what is read."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tracknet.training.checkpoint import load_checkpoint
from tracknet.training.checkpoint_store import CheckpointStore

MODEL_TEXTS = {"config.json": '{"model_type": "tracknet"}', "README.md": "# TrackNet\n"}
FILES = ["config.json", "README.md", "model.safetensors", "state.json", "optimizer.safetensors", "weights.safetensors", "manifest.json"]


def tensors_of(step: int, size: int = 1000) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"layer.weight": torch.full((7, 3), 0.5)},
        "optimizer": {"0.exp_avg": torch.randn(size, generator=generator), "0.step": torch.tensor(float(step))},
        "weights": {"layer.weight": torch.randn(7, 3, generator=generator), "layer.count": torch.tensor(step)},
    }


def save(store: CheckpointStore, step: int, *, best: bool = False, size: int = 1000, **state: Any) -> Path:
    return store.save(step, MODEL_TEXTS, tensors_of(step, size), {"step": step} | state, best)


def assert_good(path: Path) -> int:
    """Loads a checkpoint, checks every value in it and gives its step."""
    checkpoint = load_checkpoint(path)
    size = len(checkpoint.tensors["optimizer"]["0.exp_avg"])
    for name, group in tensors_of(checkpoint.step, size).items():
        assert checkpoint.tensors[name].keys() == group.keys()
        assert all(torch.equal(checkpoint.tensors[name][key], value) for key, value in group.items())
    assert checkpoint.state["step"] == checkpoint.step
    assert torch.equal(load_file(checkpoint.path / "model.safetensors")["layer.weight"], torch.full((7, 3), 0.5))
    return checkpoint.step


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {".lock"}
