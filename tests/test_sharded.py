"""A sharded model trains as an unsharded one, and stops whole where it cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import small_model
from test_train import arguments, losses_of, only_run

from tracknet.errors import ConfigError
from tracknet.scripts.train import main
from tracknet.training import sharding
from tracknet.training.checkpoint import inspect_checkpoint
from tracknet.training.size_note import FILE

PROBE = Path(__file__).with_name("sharded_probe.py")
SHARDED, WHOLE = ["--use_fsdp", "--fsdp_version", "2"], ["--multi_gpu"]
# loss of a step at 4 samples a rank and 2 a micro-batch; an eps that rounding does not reach
RUN = ["training.epochs=6", "training.evaluation.every_epochs=2", "training.optimizer.eps=1e-3"]
SAID = (
    "step 6: out of memory at micro-batches of 4 while the model is sharded, where a step cannot be tried again;"
    " the last checkpoint is whole, and a restart goes on with 2"
)


def launch(folder: Path, options: list[str], *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU, neither of which may take longer than its own watchdog."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": f"{PROBE.parents[1]}{os.pathsep}{PROBE.parent}",
        **variables,
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2", "--main_process_port", "0"]
    return subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=200)


def told_by_steps(folder: Path, place: str) -> list[dict]:
    done = launch(folder, WHOLE, str(PROBE), "steps", str(folder), place)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return told_by_steps(tmp_path_factory.mktemp("steps"), "forward")


def test_sharded_steps_are_those_of_one_process_with_the_whole_batch_also_after_a_checkpoint(told):
    for rank in told:
        assert rank["world_size"] == 2
        for name, run in rank["runs"].items():
            assert run["difference"] < 1e-14, name
            np.testing.assert_allclose(*np.transpose(run["losses"]), rtol=1e-12, err_msg=name)
            np.testing.assert_allclose(*np.transpose(run["norms"]), rtol=1e-12, err_msg=name)
            np.testing.assert_equal(*np.transpose(run["samples"]), err_msg=name)
        # transformers interpolates a ViT's positions in float32
        assert rank["vit"]["difference"] < 1e-7
        np.testing.assert_allclose(*np.transpose(rank["vit"]["norms"]), rtol=1e-6)
    assert told[0]["runs"]["unequal"]["losses"][0] != told[0]["runs"]["unequal"]["losses"][2]


def test_each_rank_holds_its_share_of_the_numbers(told):
    for name in ("unequal", "convnext"):
        shares = [rank["runs"][name]["local_numbers"] for rank in told]
        assert sum(shares) == told[0]["runs"][name]["all_numbers"]
        assert max(shares) < 0.51 * sum(shares)


def test_all_ranks_refuse_alike_and_name_the_cause(told):
    assert told[0]["refusals"] == told[1]["refusals"]
    assert told[0]["refusals"]["no batch"] == "frame 7 is broken"
    assert told[0]["refusals"]["not finite"].startswith("step 18: the loss is not finite for 902; ")


def check_out_of_memory(told: list[dict]) -> None:
    assert told[0]["out_of_memory"] == told[1]["out_of_memory"]
    said = SAID.replace("step 6", "step 13").replace("of 4", "of 2").replace("with 2", "with 1")
    assert told[0]["out_of_memory"] == {"said": said, "noted": 1}


def test_memory_that_runs_out_in_the_forward_pass_stops_all_ranks_with_one_line(told):
    check_out_of_memory(told)


@pytest.mark.slow
def test_memory_that_runs_out_in_the_backward_pass_stops_all_ranks_with_one_line(tmp_path):
    check_out_of_memory(told_by_steps(tmp_path, "backward"))


def test_a_sharding_that_was_not_obtained_stops_the_run(monkeypatch):
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(sharding, "fully_shard", lambda *_, **__: None)
    ranks = SimpleNamespace(size=2, device=torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"over 2 processes was asked for .* not obtained: network\.\S+ and \d+ more; take it out"
    ) as raised:
        sharding.shard_with_twin(small_model("unet"), ranks, reshard_after_forward=True)
    assert "\n" not in str(raised.value)


def test_one_process_is_not_sharded(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert main(arguments(clips, tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sharding was asked for (--use_fsdp, ACCELERATE_USE_FSDP) but there is one process alone; ")
    assert not list((tmp_path / "logs").glob("*"))


def train_probe(clips: Path, output: Path, options: list[str], place: str, *more: str) -> subprocess.CompletedProcess[str]:
    output.mkdir(exist_ok=True)
    variables = {"PROBE_RANK": "1", "PROBE_LIMIT": "2", "PROBE_AFTER": "5"}
    return launch(output, options, str(PROBE), "train", place, *arguments(clips, output, *RUN, *more), **variables)


def training_size(checkpoint: Path) -> int:
    return inspect_checkpoint(checkpoint).state["micro_batch_sizes"]["whole_model"]["value"]


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of an undisturbed, unsharded run on two ranks."""
    output = tmp_path_factory.mktemp("whole")
    done = train_probe(clips, output, WHOLE, "nowhere")
    assert done.returncode == 0, done.stderr
    return losses_of(output)


