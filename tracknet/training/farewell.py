"""Why a process leaves the others in the middle of a run, where no collective can tell them any more.

It is told through the store that connected the processes, which the launcher keeps; each attempt has keys of its own there. The first
word counts: whoever leaves later does so because of the first.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from tracknet.errors import UserError
from tracknet.training.joining import close_door, store_address
from tracknet.training.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, StoppedBeforeTrainingError

_KEY = "tracknet/last_word"
_STORE_ANSWERS_S = 2.0


class OutOfStepError(UserError):
    """The ranks are no longer at the same place, or not all of them are there: no collective may follow, not even one that saves."""


def leave(reason: str, exit_code: int) -> None:
    """Says why this process leaves, unless another one was first."""
    # where the store was in a process that has gone, the others have their own reason to leave
    if _store_answers():
        with contextlib.suppress(RuntimeError):
            _get_default_store().compare_set(_KEY, "", json.dumps([reason, exit_code]))
    close_door()


def word_of_others() -> OutOfStepError | None:
    """What the first process that has left said; None where nobody did, or where the store has gone."""
    if _store_answers():
        with contextlib.suppress(RuntimeError):
            store = _get_default_store()
            if store.check([_KEY]):
                reason, exit_code = json.loads(store.get(_KEY))
                error = OutOfStepError(reason)
                error.exit_code = exit_code
                return error
    return None


@contextmanager
def leaving_with_a_word() -> Iterator[None]:
    """Whatever ends this process inside, the others learn of it, and do not take it for dead without a word."""
    try:
        yield
    except UserError as error:
        leave(str(error), error.exit_code)
        raise
    except StoppedBeforeTrainingError:
        leave(f"{_own_name()} was stopped by a signal before the first step; start again, with --resume auto", EXIT_PREEMPTED)
        raise
    except KeyboardInterrupt:
        leave(f"{_own_name()} was interrupted", EXIT_INTERRUPTED)
        raise
    except BaseException as error:
        leave(f"{_own_name()} has left because of {type(error).__name__}; its own output says more", UserError.exit_code)
        raise


def _own_name() -> str:
    """This process, for the others."""
    return f"rank {dist.get_rank() if dist.is_initialized() else 0} on {socket.gethostname()}"


def _store_answers() -> bool:
    """Whether the store can be asked: a call to one whose machine has vanished would wait for minutes."""
    if not (dist.is_initialized() and "MASTER_ADDR" in os.environ):
        return False
    try:
        with socket.create_connection(store_address(), timeout=_STORE_ANSWERS_S):
            return True
    except OSError:
        return False
