"""Sharded training on the ranks of one launch, in one of two ways. No process may take longer than a minute.

`steps OUT PLACE`: compares steps and checkpoints of sharded networks with those of one process that has the whole batch, then lets the
second rank run out of memory in the middle of a pass, PLACE being `forward` or `backward`; each rank writes what came out into OUT.

`train PLACE ARGUMENTS`: trains as the command line does with ARGUMENTS, but the rank PROBE_RANK runs out of memory above PROBE_LIMIT
samples at once from its PROBE_AFTER-th training pass on.
"""

import copy
import faulthandler
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from small_models import small_model, windows
from torch import Tensor
from transformers.integrations import is_fsdp_enabled

from tracknet.data.batch import Batch
from tracknet.errors import UserError
from tracknet.losses import frame_losses
from tracknet.models import TrackNetModel
from tracknet.models.unet import UnetDecoder
from tracknet.schema.training import AdamWConfig, LossConfig, TrainingConfig
from tracknet.training.checkpoint import load_checkpoint
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.ema import Ema
from tracknet.training.gradient import SummedLoss
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.optimization import build_optimizer
from tracknet.training.ranks import Ranks
from tracknet.training.sharded_step import ShardedStep
from tracknet.training.sharding import shard_with_twin
from tracknet.training.size_note import read_size_note, write_size_note
from tracknet.training.state import EVALUATION, FROZEN_BACKBONE, WHOLE_MODEL, TrainingState
from tracknet.training.step import StepResult, TrainingStep

SECONDS = 60
STEPS = 3
MICRO_BATCH = 2
# samples of the two ranks, and the share of labelled frames
CONTENTS = {"unequal": (5, 2, 0.8), "one empty": (0, 3, 0.8), "one sample": (1, 4, 1.0), "nothing labelled": (3, 3, 0.0)}

passes = 0


def fail_above(limit: int, samples: int) -> None:
    if passes > int(os.environ["PROBE_AFTER"]) and samples > limit and os.environ["RANK"] == os.environ["PROBE_RANK"]:
        raise RuntimeError("data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


class FailsBackward(torch.autograd.Function):
    """The identity, whose backward pass may run out of memory."""

    @staticmethod
    def forward(context, value, limit):
        context.limit, context.samples = limit, len(value)
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        fail_above(context.limit, context.samples)
        return gradient, None


def let_decoder_fail(place: str) -> None:
    decode, limit = UnetDecoder.forward, int(os.environ["PROBE_LIMIT"])

    def decode_or_fail(self, features):
        global passes
        if not self.training:
            return decode(self, features)
        passes += 1
        assert not is_fsdp_enabled()  # else transformers gives pretrained weights to one rank of a machine alone
        if place == "forward":
            fail_above(limit, len(features[0]))
        decoded = decode(self, features)
        return FailsBackward.apply(decoded, limit) if place == "backward" else decoded

    UnetDecoder.forward = decode_or_fail


def make_batch(size: int, labeled_share: float, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    frames, background = windows(size, seed=seed)
    return Batch(
        frames=frames,
        background=background,
        xy_input=torch.rand(size, 3, 2, generator=generator) * 60,
        visible=torch.rand(size, 3, generator=generator) < 0.7,
        labeled=torch.rand(size, 3, generator=generator) < labeled_share,
        sample_index=torch.arange(size) + 100 * seed,
        frame_row=torch.zeros(size, 3, dtype=torch.int64),
        counted=torch.ones(size, 3, dtype=torch.bool),
    )


def batches(contents: str, step: int) -> list[Batch]:
    *sizes, labeled_share = CONTENTS[contents]
    return [make_batch(size, labeled_share, seed=2 * step + rank + 1) for rank, size in enumerate(sizes)]


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Batch)))


