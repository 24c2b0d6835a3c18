"""Which windows each process sees at each step: a pure function of (seed, epoch)."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from tracknet.errors import ConfigError


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, window) keys for one process.

    Step g of an epoch takes the windows order[g * W * B : (g + 1) * W * B] of one order that all W processes share, cut into W contiguous
    even shares. So two processes with batches of 4 see at each step the same windows as one with 8. The last step may be ragged: shares
    then differ by at most one window and may be empty, but every process has the same number of steps. An epoch that other processes, or
    other batches, have begun goes on behind the windows that they have seen.

    Args:
        count: windows in the data set.
        batch_size: B, windows per process and step.
        rank: this process, 0 to W - 1.
        world_size: W.
        seed: of the order.
        shuffle: whether the order is drawn anew each epoch; else it is that of the data set.
        drop_last: leave out a last step of fewer than W * B windows.

    Raises:
        ConfigError: `drop_last` leaves no step at all.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int, seed: int, shuffle: bool, drop_last: bool) -> None:
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.windows_per_step = batch_size * world_size
        if len(self) == 0:
            raise ConfigError(
                f"training.data_loader.drop_last: {count} windows are fewer than one step's {self.windows_per_step} "
                f"({batch_size} x {world_size} processes), so none is left; set it to false or lower training.batch_size"
            )
        self.set_position(0)

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.steps_left(0)

    def steps_left(self, windows_seen: int) -> int:
        """Steps of an epoch of which all processes together have seen so many windows."""
        left = self.count - windows_seen
        return left // self.windows_per_step if self.drop_last else -(-left // self.windows_per_step)

    def set_position(self, epoch: int, windows_seen: int = 0) -> None:
        """Where the next iteration starts: behind the windows of the epoch that all processes together have seen."""
        self._epoch, self._windows_seen = epoch, windows_seen

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self._epoch, self._windows_seen)  # the position of now, not of the first `next`

    def _batches(self, epoch: int, windows_seen: int) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count) if self.shuffle else np.arange(self.count)
        for step in range(self.steps_left(windows_seen)):
            first = windows_seen + step * self.windows_per_step
            windows = order[first : first + self.windows_per_step]
            yield [(epoch, int(window)) for window in np.array_split(windows, self.world_size)[self.rank]]
