"""Joins the other processes as training does, later on one rank than on the other, and fails but for the last attempt.

Writes the sum of the ranks' numbers, as each rank and attempt found it, into the folder of the first argument.
"""

import faulthandler
import os
import sys
import time
from pathlib import Path

import torch

from tracknet.schema.training import TrainingConfig
from tracknet.training.accelerator import start_accelerator
from tracknet.training.ranks import Ranks

faulthandler.dump_traceback_later(60, exit=True)
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
time.sleep(1.0 if rank == attempt % 2 else 0.0)
accelerator, _ = start_accelerator(TrainingConfig())
total = int(Ranks(accelerator).sum_(torch.tensor([rank + 1])))
(Path(sys.argv[1]) / f"{attempt}-{rank}").write_text(str(total))
accelerator.end_training()
sys.exit(1 if attempt < 2 else 0)
