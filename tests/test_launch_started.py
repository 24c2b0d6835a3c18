"""Every CPU recipe really started with accelerate, and the world that came of it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launch_probe import CONNECTED, ROOT, clean_environment, finish, launch_script, start, wait_for, write_probe
from test_launch_configs import header_command

ACCELERATE = [str(Path(sys.executable).parent / "accelerate"), "launch"]
MODULE = ["-m", "tracknet.scripts.train"]
AWKWARD = ["--output-dir", "a folder", "model.name='x y'", 'data.root="/a b"', "training.optimizer.lr=1e-4", "$HOME"]

# After the collective, it waits for a signal and saves, as training does.
STOPPED = """
import signal, time
def stop(number, frame):
    time.sleep(1)  # saving
    leave_record(75 if number == signal.SIGTERM else 130, f"stopped by {signal.Signals(number).name}")
    Path(os.environ["PROBE_OUT"], f"saved-{rank}").touch()
    sys.exit(75 if number == signal.SIGTERM else 130)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
accelerator.wait_for_everyone()
Path(os.environ["PROBE_OUT"], f"ready-{rank}").touch()
time.sleep(60)
"""


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def told(folder: Path, rank: int = 0) -> Any:
    return json.loads((folder / f"rank-{rank}.json").read_text())


def assert_world(folder: Path, size: int) -> None:
    assert len(list(folder.glob("rank-*.json"))) == size
    for rank in range(size):
        assert told(folder, rank)["ranks"] == list(range(size))
        assert told(folder, rank)["device"] == "cpu"


def test_two_processes_are_connected_take_the_arguments_and_stop_on_a_signal(tmp_path: Path) -> None:
    write_probe(tmp_path, CONNECTED + STOPPED)
    process = launch_script(tmp_path, *AWKWARD, NUM_PROCESSES="2")
    wait_for(tmp_path / "ready-0", process)
    wait_for(tmp_path / "ready-1", process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert_world(tmp_path, 2)
    assert told(tmp_path, 0)["arguments"] == told(tmp_path, 1)["arguments"] == AWKWARD
    assert told(tmp_path, 0)["timestamp"] == told(tmp_path, 1)["timestamp"]
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert code == 75
    assert err.splitlines()[-1] == "stopped by SIGTERM"


def test_the_cpu_option_with_two_processes_is_stopped_with_the_recipe_that_works(tmp_path: Path) -> None:
    write_probe(tmp_path, CONNECTED)
    process = start([*ACCELERATE, "--cpu", "--num_processes", "2", *MODULE], tmp_path)
    code, _, err = finish(process, timeout=60)
    assert code == 1  # accelerate's; the worker's own stands in its traceback
    assert "found 1 process where 2 were expected" in err
    assert "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m tracknet.scripts.train`" in err
    assert sum("error:" in line for line in err.splitlines() if "expected" in line) == 1
    assert "returned non-zero exit status 2" in err
    assert not list(tmp_path.glob("rank-*.json"))


def test_two_machines_are_connected(tmp_path: Path) -> None:
    write_probe(tmp_path, CONNECTED)
    both = {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "127.0.0.1", "MAIN_PROCESS_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    machines = [launch_script(tmp_path, **both, MACHINE_RANK=str(rank)) for rank in range(2)]
    assert [finish(machine)[0] for machine in machines] == [0, 0]
    assert_world(tmp_path, 2)


def check_of(tmp_path: Path, *options: str, **variables: str) -> tuple[int, str]:
    write_probe(tmp_path, CONNECTED)
    code, _, err = finish(start([*ACCELERATE, *options, *MODULE], tmp_path, **variables))
    return code, err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("cpu", 1), ("cpu_multi", 2)])
def test_the_command_in_the_yaml_header_starts_its_world(tmp_path: Path, name: str, size: int) -> None:
    words = header_command(name)
    variables = dict(word.split("=") for word in words[: words.index("accelerate")])
    code, err = check_of(tmp_path, *words[words.index("launch") + 1 : words.index("-m")], **variables)
    assert code == 0, err
    assert_world(tmp_path, size)


@pytest.mark.slow
def test_the_command_in_the_header_for_two_machines_starts_its_world(tmp_path: Path) -> None:
    words = header_command("cpu_multi_node")
    options = words[words.index("launch") + 1 : words.index("-m")]
    write_probe(tmp_path, CONNECTED)
    port = ["--main_process_port", free_port()]
    variables = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    rank_at = options.index("--machine_rank") + 1
    machines = []
    for rank in range(2):
        own = [*options[:rank_at], str(rank), *options[rank_at + 1 :]]
        machines.append(start([*ACCELERATE, *own, *port, *MODULE], tmp_path, **variables))
    assert [finish(machine)[0] for machine in machines] == [0, 0]
    assert_world(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "size", "expected"), [(signal.SIGTERM, 1, 75), (signal.SIGINT, 1, 130), (signal.SIGINT, 2, 130)])
def test_a_signal_to_the_launch_script_lets_the_workers_save(tmp_path: Path, number: signal.Signals, size: int, expected: int) -> None:
    write_probe(tmp_path, CONNECTED + STOPPED)
    process = launch_script(tmp_path, NUM_PROCESSES=str(size))
    for rank in range(size):
        wait_for(tmp_path / f"ready-{rank}", process)
    process.send_signal(number)
    assert finish(process)[0] == expected
    assert len(list(tmp_path.glob("saved-*"))) == size
    assert_world(tmp_path, size)


@pytest.mark.slow
def test_a_wrong_size_on_two_machines_stops_both_with_code_2(tmp_path: Path) -> None:
    write_probe(tmp_path, CONNECTED.replace("check_world_size(world_size", "check_world_size(1"))
    both = {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "127.0.0.1", "MAIN_PROCESS_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    machines = [launch_script(tmp_path, **both, MACHINE_RANK=str(rank)) for rank in range(2)]
    (first, _, err), (second, _, _) = [finish(machine, timeout=60) for machine in machines]
    assert first == 2
    assert second != 0  # rank 0 speaks for the run, and it lives on the first machine
    assert err.splitlines()[-1].startswith("error: found 1 process where 2 were expected")
    assert "NUM_MACHINES=2 MACHINE_RANK=R" in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    ["distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n", "distributed_type: MULTI_GPU\nuse_cpu: false\nnum_processes: 2\n"],
    ids=["MULTI_CPU", "without the variable"],
)
def test_a_yaml_whose_processes_are_not_connected_is_stopped(tmp_path: Path, config: str) -> None:
    import torch

    if "MULTI_GPU" in config and torch.cuda.device_count() > 1:
        pytest.skip("this YAML is right on a machine with two GPUs")
    (tmp_path / "own.yaml").write_text(config + "num_machines: 1\nmachine_rank: 0\n")
    code, err = check_of(tmp_path, "--config_file", "own.yaml")
    assert code == 1
    assert "found 1 process where 2 were expected" in err
    assert not list(tmp_path.glob("rank-*.json"))


@pytest.mark.slow
def test_a_machine_whose_peers_were_never_asked_for_stops_at_once(tmp_path: Path) -> None:
    """Two of the four processes expected: refused before any rendezvous of the process group could wait."""
    write_probe(tmp_path, CONNECTED)
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    process = start([*ACCELERATE, *options, *MODULE], tmp_path, TRACKNET_EXPECTED_WORLD_SIZE="4", ACCELERATE_USE_CPU="true")
    _, _, err = finish(process, timeout=60)
    assert "found 2 processes where 4 were expected" in err


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_namespaces() -> Any:
    """Two network namespaces joined by a veth pair stand in for two machines."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"tracknet{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"`ip netns add` is not permitted here: {error.stderr!r}")
    try:
        ip("link", "add", "tna", "netns", names[0], "type", "veth", "peer", "name", "tnb", "netns", names[1])
        for i, (name, link) in enumerate(zip(names, ("tna", "tnb"), strict=True), 1):
            ip("-n", name, "address", "add", f"10.77.0.{i}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, ("tna", "tnb"), strict=True))
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_machines_with_networks_of_their_own_are_connected(tmp_path: Path, two_namespaces: list[tuple[str, str]]) -> None:
    write_probe(tmp_path, CONNECTED)
    machines = []
    for rank, (namespace, link) in enumerate(two_namespaces):
        variables = {
            "NUM_MACHINES": "2",
            "NUM_PROCESSES": "2",
            "MACHINE_RANK": str(rank),
            "MAIN_PROCESS_IP": "10.77.0.1",
            "GLOO_SOCKET_IFNAME": link,
        }
        command = ["ip", "netns", "exec", namespace, str(ROOT / "launch.sh")]
        machines.append(subprocess.Popen(command, cwd=tmp_path, env=clean_environment(tmp_path, **variables)))
        time.sleep(0.5)
    assert [machine.wait(timeout=120) for machine in machines] == [0, 0]
    assert_world(tmp_path, 2)
