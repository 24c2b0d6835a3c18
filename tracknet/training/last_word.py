"""Collectives inside of which a process may have to leave the others, because its memory has run out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tracknet.out_of_memory import is_out_of_memory
from tracknet.training.farewell import OutOfStepError, leave
from tracknet.training.lost_peer import naming_lost_peers


@contextmanager
def last_word(reason: Callable[[], str]) -> Iterator[None]:
    """As `naming_lost_peers`; and a rank that runs out of memory inside ends all ranks with the same line.

    Args:
        reason: why this rank leaves; asked for when it does.

    Raises:
        OutOfStepError: memory ran out, here or on another rank, or a process has left.
    """
    try:
        with naming_lost_peers():
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = reason()
        leave(why, OutOfStepError.exit_code)
        raise OutOfStepError(why) from error  # the others wait in the collective that this rank has left
