"""Decodes the clips of a run, each by one process of a machine, and sees to it that all ranks agree on the outcome."""

import logging
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from tracknet.data.decode import available_cores
from tracknet.data.frames import FrameStore
from tracknet.data.index import Clip
from tracknet.errors import DataError, UserError

Gather = Callable[[list[Any]], list[Any]]  # joins the lists of all ranks
Result = TypeVar("Result")

log = logging.getLogger("tracknet")


def of_one_process(items: list[Any]) -> list[Any]:
    """The `Gather` of a process that is alone."""
    return items


def on_all_ranks(work: Callable[[], Result], gather: Gather) -> Result:
    """Does `work` on each rank; if a user's error ends it on any, all raise the first one. All ranks: holds a collective."""
    result, failures = None, []
    try:
        result = work()
    except UserError as error:
        failures = [error]
    failures = gather(failures)
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]


def prepare_clips(
    clips: Sequence[Clip], store: FrameStore, on_error: str, share: tuple[int, int], gather: Gather, *, order: int = 0
) -> dict[str, str]:
    """Decodes what the cache lacks. All ranks: holds collectives.

    Machines that share the cache's disk share the work too: each takes the clips in another order, and skips what the others have done.

    Args:
        clips: of the whole run, the same on all ranks.
        store: the cache.
        on_error: `stop` ends the run at the first broken clip; `skip` leaves it out.
        share: this process's number on its machine, and how many there are.
        gather: joins the lists of all ranks.
        order: processes that do not know of each other, and fill one cache, take different ones; 0 is the order of the clips.

    Returns:
        The errors of the clips left out, by clip id, the same on all ranks.

    Raises:
        DataError: a clip is broken and `on_error` is `stop`, or the machines hold different clips.
        UserError: the cache's folder is none.
    """
    _check_same_clips(clips, gather)
    claim_clips(clips, store)
    if share[0] == 0:
        store.folder.tidy()
    mine = _ordered(clips[share[0] :: share[1]], order + _machine(share, gather))
    threads = max(1, available_cores() // share[1])
    broken = on_all_ranks(lambda: _prepare(mine, store, on_error, threads, show=share[0] == 0), gather)
    together: dict[str, str] = {}
    for clip_id, message in gather(list(broken.items())):
        together.setdefault(clip_id, message)
    kept = [clip for clip in clips if clip.id not in together]
    missing = on_all_ranks(lambda: store.settle(kept), gather)
    if missing and share[0] == 0:
        _tell_of_missing(missing, kept, store)
    return together


def claim_clips(clips: Sequence[Clip], store: FrameStore) -> None:
    """Notes that a run needs these clips, see `FrameStore.claim`; those of several stores before the first of them is filled."""
    for clip in clips:
        with suppress(DataError):  # its source has gone; preparing it will tell
            store.claim(clip)


def _check_same_clips(clips: Sequence[Clip], gather: Gather) -> None:
    """Machines with a disk each may hold different data."""
    listing = {f"{clip.id} ({clip.length} frames)" for clip in clips}
    listings = gather([listing])
    differing = sorted(set.union(*listings) - set.intersection(*listings))
    if differing:
        raise DataError(f"data.root: the machines do not hold the same clips; {differing[0]} is not on all of them")


def _machine(share: tuple[int, int], gather: Gather) -> int:
    """The number of this machine among those of the run; ranks of one machine follow each other."""
    own = uuid.uuid4().hex
    ranks = gather([(own, share[0])])
    mine = [name for name, _ in ranks].index(own)
    return len([local_rank for _, local_rank in ranks[: mine + 1] if local_rank == 0]) - 1


def _ordered(clips: Sequence[Clip], order: int) -> list[Clip]:
    """The clips in one of many orders, in which no two processes work side by side for long; 0 is their own."""
    return list(clips) if order == 0 else [clips[place] for place in np.random.default_rng(order).permutation(len(clips))]


def _prepare(clips: Sequence[Clip], store: FrameStore, on_error: str, threads: int, show: bool) -> dict[str, str]:
    """Decodes clips one after the other; the broken ones and why, by clip id."""
    broken: dict[str, str] = {}
    frames_done, next_line = 0, 0.1
    missing: list[Clip] = []
    for clip in clips:
        try:
            if not store.is_prepared(clip):
                missing.append(clip)
        except DataError as error:
            _drop(broken, clip, error, on_error)
    frames_all = sum(clip.length for clip in missing)
    on_terminal = show and sys.stderr.isatty()
    with tqdm(total=frames_all, desc="decoding", unit="frame", disable=not (on_terminal and missing)) as bar:
        for clip in missing:
            try:
                store.prepare(clip, threads)  # at once where another process has done it meanwhile
            except DataError as error:
                _drop(broken, clip, error, on_error)
            bar.update(clip.length)
            frames_done += clip.length
            if show and not on_terminal and frames_done >= next_line * frames_all:
                log.info("decoded %d of %d frames (cache: %s)", frames_done, frames_all, store.cache_dir)
                next_line = frames_done / frames_all + 0.1
    return broken


def _drop(broken: dict[str, str], clip: Clip, error: DataError, on_error: str) -> None:
    """Notes a broken clip, or ends the run."""
    if on_error == "stop":
        raise error
    broken[clip.id] = str(error)


def _tell_of_missing(missing: Sequence[Clip], clips: Sequence[Clip], store: FrameStore) -> None:
    """One line about the clips that the cache does not hold."""
    limit = store.folder.limit
    reason = "no room for them" if limit is None or store.folder.refuses else f"data.cache_limit_gb={limit / 1e9:g} leaves no room for them"
    frames = sum(clip.length for clip in missing)
    text = "%d of %d clips (%d frames) are decoded whenever they are read: %s in %s"
    log.info(text, len(missing), len(clips), frames, reason, store.folder.path)
