"""What a collective that fails is taken for."""

import pickle
from collections.abc import Iterator

import pytest
import torch

from tracknet.errors import UserError
from tracknet.training import joining, lost_peer
from tracknet.training.farewell import OutOfStepError
from tracknet.training.last_word import last_word
from tracknet.training.lost_peer import PeerLostError, naming_lost_peers
from tracknet.training.peers import Door, Peer

GLOO = "[gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:61065: Connection reset by peer."


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Door]]:
    """Of two processes of the run, rank 0 on node-a and rank 1 on node-b."""
    made = [Door("127.0.0.1"), Door("127.0.0.1")]
    peers = tuple(Peer(rank, rank, f"node-{'ab'[rank]}", door.address, door.port, str(rank)) for rank, door in enumerate(made))
    monkeypatch.setattr(joining, "_peers", peers)
    monkeypatch.setattr(lost_peer, "PATIENCE_S", 0.3)
    yield made
    for door in made:
        door.close()


def fail(error: Exception) -> None:
    with naming_lost_peers():
        raise error


def test_the_one_who_has_gone_is_named(doors: list[Door]) -> None:
    doors[1].close()
    with pytest.raises(PeerLostError, match=r"^rank 1 on node-b has gone; the last checkpoint is whole: .* --resume auto$") as raised:
        fail(RuntimeError(GLOO))
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None


def test_a_broken_connection_is_told_from_a_mistake_of_the_program_where_all_are_there(doors: list[Door]) -> None:
    with pytest.raises(PeerLostError, match=r"^a connection between the ranks broke, though all are there .*Connection reset by peer"):
        fail(RuntimeError(GLOO))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"), naming_lost_peers():
        torch.ones(2) @ torch.ones(3)


@pytest.mark.parametrize("error", [UserError("its own"), torch.OutOfMemoryError("out of memory"), KeyError("x")])
def test_what_is_no_failure_of_a_collective_stays_what_it_is(doors: list[Door], error: Exception) -> None:
    doors[1].close()
    with pytest.raises(type(error)) as raised:
        fail(error)
    assert raised.value is error


def test_what_others_are_told_survives_the_way_to_them() -> None:
    """An error that meets one rank is pickled for the others."""
    lost = pickle.loads(pickle.dumps(PeerLostError("rank 1 has gone", speaks_for_machine=True)))
    assert (type(lost), str(lost), lost.speaks_for_machine) == (PeerLostError, "rank 1 has gone", True)
    error = OutOfStepError("a reason")
    error.exit_code = 75
    error = pickle.loads(pickle.dumps(error))
    assert (type(error), str(error), error.exit_code) == (OutOfStepError, "a reason", 75)


def test_after_a_loss_no_collective_may_follow(doors: list[Door], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_peer, "word_of_others", lambda: OutOfStepError("a reason of rank 1"))
    with pytest.raises(OutOfStepError, match=r"^a reason of rank 1$"), last_word(lambda: "unused"):
        raise RuntimeError(GLOO)
    monkeypatch.undo()
    with pytest.raises(OutOfStepError, match=r"^no memory here$"), last_word(lambda: "no memory here"):
        raise torch.OutOfMemoryError("out of memory")
    assert issubclass(PeerLostError, OutOfStepError)


def test_a_process_alone_has_lost_nobody() -> None:
    with pytest.raises(RuntimeError, match="Connection reset"):
        fail(RuntimeError(GLOO))
