"""Joins the other ranks as training does, then adds up numbers for ever, until its rank is the one that leaves.

Arguments: the rank that leaves, and how: `killed`, `user` (its own UserError), `bug` (of the program).
What it comes to is its last line on stderr: the error's class and text.
"""

import faulthandler
import os
import signal
import sys
import time

import torch

from tracknet.errors import UserError
from tracknet.schema.training import TrainingConfig
from tracknet.training.accelerator import start_accelerator
from tracknet.training.farewell import leaving_with_a_word
from tracknet.training.ranks import Ranks

faulthandler.dump_traceback_later(100, exit=True)
accelerator, _ = start_accelerator(TrainingConfig())
ranks = Ranks(accelerator)
leaving, how = int(sys.argv[1]), sys.argv[2]


def leave() -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "user":
        raise UserError("a reason of its own")
    torch.ones(2) @ torch.ones(3)


try:
    with leaving_with_a_word():
        for step in range(100_000):
            ranks.sum_(torch.ones(10))
            ranks.gather([step])
            ranks.from_main(step)
            ranks.copy_from_main_([torch.zeros(3)])
            if step == 5 and ranks.rank == leaving:
                leave()
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    accelerator.end_training()
    time.sleep(1 if how == "killed" else 6)  # the launcher's other processes end only later
    sys.exit(1)
