"""What training costs beside the network's own work: `uv run python benchmarks/training.py`.

With Lightning beside it: `uv run --with lightning python benchmarks/training.py`; without it those rows are left out. All sides train the
same network with the same optimizer, clipping and schedule on the same batches in memory, log every 10 steps and save nothing.
"""

import contextlib
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Iterator
from statistics import median

import torch
import training_loops as loops
from ratios import Row, Spread, significant, speed_up, time_ratio
from training_ranks import PROCESSES, measure
from training_run import run_rows

NETWORKS = {"the tennis recipe's U-Net": [], "a U-Net of 14 M parameters": [loops.WIDE]}
STEPS = {"the tennis recipe's U-Net": 23, "a U-Net of 14 M parameters": 8}  # of a loop each time
PAIRS, TINY_PAIRS, RANK_PAIRS = 6, 11, 11
TINY_STEPS = 403
PEERS = {
    "Hugging Face Trainer": (loops.hugging_face, "huggingface/transformers src/transformers/trainer.py"),
    "Lightning": (loops.lightning, "Lightning-AI/pytorch-lightning src/lightning/pytorch/loops/training_epoch_loop.py"),
}
BARE = "a bare PyTorch loop, the limit"


def rows() -> list[Row]:
    """All rows of this group."""
    if importlib.util.find_spec("lightning") is None:
        print("Lightning is not installed, so its rows are left out: uv run --with lightning python benchmarks/training.py")
        PEERS.pop("Lightning", None)
    return [*_real_rows(), *_tiny_rows(), *_rank_rows(), *run_rows()]


def _real_rows() -> Iterator[Row]:
    for name, overrides in NETWORKS.items():
        times = _times(overrides, STEPS[name], PAIRS)
        what, mine = f"training step, {name}", times["ours"]
        remark = f"{_ms(mine)} a step, {torch.get_num_threads()} threads"
        yield Row(what, BARE, "<= 1.02", time_ratio(mine, times["bare"]), remark)
        for peer, (_, source) in PEERS.items():
            yield Row(what, f"{peer} ({source})", "<= 1.00", time_ratio(mine, times[peer]), f"theirs {_ms(times[peer])}")


def _tiny_rows() -> Iterator[Row]:
    times = _times(list(loops.TINY), TINY_STEPS, TINY_PAIRS)
    mine, bare = times["ours"], times["bare"]
    for peer, (_, source) in PEERS.items():
        theirs = times[peer]
        own_overhead = [one - plain for one, plain in zip(mine, bare, strict=True)]
        their_overhead = [one - plain for one, plain in zip(theirs, bare, strict=True)]
        remark = f"bare {_ms(bare)}, ours + {_ms(own_overhead)}, theirs + {_ms(their_overhead)}, 1 thread"
        against = f"{peer} ({source})"
        yield Row("overhead per step of a tiny network", against, "<= 0.5", time_ratio(own_overhead, their_overhead), remark)
        yield Row("whole step of the tiny network", against, "<= 1.00", time_ratio(mine, theirs))


def _rank_rows() -> Iterator[Row]:
    for name, overrides in NETWORKS.items():
        found = measure(overrides, RANK_PAIRS)
        alone, together, unconnected = found["alone_s"], found["together_s"], found["unconnected_s"]
        limit = speed_up(unconnected, alone)
        remark = (
            f"alone {_ms(alone)}, together {_ms(together)}; two unconnected processes reach {limit}, and beside these it is"
            f" {speed_up(together, unconnected)}; in CPU seconds {speed_up(found['together_cpu_s'], found['alone_cpu_s'])}"
        )
        what = f"efficiency of {PROCESSES} processes of 1 thread, {name}"
        yield Row(what, "1 process of 1 thread, same batch per process", ">= 0.93", speed_up(together, alone), remark)
        least = 2 * (PROCESSES - 1) * 4 * found["parameters"]  # of all ranks together: 2 (W - 1) / W of the gradient's bytes for each
        sent = (found["sent_bytes"] - found["idle_bytes"]) / least
        network = (
            "in a network namespace of its own" if found["own_network"] else "on the machine's loopback interface, which others may use too"
        )
        remark = f"{found['sent_bytes']:.0f} bytes a step with headers, {found['idle_bytes']:.0f} in as much time without steps, {network}"
        yield Row(f"bytes sent per step, {name}", "the least of a ring all-reduce", "<= 1.05", Spread(sent, sent, sent, 1), remark)


def _times(overrides: list[str], steps: int, pairs: int) -> dict[str, list[float]]:
    """Seconds per step of each loop; they take turns, and begin with another one each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if overrides == list(loops.TINY) else threads)
    config = loops.recipe(*overrides)
    model = loops.network(config)
    batches = [loops.random_batch(config, seed) for seed in range(4)]
    arguments = [loops.as_arguments(batch) for batch in batches]
    sides = {"bare": (loops.bare, batches), "ours": (loops.ours, batches)} | {name: (loop, arguments) for name, (loop, _) in PEERS.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for pair in range(pairs):
        for name in names[pair % len(names) :] + names[: pair % len(names)]:
            loop, given = sides[name]
            timed = loops.Timed(given, steps)
            with quiet():
                loop(config, model, timed)
            times[name].append(timed.per_step_s)
    torch.set_num_threads(threads)
    return times


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the loops say goes to a text in memory, as it would go to a file."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _ms(seconds: list[float]) -> str:
    return f"{significant(median(seconds) * 1e3)} ms"


if __name__ == "__main__":
    start = time.perf_counter()
    for row in rows():
        print(f"{row.what} | {row.against} | {row.target} | {row.measured} | {row.remark}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
