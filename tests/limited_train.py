"""Stands for `tracknet.scripts.train` where memory is to run out: `limited_train.py RUNS`, a JSON list of `Run`s, one after the other.

Nothing in the trainer is replaced but what a run names. It is the allocator that fails: the network asks it for much memory per sample,
without touching it, and the address space of a rank may grow by no more than so much.

Each run but the last has a process of its own, forked once everything is imported, which saves seconds; the last is this process, as the
launcher sees it. In a run's folder, `rank<n>.log` is what the rank wrote to stderr, apart from what the launcher writes; `rank<n>.json`
its exit code, its micro-batch sizes and the SHA-256 of its weights.
"""

import hashlib
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import tracknet.evaluation.detection as detection_module
import tracknet.training.run as run_module
from tracknet.scripts.train import main
from tracknet.training import build as build_module
from tracknet.training.step import TrainingStep

MIB = 2**20
WATCHDOG_SECONDS = 90  # a run takes some 5 on a busy machine
RANK = int(os.environ.get("RANK", "0"))


@dataclass
class Run:
    """One training run; its steps count from 0, as in the messages.

    Attributes:
        folder: where it leaves what it tells.
        arguments: of `tracknet.scripts.train`.
        port: for its ranks to meet; the last run has the launcher's.
        hungry: where the network asks for memory: "forward" or "backward" in training, "evaluation".
        mib_per_sample: how much it asks for.
        limited_rank: whose memory is limited, from the start of `limit_step` to that of `lift_step`.
        limit_mib: by how much its address space may still grow.
        sizes_of: the folder of an earlier run whose micro-batch sizes are prescribed, step by step.
        stop_step: rank 0 gets SIGTERM as this step begins, so the next one is the last.
        double: whether the network computes in float64.
    """

    folder: str
    arguments: list[str]
    port: str = ""
    hungry: list[str] = field(default_factory=list)
    mib_per_sample: int = 64
    limited_rank: int = -1
    limit_step: int = -1
    lift_step: int = -1
    limit_mib: int = 768
    sizes_of: str = ""
    stop_step: int = -1
    double: bool = False


@dataclass
class Now:
    """Where the run is, and what it tells at its end."""

    model: Any = None
    step: int = 0
    sizes: list[int] = field(default_factory=list)


class Hungry(torch.autograd.Function):
    """The identity, for so many bytes in the forward or backward pass."""

    @staticmethod
    def forward(context, value, forward_bytes, backward_bytes):
        context.backward_bytes = backward_bytes
        torch.empty(forward_bytes, dtype=torch.uint8)
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        torch.empty(context.backward_bytes, dtype=torch.uint8)
        return gradient, None, None


class PrescribedSize:
    """Takes the place of `MicroBatchSize`."""

    def __init__(self, sizes: list[int], now: Now) -> None:
        self._sizes, self._now = sizes, now

    @property
    def value(self) -> int:
        return self._sizes[self._now.step]

    def back_off(self, retries: int, tried: int | None = None) -> None:
        raise AssertionError(f"step {self._now.step}: memory ran out at a size that was prescribed")

    def passed(self, steps: int = 1, tried: int | None = None) -> bool:
        return False

    def as_json(self) -> dict[str, Any]:
        return {}


def make_hungry(network: nn.Module, run: Run) -> None:
    """At its first convolution: when memory runs out there in the backward pass, the layers above have their gradients already."""

    def ask(layer, inputs, output):
        asked = len(output) * run.mib_per_sample * MIB
        places = ("forward" if layer.training else "evaluation", "backward")
        return Hungry.apply(output, *(asked if place in run.hungry else 0 for place in places))

    next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d)).register_forward_hook(ask)


def prepare_network(run: Run, now: Now) -> None:
    build_network = run_module.build_network
    # on a CPU an evaluation's windows go in one by one, and there is nothing to fall back from; this is how they go in elsewhere
    detection_module.logits_of = lambda model, frames, background: model(frames, background, None)

    def build_and_prepare(*arguments):
        now.model = build_network(*arguments)
        make_hungry(now.model, run)
        return now.model.double() if run.double else now.model

    run_module.build_network = build_and_prepare


def prescribe_sizes(run: Run, now: Now) -> None:
    sizes = json.loads(Path(run.sizes_of, f"rank{RANK}.json").read_text())["sizes"]
    found_size = build_module.MicroBatchSize

    def make(*arguments, **named):
        return found_size(*arguments, **named) if named.get("evaluation") else PrescribedSize(sizes, now)

    build_module.MicroBatchSize = make


def follow_steps(run: Run, now: Now) -> None:
    make_step = TrainingStep.__call__

    def begin_and_make(self, batch, step, stop):
        now.step = step
        # anew at each step: what is mapped besides changes by more than a sample needs
        if run.limited_rank == RANK and run.limit_step <= step < run.lift_step:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + run.limit_mib * MIB, resource.RLIM_INFINITY))
        if step == run.lift_step:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if RANK == 0 and step == run.stop_step:
            os.kill(os.getpid(), signal.SIGTERM)
        result = make_step(self, batch, step, stop)
        now.sizes.append(result.micro_batch_size)
        return result

    TrainingStep.__call__ = begin_and_make


def carry_out(run: Run) -> int:
    """Trains in this process, which does not outlive the watchdog; returns its exit code."""
    signal.alarm(WATCHDOG_SECONDS)
    folder, now = Path(run.folder), Now()
    with (folder / f"rank{RANK}.log").open("wb") as console:
        os.dup2(console.fileno(), sys.stderr.fileno())
    prepare_network(run, now)
    follow_steps(run, now)
    if run.sizes_of:
        prescribe_sizes(run, now)
    code = main(run.arguments)
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in now.model.parameters())).hexdigest()
    (folder / f"rank{RANK}.json").write_text(json.dumps({"code": code, "sizes": now.sizes, "weights": weights}))
    return code


def carry_out_forked(run: Run) -> None:
    """Trains in a child, whose exit code is in what it tells; ends the launch if a signal ends it, such as the watchdog's."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            sys.exit(f"a run was ended by {signal.Signals(os.WTERMSIG(status)).name}: {run.folder}")
        return
    # the launcher's meeting place still has what the ranks of the run before left there
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": run.port}
    sys.exit(carry_out(run))


if __name__ == "__main__":
    *earlier, last = (Run(**run) for run in json.loads(sys.argv[1]))
    for run in earlier:
        carry_out_forked(run)
    sys.exit(carry_out(last))
