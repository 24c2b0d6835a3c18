"""The allocator really fails, on one rank of one or two, and the update is that of the undisturbed step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROBE = Path(__file__).with_name("memory_probe.py")
NO_RANK = -1


def run_probe(folder: Path, processes: int, place: str, limited_rank: int) -> list[dict]:
    folder.mkdir()
    launcher = [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(PROBE.parents[1])}
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, str(PROBE), str(folder), place, str(limited_rank)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize(("processes", "place", "limited_rank"), [(1, "forward", 0), (1, "backward", 0), (2, "backward", 1)])
def test_the_step_is_retried_at_a_size_that_fits_on_all_ranks_alike(processes, place, limited_rank, tmp_path):
    undisturbed = run_probe(tmp_path / "undisturbed", processes, place, NO_RANK)
    disturbed = run_probe(tmp_path / "disturbed", processes, place, limited_rank)
    assert [told["retries"] for told in undisturbed] == [0] * processes
    assert [(told["size"], told["retries"]) for told in disturbed] == [(8, 2)] * processes  # failed at 32 and at 16
    assert all(told["weights"] == disturbed[0]["weights"] for told in disturbed)
    assert all(told["world_size"] == processes for told in disturbed)
    np.testing.assert_allclose(disturbed[0]["weights"], undisturbed[0]["weights"], rtol=1e-12, atol=1e-14)
    # a thread of gloo that is left when the interpreter ends aborts the process, now and then
    assert not [name for told in disturbed for name in told["threads"] if "gloo" in name]
