"""launch.sh and slurm/train.sbatch: the command, the exit code and the last line, with a quick stand-in for accelerate."""

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from launch_probe import ROOT, clean_environment, finish, hear_signals, launch_script, start, wait_for, write_probe

AWKWARD = ["--output-dir", "a folder", "model.name='x y'", 'data.root="/a b"', "training.optimizer.lr=1e-4", "", "$HOME", "a\\b", "*"]

# Like accelerate: every failure becomes a traceback and 1; one process is not told of signals, several are.
ACCELERATE = """
import os, signal, subprocess, sys
start = sys.argv.index("-m")
environ = os.environ | {"LAUNCHER_ARGUMENTS": " ".join(sys.argv[1:start])}
worker = subprocess.Popen([sys.executable, *sys.argv[start:]], env=environ)
if sys.argv[sys.argv.index("--num_processes") + 1] != "1":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: worker.send_signal(number))
if worker.wait() != 0:
    raise subprocess.CalledProcessError(worker.returncode, "train")
"""

LEAVES = """
import os, sys
code = int(sys.argv[1])
print("error: the worker's own line", file=sys.stderr)
if sys.argv[2] == "record":
    leave_record(code, "error: the worker's own line")
sys.exit(code)
"""

WAITS_FOR_A_SIGNAL = """
import os, signal, sys, time
from pathlib import Path
def stop(number, frame):
    time.sleep(0.5)  # saving
    code = 75 if number == signal.SIGTERM else 130
    leave_record(code, f"stopped by {signal.Signals(number).name}")
    Path("saved").touch()
    sys.exit(code)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
Path("ready").touch()
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    commands = tmp_path / "accelerate" / "commands"
    commands.mkdir(parents=True)
    for package in (commands, commands.parent):
        (package / "__init__.py").write_text("")
    (commands / "launch.py").write_text(ACCELERATE)
    return tmp_path


def dry_run(folder: Path, *arguments: str, **variables: str) -> list[str]:
    code, out, err = finish(launch_script(folder, *arguments, **{"DRY_RUN": "1"} | variables))
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    return shlex.split(out)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_a_dry_run_prints_a_command_that_can_be_pasted_and_starts_nothing(folder: Path) -> None:
    write_probe(folder, "import json, sys; print(json.dumps(sys.argv[1:]))")
    before = sorted(folder.rglob("*"))
    _, out, _ = finish(launch_script(folder, *AWKWARD, DRY_RUN="1"))
    assert sorted(folder.rglob("*")) == before
    pasted = subprocess.run(["bash", "-c", out], cwd=folder, env=clean_environment(folder), capture_output=True, text=True, check=True)
    assert json.loads(pasted.stdout) == AWKWARD


def test_arguments_go_through_unchanged(folder: Path) -> None:
    write_probe(folder, "import json, sys; print(json.dumps(sys.argv[1:]))")
    code, out, _ = finish(launch_script(folder, *AWKWARD))
    assert code == 0
    assert json.loads(out) == AWKWARD


@pytest.mark.parametrize(
    ("variables", "config", "processes"),
    [
        ({}, "cpu", "1"),
        ({"NUM_PROCESSES": "2"}, "cpu_multi", "2"),
        ({"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "h"}, "cpu_multi_node", "2"),
        ({"CPU": "0", "CUDA_VISIBLE_DEVICES": "0"}, "single_gpu", "1"),
        ({"CPU": "0", "CUDA_VISIBLE_DEVICES": "0,1,2"}, "multi_gpu", "3"),
        ({"CPU": "", "CUDA_VISIBLE_DEVICES": "0,1,2"}, "multi_gpu", "3"),
        ({"CPU": "", "CUDA_VISIBLE_DEVICES": ""}, "cpu", "1"),
        ({"CPU": "", "CUDA_VISIBLE_DEVICES": "0,1", "ACCELERATE_USE_CPU": "true"}, "cpu", "1"),
        ({"CPU": "0", "CUDA_VISIBLE_DEVICES": "0,1", "NUM_MACHINES": "2", "MAIN_PROCESS_IP": "h"}, "multi_node", "4"),
    ],
)
def test_the_recipe_fits_the_hardware(folder: Path, variables: dict[str, str], config: str, processes: str) -> None:
    words = dry_run(folder, **variables)
    assert option(words, "--config_file") == str(ROOT / "accelerate_configs" / f"{config}.yaml")
    assert option(words, "--num_processes") == processes
    assert f"TRACKNET_EXPECTED_WORLD_SIZE={processes}" in words
    assert ("ACCELERATE_USE_CPU=true" in words) is config.startswith("cpu")


def test_variables_reach_the_launcher(folder: Path) -> None:
    machine = {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MAIN_PROCESS_IP": "10.0.0.1", "MAIN_PROCESS_PORT": "1234"}
    words = dry_run(folder, CPU="0", NUM_PROCESSES="8", MAX_RESTARTS="3", **machine)
    given = {
        "--num_machines": "2",
        "--machine_rank": "1",
        "--main_process_ip": "10.0.0.1",
        "--main_process_port": "1234",
        "--max_restarts": "3",
    }
    assert {name: option(words, name) for name in given} == given


def test_an_own_yaml_is_used_and_its_numbers_are_expected(folder: Path) -> None:
    config = folder / "my own.yaml"
    config.write_text("use_cpu: true\nnum_processes: 6 # three each\nnum_machines: 2\nmain_process_ip: '10.0.0.7'\nmain_process_port: 77\n")
    words = dry_run(folder, CPU="", ACCELERATE_CONFIG=str(config), MACHINE_RANK="1")
    assert option(words, "--config_file") == str(config)
    assert [
        option(words, f"--{name}") for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
    ] == [
        "6",
        "2",
        "1",
        "10.0.0.7",
        "77",
    ]
    assert {"TRACKNET_EXPECTED_WORLD_SIZE=6", "ACCELERATE_USE_CPU=true"} <= set(words)
    assert option(dry_run(folder, ACCELERATE_CONFIG=str(config), NUM_PROCESSES="4"), "--num_processes") == "4"


def test_without_an_environment_uv_makes_one_first(folder: Path) -> None:
    copy = folder / "checkout"
    copy.mkdir()
    (copy / "launch.sh").write_text((ROOT / "launch.sh").read_text())
    code, out, _ = finish(start(["bash", str(copy / "launch.sh")], folder, PYTHON="", DRY_RUN="1"))
    assert code == 0
    assert out.startswith(f"uv sync --project {copy} && env ")
    assert f"{copy}/.venv/bin/python -m accelerate.commands.launch" in out


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES is 'two'"),
        ({"NUM_PROCESSES": "08"}, "NUM_PROCESSES is '08'"),
        ({"NUM_PROCESSES": "0"}, "at least 1"),
        ({"NUM_MACHINES": "2"}, "needs MAIN_PROCESS_IP"),
        ({"NUM_MACHINES": "2", "NUM_PROCESSES": "3"}, "does not divide"),
        ({"MACHINE_RANK": "1"}, "MACHINE_RANK is 1"),
        ({"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "h", "MAIN_PROCESS_PORT": "0"}, "MAIN_PROCESS_PORT is '0'"),
        ({"MAX_RESTARTS": "1"}, "at least two processes"),
        ({"CPU": "yes"}, "CPU is 'yes'"),
        ({"DRY_RUN": "true"}, "DRY_RUN is 'true'"),
        ({"ACCELERATE_CONFIG": "/nowhere.yaml"}, "ACCELERATE_CONFIG is '/nowhere.yaml'"),
        ({"PYTHON": "/nowhere/python"}, "PYTHON is '/nowhere/python'"),
    ],
)
def test_a_wrong_variable_is_one_line_and_code_2(folder: Path, variables: dict[str, str], word: str) -> None:
    write_probe(folder, "print('started')")
    code, out, err = finish(launch_script(folder, **variables))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("launch.sh: ")
    assert word in err


@pytest.mark.parametrize("code", [1, 2, 75, 130])
def test_the_workers_code_and_line_are_restored(folder: Path, code: int) -> None:
    write_probe(folder, LEAVES)
    left, _, err = finish(launch_script(folder, str(code), "record"))
    assert left == code
    assert "CalledProcessError" in err  # what accelerate adds
    assert err.splitlines()[-1] == "error: the worker's own line"
    assert not list(folder.glob("tmp.*"))


def test_success_is_code_0(folder: Path) -> None:
    write_probe(folder, LEAVES)
    assert finish(launch_script(folder, "0", "record"))[0] == 0


def test_a_worker_that_leaves_no_record_is_a_failure_that_says_so(folder: Path) -> None:
    write_probe(folder, LEAVES)
    code, _, err = finish(launch_script(folder, "3", "none"))
    assert code == 1
    assert "no worker said why" in err.splitlines()[-1]


def test_a_record_cut_short_is_no_record(folder: Path) -> None:
    write_probe(
        folder, "import os, pathlib; pathlib.Path(os.environ['TRACKNET_EXIT_FILE']).write_text('{\"code\": 7'); raise SystemExit(7)"
    )
    code, _, err = finish(launch_script(folder))
    assert code == 1
    assert "no worker said why" in err.splitlines()[-1]


def test_what_is_exported(folder: Path) -> None:
    names = ["TRACKNET_EXPECTED_WORLD_SIZE", "TRACKNET_TIMESTAMP", "ACCELERATE_USE_CPU", "LAUNCHER_ARGUMENTS"]
    write_probe(folder, f"import json, os; print(json.dumps([os.environ[name] for name in {names}]))")
    size, timestamp, cpu, arguments = json.loads(finish(launch_script(folder, NUM_PROCESSES="2"))[1])
    assert (size, cpu) == ("2", "true")
    assert [len(part) for part in timestamp.split("-")] == [8, 6]
    assert timestamp.replace("-", "").isdecimal()
    assert "cpu_multi.yaml --num_processes 2 --num_machines 1" in arguments
    assert json.loads(finish(launch_script(folder, TRACKNET_TIMESTAMP="20260102-030405"))[1])[1] == "20260102-030405"


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "SIGINT"), (signal.SIGUSR1, 75, "SIGTERM"), (signal.SIGHUP, 75, "SIGTERM")],
)
def test_a_signal_reaches_the_worker_which_is_given_time_to_save(
    folder: Path, number: signal.Signals, code: int, name: str, processes: str
) -> None:
    write_probe(folder, WAITS_FOR_A_SIGNAL)
    process = launch_script(folder, NUM_PROCESSES=processes)
    wait_for(folder / "ready", process)
    process.send_signal(number)
    left, _, err = finish(process)
    assert left == code
    assert (folder / "saved").exists()
    assert err.splitlines()[-1] == f"stopped by {name}"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_there_are_workers_ends_a_launcher_that_does_not_listen(folder: Path, number: signal.Signals, code: int) -> None:
    deaf = (
        "import pathlib, signal, time\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\npathlib.Path('ready').touch()\ntime.sleep(60)\n"
    )
    (folder / "accelerate" / "commands" / "launch.py").write_text(deaf)
    process = launch_script(folder, NUM_PROCESSES="2")
    wait_for(folder / "ready", process)
    process.send_signal(number)
    left, _, err = finish(process)
    assert left == code
    assert f"stopped by {number.name} before a worker could save" in err.splitlines()[-1]


def test_ctrl_c_comes_to_the_worker_once(folder: Path) -> None:
    write_probe(folder, WAITS_FOR_A_SIGNAL.replace("def stop(number, frame):", "def stop(number, frame):\n    os.write(2, b'stopping\\n')"))
    environ = clean_environment(folder, NUM_PROCESSES="2")
    process = subprocess.Popen(
        [str(ROOT / "launch.sh")],
        cwd=folder,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    wait_for(folder / "ready", process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    code, _, err = finish(process)
    assert code == 130
    assert err.count("stopping\n") == 1


SRUN = """#!/usr/bin/env bash
# Runs the step once per node, as srun would.
echo "$@" >> srun.log
while [[ "$1" == --* ]]; do shift; done
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & pids+=("$!"); done
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
    ((code > worst)) && worst=$code
