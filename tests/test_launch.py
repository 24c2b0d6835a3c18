"""The world-size check and the refusals, on environments and command lines as launchers make them."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracknet.errors import ConfigError
from tracknet.training import launch
from tracknet.training.launch import (
    ancestor_command_lines,
    check_accelerate_environment,
    check_sharding,
    check_world_size,
    recipe,
    reshard_after_forward,
    world_from_environment,
)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ["-m", "tracknet.scripts.train", "--num_processes", "9", "training.epochs=1"]
NO_HOME = {"HF_HOME": "/nonexistent"}  # so that a developer's own accelerate configuration plays no part


def test_a_process_without_launcher_is_alone() -> None:
    assert world_from_environment({}) == (0, 1, 0, 1)


@given(st.integers(0, 500), st.integers(1, 500), st.integers(0, 15), st.integers(1, 16))
def test_the_world_is_what_torchrun_says(rank: int, size: int, local_rank: int, local_size: int) -> None:
    environ = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size)}
    assert world_from_environment(environ) == (rank, size, local_rank, local_size)


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not LOCAL_RANK"),
        ({"RANK": "a", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "RANK is 'a'"),
    ],
)
def test_half_a_launcher_environment_is_refused(environ: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        world_from_environment(environ)


@pytest.mark.parametrize(
    "launcher",
    [
        ["/venv/bin/python", "/venv/bin/accelerate", "launch"],
        ["/venv/bin/python", "/venv/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch"],
        ["uv", "run", "accelerate", "launch"],
    ],
)
@pytest.mark.parametrize(
    "options", [["--num_processes", "2"], ["--num-processes=2"], ["--cpu", "--num_processes=2", "--num_machines", "1"]]
)
def test_the_number_asked_for_is_read_from_any_form_of_accelerate_launch(launcher: list[str], options: list[str]) -> None:
    ancestors = [["bash"], [*launcher, *options, *SCRIPT], ["accelerate", "launch", "--num_processes", "7", *SCRIPT]]
    check_world_size(2, NO_HOME, ancestors)
    with pytest.raises(ConfigError, match="found 1 process where 2 were expected"):
        check_world_size(1, NO_HOME, ancestors)


@pytest.mark.parametrize(
    "ancestors",
    [
        [],
        [[]],
        [["bash", "-c", "true"]],
        [["accelerate", "config"]],
        [["accelerate", "launch", *SCRIPT]],
        [["accelerate", "launch", "--cpu", *SCRIPT]],
    ],
)
def test_nothing_is_checked_where_nobody_asked_for_a_number(ancestors: list[list[str]]) -> None:
    check_world_size(1, NO_HOME, ancestors)
    check_world_size(4, NO_HOME, ancestors)


def test_the_number_in_the_yaml_counts_unless_an_option_overrides_it(tmp_path: Path) -> None:
    config = tmp_path / "two machines.yaml"
    config.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 4\nnum_machines: 2\n")
    command = ["accelerate", "launch", "--config_file", str(config)]
    with pytest.raises(ConfigError, match=r"4 were expected.*CPU=1 NUM_PROCESSES=4 NUM_MACHINES=2 MACHINE_RANK=R"):
        check_world_size(1, NO_HOME, [[*command, *SCRIPT]])
    check_world_size(6, NO_HOME, [[*command, "--num_processes", "6", *SCRIPT]])


def test_the_default_yaml_counts_as_accelerate_reads_it(tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("num_processes: 3\n")
    environ = {"HF_HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="3 were expected"):
        check_world_size(1, environ, [["accelerate", "launch", *SCRIPT]])
    check_world_size(1, environ, [["accelerate", "launch", "--cpu", *SCRIPT]])


@pytest.mark.parametrize("text", ["num_processes: -1\n", "- a list\n", "a: [", "", "num_processes: many\n"])
def test_a_yaml_that_says_no_number_checks_nothing(tmp_path: Path, text: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    check_world_size(1, NO_HOME, [["accelerate", "launch", "--config_file", str(config), *SCRIPT]])


def test_two_machines_without_a_number_of_processes_need_at_least_two() -> None:
    ancestors = [["accelerate", "launch", "--cpu", "--num_machines", "2", *SCRIPT]]
    check_world_size(8, NO_HOME, ancestors)
    with pytest.raises(ConfigError, match="found 1 process where 2 were expected"):
        check_world_size(1, NO_HOME, ancestors)


def test_what_the_launch_script_exported_comes_first() -> None:
    environ = NO_HOME | {"TRACKNET_EXPECTED_WORLD_SIZE": "4"}
    ancestors = [["accelerate", "launch", "--num_processes", "2", *SCRIPT]]
    check_world_size(4, environ, ancestors)
    with pytest.raises(ConfigError, match="found 2 processes where 4 were expected"):
        check_world_size(2, environ, ancestors)
    with pytest.raises(ConfigError, match="TRACKNET_EXPECTED_WORLD_SIZE is 'four'"):
        check_world_size(2, {"TRACKNET_EXPECTED_WORLD_SIZE": "four"}, [])


def test_processes_that_accelerate_left_unconnected_are_found_by_world_size() -> None:
    environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(ConfigError, match="found 1 process where 2"):
        check_world_size(1, environ, [])


@pytest.mark.parametrize("gpu", [False, True])
def test_the_recipe_is_for_this_machine_and_in_one_line(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(launch, "_has_gpu", lambda: gpu)
    with pytest.raises(ConfigError) as caught:
        check_world_size(1, {"TRACKNET_EXPECTED_WORLD_SIZE": "2"}, [])
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert ("ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in message) is not gpu
    assert ("`NUM_PROCESSES=2 ./launch.sh`" in message) is gpu
    with pytest.raises(ConfigError, match="`CPU=1 NUM_PROCESSES=2"):
        check_world_size(1, {"TRACKNET_EXPECTED_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, [])


def test_one_process_is_not_asked_of_the_launcher_of_several() -> None:
    assert "--multi_gpu" not in recipe(1, 1, cpu=False)
    assert "accelerate launch --cpu --num_processes 1" in recipe(1, 1, cpu=True)
    assert "--num_machines 2 --machine_rank R --main_process_ip IP --main_process_port 29500" in recipe(4, 2, cpu=False)


def test_the_real_ancestors_are_read() -> None:
    code = "from tracknet.training.launch import ancestor_command_lines as a; print(a()[0][-1])"
    outer = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    done = subprocess.run([sys.executable, "-c", outer, code, "a word"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "a word\n"


@pytest.mark.parametrize("error", [psutil.AccessDenied(1), psutil.NoSuchProcess(1), PermissionError("no /proc")])
def test_ancestors_that_cannot_be_read_are_no_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(_self: psutil.Process) -> list[str]:
        raise error

    monkeypatch.setattr(psutil.Process, "cmdline", refuse)
    assert ancestor_command_lines() == []
    monkeypatch.setattr(psutil.Process, "parents", refuse)
    assert ancestor_command_lines() == []


def test_importing_the_check_imports_no_torch() -> None:
    code = "import sys, tracknet.training.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_accelerate_sets_by_itself_is_accepted() -> None:
    environ = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_USE_FSDP": "false",
    }
    check_accelerate_environment("bf16", environ)
    check_accelerate_environment("bf16", {"ACCELERATE_MIXED_PRECISION": "bf16"})
    check_accelerate_environment("fp32", {})


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", ("mixed_precision bf16", "training.precision is fp32")),
        ("ACCELERATE_MIXED_PRECISION", "fp16", ("mixed_precision fp16", "training.precision is fp32")),
        ("ACCELERATE_MIXED_PRECISION", "FP8", ("mixed_precision fp8", "training.precision")),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", ("gradient_accumulation_steps 4", "training.micro_batch_size")),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 'auto'",)),
        ("ACCELERATE_USE_DEEPSPEED", "true", ("DeepSpeed", "multi_gpu")),
        ("ACCELERATE_USE_MEGATRON_LM", "1", ("Megatron-LM", "multi_gpu")),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", ("parallelism_config", "multi_gpu")),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", ("dynamo_backend inductor",)),
    ],
)
def test_what_accelerate_asks_for_and_is_not_done_is_refused(variable: str, value: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_accelerate_environment("fp32", {variable: value})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# What `accelerate launch --use_fsdp --fsdp_version 2` sets by itself.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


def test_sharding_of_version_2_is_accepted_as_accelerate_asks_for_it() -> None:
    check_accelerate_environment("bf16", FSDP)
    check_sharding("bf16", 2, FSDP)
    check_sharding("fp16", 1, {"ACCELERATE_USE_FSDP": "false"})
    assert reshard_after_forward(FSDP)
    assert reshard_after_forward({})
    assert not reshard_after_forward({"FSDP_RESHARD_AFTER_FORWARD": "false"})


@pytest.mark.parametrize(
    ("variables", "precision", "processes", "words"),
    [
        ({"FSDP_VERSION": "1"}, "fp32", 2, ("FSDP version 1", "--fsdp_version 2")),
        ({}, "fp16", 2, ("training.precision=fp16", "training.precision=bf16 or fp32")),
        ({}, "fp32", 1, ("one process alone",)),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fp32", 2, ("fsdp_offload_params true", "take it out")),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fp32", 2, ("fsdp_activation_checkpointing", "training.micro_batch_size")),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fp32", 2, ("fsdp_auto_wrap_policy SIZE_BASED_WRAP",)),
        ({"FSDP_IGNORED_MODULES": "head"}, "fp32", 2, ("fsdp_ignored_modules head",)),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fp32", 2, ("fsdp_state_dict_type", "checkpoints are whole")),
    ],
)
def test_sharding_that_is_not_done_is_refused(variables: dict[str, str], precision: str, processes: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sharding(precision, processes, FSDP | variables)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_fsdp_without_a_version_is_version_1() -> None:
    with pytest.raises(ConfigError, match="FSDP version 1"):
        check_sharding("fp32", 2, {"ACCELERATE_USE_FSDP": "True"})
