"""Batches of one process."""

import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import RawArray, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tracknet.data.batch import Batch, Block
from tracknet.data.dataset import WindowDataset
from tracknet.data.sampler import EpochBatchSampler
from tracknet.errors import UserError
from tracknet.out_of_memory import is_out_of_memory
from tracknet.schema.training import DataLoaderConfig

PR_SET_PDEATHSIG = 1  # linux/prctl.h

# A process that CPython 3.11 forks while another thread begins or ends hangs for ever in os.fork, over a lock that nobody holds there
# (github.com/python/cpython/issues/112275). Such threads end just then: gloo's, which clean up after a collective, or a saver's.
CALM_S = 0.1  # before a fork; gives those threads the time to end
START_S = 60.0  # what has not started by then hangs
START_POLL_S = 0.01


class _WholeBatches(Dataset[Block | UserError]):
    """One batch per list of keys.

    A user's error is handed over as a value: PyTorch would wrap it in a traceback, and then wait seconds for workers that do not end.
    """

    def __init__(self, dataset: WindowDataset, num_workers: int) -> None:
        self.dataset, self.num_workers = dataset, num_workers

    def __getitem__(self, keys: list[tuple[int, int]]) -> Block | UserError:
        try:
            # In a worker in shared memory from the start: else its queue's thread copies it there, and where that runs out of memory,
            # the batch never comes and nobody is told.
            return self.dataset.block(keys, _shared_memory) if get_worker_info() else self.dataset.block(keys)
        except UserError as error:
            return error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _out_of_memory(self.num_workers)


def _out_of_memory(num_workers: int) -> UserError:
    lower = "training.data_loader.num_workers or training.data_loader.prefetch_factor" if num_workers else "training.batch_size"
    return UserError(f"out of memory while loading a batch; lower {lower}")


def _shared_memory(byte_count: int) -> Tensor:
    """Memory that the main process can map, uint8 (byte_count,), there in full.

    Left alone a worker would be killed (SIGBUS) when it writes behind what the system has, as in a container with 64 MB of /dev/shm.
    """
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(byte_count)  # type: ignore[no-untyped-call]  # as `default_collate`
    shares_descriptors = get_sharing_strategy() == "file_descriptor"  # type: ignore[no-untyped-call]
    if byte_count and shares_descriptors and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(storage._share_fd_cpu_()[0], 0, byte_count)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            advice = "give the system more, in Docker with --shm-size, or set training.data_loader.num_workers=0"
            raise UserError(f"no room for a batch in the shared memory of data workers (/dev/shm); {advice}") from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _hangs() -> UserError:
    advice = "start again with --resume auto, or set training.data_loader.num_workers=0"
    return UserError(f"a data worker did not start within {START_S:.0f} s; {advice}")


def _as_it_is(block: Any) -> Any:
    return block


