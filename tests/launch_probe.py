"""A stand-in for `tracknet.scripts.train`, found in its place through PYTHONPATH, so that launchers are tried without training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Everything but the scripts comes from the real package.
PACKAGE = f"__path__.append({str(ROOT / 'tracknet')!r})\n"

# What the real worker leaves for launch.sh.
RECORD = """
def leave_record(code, message):
    import json, os
    if "TRACKNET_EXIT_FILE" in os.environ and os.environ.get("RANK", "0") == "0":
        with open(os.environ["TRACKNET_EXIT_FILE"], "w") as file:
            json.dump({"code": code, "message": message}, file)
"""

# What the real worker does first: the check, before accelerate is imported; then one collective, so that the ranks are really connected.
CONNECTED = """
import json, os, sys
from pathlib import Path
from tracknet.errors import ConfigError
from tracknet.training.launch import ancestor_command_lines, check_world_size, world_from_environment

rank, world_size, _, _ = world_from_environment(os.environ)
try:
    check_world_size(world_size, os.environ, ancestor_command_lines())
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    check_world_size(accelerator.num_processes, os.environ, ancestor_command_lines())
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    leave_record(error.exit_code, f"error: {error}")
    sys.exit(error.exit_code)
ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
told = {"ranks": ranks, "device": accelerator.device.type, "arguments": sys.argv[1:], "timestamp": os.environ.get("TRACKNET_TIMESTAMP")}
Path(os.environ["PROBE_OUT"], f"rank-{rank}.json").write_text(json.dumps(told))
import atexit
atexit.register(accelerator.end_training)  # gloo's threads must not outlive the interpreter
"""


def write_probe(folder: Path, worker: str) -> None:
    """Makes `folder` a place from which `python -m tracknet.scripts.train` runs `worker`."""
    scripts = folder / "tracknet" / "scripts"
    scripts.mkdir(parents=True)
    (folder / "tracknet" / "__init__.py").write_text(PACKAGE)
    (scripts / "__init__.py").write_text("")
    (scripts / "train.py").write_text(RECORD + worker)


def clean_environment(folder: Path, **variables: str) -> dict[str, str]:
    """This process's environment without what launchers set, with the probe in front and `variables` on top."""
    prefixes = ("ACCELERATE", "TRACKNET_", "SLURM_", "NUM_", "MACHINE_RANK", "MAIN_PROCESS", "MAX_RESTARTS", "DRY_RUN", "VIRTUAL_ENV")
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CPU")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(prefixes) and key not in launched}
    return (
        kept
        | {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(folder),
            "PROBE_OUT": str(folder),
            "HF_HOME": str(folder / "hf"),
            "TMPDIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "CPU": "1",
        }
        | variables
    )


def launch_script(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Starts launch.sh in `folder`."""
    return start([str(ROOT / "launch.sh"), *arguments], folder, **variables)


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Starts any command in `folder` with the probe in place of the training script."""
    environ = clean_environment(folder, **variables)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_signals)


def hear_signals() -> None:
    """A test run in the background or under nohup ignores these, and what is ignored at its start a shell cannot trap."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr; a process that does not end is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(timeout=60)
        raise
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen[Any], seconds: float = 90) -> None:
    """Waits until a worker has written `path`."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"it left with {process.returncode} before it wrote {path.name}: {process.communicate()}"
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.05)
