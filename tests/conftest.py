import logging
import os
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from fault_table import PAGE, FaultTable

# before torch is imported: tiny tensors are slower on two threads than on one, and sums come out the same on every machine
os.environ["OMP_NUM_THREADS"] = "1"

FAULTS = pytest.StashKey[FaultTable]()
LAUNCH_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "TRACKNET_CONFIG_DIR",
    "TRACKNET_TIMESTAMP",
    "TRACKNET_EXIT_FILE",
    "TRACKNET_EXPECTED_WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A test's outcome must not depend on what the shell around pytest exports, on the user's cache, nor on another test's rank."""
    monkeypatch.setenv("TRACKNET_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("tracknet").setLevel(logging.NOTSET)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAULTS] = FaultTable()


@pytest.fixture(scope="session")
def faults(pytestconfig: pytest.Config) -> FaultTable:
    """The table of faults: `faults.record(row, survived, note)` counts one trial; a lost one fails the test when it ends."""
    return pytestconfig.stash[FAULTS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    losses = item.config.stash[FAULTS].losses
    before = len(losses)
    yield  # what the test raises goes on its way
    if len(losses) > before:
        pytest.fail("lost:\n" + "\n".join(losses[before:]), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[FAULTS]
    if not table.markdown():
        return
    terminalreporter.section("fault table")
    terminalreporter.write(table.markdown())
    if table.is_whole():
        table.write()
        terminalreporter.write_line(f"written to {PAGE}")
    else:
        terminalreporter.write_line(f"not the whole set, so not written to {PAGE}")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two games of two clips of ten frames."""
    from clips import write_games  # here, for it brings libraries that read the variable above when they are loaded

    root = tmp_path_factory.mktemp("clips")
    write_games(root, ["game1", "game2"], clips=2, count=10)
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, check=False, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
