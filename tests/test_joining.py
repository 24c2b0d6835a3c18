"""How processes find each other in a store that keeps what earlier ones wrote there."""

import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, TCPStore

from tracknet.errors import UserError
from tracknet.training import joining
from tracknet.training.joining import Meeting
from tracknet.training.peers import Peer, address_towards

Met = dict[str, tuple[int, tuple[Peer, ...]]]


def process(rank: int, life: int) -> Peer:
    return Peer(rank, rank, f"node-{rank}", "127.0.0.1", 1, f"{rank}/{life}")


def arrive(store: HashStore, peer: Peer, size: int, met: Met, delay_s: float = 0.0) -> threading.Thread:
    def run() -> None:
        time.sleep(delay_s)
        met[peer.id] = Meeting(store, peer, size).meet()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def dies_before_go(store: HashStore, peer: Peer, size: int, after_looks: int) -> None:
    """A process that is there for a while, and does not live to hear go."""
    meeting = Meeting(store, peer, size)
    looks = 0

    def newest() -> tuple[int, tuple[Peer, ...]]:
        nonlocal looks
        looks += 1
        if looks > after_looks:
            raise InterruptedError
        return Meeting._newest_roster(meeting)

    meeting._newest_roster = newest  # type: ignore[method-assign]
    with pytest.raises(InterruptedError):
        meeting.meet()


@pytest.fixture(autouse=True, scope="module")
def _quick() -> object:
    before, joining.POLL_S = joining.POLL_S, 0.002
    yield
    joining.POLL_S = before


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 4), seed=st.integers(0, 10**6), attempts=st.integers(1, 3))
def test_all_meet_in_one_attempt_after_the_other_whoever_comes_first(size: int, seed: int, attempts: int) -> None:
    store, rng = HashStore(), random.Random(seed)
    numbers = []
    for life in range(attempts):
        met: Met = {}
        present = tuple(process(rank, life) for rank in range(size))
        threads = [arrive(store, peer, size, met, rng.uniform(0, 0.02)) for peer in present]
        for thread in threads:
            thread.join(timeout=20)
        assert set(met) == {peer.id for peer in present}
        assert len({number for number, _ in met.values()}) == 1
        assert {members for _, members in met.values()} == {present}  # and none of an earlier life
        numbers.append(next(iter(met.values()))[0])
    assert len(set(numbers)) == attempts


@pytest.mark.parametrize("dead", [0, 1, 2])
@pytest.mark.parametrize("after_looks", [0, 1, 3])
def test_a_process_that_dies_before_go_is_waited_for_until_another_takes_its_place(dead: int, after_looks: int) -> None:
    store, size = HashStore(), 3
    met: Met = {}
    others = [process(rank, 0) for rank in range(size) if rank != dead]
    threads = [arrive(store, others[0], size, met)]
    dies_before_go(store, process(dead, 0), size, after_looks)
    threads.append(arrive(store, others[1], size, met))
    time.sleep(0.05)
    assert not met
    threads.append(arrive(store, process(dead, 1), size, met))
    for thread in threads:
        thread.join(timeout=20)
    assert len(met) == size
    assert len(set(met.values())) == 1
    assert {peer.id for peer in met[f"{dead}/1"][1]} == {f"{dead}/1", *(peer.id for peer in others)}


def test_the_log_says_who_is_missing_and_where_it_was(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FIRST_WORD_S", 0.05)
    store = HashStore()
    met: Met = {}
    first = arrive(store, process(0, 0), 2, met)
    while not caplog.messages:
        time.sleep(0.01)
    assert caplog.messages == ["waiting for rank 1 since 0 s"]
    second = arrive(store, process(1, 0), 2, met)
    first.join(timeout=20)
    second.join(timeout=20)
    caplog.clear()
    first = arrive(store, process(0, 1), 2, met)  # the second machine has gone meanwhile
    while not caplog.messages:
        time.sleep(0.01)
    assert caplog.messages == ["waiting for rank 1 (last seen on node-1) since 0 s"]
    arrive(store, process(1, 1), 2, met)
    first.join(timeout=20)
    assert met["0/1"] == met.get("1/1", met["0/1"])


def test_what_does_not_come_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FIRST_WORD_S", 0.02)
    monkeypatch.setattr(joining, "LONGEST_WAIT_S", 0.01)
    with pytest.raises(UserError, match=r"^rank 0, rank 2 did not come within .* start all machines of the run$"):
        Meeting(HashStore(), process(1, 0), 3).meet()


def test_two_machines_with_one_number_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store, errors = HashStore(), []

    def join(peer: Peer) -> None:
        try:
            Meeting(store, peer, 2).meet()
        except UserError as error:
            errors.append(str(error))

    one = threading.Thread(target=join, args=[process(0, 0)], daemon=True)
    one.start()
    time.sleep(0.05)
    other = threading.Thread(target=join, args=[replace(process(0, 1), host="node-7")], daemon=True)
    other.start()
    one.join(timeout=20)
    Meeting(store, process(1, 0), 2).meet()  # else the other would wait, and say so, while later tests look at what is logged
    other.join(timeout=20)
    assert not other.is_alive()
    assert errors == [
        "another process, on node-7, has joined as rank 0: give each machine a --machine_rank (MACHINE_RANK) of its own, "
        "and start each machine once"
    ]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TCPStore]]:
    """That of a launcher, as this process finds it; it ends when it is taken out of the list."""
    kept = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept[0].port), "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in (told | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joining, "_door", None)
    monkeypatch.setattr(joining, "_peers", ())
    yield kept
    joining.close_door()


def join() -> None:
    next(joining._join("", timedelta(seconds=1)))


def test_a_store_that_ends_while_processes_meet_is_one_line(store: list[TCPStore]) -> None:
    address = f"127.0.0.1:{store[0].port}"
    threading.Timer(0.5, store.clear).start()
    for _ in ("it ends", "it has ended before"):
        with pytest.raises(UserError, match=f"^the store of machine 0 at {address} has gone .*; start again with --resume auto") as raised:
            join()
        assert "\n" not in str(raised.value)


def test_a_store_that_this_process_keeps_itself_keeps_its_own_words(store: list[TCPStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(RuntimeError, match="EADDRINUSE"):
            join()


@pytest.mark.parametrize("failing", [ConnectionRefusedError("refused"), TimeoutError("timed out"), socket.gaierror(-2, "Name not known")])
def test_a_store_that_cannot_be_connected_to_again_is_one_line(
    store: list[TCPStore], monkeypatch: pytest.MonkeyPatch, failing: OSError
) -> None:
    def fails(*_: object) -> str:
        raise failing

    monkeypatch.setattr(joining, "address_towards", fails)
    with pytest.raises(UserError, match=r"^the store of machine 0 at 127\.0\.0\.1"):
        join()


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address of its own on Linux only")
@pytest.mark.parametrize("several_machines", [True, False])
def test_a_first_machine_whose_name_means_itself_has_its_door_at_all_addresses(store: list[TCPStore], several_machines: bool) -> None:
    assert address_towards("127.0.0.1", store[0].port).startswith("127.")
    door = joining._open_door(several_machines)
    assert door.address == "127.0.0.1"  # what the others know it by
    assert answers("127.0.0.1", door.port)
    assert answers("127.0.0.2", door.port) is several_machines
    door.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the open files of a process in /proc")
def test_connections_are_watched_and_nothing_is_left_open() -> None:
    reading, writing = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(3):
            joining.watch_connections()
        assert set(os.listdir("/proc/self/fd")) == before
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == joining.SILENCE_MS
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    os.close(reading)
    os.close(writing)
