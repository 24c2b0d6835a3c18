"""Batches of one process."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import parent_process
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tracknet.data.batch import Batch
from tracknet.data.dataset import WindowDataset
from tracknet.data.sampler import EpochBatchSampler
from tracknet.errors import UserError
from tracknet.out_of_memory import is_out_of_memory
from tracknet.schema.training import DataLoaderConfig

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _WholeBatches(Dataset[Batch | UserError]):
    """One batch per list of keys.

    A user's error is handed over as a value: PyTorch would wrap it in a traceback, and then wait seconds for workers that do not end.
    """

    def __init__(self, dataset: WindowDataset, num_workers: int) -> None:
        self.dataset, self.num_workers = dataset, num_workers

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch | UserError:
        try:
            batch = self.dataset.collate([self.dataset[key] for key in keys])
            # In a worker: else its queue's thread does it, and where that runs out of memory, the batch never comes and nobody is told.
            return batch.share_memory() if get_worker_info() else batch
        except UserError as error:
            return error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _out_of_memory(self.num_workers)


def _out_of_memory(num_workers: int) -> UserError:
    lower = "training.data_loader.num_workers or training.data_loader.prefetch_factor" if num_workers else "training.batch_size"
    return UserError(f"out of memory while loading a batch; lower {lower}")


def _as_it_is(batch: Any) -> Any:
    return batch


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
        self._loader: DataLoader[Batch | UserError] = DataLoader(
            _WholeBatches(dataset, workers),
            batch_size=None,  # the sampler's items are whole batches
            sampler=sampler,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0 and config.persistent_workers,
            prefetch_factor=config.prefetch_factor if workers > 0 else None,
            pin_memory=config.pin_memory and torch.cuda.is_available(),
            worker_init_fn=_start_worker,
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
        return self._received(iter(self._loader))

    def _received(self, batches: Iterator[Batch | UserError]) -> Iterator[Batch | UserError]:
        """The batches as they come; memory may run out in receiving one too."""
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                batch = _out_of_memory(self._loader.num_workers)
            yield batch


def _start_worker(worker: int) -> None:
    """Set-up of a worker process: one thread, and signals are the main process's business.

    A launcher or Slurm signals the whole process group. A worker that died of it would take the main process down with it before that could
    save, so a worker obeys SIGTERM only from the main process, and leaves by itself when that one has gone.
    """
    cv2.setNumThreads(0)
    if sys.platform == "linux":
        # it holds connections to the other ranks, which learn of its main process's death only when both have gone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = parent_process()
    if main is None or not hasattr(signal, "sigwaitinfo"):  # macOS has no way to tell the sender
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_when_told, args=(main.pid,), daemon=True).start()


def _leave_when_told(main_pid: int | None) -> None:
    """Ends the process on a SIGTERM that `main_pid` sends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_pid:
        pass
    os._exit(0)
