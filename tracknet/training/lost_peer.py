"""A collective that fails because another process has gone: who that is, in one line."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from tracknet.out_of_memory import is_out_of_memory
from tracknet.training.farewell import OutOfStepError, leave, word_of_others
from tracknet.training.joining import peers
from tracknet.training.peers import absent_peers, in_words

PATIENCE_S = 5.0  # a process that leaves by itself takes a moment to end
WHAT_NOW = "the last checkpoint is whole: a launcher with restarts left goes on from it, else start again with --resume auto"
# what gloo, NCCL and the store say of a broken connection; anything else is a mistake in the call
_BROKEN = ("gloo/transport", "gloo connectfullmesh", "nccl", "connection", "socket", "timed out", "timeout")


class PeerLostError(OutOfStepError):
    """Another process of the run has gone without a word, so that this one cannot go on.

    Attributes:
        speaks_for_machine: this process is the first of its machine that is still there, and so says the line for it.
    """

    def __init__(self, line: str, speaks_for_machine: bool = False) -> None:
        super().__init__(line)  # one argument: it may be pickled for other ranks
        self.speaks_for_machine = speaks_for_machine


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Around collectives: one that fails because another process has left becomes one line that says who, or why it left.

    Raises:
        PeerLostError: a process has gone, or cannot be reached.
        OutOfStepError: what a process said that has left by itself.
    """
    try:
        yield
    except RuntimeError as error:
        reason = None if is_out_of_memory(error) else _why(error)
        if reason is None:
            raise
        raise reason from error


def _why(error: RuntimeError) -> OutOfStepError | None:
    """Why a collective has failed; None where the other processes have no part in it."""
    if said := word_of_others():
        return said
    if not peers():
        return None
    own = dist.get_rank() if dist.is_initialized() else None
    absent = absent_peers([peer for peer in peers() if peer.rank != own], PATIENCE_S)
    if said := word_of_others():
        return said
    if absent:
        line = in_words(peers(), absent)
    elif any(sign in str(error).lower() for sign in _BROKEN):
        line = f"a connection between the ranks broke, though all are there ({str(error).splitlines()[0]})"
    else:
        return None
    line = f"{line}; {WHAT_NOW}"
    leave(line, PeerLostError.exit_code)
    return PeerLostError(line, _is_first_of_machine(own, absent))


def _is_first_of_machine(own: int | None, absent: Collection[int]) -> bool:
    if own is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    machine = peers()[own].machine
    return own == min(peer.rank for peer in peers() if peer.machine == machine and peer.rank not in absent)
