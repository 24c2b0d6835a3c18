import logging
import os

import pytest

# before torch is imported: tiny tensors are slower on two threads than on one, and sums come out the same on every machine
os.environ["OMP_NUM_THREADS"] = "1"

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
