"""Runs every injected failure on the ranks of one launch; writes what came out into the folder of the first argument.

Each run is a few steps of a fresh network, in one of which an attempt, or two in a row, runs out of memory on a rank or on several. Beside
it go a run whose sizes are prescribed, so that nothing has to fail, and an undisturbed one. No run may last longer than a minute.
"""

import faulthandler
import gc
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from exactness_probe import DropoutNetwork, unchanged
from test_step import make_batch
from torch import Tensor, nn

from tracknet.data.batch import Batch
from tracknet.errors import UserError
from tracknet.losses import frame_losses
from tracknet.schema.training import LossConfig, TrainingConfig
from tracknet.training.gradient import SummedLoss
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.ranks import Ranks
from tracknet.training.step import StepResult, TrainingStep

SECONDS_PER_RUN = 60
STEPS = 4
BATCH_SIZE = 8
FIRST_SIZE = 4  # then 2, then 1
WRONG_SHAPE = "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"
RANKS = {"first": (0,), "second": (1,), "both": (0, 1), "in turn": (0, 1)}
PLACES = ("transfer", "forward", "backward", "loss")
CONTENTS = ("full", "ragged", "one with nothing labelled", "one empty")
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"),
    "cuda driver": lambda: RuntimeError("CUDA error: out of memory"),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "nccl": lambda: RuntimeError("NCCL Error 1: unhandled cuda error. Last error: Failed to CUDA calloc async 608 bytes"),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB, other allocations: 1.00 MB, max allowed: 18.13 GB)"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to"),
    "onednn": lambda: RuntimeError("could not create a primitive"),
    "python": lambda: MemoryError(),
}


@dataclass(frozen=True)
class Case:
    """One injected run; what it does not name is drawn from its number."""

    number: int
    ranks: str  # of RANKS
    place: str  # of PLACES
    micro_batch: str  # first or last of the batch
    step: int
    attempts: int  # that fail, over all ranks; more than one: also at the smaller size
    internal_dropout: bool  # torch's own, as inside a pretrained backbone

    def fails(self, rank: int, attempt: int) -> bool:
        if self.ranks == "in turn":
            return rank == attempt
        return rank in RANKS[self.ranks] and attempt < self.attempts


def cases() -> list[Case]:
    places = itertools.product(RANKS, PLACES, ("first", "last"), range(STEPS), (1, 2), (False, True))
    kept = [place for place in places if not (place[0] == "in turn" and place[4] == 1)]
    return [Case(number, *place) for number, place in enumerate(kept)]


class Injector:
    """Raises in one place of a run, for one micro-batch."""

    def __init__(self, case: Case, rank: int, error: Callable[[], Exception]) -> None:
        self._case, self._rank, self._error = case, rank, error
        self.raised = 0

    def step_begins(self, step: int, batch: Batch) -> None:
        self._step, self._samples, self._attempt = step, batch.sample_index.tolist(), -1

    def transferred(self, part: Batch) -> None:
        samples = part.sample_index.tolist()
        self._attempt += samples[0] == self._samples[0]  # the first micro-batch begins an attempt
        wanted = self._samples[0 if self._case.micro_batch == "first" else -1]
        self._armed = self._step == self._case.step and self._case.fails(self._rank, self._attempt) and wanted in samples
        self.at("transfer")

    def at(self, place: str) -> None:
        if self._armed and place == self._case.place:
            self.raised += 1
            raise self._error()


class Hook(torch.autograd.Function):
    """The identity, with a call in the middle of the forward pass and in the middle of the backward pass."""

    @staticmethod
    def forward(context, value, call):
        context.call = call
        call("forward")
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        context.call("backward")
        return gradient, None


