"""Whether another process is still there."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tracknet.training.peers import GONE, UNREACHABLE, Door, Peer, absent_peers, in_words

KEEPS_A_DOOR = """
import sys, time
from tracknet.training.peers import Door
door = Door("127.0.0.1")
print(door.port, flush=True)
while True:  # never answers, and yet it is there
    pass
"""


@pytest.fixture
def busy() -> Iterator[tuple[subprocess.Popen[str], Peer]]:
    process = subprocess.Popen([sys.executable, "-c", KEEPS_A_DOOR], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, Peer(1, 0, "here", "127.0.0.1", int(process.stdout.readline()), "")
    process.kill()


def test_a_process_is_there_until_it_ends_however_busy_it_is(busy: tuple[subprocess.Popen[str], Peer]) -> None:
    process, peer = busy
    assert absent_peers([peer], 0.3) == {}
    process.kill()
    assert absent_peers([peer], 30.0) == {1: GONE}
    process.wait()
    assert absent_peers([peer], 30.0) == {1: GONE}


def test_one_that_ends_while_it_is_called_is_noticed(busy: tuple[subprocess.Popen[str], Peer]) -> None:
    process, peer = busy
    other = Door("127.0.0.1")
    end_it = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
    begin = time.monotonic()
    assert absent_peers([peer, Peer(2, 0, "here", other.address, other.port, "")], 30.0) == {1: GONE}
    assert time.monotonic() - begin < 25.0  # it did not wait for the other one's end
    end_it.wait()


def test_a_closed_door_is_as_good_as_an_end() -> None:
    door = Door("127.0.0.1")
    door.close()
    assert absent_peers([Peer(0, 0, "here", door.address, door.port, "")], 30.0) == {0: GONE}


def test_a_door_closes_though_a_forked_worker_holds_it_open() -> None:
    door = Door("127.0.0.1")
    held = os.dup(door._socket.fileno())
    peer = Peer(0, 0, "here", door.address, door.port, "")
    assert absent_peers([peer], 0.2) == {}
    door.close()
    assert absent_peers([peer], 30.0) == {0: GONE}
    os.close(held)


def test_what_cannot_even_be_called_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # no route leads to a broadcast address: the kernel says so at once
    assert absent_peers([Peer(1, 0, "there", "255.255.255.255", 9, "")], 30.0) == {1: UNREACHABLE}

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert absent_peers([Peer(1, 0, "there", "node-b", 9, "")], 30.0) == {1: UNREACHABLE}


def test_a_door_may_be_known_by_a_name() -> None:
    door = Door("localhost", everywhere=True)
    peer = Peer(0, 0, "here", door.address, door.port, "")
    assert absent_peers([peer], 0.2) == {}
    door.close()
    assert absent_peers([peer], 30.0) == {0: GONE}


def test_the_absent_are_named_by_rank_and_machine() -> None:
    peers = [Peer(rank, rank // 2, f"node-{'ab'[rank // 2]}", "127.0.0.1", 1, "") for rank in range(4)]
    assert in_words(peers, {1: GONE}) == "rank 1 on node-a has gone"
    assert in_words(peers, {2: UNREACHABLE}) == "rank 2 on node-b cannot be reached"
    assert in_words(peers, {2: GONE, 3: GONE}) == "ranks 2, 3 on node-b have gone"
    assert in_words(peers, {0: GONE, 3: GONE}) == "rank 0 on node-a has gone and rank 3 on node-b has gone"
