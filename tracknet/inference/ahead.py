"""Reading on a thread of its own, ahead of whoever uses what is read."""

from collections import deque
from collections.abc import Iterable, Iterator
from threading import Condition, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """The items of an iterable, in order, while a thread fetches the next ones; inside a `with` block, at whose end the thread has ended.

    Args:
        items: read on that thread, once.
        most: items that have been read and are not done yet, at most; reading waits where there are so many.
    """

    def __init__(self, items: Iterable[T], most: int) -> None:
        self._items, self._most = items, most
        self._read: deque[T] = deque()
        self._undone = 0
        self._ended = self._stopped = False
        self._failure: BaseException | None = None
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="reading ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        """Gives each item once; raises what the iterable raises, behind the items before it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._read or self._ended)
                if not self._read:
                    break
                item = self._read.popleft()
            yield item
        if self._failure is not None:
            raise self._failure

    def done(self, count: int) -> None:
        """So many items are not needed any more: as many others may be read."""
        with self._changed:
            self._undone -= count
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._keep(item):
                    break
        except BaseException as error:  # raised again where the items are used
            self._failure = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _keep(self, item: T) -> bool:
        """Puts an item where it is fetched from, and waits for room for the next; False where no more is wanted."""
        with self._changed:
            self._read.append(item)
            self._undone += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or self._undone < self._most)
            return not self._stopped