class EpochLoader:
    """Loads the batches that a sampler names, in worker processes where there are some.

    Args:
        dataset: gives samples for (epoch, window) keys.
        sampler: this process's batches.
        config: `training.data_loader`; `drop_last` is the sampler's. `pin_memory` applies where there is a CUDA device.
    """

    def __init__(self, dataset: WindowDataset, sampler: EpochBatchSampler, config: DataLoaderConfig) -> None:
        self.dataset = dataset
        self.sampler = sampler
        workers = config.num_workers
        self._workers = _Workers(workers)
        self._persistent = workers > 0 and config.persistent_workers
        self._loader: DataLoader[Block | UserError] = DataLoader(
            _WholeBatches(dataset, workers),
            batch_size=None,  # the sampler's items are whole batches
            sampler=sampler,
            collate_fn=_as_it_is,
            num_workers=workers,
            # for what is shared by forking; from Python 3.14 on it is no longer what Linux does by itself
            multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
            persistent_workers=self._persistent,
            prefetch_factor=config.prefetch_factor if workers > 0 else None,
            pin_memory=config.pin_memory and torch.cuda.is_available(),
            worker_init_fn=partial(_start_and_note, self._workers.noted),
            generator=torch.Generator(),  # its own: otherwise each epoch would draw from the global generator
        )

    def __len__(self) -> int:
        """Batches per epoch, the same on all ranks."""
        return len(self.sampler)

    @property
    def windows_per_epoch(self) -> int:
        """Of all ranks together."""
        return self.sampler.count

    @property
    def windows_per_step(self) -> int:
        """Of all ranks together."""
        return self.sampler.windows_per_step

    @property
    def starts_workers(self) -> bool:
        """Whether the next epoch forks worker processes, which inherit what other threads hold at that moment."""
        return self._loader.num_workers > 0 and not (self._persistent and self._workers.started)

    def steps_left(self, windows_seen: int) -> int:
        """Batches of an epoch of which all processes together have seen so many windows; the same on all ranks."""
        return self.sampler.steps_left(windows_seen)

    def windows_of_this_rank(self) -> list[int]:
        """Numbers of the windows that this process gets in the first epoch, in order."""
        self.sampler.set_position(0)
        return [window for batch in self.sampler for _, window in batch]

    def epoch(self, epoch: int, windows_seen: int = 0) -> Iterator[Batch | UserError]:
        """The batches of an epoch, without the windows that all processes together have seen of it; workers start at once.

        What cannot be loaded comes as an error in the batch's place, and whoever takes it ends all ranks with it.
        """
        self.sampler.set_position(epoch, windows_seen)
        if self._persistent and self._workers.started:
            # here too, for an epoch may have been left before its first batch; and PyTorch waits for each of them without an end
            return self._received(iter(self._loader)) if self._workers.have_all_started() else iter([_hangs()])
        with self._workers.starting():
            blocks = iter(self._loader)
        return self._received(blocks)

    def _received(self, blocks: Iterator[Block | UserError]) -> Iterator[Batch | UserError]:
        """The batches as they come; memory may run out in receiving one too."""
        if not self._workers.have_all_started():
            yield _hangs()
            return
        while True:
            try:
                block = next(blocks)
            except StopIteration:
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                block = _out_of_memory(self._loader.num_workers)
            yield block.batch() if isinstance(block, Block) else block


class _Workers:
    """The worker processes of a loader, and whether each has come as far as its own code."""

    def __init__(self, count: int) -> None:
        self.noted: MutableSequence[int] = RawArray("q", count)  # process ids, in shared memory; each worker writes its own
        self.started: list[BaseProcess] = []

    @contextmanager
    def starting(self) -> Iterator[None]:
        """What is forked inside are the workers from here on."""
        if not len(self.noted):
            yield
            return
        self.noted[:] = [0] * len(self.noted)
        time.sleep(CALM_S)
        before = set(multiprocessing.active_children())
        yield
        self.started = [child for child in multiprocessing.active_children() if child not in before]

    def have_all_started(self) -> bool:
        """Waits for them, for a minute at most, and ends those that hang: they never would, and hold connections to the other ranks."""
        end = time.monotonic() + START_S
        try:
            while self._late() and time.monotonic() < end:
                time.sleep(START_POLL_S)
        finally:  # also where a signal ends the wait
            late = self._late()
            _kill(late)
        return not late

    def _late(self) -> list[BaseProcess]:
        """Those that live and have not noted themselves; of those that have ended PyTorch tells."""
        noted = set(self.noted)
        return [process for process in self.started if process.pid not in noted and process.is_alive()]


def _kill(processes: list[BaseProcess]) -> None:
    """Ends workers. PyTorch's handler would raise an error of its own over it, so it must not hear of it."""
    if not processes:
        return
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
    for process in processes:
        process.kill()
        process.join()  # then there is nothing left of it that the handler could find
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _start_and_note(noted: MutableSequence[int], worker: int) -> None:
    """First code of a worker process; `noted` is that of `_Workers`."""
    try:
        _start_worker()
    finally:  # an error is PyTorch's to tell
        noted[worker] = os.getpid()


def _start_worker() -> None:
    """Set-up of a worker process: one thread, and signals are the main process's business.

    A launcher or Slurm signals the whole process group. A worker that died of it would take the main process down with it before that could
    save, so a worker obeys SIGTERM only from the main process, and leaves by itself when that one has gone.
    """
    cv2.setNumThreads(0)
    main = parent_process()
    if sys.platform == "linux":
        # it holds connections to the other ranks, which learn of its main process's death only when both have gone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if main and os.getppid() != main.pid:  # it has gone before the kernel was asked
            os._exit(0)
    signal.set_wakeup_fd(-1)  # the main process has its own reader of signals; those of a worker are none of its business
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if main is None or not hasattr(signal, "sigwaitinfo"):  # macOS has no way to tell the sender
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_when_told, args=(main.pid,), daemon=True).start()


def _leave_when_told(main_pid: int | None) -> None:
    """Ends the process on a SIGTERM that `main_pid` sends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_pid:
        pass
    os._exit(0)
