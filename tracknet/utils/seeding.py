"""One seed for every generator of the process. What matters for a result is drawn from (seed, epoch, index) and needs none of them."""

import os
import random


def seed_everything(seed: int) -> None:
    """Seeds `random`, NumPy and torch, and sets `PYTHONHASHSEED` for the processes started from here.

    Args:
        seed: 0 to 2**32 - 1, NumPy's range.
    """
    # torch takes seconds to import, and `--help` reads this module
    import numpy as np
    import torch

    os.environ["PYTHONHASHSEED"] = str(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
