"""Checkpoints whose every value follows from their step, so that whatever is resumed can be compared with what was saved."""

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from saved_states import saved_state
from test_resume import config
from torch import Tensor

from tracknet.errors import UserError
from tracknet.training.checkpoint import CheckpointError, load_checkpoint
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.resume import find_resume

RUN_ID = "run-20300101-000000-s42"
SMALL = 600  # numbers in the largest tensor
FOREIGN = {
    "notes.txt": "mine",
    "step-7/notes.txt": "mine",
    "step-00000003.bak/model.safetensors": "mine",
    ".saving-step-00000002/half": "mine",
    ".hidden": "mine",
}


def model_texts_of(step: int) -> dict[str, str]:
    return {"config.json": json.dumps({"model_type": "tracknet", "step": step}), "README.md": f"# TrackNet after {step} updates\n"}


def tensors_of(step: int, size: int) -> dict[str, dict[str, Tensor]]:
    ramp = torch.arange(size, dtype=torch.float32)
    return {
        "model": {"layer.weight": ramp[: size // 2].view(-1, 2) - step, "layer.count": torch.tensor(step)},
        "weights": {"layer.weight": ramp[: size // 2].view(-1, 2) * 0.5 + step},
        "optimizer": {"0.exp_avg": ramp + step, "0.step": torch.tensor(float(step))},
    }


def state_of(step: int) -> dict[str, Any]:
    return saved_state(step) | {"ema_updates": step}


def save(run_folder: Path, step: int, size: int = SMALL, best: bool = False) -> Path:
    """With `keep_last=1`, as all trials do."""
    store = CheckpointStore(run_folder, keep_last=1)
    return store.save(step, model_texts_of(step), tensors_of(step, size), state_of(step), best)


def check_content(path: Path) -> int:
    """The step of a checkpoint that loads; every bit in it must be what was saved at that step.

    Raises:
        AssertionError: something was loaded that nobody has saved.
        CheckpointError: it was refused.
    """
    loaded = load_checkpoint(path)
    saved = tensors_of(loaded.step, len(loaded.tensors["optimizer"]["0.exp_avg"]))
    assert loaded.tensors.keys() == saved.keys()
    for name, group in saved.items():
        assert loaded.tensors[name].keys() == group.keys()
        for key, tensor in group.items():
            assert loaded.tensors[name][key].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[name][key], tensor), f"{path}: {name} {key} is not what was saved"
    assert loaded.state == state_of(loaded.step)
    try:
        for name, text in model_texts_of(loaded.step).items():
            assert (loaded.path / name).read_text() == text
    except FileNotFoundError as error:
        raise CheckpointError(f"{loaded.path}: pruned since it was loaded") from error
    return loaded.step


def resumed_step(ckpt_dir: Path, resume: str = "auto") -> int | None:
    """The step at which a launch goes on, None where it would start afresh; checks all that it would load."""
    point = find_resume(resume, ckpt_dir, config(ckpt_dir))
    if point is None:
        return None
    assert point.checkpoint.parent == (ckpt_dir / RUN_ID).resolve(), "it would go on from a folder that is not the run's"
    return check_content(point.checkpoint)


def what_is_wrong(ckpt_dir: Path, steps: Collection[int]) -> str:
    """Why a launch would not go on from one of these steps, or what became of the files of others; empty where all is well."""
    try:
        step = resumed_step(ckpt_dir)
    except (AssertionError, UserError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    if step not in steps:
        return f"it would go on from {step}"
    return "" if foreign_files_are_untouched(ckpt_dir / RUN_ID) else "files of others were touched"


def put_foreign_files(run_folder: Path) -> None:
    """What is not ours, with names much like ours."""
    for name, content in FOREIGN.items():
        (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).write_text(content)
    (run_folder / "step-09999999").symlink_to(run_folder.parent)


def foreign_files_are_untouched(run_folder: Path) -> bool:
    there = {name: (run_folder / name).read_text() for name in FOREIGN if (run_folder / name).is_file()}
    link = run_folder / "step-09999999"
    return there == FOREIGN and link.is_symlink() and os.readlink(link) == str(run_folder.parent)


def leftovers(run_folder: Path) -> set[str]:
    """Names that only killed or failed saves leave."""
    ours = (".saving-", ".deleted-", ".replaced-", ".link-")
    foreign = {name.split("/")[0] for name in FOREIGN}
    return {entry.name for entry in run_folder.iterdir() if entry.name.startswith(ours)} - foreign


def silence() -> None:
    """The log of many walks back would hide the table."""
    logging.getLogger("tracknet").setLevel(logging.CRITICAL)
