"""Two connected processes on the CPU train like one with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clips import write_games
from test_train import arguments, losses_of, metrics_of, only_run

PROBE = Path(__file__).with_name("weights_probe.py")


def launch(processes: int, folder: Path, clips: Path, double: bool, *more: str) -> None:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PROBE.parents[1]}{os.pathsep}{PROBE.parent}"}
    if double:
        environment["PROBE_IN_DOUBLE"] = "1"
    launcher = [sys.executable]
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, str(PROBE), str(folder), *arguments(clips, folder, *more)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


# In float32 rounding flips a ReLU now and then, and Adam's usual eps of 1e-8 makes that large; in float64 nothing flips.
@pytest.mark.parametrize(("double", "eps", "tolerance"), [pytest.param(False, 1e-3, 1e-5, marks=pytest.mark.slow), (True, 1e-8, 1e-11)])
def test_two_ranks_keep_identical_weights_and_lose_as_one_process_with_twice_the_batch(double, eps, tolerance, tmp_path):
    clips = tmp_path / "clips"
    # 42 windows: 5 whole steps of 8 and a ragged one of 2, 24 steps in all; 3 validation clips do not divide evenly either
    write_games(clips, ["game1"], clips=3, count=16)
    write_games(clips, ["game2"], clips=3, count=7)
    more = ["training.epochs=4", f"training.optimizer.eps={eps}", "training.ema_decay=0"]
    launch(2, tmp_path / "two", clips, double, *more, "training.batch_size=4")
    launch(1, tmp_path / "one", clips, double, *more, "training.batch_size=8")

    assert (tmp_path / "two" / "rank0").read_text() == (tmp_path / "two" / "rank1").read_text()
    two, one = losses_of(tmp_path / "two"), losses_of(tmp_path / "one")
    assert len(two) == 24
    np.testing.assert_allclose(two, one, rtol=tolerance, atol=tolerance)
    evaluations = [[line for line in metrics_of(tmp_path / name) if "val/f1_wasb" in line] for name in ("two", "one")]
    for of_two, of_one in zip(*evaluations, strict=True):
        outcomes = [key for key in of_two if key.startswith("val/tp_") or key.startswith("val/f") or key.startswith("val/tn_")]
        assert {key: of_two[key] for key in outcomes} == {key: of_one[key] for key in outcomes}
    assert only_run(tmp_path / "two" / "checkpoints").name == only_run(tmp_path / "two" / "logs").name