@pytest.mark.slow
@pytest.mark.parametrize(("after", "resumed_at"), [(5, 4), (0, 0)])
def test_the_launchers_restart_goes_on_with_its_run_at_the_smaller_size(clips, tmp_path, whole, after, resumed_at):
    (tmp_path / "older").mkdir()
    assert main(arguments(clips, tmp_path, "training.epochs=1", "training.batch_size=8")) == 0  # not the run to go on with
    older = only_run(tmp_path / "checkpoints")
    variables = {"PROBE_RANK": "1", "PROBE_LIMIT": "2", "PROBE_AFTER": str(after)}
    options = [*SHARDED, "--max_restarts", "1"]
    done = launch(tmp_path, options, str(PROBE), "train", "forward", *arguments(clips, tmp_path, *RUN), **variables)
    assert done.returncode == 0, done.stderr
    said = SAID.replace("step 6", f"step {after + 1}")
    lines = done.stderr.splitlines()
    assert 1 <= lines.count(said) <= 2  # at most once from each rank
    assert "Traceback" not in done.stderr
    (run,) = (folder for folder in (tmp_path / "checkpoints").iterdir() if folder.name != older.name)
    assert any(line.endswith(f"continuing {run.name} after step {resumed_at}") for line in lines)
    assert training_size(run / "last") == 2
    assert not (run / FILE).exists()
    folder = tmp_path / "logs" / run.name
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    np.testing.assert_allclose(losses, whole, rtol=1e-4)
    assert [launch["exit"]["code"] for launch in json.loads((folder / "run.json").read_text())["launches"]] == [1, 0]


@pytest.mark.slow
def test_a_stopped_run_keeps_its_checkpoint_and_goes_on_by_hand_without_sharding(clips, tmp_path, whole):
    stopped = train_probe(clips, tmp_path, SHARDED, "backward")
    assert stopped.returncode == 1
    assert 1 <= stopped.stderr.splitlines().count(SAID) <= 2
    assert stopped.stderr.count("Traceback") == 1  # the launcher's own
    run = only_run(tmp_path / "checkpoints")
    assert os.readlink(run / "last") == "step-00000004"
    assert training_size(run / "last") == 4
    assert json.loads((run / FILE).read_text())["sizes"]["whole_model"]["value"] == 2
    assert json.loads((only_run(tmp_path / "logs") / "run.json").read_text())["launches"][0]["exit"]["message"] == SAID
    resumed = train_probe(clips, tmp_path, WHOLE, "nowhere", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert any(line.endswith("going on with micro-batches of 2 (whole model)") for line in resumed.stderr.splitlines())
    np.testing.assert_allclose(losses_of(tmp_path), whole, rtol=1e-4)
    assert not (run / FILE).exists()
