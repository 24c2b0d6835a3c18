"""Saves on a disk that fails (`faulty_disk.c`, loaded with LD_PRELOAD), once for each call that changes something on the disk.

Arguments: an empty folder, the fault (one of FAULTS), and the step to save over a checkpoint of step 1: 1 replaces it, 2 is a new one.
Prints a line of JSON for each trial: {"call": "fsync /last", "wrong": ""}.
"""

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from saved_runs import RUN_ID, leftovers, put_foreign_files, save, silence, what_is_wrong

from tracknet.errors import UserError

FAULTS = {  # what the disk does, and the error that it gives
    "fail_once": (1, errno.EIO),
    "full": (2, errno.ENOSPC),
    "kill_before": (3, 0),
    "kill_after": (4, 0),
    "flip_a_bit": (5, 0),
}
DISK = ctypes.CDLL(None)  # the library is loaded already
DISK.faulty_disk_hit.restype = ctypes.c_char_p


def save_on_a_faulty_disk(run_folder: Path, fault: str, n: int, step: int) -> tuple[str, str]:
    """Saves, and gives the call that was hit, empty where there are less than n, and what went wrong, empty where nothing did."""
    wrong = ""
    what, error_number = FAULTS[fault]
    DISK.faulty_disk_arm(os.fsencode(run_folder), what, n, error_number)
    try:
        save(run_folder, step)
    except UserError as error:
        if "\n" in str(error) or not str(error).startswith(f"training.ckpt_dir: the checkpoint of step {step} could not be written"):
            wrong = f"not one clear line: {error}"
    finally:
        DISK.faulty_disk_disarm()
    return re.sub("-[0-9a-f]{32}", "", os.fsdecode(DISK.faulty_disk_hit()).replace(str(run_folder), "")), wrong


def save_and_die(run_folder: Path, fault: str, n: int, step: int) -> tuple[str, str]:
    """As above in a child, which the fault kills. Which call that was is not known here."""
    child = os.fork()
    if child == 0:
        hit, wrong = save_on_a_faulty_disk(run_folder, fault, n, step)
        os._exit(1 if hit or wrong else 0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return f"call {n}", ""
    return "", "" if status == 0 else "the child failed"


def trial(ckpt_dir: Path, fault: str, n: int, step: int) -> tuple[str, str]:
    """The call that was hit, empty where there was none, and what went wrong, empty where nothing did."""
    run_folder = ckpt_dir / RUN_ID
    save(run_folder, 1)
    put_foreign_files(run_folder)
    attempt = save_and_die if fault.startswith("kill") else save_on_a_faulty_disk
    hit, wrong = attempt(run_folder, fault, n, step)
    wrong = wrong or what_is_wrong(ckpt_dir, {1, step})
    if not wrong:
        save(run_folder, 3)  # the next one is as good as ever, and clears up
        wrong = what_is_wrong(ckpt_dir, {3})
    if not wrong and (left := leftovers(run_folder)):
        wrong = f"left behind: {left}"
    return hit, wrong


def main(folder: Path, fault: str, step: int) -> None:
    silence()
    n = 1
    while True:
        ckpt_dir = folder / str(n)
        hit, wrong = trial(ckpt_dir, fault, n, step)
        if hit or wrong:
            print(json.dumps({"call": hit, "wrong": wrong}), flush=True)
        if not hit:
            return  # the save makes no such call any more
        shutil.rmtree(ckpt_dir)
        n += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
