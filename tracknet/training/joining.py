"""How the processes of a run find each other, at the start and after each restart.

A launcher that restarts its processes keeps the store in which they meet, with all that earlier ones wrote there; and on several machines
each launcher counts its own restarts, so that no number of theirs names a common attempt. So the processes agree on one:

1. Each notes itself under its rank, with an id of its own. What an earlier process of that rank has noted is overwritten.
2. When every rank is noted, rank 0 writes them all down as a numbered roster, and a new one whenever one of them changes.
3. A process that finds its own id in the newest roster confirms that. One that has died never will; the next one of its rank changes 1.
4. When all have confirmed the newest roster, rank 0 says go. Its number then sets this attempt's keys apart from all others.
"""

import contextlib
import ipaddress
import json
import logging
import os
import socket
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from tracknet.errors import UserError
from tracknet.training.peers import Door, Peer, address_towards

log = logging.getLogger("tracknet")

INIT_METHOD = "tracknet-roster://"  # of torch.distributed.init_process_group
CONNECT_TIMEOUT = timedelta(minutes=2)  # for processes that have all confirmed that they are there
POLL_S = 0.1
LONGEST_WAIT_S = 7200.0  # for a machine that is to be replaced
FIRST_WORD_S, NEXT_WORD_S = 10.0, 30.0  # when the log says who is missing

# A machine that loses its power says nothing, and a peer that waits for it would wait for ever. After a minute without any answer from its
# kernel the connection ends; a cable that is cut for 20 s is ridden out.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 10, 10, 5
SILENCE_MS = 60_000

_peers: tuple[Peer, ...] = ()
_door: Door | None = None


def peers() -> tuple[Peer, ...]:
    """The processes of this run in the order of their ranks, this one among them; empty where it is alone or has not joined."""
    return _peers


def close_door() -> None:
    """Shows the others that this process leaves."""
    if _door:
        _door.close()


def finish_joining(device: torch.device, collective_timeout: timedelta) -> None:
    """Makes the first collective, and has all connections watched. All ranks call this, once they are connected.

    Args:
        device: of this process.
        collective_timeout: how long a collective waits for the slowest rank from here on.
    """
    if not dist.is_initialized():
        return
    dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects only here
    dist.set_timeout(collective_timeout)
    _get_default_store().set_timeout(collective_timeout)
    watch_connections()


def watch_connections() -> None:
    """Has the kernel end each TCP connection of this process whose other end has been silent for a minute."""
    if sys.platform != "linux":
        return
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # not connected, or closed a moment ago
            if stat.S_ISSOCK(os.fstat(int(descriptor)).st_mode):
                _watch(int(descriptor))


def _watch(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as same:
        if same.family not in (socket.AF_INET, socket.AF_INET6) or not same.getpeername():
            return
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)


