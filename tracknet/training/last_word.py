"""Why a process left the others in the middle of a step, where no collective could tell them any more.

It is told through the store that connected the processes, which the launcher keeps; each of its restarts has keys of its own there.
"""

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_KEY = "tracknet/last_word"


def leave_last_word(reason: str) -> None:
    """To be called before the process leaves; a second one takes the place of the first."""
    if dist.is_initialized():
        _get_default_store().set(_KEY, reason)


def last_word_of_others() -> str | None:
    """What a process that has left said, if any did; None also where the store was in the process that has gone."""
    try:
        store = _get_default_store()
        return store.get(_KEY).decode() if store.check([_KEY]) else None
    except RuntimeError:
        return None