class Side:
    """A network in training, sharded over the ranks or whole in one process."""

    def __init__(self, family: str, ranks: Ranks, frozen: bool = False, keep_sizes: Any = None) -> None:
        config = TrainingConfig(batch_size=8, micro_batch_size=MICRO_BATCH)
        model: TrackNetModel = small_model(family).double()
        model.train()
        model.freeze_backbone(frozen)
        twin = shard_with_twin(model, ranks, reshard_after_forward=True) if ranks.size > 1 else None
        # a larger eps than usual: gradients that are 0 but for rounding must not decide the direction
        optimizer = build_optimizer(AdamWConfig(lr=1e-2, eps=1e-3), model.parameters())
        sizes = {phase: MicroBatchSize(MICRO_BATCH, config) for phase in (FROZEN_BACKBONE, WHOLE_MODEL, EVALUATION)}
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.state = TrainingState(model, optimizer, scaler, Ema(model, 0.9), sizes, twin)
        summed_loss = SummedLoss(
            model,
            lambda logits, target: frame_losses(logits, target, LossConfig("focal")),
            nominal_frames=24,
            sigma=1.5,
            seed=0,
            autocast=nullcontext,
            scaler=scaler,
            device=ranks.device,
        )
        parts = {"ranks": ranks, "micro_batch": sizes[WHOLE_MODEL], "clip_norm": 0.5, "describe": str}
        if twin:
            self.step: Any = ShardedStep(summed_loss, optimizer, **parts, keep_sizes=keep_sizes)
        else:
            self.step = TrainingStep(summed_loss, optimizer, **parts)

    def release_backbone(self) -> None:
        self.state.model.freeze_backbone(False)
        self.step.begin_phase(self.state.micro_batch_size)

    def __call__(self, batch: Batch, step: int) -> StepResult:
        result = self.step(batch, step=step, stop=False)
        self.state.ema.update()
        self.state.position.step += 1
        return result

    def whole(self) -> dict[str, Tensor]:
        """All tensors of the state, and the model that a user is to have."""
        self.state.gather()
        tensors = {f"{group}.{name}": t for group, of in self.state.tensors(keep=True).items() for name, t in of.items()}
        with self.state.finished_model() as model:
            return tensors | {f"model.{name}": t.clone() for name, t in model.state_dict().items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest, absolute; the weights and the averages are of the order of 1."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def alone(ranks: Ranks) -> Ranks:
    one = copy.copy(ranks)
    one.rank, one.size, one.is_main = 0, 1, True
    return one


def compare(family: str, contents: str, ranks: Ranks, out: Path, frozen: bool = False) -> dict[str, Any]:
    """Steps of both sides; before the last one, the sharded side is saved and goes on from its checkpoint."""
    sharded, single = Side(family, ranks, frozen), Side(family, alone(ranks), frozen)
    results = []
    for step in range(STEPS):
        if step == STEPS - 1:
            sharded = reloaded(sharded, family, ranks, out / f"{family} {contents} {frozen}")
            if frozen:
                sharded.release_backbone()
                single.release_backbone()
        parts = batches(contents, step)
        results.append((sharded(parts[ranks.rank], step), single(joined(parts), step)))
    return {
        "difference": difference(sharded.whole(), single.whole()),
        "losses": [[a.loss, b.loss] for a, b in results],
        "norms": [[a.grad_norm, b.grad_norm] for a, b in results],
        "samples": [[a.samples, b.samples] for a, b in results],
        "local_numbers": sum(p.to_local().numel() for p in sharded.state.model.parameters()),
        "all_numbers": sum(p.numel() for p in single.state.model.parameters()),
    }


def reloaded(side: Side, family: str, ranks: Ranks, folder: Path) -> Side:
    tensors = side.state.tensors(keep=ranks.is_main)
    state = side.state
    ranks.on_main(lambda: CheckpointStore(folder, 1).save(2, state.model_texts(), tensors, state.as_json(), False))
    fresh = Side(family, ranks, state.model.backbone_frozen)
    with torch.no_grad():
        for parameter in fresh.state.model.parameters():
            parameter.zero_()
    fresh.state.restore(load_checkpoint(folder / "last"))
    return fresh


def refusals(ranks: Ranks) -> dict[str, str]:
    """What each rank says where one of them cannot go on."""
    told = {}
    side = Side("unet", ranks)
    batch = make_batch(3, 1.0, seed=9)
    for name, own in (("no batch", UserError("frame 7 is broken") if ranks.rank == 1 else batch), ("not finite", batch)):
        if name == "not finite" and ranks.rank == 1:
            batch.xy_input[2, 1] = float("nan")
            batch.visible[2, 1] = True
        try:
            side(own, 17)
        except UserError as error:
            told[name] = str(error)
    return told


def run_out_of_memory(ranks: Ranks, out: Path, place: str) -> dict[str, Any]:
    """One undisturbed step, then one in which the second rank fails."""
    os.environ.update(PROBE_RANK="1", PROBE_LIMIT="1", PROBE_AFTER="1")
    let_decoder_fail(place)
    side = Side("unet", ranks, keep_sizes=lambda step: write_size_note(out, side.state.micro_batch_sizes, step))
    global passes
    passes = -1
    side(make_batch(4, 1.0, seed=1 + ranks.rank), 11)
    try:
        side(make_batch(4, 1.0, seed=3 + ranks.rank), 12)
    except UserError as error:
        noted = read_size_note(out, side.state.micro_batch_sizes)
        return {"said": str(error), "noted": noted[WHOLE_MODEL]["value"] if noted else None}
    return {"said": "nothing"}


def run_steps(out: Path, place: str) -> None:
    ranks = Ranks(Accelerator(cpu=True))
    told: dict[str, Any] = {"world_size": ranks.size}
    if place == "forward":
        told["runs"] = {contents: compare("unet", contents, ranks, out) for contents in CONTENTS}
        told["runs"]["convnext"] = compare("convnext", "unequal", ranks, out)
        told["runs"]["released"] = compare("convnext", "unequal", ranks, out, frozen=True)
        told["vit"] = compare("vit", "unequal", ranks, out)
        told["refusals"] = refusals(ranks)
    told["out_of_memory"] = run_out_of_memory(ranks, out, place)
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(told))
    # as a process that has failed: its connections close when it is gone, and not one by one
    os._exit(0)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    if sys.argv[1] == "steps":
        run_steps(Path(sys.argv[2]), sys.argv[3])
    let_decoder_fail(sys.argv[2])
    from tracknet.scripts.train import main

    code = main(sys.argv[3:])
    faulthandler.cancel_dump_traceback_later()
    sys.exit(code)
