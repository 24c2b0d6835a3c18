"""The other processes of a run: where each is, and whether it is still there."""

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

BACKLOG = 1024  # processes that may knock at once; nobody ever opens
CONNECT_S = 4.0  # a machine that does not answer by then cannot be reached
SETTLE_S = 0.5  # a machine's processes die one after the other
GONE, UNREACHABLE = "gone", "unreachable"
# what a machine answers for a process that has ended
_REFUSALS = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE)


@dataclass(frozen=True)
class Peer:
    """A process of the run.

    Attributes:
        rank: its number in the run.
        machine: number of its machine, which is `accelerate launch`'s `--machine_rank`.
        host: name of its machine.
        address: where its door is; a number or a name.
        port: of its door.
        id: of this process alone; the next process of the same rank has another one.
    """

    rank: int
    machine: int
    host: str
    address: str
    port: int
    id: str


class Door:
    """A port where others see that this process lives: the kernel answers there, whatever the process is busy with."""

    def __init__(self, address: str, *, everywhere: bool = False) -> None:
        """Opens it at an address of this machine, or at all of them, where others know one by a name that means another one here."""
        both = everywhere and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in address else socket.AF_INET
        place = "" if everywhere else address
        self._socket = socket.create_server((place, 0), family=family, backlog=BACKLOG, dualstack_ipv6=both)
        self.address, self.port = address, int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Lets the others see that this process leaves, before it has ended."""
        with contextlib.suppress(OSError):  # closed before
            self._socket.shutdown(socket.SHUT_RDWR)  # forked workers hold it open too
        self._socket.close()


def address_towards(host: str, port: int, seconds: float = 30.0) -> str:
    """This machine's address in the network in which a server is reached.

    Raises:
        OSError: it cannot be reached.
    """
    with socket.create_connection((host, port), timeout=seconds) as connection:
        return str(connection.getsockname()[0])


def _how(error: int) -> str:
    """In which way a process is absent whose connection has failed, or has ended (0)."""
    return GONE if not error or error in _REFUSALS else UNREACHABLE


@dataclass
class _RollCall:
    """Knocks at all doors at once, and stays there: a connection that nobody has taken in ends together with the process."""

    selector: selectors.BaseSelector
    connecting: set[int] = field(default_factory=set)
    absent: dict[int, str] = field(default_factory=dict)

    def knock(self, peer: Peer) -> None:
        try:
            family, _, _, _, place = socket.getaddrinfo(peer.address, peer.port, type=socket.SOCK_STREAM)[0]
        except socket.gaierror:
            self.absent[peer.rank] = UNREACHABLE
            return
        knocking = socket.socket(family)
        knocking.setblocking(False)
        if (error := knocking.connect_ex(place)) not in (0, errno.EINPROGRESS):
            knocking.close()
            self.absent[peer.rank] = _how(error)
            return
        self.connecting.add(peer.rank)
        self.selector.register(knocking, selectors.EVENT_WRITE, peer.rank)

    def listen(self, seconds: float) -> None:
        """Takes in what has changed within some seconds."""
        for key, _ in self.selector.select(max(0.0, seconds)):
            assert isinstance(key.fileobj, socket.socket)
            error, rank = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), key.data
            if not error and rank in self.connecting:
                self.selector.modify(key.fileobj, selectors.EVENT_READ, rank)
            else:
                self.absent[rank] = _how(error)
                self.selector.unregister(key.fileobj)
                key.fileobj.close()
            self.connecting.discard(rank)

    def close(self) -> None:
        for key in list(self.selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()


def absent_peers(peers: Iterable[Peer], patience_s: float) -> dict[int, str]:
    """Which processes have ended, or end within some seconds.

    Returns:
        `GONE` or `UNREACHABLE` by rank, soon after the first is known; empty where all are there all the time.
    """
    with selectors.DefaultSelector() as selector:
        call = _RollCall(selector)
        try:
            for peer in peers:
                call.knock(peer)
            begin = time.monotonic()
            end = begin + patience_s
            while (now := time.monotonic()) < end and selector.get_map():
                call.listen(min(end, begin + CONNECT_S if call.connecting else end) - now)
                if call.absent and not call.connecting:
                    end = min(end, time.monotonic() + SETTLE_S)
                if call.connecting and time.monotonic() >= begin + CONNECT_S:
                    break
            return dict(sorted((call.absent | dict.fromkeys(call.connecting, UNREACHABLE)).items()))
        finally:
            call.close()


def in_words(peers: Sequence[Peer], absent: dict[int, str]) -> str:
    """Who is absent: `rank 1 on node-b has gone`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for peer in peers:
        if peer.rank in absent:
            groups.setdefault((peer.host, absent[peer.rank]), []).append(peer.rank)
    parts = []
    for (host, how), ranks in groups.items():
        one = len(ranks) == 1
        who = f"rank {ranks[0]}" if one else f"ranks {', '.join(map(str, ranks))}"
        parts.append(f"{who} on {host} {'cannot be reached' if how == UNREACHABLE else 'has gone' if one else 'have gone'}")
    return " and ".join(parts)
