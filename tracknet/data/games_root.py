"""Where the games of a data set are, also those that are drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tracknet.data.prepare import Gather, on_all_ranks
from tracknet.data.synthetic import make_rallies
from tracknet.schema.data import DataConfig


def games_root(data: DataConfig, games: Sequence[str], cache_dir: Path, local_rank: int, gather: Gather) -> Path:
    """The folder with the games; drawn ones are drawn by the first process of each machine while the others wait. All ranks call this.

    Args:
        data: its section `data`; `root` or `synthetic` is set.
        games: that are needed.
        cache_dir: where drawn games go.
        local_rank: this process's number on its machine.
        gather: joins the lists of all ranks; it is a barrier too.

    Raises:
        UserError: drawn games cannot be written; on all ranks.
    """
    synthetic = data.synthetic
    if synthetic is None:
        assert data.root is not None
        return Path(data.root)
    make: Callable[[], Path] = lambda: make_rallies(synthetic, games, cache_dir)  # noqa: E731
    on_all_ranks(make if local_rank == 0 else lambda: cache_dir, gather)
    return on_all_ranks(make, gather)
