"""Why a process left the others in the middle of a step, where no collective could tell them any more.

It is told through the store that connected the processes, which the launcher keeps; each of its restarts has keys of its own there.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from tracknet.errors import UserError
from tracknet.out_of_memory import is_out_of_memory

_KEY = "tracknet/last_word"


@contextmanager
def last_word(reason: Callable[[], str]) -> Iterator[None]:
    """Around collectives: a rank that runs out of memory there ends all ranks with the same line.

    Args:
        reason: why this rank leaves; asked for when it does.

    Raises:
        UserError: memory ran out, here or on another rank.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            why = reason()
            _leave(why)
            raise UserError(why) from error
        # a collective that fails here does so because a rank has left
        said = _word_of_others() if isinstance(error, RuntimeError) else None
        if said is None:
            raise
        raise UserError(said) from error


def _leave(reason: str) -> None:
    # where the store was in a process that has gone, the others have their own reason to leave
    with contextlib.suppress(RuntimeError):
        if dist.is_initialized():
            _get_default_store().set(_KEY, reason)


def _word_of_others() -> str | None:
    """What a process that has left said, if any did; None also where the store was in the process that has gone."""
    try:
        store = _get_default_store()
        return store.get(_KEY).decode() if store.check([_KEY]) else None
    except RuntimeError:
        return None
