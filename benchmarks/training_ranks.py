"""Two processes of one thread beside one: time of a step, and bytes that a step sends.

`measure` starts the processes, which write what they found as JSON. Each is pinned to a core. In turns the main rank makes steps alone
while the other sleeps, both make the same steps together, and both make steps that know nothing of each other: the machine's own limit.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from training_loops import network, random_batch, recipe, training_step

from tracknet.training.ranks import Ranks

PROCESSES = 2
BLOCK_S = 0.4
WARM_UP_STEPS = 3
COUNTED_STEPS = 10
Step = Callable[[], object]


def measure(overrides: list[str], pairs: int) -> dict[str, Any]:
    """What the main rank found.

    Returns:
        `alone_s`, `together_s`, `unconnected_s`: seconds per step, block by block; the same with `_cpu_s` in CPU seconds; `parameters`;
        `sent_bytes` of a step by all ranks together, `idle_bytes` in as much time without one; `own_network`: whether nobody else could use
        the interface.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(port), str(pairs), *overrides]
    own_network = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    has_own = subprocess.run([*own_network, "true"], capture_output=True, check=False).returncode == 0
    done = subprocess.run([*own_network, *command] if has_own else command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"own_network": has_own}


def work(rank: int, port: int, pairs: int, overrides: list[str]) -> None:
    """One process."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    accelerator = Accelerator()
    torch.set_num_threads(1)
    config, ranks, lone = recipe(*overrides), Ranks(accelerator), Ranks(accelerator)
    lone.size = 1
    torch.manual_seed(0)
    model, batch = network(config), random_batch(config, rank)
    steps: dict[str, Step] = {}
    for name, group in (("alone", lone), ("together", ranks), ("unconnected", lone)):
        step, _ = training_step(config, model, group, accelerator)
        steps[name] = partial(step, batch, 0, False)
    found: dict[str, Any] = _times(steps, ranks, pairs) | _sent(steps["together"], ranks)
    if ranks.is_main:
        print(json.dumps(found | {"parameters": sum(p.numel() for p in model.parameters())}))
    accelerator.end_training()


def _times(steps: dict[str, Step], ranks: Ranks, pairs: int) -> dict[str, list[float]]:
    for step in steps.values():
        _block(step, WARM_UP_STEPS, ranks, True)
    count: int = ranks.from_main(max(1, round(BLOCK_S / _block(steps["alone"], 1, ranks, True)[0])))
    found: dict[str, list[float]] = {f"{name}_{kind}": [] for name in steps for kind in ("s", "cpu_s")}
    for pair in range(pairs):
        for name in sorted(steps, reverse=pair % 2 == 1):
            wall_s, cpu_s = _block(steps[name], count, ranks, name != "alone" or ranks.is_main)
            found[f"{name}_s"].append(wall_s / count)
            found[f"{name}_cpu_s"].append(cpu_s / count)
    return found


def _block(step: Step, count: int, ranks: Ranks, takes_part: bool) -> tuple[float, float]:
    """Seconds until the last rank that takes part has made its steps, and the most CPU seconds that one of them used."""
    ranks.gather([0])
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(count if takes_part else 0):
        step()
    used = ranks.gather([(time.perf_counter() - start, time.process_time() - cpu_start)])
    return max(wall_s for wall_s, _ in used), max(cpu_s for _, cpu_s in used)


def _sent(step: Step, ranks: Ranks) -> dict[str, float]:
    def counted(action: Callable[[], object]) -> tuple[float, float]:
        ranks.gather([0])
        before, start = _passed(), time.perf_counter()
        action()
        spent = time.perf_counter() - start
        ranks.gather([0])
        return (_passed() - before) / COUNTED_STEPS, spent

    sent, spent = counted(lambda: [step() for _ in range(COUNTED_STEPS)])
    idle, _ = counted(lambda: time.sleep(spent))
    return {"sent_bytes": sent, "idle_bytes": idle}


def _passed() -> int:
    """Bytes that the loopback interface of this process's network has sent; every byte between the processes passes it once."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]), nprocs=PROCESSES)
