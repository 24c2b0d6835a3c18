"""What happens when a launcher starts all processes again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from saved_states import MODEL_TEXTS, TENSORS, saved_state

from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.restart import launcher_of, same_launcher
from tracknet.training.resume import find_own_run

PROBE = Path(__file__).with_name("restart_probe.py")
OWN, OTHER = ["machine", 17, 1e9], ["machine", 17, 2e9]


def save(folder: Path, step: int, launcher: list | None) -> Path:
    return CheckpointStore(folder, 3).save(step, MODEL_TEXTS, TENSORS, saved_state(step, launcher=launcher), False)


def test_a_launcher_is_known_again_and_is_no_other():
    assert launcher_of({}) is None
    own = launcher_of({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert own is not None
    assert same_launcher(own, launcher_of({"TORCHELASTIC_RESTART_COUNT": "1"}))
    host, pid, started = own
    for other in (None, "text", [host, pid, started + 60.0], [host, pid + 1, started], [f"not-{host}", pid, started]):
        assert not same_launcher(own, other)
    assert not same_launcher(None, None)


def test_the_run_that_the_launcher_began_is_found_among_others(tmp_path):
    own = save(tmp_path / "run-20260101-000001-s1", 4, OWN)
    save(tmp_path / "run-20260101-000000-s1", 4, None)  # of an older version of TrackNet
    save(tmp_path / "run-20260101-000002-s1", 9, OTHER)
    (save(tmp_path / "run-20260101-000003-s1", 9, OTHER) / "state.json").write_text('{"format_version": 99}')
    (save(tmp_path / "run-20260101-000004-s1", 9, OTHER) / "state.json").write_text("damaged")
    found = find_own_run(OWN, tmp_path)
    assert found is not None
    assert found.checkpoint == own
    assert found.run_id == "run-20260101-000001-s1"


def test_a_launcher_without_a_checkpoint_has_no_run(tmp_path):
    save(tmp_path / "run-20260101-000002-s1", 9, OTHER)
    assert find_own_run(OWN, tmp_path) is None
    assert find_own_run(None, tmp_path) is None
    assert find_own_run(OWN, tmp_path / "nothing") is None


@pytest.mark.slow
def test_processes_find_each_other_again_whichever_is_first(tmp_path):
    # accelerate keeps one store for all attempts, with what the processes of the last one wrote
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    environment["PYTHONPATH"] = str(PROBE.parents[1])
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--max_restarts", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(PROBE), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = {f"{attempt}-{rank}": (tmp_path / f"{attempt}-{rank}").read_text() for attempt in range(3) for rank in range(2)}
    assert set(found.values()) == {"3"}
