"""Real tennis through the command line, killed five times: what comes out is what the run left alone would have given."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from clips import real_video_clip
from fault_table import FaultTable
from test_train import MEASURED, only_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

ROW = "`kill -9` of a run on real tennis, then `--resume auto`: the weights of the run left alone, bit for bit"
KILLS = 5
WEIGHTS = ("model.safetensors", "weights.safetensors", "optimizer.safetensors")
# The recipe as it is but for its length: fewer clips, and everything that is logged, evaluated and saved more often.
SHORT = [
    "data.split.train_games=[game5]",
    "data.split.val_games=[game10]",
    "training.data_loader.num_workers=2",
    "training.checkpoint.every_steps=7",
    "training.tracking.log_every_steps=1",
    "training.tracking.previews=1",
]
WORKERS_GO_WITHIN_S = 60.0  # they look for their parent every 5 s


@pytest.fixture
def tennis(tmp_path: Path) -> Path:
    root = tmp_path / "tennis"
    for name in ("game5_Clip2", "game5_Clip11", "game5_Clip13", "game5_Clip14", "game10_Clip4"):
        real_video_clip(root, name)
    return root


def start(tennis: Path, output: Path, *more: str) -> subprocess.Popen[bytes]:
    names = ["--data", "tennis", "--model", "unet", "--training", "tennis", "--output-dir", str(output)]
    places = [f"data.root={tennis}", f"data.cache_dir={output / 'cache'}"]
    with log_of(output).open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "tracknet.scripts.train", *names, *places, *SHORT, *more], stderr=log)


def log_of(output: Path) -> Path:
    return output.with_suffix(".log")


def wait_until_it_trains(process: subprocess.Popen[bytes], output: Path, launch: int) -> float:
    """When this launch, counted from 1, was ready for its first step: from here on it saves, trains and evaluates."""
    while process.poll() is None and log_of(output).read_text().count(" run folder ") < launch:
        time.sleep(0.02)
    return time.monotonic()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process, and it alone; its workers must go by themselves."""
    assert process.poll() is None, "it was over before it was to be killed"
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=WORKERS_GO_WITHIN_S)
    assert not alive, "workers outlive their run"


def metrics_of(output: Path) -> list[dict[str, Any]]:
    lines = (only_run(output / "logs") / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def progress_of(output: Path) -> str:
    """How far a killed run had come, in words."""
    steps = [line["step"] for line in metrics_of(output)]
    saved = sorted(entry.name for entry in only_run(output / "checkpoints").glob("*step-*"))
    return f"{len(set(steps))} steps logged, saved {saved}"


def test_a_run_killed_at_random_moments_ends_like_the_one_left_alone(tennis: Path, tmp_path: Path, faults: FaultTable) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    process = start(tennis, alone)
    began = wait_until_it_trains(process, alone, 1)
    assert process.wait() == 0, log_of(alone).read_text()
    duration = time.monotonic() - began

    drawn = faults.random("killed")
    shares = [drawn.random() for _ in range(KILLS)]
    story = []
    for launch, share in enumerate(shares, start=1):
        # all five together come to less than the run needs, so that it is never over before the fifth
        moment = 0.8 * duration * share / sum(shares)
        process = start(tennis, killed, "--resume", "auto")
        wait_until_it_trains(process, killed, launch)
        time.sleep(moment)
        kill(process)
        story.append(f"after {moment:.1f} s: {progress_of(killed)}")
    code = start(tennis, killed, "--resume", "auto").wait()
    print(f"left alone it trained for {duration:.0f} s; killed", *story, sep="\n")

    assert code == 0, log_of(killed).read_text()
    whole, resumed = (only_run(output / "checkpoints") / "last" for output in (alone, killed))
    different = [name for name in WEIGHTS if (whole / name).read_bytes() != (resumed / name).read_bytes()]
    if metrics_of(killed) != metrics_of(alone):
        different.append("metrics.jsonl")
    for line in story:
        faults.record(ROW, not different, f"{line}; different at the end: {different}")
    assert os.readlink(whole) == os.readlink(resumed)
    steps = [line["step"] for line in metrics_of(killed) if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))
