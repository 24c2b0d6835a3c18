"""Two network namespaces as two machines with names of their own, on which things are started, killed and cut off; see two_machines.sh."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

SET_UP = Path(__file__).with_name("two_machines.sh")
FIRST_ADDRESS = "10.79.0.1"


@dataclass(frozen=True)
class Machine:
    """A namespace.

    Attributes:
        number: 0 or 1.
        namespace: its name, and that of its link.
        host: what its processes take the machine's name to be.
    """

    number: int
    namespace: str
    host: str

    def start(self, command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts a command; what it writes is added to `log`."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", f'hostname {self.host}; exec "$@"', "sh"]
        with log.open("ab") as file:
            return subprocess.Popen([*inside, *command], env=environment, stdout=file, stderr=file)

    def processes(self) -> list[psutil.Process]:
        """All that run here."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True).stdout
        found = []
        for pid in listed.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def kill_all(self) -> None:
        """As where the machine's power fails, but for what its kernel still tells the others while the cable is in."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def cut_cable(self) -> None:
        self._set_link("down")

    def mend_cable(self) -> None:
        self._set_link("up")

    def _set_link(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.namespace, "link", "set", self.namespace, state], check=True)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Makes them, and in the end kills all that runs there; skips the test where namespaces are not allowed."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("two network namespaces as two machines need root, iproute2 and unshare")
    name = f"tn{os.getpid()}"
    try:
        made = subprocess.run([SET_UP, "up", name], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
        machines = Machine(0, f"{name}a", "node-a"), Machine(1, f"{name}b", "node-b")
        try:
            yield machines
        finally:
            for machine in machines:
                machine.kill_all()
            time.sleep(0.2)
    finally:
        subprocess.run([SET_UP, "down", name], capture_output=True)
