"""How long a save in the background holds the training up, beside one copy of the same bytes in memory; and what the thread costs it.

    python benchmarks/background_saving.py [--pairs 9] [--threads N] [--folder FOLDER] [--reserve]

Saved is what a run with AdamW and an average of the weights saves: 16 bytes per parameter, here of a U-Net of 100 M parameters. The copy
is `copy_` between tensors that were there before, of the same shapes and strides; it and `BackgroundSaver.save` take turns, each when the
disk is at rest. Then two loops run alone and while the thread writes: one of matrix products on all threads, and one of Python.
"""

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from tracknet.models import TrackNetModel, build_model
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.ema import Ema
from tracknet.training.optimization import build_optimizer
from tracknet.training.optimizer_state import pack_optimizer
from tracknet.training.saver import BackgroundSaver
from tracknet.utils.config import build_cfg, typed

WIDE = "model.backbone.channels=[170,340,768,1624]"
STEP_S = 0.02  # of the loop of matrix products: about this long

Groups = dict[str, dict[str, Tensor]]


def what_a_run_saves() -> tuple[TrackNetModel, Groups]:
    """The groups of tensors of a checkpoint, in the memory layout of training."""
    config = typed(build_cfg("tennis", "unet", "tennis", overrides=[WIDE], dry_run=True))
    model = build_model(config.model, config.data, (512, 288))
    module: torch.nn.Module = model
    module.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(config.training.optimizer, model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    averages = Ema(model, 0.995).state_tensors()
    return model, {"model": weights | averages, "optimizer": pack_optimizer(optimizer)[0], "weights": weights}


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    lower, middle, upper = quantiles(values, method="inclusive")
    return f"median {middle:.3f}, half of them {lower:.3f} to {upper:.3f}, all {min(values):.3f} to {max(values):.3f}"


def resident_gb() -> float:
    """What the process holds of the memory now, in 1e9 bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def hold_up(saver: BackgroundSaver, groups: Groups, pairs: int) -> None:
    """Prints the time of a save for its caller against that of a copy."""
    sources = [tensor for group in groups.values() for tensor in group.values()]
    targets = [torch.zeros_like(tensor) for tensor in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    step = iter(range(1, 10_000))

    def save() -> None:
        saver.save(next(step), {"config.json": "{}", "README.md": ""}, groups, {}, False)

    copy()
    print(f"first save: {timed(save):.3f} s")
    copies: list[tuple[float, float]] = []
    saves: list[tuple[float, float]] = []
    writes = [timed(saver.wait)]
    for number in range(pairs):
        for action, times in ((save, saves), (copy, copies))[:: -1 if number % 2 else 1]:
            start = time.thread_time()
            wall_s = timed(action)
            times.append((wall_s, time.thread_time() - start))
            writes.append(timed(saver.wait))
    for name, times in (("copy", copies), ("save", saves)):
        print(f"{name} in seconds:  {spread([wall_s for wall_s, _ in times])}")
    for name, clock in (("time", 0), ("time of the caller's core", 1)):
        ratios = [mine[clock] / other[clock] for mine, other in zip(saves, copies, strict=True)]
        print(f"ratio of a save to the copy beside it, {name}: {spread(ratios)}")
    print(f"until it is on the disk, in seconds: {spread([seconds for seconds in writes if seconds > 0.1])}")


def products() -> Callable[[], object]:
    """Matrix products for about `STEP_S`, on torch's threads."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    count = max(1, round(STEP_S / min(timed(lambda: a @ b) for _ in range(5))))
    return lambda: [a @ b for _ in range(count)]


def python_loop() -> object:
    """Half a millisecond of the interpreter."""
    return sum(range(20_000))


def slowdown(saver: BackgroundSaver, groups: Groups, name: str, step: Callable[[], object], rounds: int) -> None:
    """Prints how much longer the steps of a loop take while the thread writes."""
    ratios, longest, longest_alone = [], 0.0, 0.0
    for number in range(rounds):
        saver.wait()
        alone = [timed(step) for _ in range(int(1 / timed(step)))]
        saver.save(20_000 + number, {"config.json": "{}", "README.md": ""}, groups, {}, False)
        beside = []
        while saver.is_busy:
            beside.append(timed(step))
        ratios.append(sum(beside) / len(beside) / (sum(alone) / len(alone)))
        longest, longest_alone = max(longest, *beside), max(longest_alone, *alone)
    usual = 1e3 * median(alone)
    print(f"{name}, {usual:.2f} ms a step; mean time of a step while the thread writes over that alone: {spread(ratios)}")
    print(f"    the longest step: {1e3 * longest:.1f} ms, alone {1e3 * longest_alone:.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="default 9")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch; default: all cores")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: that of temporary files")
    parser.add_argument("--reserve", action="store_true", help="make room before the first save")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, groups = what_a_run_saves()
    byte_count = sum(tensor.nbytes for group in groups.values() for tensor in group.values())
    before = resident_gb()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saver = BackgroundSaver(CheckpointStore(Path(folder), 1), lambda _: None)
        cores = len(os.sched_getaffinity(0))
        print(f"{platform.machine()}, {cores} cores, torch {torch.__version__}, {arguments.threads} threads, load {os.getloadavg()[0]:.2f}")
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{parameters:.1f} M parameters, {byte_count / 1e9:.3f} GB in {sum(map(len, groups.values()))} tensors: {', '.join(groups)}")
        if arguments.reserve:
            saver.reserve(byte_count, pinned=False)
            print(f"making room on the thread: {timed(saver.wait):.3f} s")
        hold_up(saver, groups, arguments.pairs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"memory: {before:.2f} GB before, {resident_gb():.2f} GB after; {peak:.2f} GB at most, with the targets of the copies")
        slowdown(saver, groups, "products", products(), 2)
        slowdown(saver, groups, "Python", python_loop, 2)
        saver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