done
exit "$worst"
"""

SCONTROL = """#!/usr/bin/env bash
echo "$@" >> scontrol.log
[[ "$1 $2" == "show hostnames" ]] && printf 'node-%s\\n' 7 8
exit 0
"""


@pytest.fixture
def cluster(folder: Path) -> dict[str, str]:
    """The environment of a batch script on two nodes."""
    (folder / "launch.sh").write_text((ROOT / "launch.sh").read_text())
    (folder / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "launch.sh").chmod(0o755)
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "CPU": "",
    }


def submit(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return start(["bash", str(ROOT / "slurm" / "train.sbatch"), *arguments], folder, **variables)


def test_the_batch_script_starts_one_launcher_per_node(folder: Path, cluster: dict[str, str]) -> None:
    code, out, err = finish(submit(folder, "x y", "a='b'", **cluster, SLURM_GPUS_ON_NODE="4", DRY_RUN="1"))
    assert (code, err) == (0, "")
    commands = sorted((shlex.split(line) for line in out.splitlines()), key=lambda words: option(words, "--machine_rank"))
    assert [option(words, "--machine_rank") for words in commands] == ["0", "1"]
    for words in commands:
        assert option(words, "--config_file").endswith("/multi_node.yaml")
        assert option(words, "--num_processes") == "8"
        assert option(words, "--main_process_ip") == "node-7"
        assert option(words, "--main_process_port") == str(20000 + 123456 % 20000)
        assert words[words.index("tracknet.scripts.train") :] == [
            "tracknet.scripts.train",
            "--output-dir",
            f"{folder}/outputs/slurm-123456",
            "x y",
            "a='b'",
        ]
    assert "--ntasks=2 --ntasks-per-node=1" in (folder / "srun.log").read_text()


def test_the_batch_script_trains_on_cpus_without_gpus_and_resumes_after_a_requeue(folder: Path, cluster: dict[str, str]) -> None:
    _, out, _ = finish(submit(folder, **cluster, DRY_RUN="1", SLURM_RESTART_COUNT="1"))
    words = shlex.split(out.splitlines()[0])
    assert option(words, "--config_file").endswith("/cpu_multi_node.yaml")
    assert option(words, "--num_processes") == "2"
    assert words[-2:] == ["--resume", "auto"]


def test_a_job_that_was_stopped_saves_and_goes_back_into_the_queue(folder: Path, cluster: dict[str, str]) -> None:
    write_probe(folder, WAITS_FOR_A_SIGNAL.replace('"ready"', '"ready-" + os.environ["SLURM_NODEID"]'))
    process = submit(folder, **cluster)
    wait_for(folder / "ready-0", process)
    wait_for(folder / "ready-1", process)
    process.send_signal(signal.SIGTERM)
    code, _, _ = finish(process)
    assert code == 75
    assert (folder / "saved").exists()
    assert "requeue 123456" in (folder / "scontrol.log").read_text()


def test_a_job_that_failed_stays_out_of_the_queue(folder: Path, cluster: dict[str, str]) -> None:
    # The folder and --output-dir come first, so the worker's own two words are the last.
    write_probe(folder, LEAVES.replace("sys.argv[1]", "sys.argv[-2]").replace("sys.argv[2]", "sys.argv[-1]"))
    assert finish(submit(folder, "2", "record", **cluster))[0] == 2
    assert "requeue" not in (folder / "scontrol.log").read_text()


def test_the_batch_script_says_where_to_submit_from(folder: Path, cluster: dict[str, str]) -> None:
    (folder / "empty").mkdir()
    code, _, err = finish(submit(folder, **cluster | {"SLURM_SUBMIT_DIR": str(folder / "empty")}))
    assert (code, err.count("\n")) == (2, 1)
    assert "root of the checkout" in err


def test_the_batch_script_asks_slurm_for_a_warning_and_a_requeue() -> None:
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    for line in ("--requeue", "--signal=B:TERM@120", "--ntasks-per-node=1", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text
