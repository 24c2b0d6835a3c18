"""accelerate's own parser on every file of accelerate_configs/ and on every command that a header gives."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FOLDER = Path(__file__).resolve().parents[1] / "accelerate_configs"
EXPECTED = {
    "cpu": {"distributed_type": "NO", "use_cpu": True, "num_processes": 1, "num_machines": 1},
    "cpu_multi": {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "num_machines": 1},
    "cpu_multi_node": {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "num_machines": 2, "main_process_port": 29500},
    "single_gpu": {"distributed_type": "NO", "use_cpu": False, "num_processes": 1, "num_machines": 1},
    "multi_gpu": {"distributed_type": "MULTI_GPU", "use_cpu": False, "num_processes": 2, "num_machines": 1},
    "fsdp2": {"distributed_type": "FSDP", "use_cpu": False, "num_processes": 2, "num_machines": 1},
    "multi_node": {"distributed_type": "MULTI_GPU", "use_cpu": False, "num_processes": 16, "num_machines": 2, "main_process_port": 29500},
}


def header_command(name: str) -> list[str]:
    """The words of the accelerate command in a file's header, with its variables in front and R and IP filled in."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").replace(" \\\n#    ", "")
    line = next(line[1:] for line in text.splitlines() if "accelerate launch --config_file" in line)
    words = shlex.split(
        re.sub(r"--main_process_ip IP", "--main_process_ip 127.0.0.1", re.sub(r"--machine_rank R", "--machine_rank 0", line))
    )
    return [str(FOLDER.parent / word) if word.startswith("accelerate_configs/") else word for word in words]


def parse(words: list[str]) -> Any:
    start = words.index("launch") + 1
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[start:]))
    return arguments


def test_every_file_is_expected_here() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file_as_meant(name: str) -> None:
    loaded = load_config_from_file(str(FOLDER / f"{name}.yaml")).to_dict()
    assert {key: loaded.get(key) for key in EXPECTED[name]} == EXPECTED[name]
    assert loaded["mixed_precision"] == "no"  # the word: unquoted it would be False


@pytest.mark.parametrize("name", EXPECTED)
def test_no_value_became_a_boolean_by_its_spelling(name: str) -> None:
    settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert {key for key, value in settings.items() if isinstance(value, bool)} == {"use_cpu"}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_command_in_the_header_is_valid_and_starts_what_it_says(name: str) -> None:
    arguments = parse(header_command(name))
    assert arguments.training_script == "tracknet.scripts.train"
    assert arguments.module is True
    assert arguments.num_processes == EXPECTED[name]["num_processes"]
    assert arguments.num_machines == EXPECTED[name]["num_machines"]
    assert bool(arguments.multi_gpu) is (EXPECTED[name]["distributed_type"] == "MULTI_GPU")
    assert bool(arguments.use_fsdp) is (EXPECTED[name]["distributed_type"] == "FSDP")


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("cpu_multi")])
def test_cpu_recipes_of_several_processes_set_the_variable_that_makes_them_work(name: str) -> None:
    assert "ACCELERATE_USE_CPU=true" in header_command(name)
    assert "ACCELERATE_USE_CPU" not in os.environ
