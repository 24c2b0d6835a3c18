"""Saving while the training goes on: the caller waits for a copy in memory, a thread brings it to the disk."""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tracknet.errors import UserError
from tracknet.out_of_memory import is_out_of_memory
from tracknet.training.background import step_back
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.snapshot import Snapshot

log = logging.getLogger("tracknet")


class BackgroundSaver:
    """Writes checkpoints on a thread of its own, one after the other.

    It keeps one copy of what is saved in host memory from save to save (`Snapshot`); its thread takes besides the memory of the largest
    tensor that is not contiguous. The interpreter does not exit before the thread is done.

    Args:
        store: where they go.
        after: called on the thread with the step of each checkpoint that was written.
        before: called on the thread before each, for what must be on the disk by then.
    """

    def __init__(self, store: CheckpointStore, after: Callable[[int], None], before: Callable[[], object] = lambda: None) -> None:
        self._store, self._after, self._before = store, after, before
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def failure(self) -> UserError | None:
        """Why the last checkpoint could not be written, once that is known."""
        return self._failure if isinstance(self._failure, UserError) else None

    @property
    def is_busy(self) -> bool:
        """Whether something is under way."""
        return self._thread is not None and self._thread.is_alive()

    def reserve(self, byte_count: int, pinned: bool) -> None:
        """Makes room for a copy on the thread, so that the first save is as quick as later ones; returns at once.

        Args:
            byte_count: of all tensors that will be saved.
            pinned: whether they are on a CUDA device.
        """
        self.wait()
        self._start(lambda: self._snapshot.reserve(byte_count, pinned))

    def save(
        self,
        step: int,
        model_texts: Mapping[str, str],
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best: bool,
    ) -> None:
        """Copies everything and returns; the arguments, as those of `CheckpointStore.save`, may change afterwards.

        Waits for an earlier save first. What fails is told in the log, and by `wait` unless a later save is good.

        Raises:
            Exception: an error of the program in an earlier save.
        """
        self._join()
        self.check()
        self._failure = None
        own_texts = dict(model_texts)
        own_state = json.loads(json.dumps(dict(state), allow_nan=False))
        try:
            copies = self._snapshot.take(tensors)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._fail(_out_of_memory(error))
            return

        def write() -> None:
            step_back()
            self._before()
            self._store.save(step, own_texts, copies, own_state, best)
            try:
                self._after(step)
            except UserError as error:  # the checkpoint is good
                log.warning("%s", error)

        self._start(write)

    def settle(self) -> UserError | None:
        """Returns when nothing is under way: why the last checkpoint could not be written, None where it was or there is none."""
        self._join()
        return self.failure

    def check(self) -> None:
        """Raises an error of the program that has ended a save; a failure that is a user's to mend is for `wait`."""
        if self._failure is not None and not isinstance(self._failure, UserError):
            raise self._failure

    def wait(self) -> None:
        """Returns when all is on the disk.

        Raises:
            UserError: the last checkpoint could not be written. A programming error comes as it was.
        """
        self._join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Returns when nothing is under way any more, and gives the memory back. A failure is not raised: it is in the log."""
        self._join()
        if self._failure is not None and not isinstance(self._failure, UserError):
            log.error("saving in the background failed", exc_info=self._failure)
        self._snapshot = Snapshot()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, job: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(job,), name="tracknet-saver")
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except UserError as error:
            self._fail(error)
        except Exception as error:
            if is_out_of_memory(error):
                self._fail(_out_of_memory(error))
            else:
                self._failure = error  # raised on the caller's thread, with its traceback

    def _fail(self, error: UserError) -> None:
        self._failure = error
        log.error("%s", error)


def _out_of_memory(error: Exception) -> UserError:
    return UserError(f"out of memory while a checkpoint was saved: {' '.join(str(error).split())}; free some memory")