class Prescribed:
    """Stands in for the policy: the sizes of the steps, whatever happens."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    @property
    def value(self) -> int:
        return self._sizes[0]

    def back_off(self, retries: int, tried: int | None = None) -> None:
        raise AssertionError("nothing fails in a run whose sizes are prescribed")

    def passed(self, steps: int = 1, tried: int | None = None) -> bool:
        self._sizes = self._sizes[1:]
        return False


@dataclass(frozen=True)
class Settings:
    """What a case draws from its number, the same on all ranks."""

    error: str
    contents: tuple[str, ...]  # of the steps
    sizes: tuple[tuple[int, int], ...]  # samples of the ranks, for each step
    unlabelled_rank: int
    optimizer: str
    loss: str
    growth_steps: int

    @staticmethod
    def of(case: Case) -> "Settings":
        draw = np.random.default_rng(case.number)
        failing = {rank for rank in (0, 1) for attempt in range(case.attempts) if case.fails(rank, attempt)}
        contents, sizes = [], []
        for step in range(STEPS):
            content = CONTENTS[draw.integers(len(CONTENTS))]
            may_be_empty = sorted({0, 1} - failing) if step == case.step else [0, 1]
            if content == "one empty" and not may_be_empty:
                content = "full"
            of_ranks = [BATCH_SIZE, BATCH_SIZE] if content == "full" else draw.integers(1, BATCH_SIZE + 1, 2).tolist()
            if content == "one empty":
                of_ranks[may_be_empty[draw.integers(len(may_be_empty))]] = 0
            if step == case.step:
                of_ranks[min(failing)] = BATCH_SIZE  # a smaller batch would be cut below what it holds, and not one size after the other
            contents.append(content)
            sizes.append(tuple(of_ranks))
        return Settings(
            error=list(ERRORS)[case.number % len(ERRORS)],
            contents=tuple(contents),
            sizes=tuple(sizes),
            unlabelled_rank=int(draw.integers(2)),
            optimizer=str(draw.choice(["adam", "sgd"])),
            loss=str(draw.choice(["mse", "focal"])),
            growth_steps=int(draw.integers(3)),
        )

    def batch(self, case: Case, step: int, rank: int) -> Batch:
        nothing_labelled = self.contents[step] == "one with nothing labelled" and rank == self.unlabelled_rank
        seed = (case.number * STEPS + step) * 2 + rank
        batch = make_batch(self.sizes[step][rank], seed, labeled_share=0.0 if nothing_labelled else 0.8)
        return replace(batch, sample_index=batch.sample_index + 100 * seed)


@contextmanager
def transfers_seen_by(seen: Callable[[Batch], None]) -> Iterator[None]:
    plain = Batch.to

    def to(batch: Batch, device: torch.device | str) -> Batch:
        seen(batch)
        return plain(batch, device)

    Batch.to = to
    try:
        yield
    finally:
        Batch.to = plain


def make_step(network: nn.Module, ranks: Ranks, settings: Settings, micro_batch, call: Callable[[str], None]) -> TrainingStep:
    def losses(logits: Tensor, target: Tensor) -> Tensor:
        call("loss")
        return frame_losses(logits, target, LossConfig(settings.loss))

    summed_loss = SummedLoss(
        network,
        losses,
        nominal_frames=2 * BATCH_SIZE,
        sigma=1.5,
        seed=0,
        autocast=nullcontext,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=ranks.device,
    )
    if settings.optimizer == "adam":
        # a larger eps than usual: gradients that are 0 but for rounding must not decide the direction
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, eps=1e-3)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    return TrainingStep(summed_loss, optimizer, ranks=ranks, micro_batch=micro_batch, clip_norm=0.5, describe=str)


def weights_of(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


class Experiment:
    """The runs of one case on this rank."""

    def __init__(self, case: Case, ranks: Ranks) -> None:
        self.case, self.ranks, self.settings = case, ranks, Settings.of(case)
        self._config = TrainingConfig(batch_size=BATCH_SIZE, micro_batch_size=FIRST_SIZE, mb_growth_steps=self.settings.growth_steps)

    def _network(self, between: Callable[[Tensor], Tensor] = unchanged) -> DropoutNetwork:
        torch.manual_seed(self.case.number)
        return DropoutNetwork(self.case.internal_dropout, between).double()

    def _batch(self, step: int) -> Batch:
        return self.settings.batch(self.case, step, self.ranks.rank)

    def injected(self, error: Callable[[], Exception]) -> tuple[Tensor, list[StepResult], int]:
        injector = Injector(self.case, self.ranks.rank, error)
        network = self._network(lambda x: Hook.apply(x, injector.at))
        step = make_step(network, self.ranks, self.settings, MicroBatchSize(FIRST_SIZE, self._config), injector.at)
        results = []
        with transfers_seen_by(injector.transferred):
            for number in range(STEPS):
                batch = self._batch(number)
                injector.step_begins(number, batch)
                results.append(step(batch, step=number, stop=False))
        return weights_of(network), results, injector.raised

    def untouched(self, micro_batch) -> tuple[Tensor, list[StepResult]]:
        network = self._network()
        step = make_step(network, self.ranks, self.settings, micro_batch, lambda place: None)
        results = [step(self._batch(number), step=number, stop=False) for number in range(STEPS)]
        return weights_of(network), results

    def outcome(self) -> dict:
        start = weights_of(self._network())
        weights, results, raised = self.injected(ERRORS[self.settings.error])
        prescribed, prescribed_results = self.untouched(Prescribed([result.micro_batch_size for result in results]))
        undisturbed, _ = self.untouched(MicroBatchSize(FIRST_SIZE, self._config))
        moved = (undisturbed - start).norm()
        return {
            "number": self.case.number,
            "raised": raised,
            "sizes": [result.micro_batch_size for result in results],
            "retries": [result.retries for result in results],
            "losses": [result.loss for result in results],
            "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
            "as_prescribed": torch.equal(weights, prescribed) and [r.loss for r in results] == [r.loss for r in prescribed_results],
            "moved": float(moved),
            "error_to_undisturbed": float((weights - undisturbed).norm() / moved),
        }


def steps_that_end_a_run(ranks: Ranks) -> dict[str, str]:
    """What each rank raises where no retry helps, one after the other: the ranks stay together all the same."""
    case = replace(cases()[0], ranks="both", attempts=9)
    experiment = Experiment(case, ranks)
    network = experiment._network()
    step = make_step(network, ranks, experiment.settings, MicroBatchSize(FIRST_SIZE, TrainingConfig()), lambda place: None)
    batch, before = experiment._batch(0), weights_of(network).clone()
    labelled, off_the_picture = torch.ones_like(batch.labeled), torch.full_like(batch.xy_input, torch.nan)
    bad_batch = replace(batch, labeled=labelled, visible=labelled, xy_input=off_the_picture, sample_index=torch.arange(len(batch)))
    no_batch = UserError("frame 7 is broken")
    ends: dict[str, Callable[[], object]] = {
        "no batch on the second rank": lambda: step(no_batch if ranks.rank == 1 else batch, step=0, stop=False),
        "no batch on the first rank": lambda: step(no_batch if ranks.rank == 0 else batch, step=0, stop=False),
        "no loss on the second rank": lambda: step(bad_batch if ranks.rank == 1 else batch, step=0, stop=False),
        "no memory for one sample": lambda: experiment.injected(MemoryError),
        "a wrong shape on both ranks": lambda: experiment.injected(lambda: RuntimeError(WRONG_SHAPE)),
    }
    told = {}
    for name, end in ends.items():
        try:
            end()
        except (UserError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    assert torch.equal(weights_of(network), before)
    return told


def main(out: Path, every: int) -> None:
    """Runs every so-manieth case, then ends as a run does where one rank has a mistake that is none of the memory's."""
    ranks = Ranks(Accelerator(cpu=True))
    gc.freeze()  # the modules alone take a third of a second to walk through, at every failure
    outcomes = []
    for case in cases()[::every]:
        faulthandler.dump_traceback_later(SECONDS_PER_RUN, exit=True)
        outcomes.append(Experiment(case, ranks).outcome())
    faulthandler.dump_traceback_later(SECONDS_PER_RUN, exit=True)
    told = {"world_size": ranks.size, "runs": outcomes, "ends": steps_that_end_a_run(ranks)}
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(told))
    gc.unfreeze()
    Experiment(replace(cases()[0], ranks="second", attempts=9), ranks).injected(lambda: RuntimeError(WRONG_SHAPE))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
