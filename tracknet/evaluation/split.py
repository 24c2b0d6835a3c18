"""The clips that are scored, and how several processes share them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tracknet.data.formats import check_game_names, read_clips
from tracknet.data.frames import cache_root
from tracknet.data.games_root import games_root
from tracknet.data.index import NO_LABEL, ClipIndex
from tracknet.data.prepare import Gather, of_one_process, on_all_ranks
from tracknet.errors import DataError
from tracknet.schema.data import DataConfig


@dataclass(frozen=True)
class Share:
    """This process among those that evaluate together.

    Attributes:
        rank: 0 to `size` - 1; 0 writes.
        size: processes on all machines.
        local_rank: among those of this machine.
        local_size: processes of this machine.
        gather: joins the lists of all ranks, in the order of the ranks; it is a barrier too.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    gather: Gather = of_one_process


ALONE = Share()


def read_split(data: DataConfig, games: Sequence[str], share: Share = ALONE) -> tuple[ClipIndex, list[str]]:
    """The labels of some games; no picture is decoded, and drawn games are drawn. All ranks: holds collectives.

    The sides of a split are told apart by the names of the games: footage that stands under another name on another side is not noticed.

    Returns:
        The index, and a line for each clip left out (`data.on_error=skip`).

    Raises:
        ConfigError: the data set or a game is not there.
        DataError: labels are broken, no clip is left, or no frame has a label.
    """
    check_game_names(games)
    cache_dir = on_all_ranks(lambda: cache_root(data.cache_dir), share.gather)
    root = games_root(data, games, cache_dir, share.local_rank, share.gather)
    index, errors = on_all_ranks(lambda: read_clips(root, games, data.on_error, cache_dir), share.gather)
    check_usable(index, games)
    return index, [f"clip skipped (data.on_error=skip): {error}" for error in errors]


def check_usable(index: ClipIndex, games: Sequence[str]) -> None:
    """Raises DataError where no clip is there, or none has a label."""
    if not (index.visibility != NO_LABEL).any():
        raise DataError(f"no clip with a label is left in {', '.join(games)}; there is nothing to score")
