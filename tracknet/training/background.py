"""One thread that works off small jobs in order while training goes on, such as drawing preview pictures."""

import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

NICENESS = 5  # of threads in the background: on busy cores they get about a third of what a thread of the training gets


class BackgroundThread:
    """Runs jobs one after the other; it lives as long as its owner, for a thread that begins or ends may hang a fork (`data.loader`).

    What a job raises is kept for `check`. The interpreter does not wait for the thread: `settle` does.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._waiting = 0  # jobs that are not done
        self._failure: Exception | None = None
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def add(self, job: Callable[[], None]) -> None:
        """Runs a job after those before it; returns at once."""
        with self._changed:
            self._waiting += 1
        self._jobs.put(job)

    def settle(self, seconds: float | None = None) -> bool:
        """Waits until all jobs are done.

        Args:
            seconds: to wait at most; None waits as long as it takes.

        Returns:
            whether they are.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting == 0, seconds)

    def check(self) -> None:
        """Raises what a job has raised, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _work(self) -> None:
        step_back()
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception as error:  # raised again where `check` is called, with its traceback
                self._failure = self._failure or error
            del job  # it holds pictures
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()


def step_back() -> None:
    """Lowers the priority of the calling thread, where the system lets it: what it does is the same without."""
    if sys.platform == "linux":  # where a thread has a niceness of its own
        thread = threading.get_native_id()
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))
