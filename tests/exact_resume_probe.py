"""One of several launched processes that trains many times, one after the other, as the plan in the file of the first argument says.

Each training has a fork of its own, for imports take most of the time, and leaves in its folder what this process wrote to stderr in
`<name>-<rank>.log`, its exit code in `<name>-<rank>.code` and the windows that it read in `<name>-<rank>.keys`.
"""

import faulthandler
import json
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from stopped_runs import noting_keys, stopping_after, with_room_for

from tracknet.scripts.train import main

SECONDS = 120
RANK = os.environ["RANK"]
ROOM_OF_TWO = {1: 1, 4: 1}  # of the second rank alone


def train(training: dict[str, Any], told: str) -> None:
    with Path(f"{told}.log").open("wb") as console:
        os.dup2(console.fileno(), sys.stderr.fileno())
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    # the launcher's meeting place still has what an earlier training left there
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(training["port"])}
    del os.environ["TORCHELASTIC_RESTART_COUNT"]  # a training is no restart of the one before
    room = with_room_for(ROOM_OF_TWO if RANK == "1" else {}) if training["short_of_memory"] else nullcontext()
    with room, noting_keys(Path(f"{told}.keys")), stopping_after(training["stop_after"] if training["stopped_rank"] == RANK else None):
        code = main(training["arguments"])
    Path(f"{told}.code").write_text(str(code))


def train_in_a_fork(training: dict[str, Any]) -> None:
    told = f"{training['folder']}/{training['name']}-{RANK}"
    if child := os.fork():
        os.waitpid(child, 0)
        return
    try:
        train(training, told)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


if __name__ == "__main__":
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        train_in_a_fork(entry)
