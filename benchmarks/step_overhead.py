"""What the exact step costs beside the plainest loop that makes the same update.

    python benchmarks/step_overhead.py [--processes 2] [--seconds 60] [KEY=VALUE ...]

One process: `TrainingStep` beside a bare PyTorch loop. Several: beside DistributedDataParallel, over gloo on this machine's cores. Same
model, batch, loss, clipping and optimizer, and no micro-batches on either side. Short blocks of the two take turns and each is compared
with its neighbour, so that a machine that gets slower slows both. The recipe is `tennis` with the U-Net widened to 14 M parameters.
"""

import argparse
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median, quantiles
from typing import NamedTuple

import torch
from accelerate import Accelerator
from ratios import middle_half, time_ratio
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training_loops import WIDE, NetworkWithLoss, as_arguments, network, random_batch, recipe, training_step

from tracknet.data.batch import Batch
from tracknet.errors import ConfigError
from tracknet.models import TrackNetModel
from tracknet.schema.root import Config
from tracknet.schema.training import gradient_bound
from tracknet.training.optimization import build_optimizer
from tracknet.training.ranks import Ranks

WARM_UP_STEPS = 4
BLOCK_S = 0.3  # a block has as many steps as take this long

Step = Callable[[], float]  # makes one update; gives the gradient's norm before clipping


def exact_step(config: Config, model: TrackNetModel, batch: Batch, accelerator: Accelerator) -> Step:
    """This trainer's."""
    step, _ = training_step(config, model, Ranks(accelerator), accelerator)
    return lambda: step(batch, 0, False).grad_norm


def plain_step(config: Config, model: TrackNetModel, batch: Batch, accelerator: Accelerator) -> Step:
    """What one would write without this trainer, straight from PyTorch's documentation."""
    training = config.training
    module: nn.Module = NetworkWithLoss(config, model).train()
    forward = DistributedDataParallel(module) if accelerator.num_processes > 1 else module
    optimizer = build_optimizer(training.optimizer, module.parameters())

    def step() -> float:
        optimizer.zero_grad()
        torch.autograd.backward(forward(**as_arguments(batch.to(accelerator.device)))["loss"])
        norm = nn.utils.clip_grad_norm_(module.parameters(), gradient_bound(training))
        optimizer.step()
        return float(norm)

    return step


class Block(NamedTuple):
    """What a block of steps took: seconds until the last rank had ended, and CPU seconds of all ranks."""

    wall_s: float
    cpu_s: float


def timed_block(step: Step, steps: int, ranks: Ranks) -> Block:
    """Runs a block. All ranks call this."""
    used = torch.zeros(1, dtype=torch.float64)
    ranks.sum_(used)
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    used += time.process_time() - cpu_start
    ranks.sum_(used)
    return Block(time.perf_counter() - start, used.item())


def measure(exact: Step, plain: Step, ranks: Ranks, seconds: float) -> tuple[list[Block], list[Block], int]:
    """Alternating blocks; which of the two comes first changes too. All ranks call this.

    Returns:
        the blocks of the exact step, those of the plain one beside them, and the steps in each.
    """
    for _ in range(WARM_UP_STEPS):
        exact_norm, plain_norm = exact(), plain()
        if not math.isclose(exact_norm, plain_norm, rel_tol=0.01):  # rounding grows from update to update
            raise RuntimeError(f"the two loops do not make the same update: gradient norms {exact_norm} and {plain_norm}")
    steps: int = ranks.from_main(math.ceil(BLOCK_S / timed_block(plain, 1, ranks).wall_s))
    exact_blocks: list[Block] = []
    plain_blocks: list[Block] = []
    order = [(exact, exact_blocks), (plain, plain_blocks)]
    end = time.perf_counter() + seconds
    while ranks.from_main(time.perf_counter() < end) or len(plain_blocks) < 4:
        for step, blocks in order:
            blocks.append(timed_block(step, steps, ranks))
        order.reverse()
    return exact_blocks, plain_blocks, steps


def report(exact: list[Block], plain: list[Block], steps: int) -> None:
    exact_s, plain_s = [block.wall_s / steps for block in exact], [block.wall_s / steps for block in plain]
    print(f"{len(exact)} pairs of blocks of {steps} steps; a step takes {median(exact_s):.3f} s, the plain one {median(plain_s):.3f} s")
    print(f"ratio of time:     {ratio(exact_s, plain_s)}")
    print(f"ratio of CPU time: {ratio([block.cpu_s for block in exact], [block.cpu_s for block in plain])}")
    print(f"ratio of time of the fastest quarter of each: {quantiles(exact_s)[0] / quantiles(plain_s)[0]:.3f}")
    neighbours = [one / next_one for one, next_one in pairwise(plain_s)]
    print(f"noise (time of a plain block beside the next plain one), half of them: {middle_half(neighbours)}")


def ratio(mine: list[float], other: list[float]) -> str:
    return f"{time_ratio(mine, other)}, half of the pairs {middle_half([one / beside for one, beside in zip(mine, other, strict=True)])}"


def run(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """One process of the benchmark."""
    processes, cores = arguments.processes, len(os.sched_getaffinity(0))
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    accelerator = Accelerator()
    torch.set_num_threads(int(threads))
    config = recipe(WIDE, *arguments.overrides)
    if config.data.preprocess.resize_wh is None:
        raise ConfigError("data.preprocess.resize=null: there are no clips here to take a size from; give it as [width,height]")
    module: nn.Module = network(config)
    model, batch, ranks = module.to(accelerator.device), random_batch(config, rank), Ranks(accelerator)
    if ranks.is_main:
        device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"{platform.machine()} CPU, {cores} cores"
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{device}, torch {torch.__version__}, {processes} processes of {torch.get_num_threads()} threads")
        print(f"{parameters:.2f} M parameters, {tuple(batch.frames.shape)} uint8 per process, load average {os.getloadavg()[0]:.2f}")
    exact, plain = (make(config, model, batch, accelerator) for make in (exact_step, plain_step))
    measured = measure(exact, plain, ranks, arguments.seconds)
    if ranks.is_main:
        report(*measured)
    accelerator.end_training()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=1, help="default 1")
    parser.add_argument("--seconds", type=float, default=60, help="to measure for; default 60")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration, such as training.batch_size=4")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if arguments.processes == 1:
        run(0, arguments, port)
    else:
        torch.multiprocessing.start_processes(run, (arguments, port), nprocs=arguments.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
