"""What ends one rank ends all of them, in one line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tracknet.errors import UserError
from tracknet.training.ranks import Ranks

PROBE = Path(__file__).with_name("ranks_probe.py")
HOST = socket.gethostname()
ADVICE = "; the last checkpoint is whole: a launcher with restarts left goes on from it, else start again with --resume auto"


def allocate_far_too_much():
    return torch.empty(2**60, dtype=torch.uint8)


def misuse():
    return torch.ones(2) @ torch.ones(3)


@pytest.mark.parametrize("method", ["together", "on_main"])
def test_memory_that_runs_out_on_the_way_is_a_line_and_other_errors_keep_their_traceback(method):
    run = getattr(Ranks(Accelerator(cpu=True)), method)
    with pytest.raises(UserError, match=r"^out of memory: .*choose a smaller model") as raised:
        run(allocate_far_too_much)
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run(misuse)


def last_words(tmp_path: Path, size: int, leaving: int, how: str) -> list[str]:
    """The last line of each rank of the probe. No launcher ends those that are left."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    common |= {"LOCAL_WORLD_SIZE": str(size), "PYTHONPATH": str(PROBE.parents[1]), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(size):
        own = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(PROBE), str(leaving), how]
        processes.append(subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=150)[1] for process in processes]
    return [(text.splitlines() or [""])[-1] for text in errors]


@pytest.mark.slow
def test_all_ranks_name_the_one_that_was_killed_and_no_other(tmp_path: Path) -> None:
    said = last_words(tmp_path, 4, 2, "killed")
    del said[2]
    line = f"rank 2 on {HOST} has gone{ADVICE}"
    assert f"PeerLostError: {line}" in said
    assert set(said) <= {f"PeerLostError: {line}", f"OutOfStepError: {line}"}  # those that end later have it from the first


@pytest.mark.slow
def test_where_the_store_dies_with_its_rank_that_rank_is_named(tmp_path: Path) -> None:
    assert last_words(tmp_path, 2, 0, "killed")[1] == f"PeerLostError: rank 0 on {HOST} has gone{ADVICE}"


@pytest.mark.slow
def test_a_rank_that_leaves_for_a_reason_of_its_own_has_told_it(tmp_path: Path) -> None:
    assert last_words(tmp_path, 3, 1, "user") == [
        f"{kind}: a reason of its own" for kind in ("OutOfStepError", "UserError", "OutOfStepError")
    ]


@pytest.mark.slow
def test_an_error_of_the_program_keeps_its_traceback_and_the_others_say_whose_it_was(tmp_path: Path) -> None:
    said = last_words(tmp_path, 3, 1, "bug")
    assert said[1].startswith("RuntimeError: inconsistent tensor size")
    assert said[0] == said[2] == f"OutOfStepError: rank 1 on {HOST} has left because of RuntimeError; its own output says more"
