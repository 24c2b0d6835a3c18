"""Whole runs in this process that are stopped where a test wants it, and what such a run leaves behind."""

import gc
import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_train import GAMES, MEASURED, TINY, metrics_of, only_run

from tracknet.data.dataset import WindowDataset
from tracknet.scripts.train import main
from tracknet.training.gradient import SummedLoss
from tracknet.training.optimization import LearningRate

VIT = [
    "model.pretrained_model_name=null",
    "model.backbone.patch_size=8",
    "model.backbone.hidden_size=8",
    "model.backbone.num_layers=1",
    "model.backbone.num_heads=2",
    "model.decoder.channels=[4,4]",
    "model.decoder.dropout=0.3",
]
CONVNEXT = [
    "model.pretrained_model_name=null",
    "model.backbone.hidden_sizes=[2,2,4,4]",
    "model.backbone.depths=[1,1,1,1]",
    "model.backbone.return_stages=[1,2]",
    "model.fpn.lateral_dim=4",
]
UNET = ["model.backbone.channels=[2,4]"]
MODELS = {"vit_heatmap": VIT, "convnext_fpn_heatmap": CONVNEXT, "unet": UNET}
# Whatever carries state from step to step. Of 16 windows a step takes 6, 6 and 4; the fourth evaluation without a gain of 2 ends the run.
EVERYTHING = [
    "training.batch_size=6",
    "training.epochs=6",
    "training.ema_decay=0.9",
    "training.scheduler.name=cosine",
    "training.scheduler.warmup_epochs=0.7",
    "training.backbone_freeze_epochs=1",
    "training.mb_growth_steps=2",
    "training.early_stopping.patience_evaluations=3",
    "training.early_stopping.min_delta=2.0",
    "training.evaluation.threshold=0.05",
    "training.tracking.previews=1",
]
ROOM = {1: 3, 4: 3, 9: 1}  # update: samples of the largest micro-batch that memory has room for, in the frozen phase and out of it
OF_THE_LAUNCH = {"config", "launcher", "wandb_id"}  # in state.json
SAVED_FILES = ("config.json", "README.md", "model.safetensors", "optimizer.safetensors", "weights.safetensors")


def arguments_of(model: str, clips: Path, output: Path, *more: str) -> list[str]:
    """A tiny run of one of MODELS."""
    names = ["--data", "tennis", "--model", model, "--training", "tennis", "--output-dir", str(output)]
    tiny = [setting for setting in TINY if not setting.startswith("model.backbone")]
    return [*names, f"data.root={clips}", *GAMES, *tiny, "training.tracking.previews=0", *MODELS[model], *more]


@contextmanager
def stopping_after(updates: int | None) -> Iterator[None]:
    """SIGTERM comes in the last of so many updates from here; None never sends it."""
    apply, made = LearningRate.apply, []

    def apply_and_signal(self: LearningRate, step: float) -> float:
        made.append(step)
        if len(made) == updates:
            signal.raise_signal(signal.SIGTERM)
        return apply(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearningRate, "apply", apply_and_signal)
        yield


@contextmanager
def with_room_for(samples: Mapping[int, int]) -> Iterator[None]:
    """Memory runs out in the updates named, at micro-batches of more than so many samples."""
    backward = SummedLoss.backward

    def with_less_room(self: SummedLoss, batch: Any, step: int) -> Any:
        if len(batch) > samples.get(step, len(batch)):
            raise MemoryError
        return backward(self, batch, step)

    gc.freeze()  # each retry collects garbage: among all that was imported, that takes longer than the whole run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummedLoss, "backward", with_less_room)
        yield
    gc.unfreeze()


@contextmanager
def noting_keys(file: Path) -> Iterator[None]:
    """Each training window that is read, by this process or its workers, becomes a line `epoch window`."""
    read = WindowDataset.block

    def read_and_note(self: WindowDataset, keys: list[tuple[int, int]], *allocate: Any) -> Any:
        if self.training is not None:
            with file.open("a") as lines:
                lines.writelines(f"{epoch} {window}\n" for epoch, window in keys)
        return read(self, keys, *allocate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowDataset, "block", read_and_note)
        yield


def noted_keys(file: Path) -> list[tuple[int, int]]:
    """(epoch, window) in the order in which they were read."""
    return [(int(epoch), int(window)) for epoch, window in map(str.split, file.read_text().splitlines())] if file.exists() else []


def train(arguments: list[str], *, stop_after: int | None = None) -> None:
    """Runs `main` to the end, or until it was stopped after so many updates."""
    with stopping_after(stop_after):
        assert main(arguments) == (0 if stop_after is None else 75)


def lines_of(output: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what a clock or a memory counter measured."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in metrics_of(output)]


def last_state(output: Path) -> dict[str, Any]:
    """The state in the newest checkpoint."""
    state: dict[str, Any] = json.loads((only_run(output / "checkpoints") / "last" / "state.json").read_text())
    return state


def outcome(output: Path) -> dict[str, Any]:
    """All that a run has come to: metrics, saved files, the rest of the state, pictures."""
    last = only_run(output / "checkpoints") / "last"
    logs = only_run(output / "logs")
    return {
        "metrics": lines_of(output),
        "files": {name: (last / name).read_bytes() for name in SAVED_FILES if (last / name).exists()},
        "state": {key: value for key, value in last_state(output).items() if key not in OF_THE_LAUNCH},
        "links": {name: (last.parent / name).readlink().name for name in ("last", "best")},
        "pictures": {path.name: path.read_bytes() for path in (logs / "previews").glob("*")},
    }


def check_same(output: Path, whole: dict[str, Any], what: str) -> None:
    """Whether a run has come to the same as another, to the bit; `what` names it in a failure."""
    own = outcome(output)
    for part in whole:
        if part == "metrics":
            for line, undisturbed in zip(own[part], whole[part], strict=False):
                assert line == undisturbed, f"{what}: step {line['step']}"
        assert own[part] == whole[part], f"{what}: {part}"
