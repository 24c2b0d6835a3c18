"""What the exact step costs beside the plainest loop that makes the same update.

    python benchmarks/step_overhead.py [--processes 2] [--seconds 60] [KEY=VALUE ...]

One process: `TrainingStep` beside a bare PyTorch loop. Several: beside DistributedDataParallel, over gloo on this machine's cores. Same
model, batch, loss, clipping and optimizer, and no micro-batches on either side. Short blocks of the two take turns and each is compared
with its neighbour, so that a machine that gets slower slows both. The recipe is `tennis` with the U-Net widened to 14 M parameters.
"""

import argparse
import copy
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median, quantiles
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tracknet.data.batch import Batch
from tracknet.errors import ConfigError
from tracknet.geometry import resize_points
from tracknet.heatmap import render_heatmaps
from tracknet.losses import frame_losses
from tracknet.models import TrackNetModel, build_model
from tracknet.models.layers import PerSampleConv1x1
from tracknet.schema.root import Config
from tracknet.schema.training import gradient_bound
from tracknet.training.gradient import SummedLoss
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.optimization import build_optimizer
from tracknet.training.ranks import Ranks
from tracknet.training.step import TrainingStep
from tracknet.utils.config import build_cfg, typed

WIDE = "model.backbone.channels=[64,128,288,608]"  # 14.1 M parameters
WARM_UP_STEPS = 4
BLOCK_S = 0.3  # a block has as many steps as take this long

Step = Callable[[], float]  # makes one update; gives the gradient's norm before clipping


def random_batch(config: Config, input_wh: tuple[int, int], rank: int) -> Batch:
    """A batch of crops in host memory as the loader gives it, every frame labelled; other pictures on every rank."""
    size, frames = config.training.batch_size, config.data.sequence.window_frames
    width, height = config.data.augment.crop or input_wh
    generator = torch.Generator().manual_seed(rank)
    return Batch(
        frames=torch.randint(0, 256, (size, frames, 3, height, width), dtype=torch.uint8, generator=generator),
        background=torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8, generator=generator),
        xy_input=torch.rand(size, frames, 2, generator=generator) * torch.tensor([width, height]),
        visible=torch.ones(size, frames, dtype=torch.bool),
        labeled=torch.ones(size, frames, dtype=torch.bool),
        sample_index=torch.arange(size) + rank * size,
        frame_row=torch.zeros(size, frames, dtype=torch.int64),
        counted=torch.ones(size, frames, dtype=torch.bool),
    )


def exact_step(config: Config, model: TrackNetModel, batch: Batch, accelerator: Accelerator) -> Step:
    """This trainer's."""
    training, ranks = config.training, Ranks(accelerator)
    summed_loss = SummedLoss(
        model,
        lambda logits, target: frame_losses(logits, target, training.loss),
        nominal_frames=training.batch_size * config.data.sequence.window_frames,
        sigma=config.model.heatmap.sigma,
        seed=config.runtime.seed,
        autocast=accelerator.autocast,
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=False),
        device=ranks.device,
    )
    step = TrainingStep(
        summed_loss,
        build_optimizer(training.optimizer, model.parameters()),
        ranks=ranks,
        micro_batch=MicroBatchSize(training.batch_size, training),
        clip_norm=gradient_bound(training),
        describe=str,
    )
    return lambda: step(batch, 0, False).grad_norm


def plain_step(config: Config, model: TrackNetModel, batch: Batch, accelerator: Accelerator) -> Step:
    """What one would write without this trainer, straight from PyTorch's documentation."""
    training, device = config.training, accelerator.device
    for module in model.modules():
        if isinstance(module, PerSampleConv1x1):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    forward: nn.Module = DistributedDataParallel(model) if accelerator.num_processes > 1 else model
    optimizer = build_optimizer(training.optimizer, model.parameters())

    def loss_of(on_device: Batch) -> Tensor:
        logits = forward(on_device.frames, on_device.background)
        (height, width), (rows, columns) = on_device.frames.shape[-2:], logits.shape[-2:]
        xy_heatmap = resize_points(on_device.xy_input, (width, height), (columns, rows))
        target = render_heatmaps(xy_heatmap, on_device.visible, (rows, columns), config.model.heatmap.sigma)
        return frame_losses(logits, target, training.loss)[on_device.labeled].mean()

    def step() -> float:
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(batch.to(device)))
        norm = nn.utils.clip_grad_norm_(model.parameters(), gradient_bound(training))
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


def spread(ratios: list[float]) -> str:
    """Median with the interval that holds it with 95 % (order statistics), and between what the middle half of the values lies."""
    ordered, count = sorted(ratios), len(ratios)
    low, high = math.floor(count / 2 - 0.98 * math.sqrt(count)), math.ceil(count / 2 + 0.98 * math.sqrt(count))
    lower, _, upper = quantiles(ordered)
    interval = f"95 % interval {ordered[max(0, low)]:.3f} to {ordered[min(count - 1, high)]:.3f}"
    return f"median {median(ordered):.3f}, {interval}, half of the pairs {lower:.3f} to {upper:.3f}"


def report(exact: list[Block], plain: list[Block], steps: int) -> None:
    exact_s, plain_s = [block.wall_s / steps for block in exact], [block.wall_s / steps for block in plain]
    print(f"{len(exact)} pairs of blocks of {steps} steps; a step takes {median(exact_s):.3f} s, the plain one {median(plain_s):.3f} s")
    print(f"ratio of time:     {spread([mine / other for mine, other in zip(exact_s, plain_s, strict=True)])}")
    print(f"ratio of CPU time: {spread([mine.cpu_s / other.cpu_s for mine, other in zip(exact, plain, strict=True)])}")
    print(f"ratio of time of the fastest quarter of each: {quantiles(exact_s)[0] / quantiles(plain_s)[0]:.3f}")
    print(f"noise (time of a plain block beside the next plain one): {spread([before / after for before, after in pairwise(plain_s)])}")


def run(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """One process of the benchmark."""
    processes, cores = arguments.processes, len(os.sched_getaffinity(0))
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    accelerator = Accelerator()
    torch.set_num_threads(int(threads))
    config = typed(build_cfg("tennis", "unet", "tennis", overrides=[WIDE, *arguments.overrides], dry_run=True))
    if config.data.preprocess.resize is None:
        raise ConfigError("data.preprocess.resize=null: there are no clips here to take a size from; give it as [width,height]")
    input_wh = (config.data.preprocess.resize[0], config.data.preprocess.resize[1])
    model = build_model(config.model, config.data, input_wh).to(accelerator.device, memory_format=torch.channels_last)
    batch, ranks = random_batch(config, input_wh, rank), Ranks(accelerator)
    if ranks.is_main:
        device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"{platform.machine()} CPU, {cores} cores"
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{device}, torch {torch.__version__}, {processes} processes of {torch.get_num_threads()} threads")
        print(f"{parameters:.2f} M parameters, {tuple(batch.frames.shape)} uint8 per process, load average {os.getloadavg()[0]:.2f}")
    make = [partial(builder, config, copy.deepcopy(model), batch, accelerator) for builder in (exact_step, plain_step)]
    measured = measure(make[0](), make[1](), ranks, arguments.seconds)
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
