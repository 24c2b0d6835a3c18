"""The folder of one run, `<log_dir>/<run_id>/`: what was asked for, what ran it and what came out."""

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tracknet.errors import UserError

VERSIONS_OF = ("tracknet", "torch", "accelerate", "transformers", "wandb")
PREVIEW = re.compile(r"step-(?P<step>\d{8,})-(?P<name>.+)\.jpg")
ANOTHER_FOLDER = "free the disk or choose another folder with --output-dir or training.log_dir"
GIT_SECONDS = 5.0  # a repository on a slow network drive must not hold up the start of a run

log = logging.getLogger("tracknet")


def write_atomically(path: Path, content: bytes, remedy: str = ANOTHER_FOLDER) -> None:
    """Writes beside the final name, flushes to the disk and renames, so that a reader never sees half a file.

    Args:
        path: the file; its folder is made.
        content: all of it.
        remedy: what the user can do where it cannot be written.

    Raises:
        UserError: the folder cannot be made or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by mkstemp, whose files nobody else may read: to give them the usual mode, the umask of all threads would have to be changed.
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with open(beside, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _cannot_write(path, error, remedy) from error


class RunDirectory:
    """Names and writes the files of a run. Nothing is made before the first write; only the main rank writes.

    Attributes:
        path: the folder.
        metrics_file: `metrics.jsonl`, one JSON object per line, each with its "step": the source of truth.
        config_file: `config.yaml`, the resolved configuration, from which `--config` rebuilds the run.
        info_file: `run.json`, the launches of the run: command, versions, machine, exit.
        log_file: `train.log`, the text that the main rank showed.
        previews: folder of the preview pictures.
        preempted_file: `PREEMPTED`, there while the run waits to go on after a signal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.config_file = path / "config.yaml"
        self.info_file = path / "run.json"
        self.log_file = path / "train.log"
        self.previews = path / "previews"
        self.preempted_file = path / "PREEMPTED"

    def write_config(self, yaml_text: str) -> None:
        """Writes `config.yaml`."""
        write_atomically(self.config_file, yaml_text.encode())

    def write_run_info(self, *, run_id: str, seed: int, world_size: int, device: str) -> None:
        """Adds this launch to `run.json`; a resumed run keeps the launches before it.

        Args:
            run_id: name of the run.
            seed: of the run.
            world_size: number of processes.
            device: in words, for example "cpu" or the name of the GPU.

        Raises:
            UserError: `run.json` cannot be read or written.
        """
        info = self.read_run_info()
        launch = {
            "started": _now(),
            "command": shlex.join(sys.orig_argv),
            "working_directory": str(Path.cwd()),
            "hostname": socket.gethostname(),
            "world_size": world_size,
            "device": device,
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in VERSIONS_OF},
            "git": git_state(Path(__file__).parent),
            "exit": None,
        }
        self._write_info(info | {"run_id": run_id, "seed": seed, "launches": [*info["launches"], launch]})

    def record_wandb_id(self, wandb_id: str | None) -> None:
        """Notes in `run.json` which W&B run belongs to this one."""
        self._write_info(self.read_run_info() | {"wandb_id": wandb_id})

    def record_exit(self, code: int, message: str) -> None:
        """Notes in `run.json` how the current launch ended.

        Raises:
            UserError: `run.json` cannot be read or written, or is not there any more.
        """
        info = self.read_run_info()
        if not info["launches"]:
            raise UserError(f"{self.info_file} is gone")
        info["launches"][-1]["exit"] = {"code": code, "message": message, "time": _now()}
        self._write_info(info)

    def read_run_info(self) -> dict[str, Any]:
        """The content of `run.json`; before the first write the same keys, empty.

        A file that is no run's history (an empty one, for example, after a crash of the machine) is moved to `run.json.broken`, with a
        warning: no run shall end for its history.

        Raises:
            UserError: the file cannot be read or moved.
        """
        empty: dict[str, Any] = {"run_id": None, "seed": None, "wandb_id": None, "launches": []}
        if not self.info_file.exists():
            return empty
        try:
            content = self.info_file.read_bytes()
            if (info := _run_info(content)) is not None:
                return empty | info
            broken = self.info_file.with_name("run.json.broken")
            os.replace(self.info_file, broken)
        except OSError as error:
            raise UserError(f"cannot read {self.info_file}: {error.strerror}; make it readable, or move it away") from error
        log.warning("%s was damaged and is now %s; it begins anew", self.info_file, broken.name)
        return empty

    def mark_preempted(self, exit_code: int, signal_name: str, step: int) -> None:
        """Writes `PREEMPTED`: one JSON object that says why the run stopped, where, and how it goes on.

        Args:
            exit_code: of this launch.
            signal_name: "SIGTERM" or "SIGINT".
            step: of the checkpoint that was saved.

        Raises:
            UserError: the file cannot be written.
        """
        go_on = "start the same command with --resume auto"
        content = {"time": _now(), "signal": signal_name, "step": step, "exit_code": exit_code, "go_on": go_on}
        write_atomically(self.preempted_file, (json.dumps(content, indent=2) + "\n").encode())

    def clear_preempted(self) -> None:
        """Removes `PREEMPTED`, at the start of a launch.

        Raises:
            UserError: it is there and cannot be removed.
        """
        try:
            self.preempted_file.unlink(missing_ok=True)
        except OSError as error:
            message = f"cannot remove {self.preempted_file}: {error.strerror}; make its folder writable, or choose another --output-dir"
            raise UserError(message) from error

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl` and flushes it.

        Args:
            metrics: names and numbers, with "step" among them. NaN and the infinities become null: the file is strict JSON,
                readable by every parser.

        Raises:
            UserError: the file cannot be written.
        """
        assert "step" in metrics
        line = json.dumps({name: _json_value(value) for name, value in metrics.items()}, allow_nan=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _cannot_write(self.metrics_file, error) from error

    def metrics_of_last_step(self) -> tuple[int, frozenset[str]]:
        """The last step that `metrics.jsonl` has, and the names that stand there; -1 and none before the first line.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            lines = self.metrics_file.read_bytes().splitlines() if self.metrics_file.exists() else []
        except OSError as error:
            raise UserError(f"cannot read {self.metrics_file}: {error.strerror}; make it readable") from error
        entries = [json.loads(line) for line in lines if _step_of(line) is not None]
        last = max((entry["step"] for entry in entries), default=-1)
        return last, frozenset(name for entry in entries if entry["step"] == last for name in entry)

    def truncate_metrics_after(self, step: int) -> int:
        """Drops the lines and preview pictures of later steps, and lines torn by a crash, so that a run resumed at `step` repeats nothing.

        Returns:
            The number of lines dropped.

        Raises:
            UserError: the file cannot be read or written, or a picture cannot be removed.
        """
        try:
            for picture in self.previews.glob("step-*.jpg"):
                if (match := PREVIEW.fullmatch(picture.name)) and int(match["step"]) > step:
                    picture.unlink(missing_ok=True)
            if not self.metrics_file.exists():
                return 0
            lines = self.metrics_file.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"cannot go on in {self.path}: {error.strerror} ({error.filename}); make the folder's files yours") from error
        kept = [line for line in lines if line.endswith(b"\n") and (at := _step_of(line)) is not None and at <= step]
        if len(kept) < len(lines):
            write_atomically(self.metrics_file, b"".join(kept))
            log.info("dropped %d lines after step %d from %s", len(lines) - len(kept), step, self.metrics_file)
        return len(lines) - len(kept)

    def _write_info(self, info: Mapping[str, Any]) -> None:
        write_atomically(self.info_file, (json.dumps(info, indent=2) + "\n").encode())


def git_state(package: Path) -> dict[str, Any] | None:
    """The commit of the code that runs and whether files that git knows differ from it.

    Args:
        package: a folder of the code. Where git does not track it (an installed wheel, even inside of some other repository)
            there is no commit to name.

    Returns:
        {"commit": 40 hex digits, "dirty": bool}; None without git, repository or commit.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def _run_info(content: bytes) -> dict[str, Any] | None:
    try:
        info = json.loads(content)
    except ValueError:
        return None
    return info if isinstance(info, dict) and isinstance(info.get("launches"), list) else None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _cannot_write(path: Path, error: OSError, remedy: str = ANOTHER_FOLDER) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; {remedy}")