class Meeting:
    """One process on its way through the four steps."""

    def __init__(self, store: Store, own: Peer, world_size: int) -> None:
        self._store, self._own, self._world_size = PrefixStore("tracknet/joining", store), own, world_size
        self._registrations = [f"rank-{rank}" for rank in range(world_size)]

    def meet(self) -> tuple[int, tuple[Peer, ...]]:
        """Waits until all ranks are there.

        Returns:
            the number of the attempt and its processes.

        Raises:
            UserError: another process has come under the same rank, or one did not come.
            RuntimeError: the store has gone.
        """
        self._store.set(self._registrations[self._own.rank], json.dumps(asdict(self._own)))
        begin = time.monotonic()
        next_word = begin + FIRST_WORD_S
        while True:
            self._refuse_double()
            if self._own.rank == 0:
                self._lead()
            number, members = self._newest_roster()
            if self._own in members:
                self._store.set(f"{number}/confirmed-{self._own.rank}", "")
                if self._own.rank == 0 and members == self._registered() and not self._unconfirmed(number):
                    self._store.set(f"{number}/go", "")
                if self._store.check([f"{number}/go"]):
                    return number, members
            if (now := time.monotonic()) >= next_word:
                self._say_who_is_missing(number, members, now - begin)
                next_word = now + NEXT_WORD_S
            time.sleep(POLL_S)

    def _lead(self) -> None:
        """Writes a roster down where the newest is not that of the ranks as they are noted now."""
        registered = self._registered()
        if registered and self._newest_roster()[1] != registered:
            number = self._store.add("rosters", 1)
            self._store.set("roster", json.dumps([number, [asdict(member) for member in registered]]))

    def _registered(self) -> tuple[Peer, ...]:
        """The newest process of each rank; empty until there is one for all."""
        if not self._store.check(self._registrations):
            return ()
        return tuple(Peer(**json.loads(text)) for text in self._store.multi_get(self._registrations))

    def _newest_roster(self) -> tuple[int, tuple[Peer, ...]]:
        if not self._store.check(["roster"]):
            return 0, ()
        number, members = json.loads(self._store.get("roster"))
        return number, tuple(Peer(**member) for member in members)

    def _unconfirmed(self, number: int) -> list[int]:
        return [rank for rank in range(self._world_size) if not self._store.check([f"{number}/confirmed-{rank}"])]

    def _refuse_double(self) -> None:
        newest = Peer(**json.loads(self._store.get(self._registrations[self._own.rank])))
        if newest != self._own:
            raise UserError(
                f"another process, on {newest.host}, has joined as rank {self._own.rank}: "
                "give each machine a --machine_rank (MACHINE_RANK) of its own, and start each machine once"
            )

    def _say_who_is_missing(self, number: int, members: tuple[Peer, ...], waited_s: float) -> None:
        missing = [rank for rank, key in enumerate(self._registrations) if not self._store.check([key])]
        if not missing and self._own in members:
            missing = self._unconfirmed(number)
        hosts = {peer.rank: f" (last seen on {peer.host})" for peer in members or self._registered()}
        names = ", ".join(f"rank {rank}{hosts.get(rank, '')}" for rank in missing or [0])
        if waited_s > LONGEST_WAIT_S:
            raise UserError(f"{names} did not come within {LONGEST_WAIT_S / 60:.0f} min; start all machines of the run")
        log.warning("waiting for %s since %.0f s", names, waited_s)


def _join(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
    global _peers, _door
    with _naming_lost_store():
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        watch_connections()
        _door = _open_door(several_machines=int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1)
        machine = int(os.environ.get("GROUP_RANK", "0"))
        own = Peer(rank, machine, socket.gethostname(), _door.address, _door.port, uuid.uuid4().hex)
        number, _peers = Meeting(store, own, world_size).meet()
    yield PrefixStore(f"tracknet/attempt-{number}", store), rank, world_size


@contextlib.contextmanager
def _naming_lost_store() -> Iterator[None]:
    """What fails because the store cannot be reached becomes one line.

    Raises:
        UserError: the launcher of machine 0 has ended, or its machine has.
    """
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError, ConnectionError, TimeoutError, socket.gaierror) as error:
        if _keeps_store():
            raise  # it is its own: a port that is taken
        host, port = store_address()
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"the store of machine 0 at {host}:{port} has gone while the processes met, or cannot be reached "
            f"({reason}); start again with --resume auto, on all machines"
        ) from error


def _keeps_store() -> bool:
    """Whether the store is in this process; the launchers keep it themselves."""
    return os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _open_door(several_machines: bool) -> Door:
    """The door of this process, where the others reach it.

    Raises:
        OSError: the store cannot be reached.
    """
    address = address_towards(*store_address())
    if several_machines and ipaddress.ip_address(address).is_loopback:
        # Machine 0, where its own name means 127.0.1.1, as Debian's /etc/hosts has it. Elsewhere that name leads to it.
        return Door(store_address()[0], everywhere=True)
    return Door(address)


def store_address() -> tuple[str, int]:
    """Host and port of the store, which the launcher of machine 0 keeps."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


register_rendezvous_handler(INIT_METHOD.removesuffix("://"), _join)  # type: ignore[no-untyped-call]
