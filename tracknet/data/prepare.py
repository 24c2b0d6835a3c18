"""Decodes the clips of a run, each by one process of a machine, and sees to it that all ranks agree on the outcome."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from tracknet.data.frames import FrameStore
from tracknet.data.index import Clip
from tracknet.errors import DataError, UserError

Gather = Callable[[list[Any]], list[Any]]  # joins the lists of all ranks
Result = TypeVar("Result")

log = logging.getLogger("tracknet")


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


def prepare_clips(clips: Sequence[Clip], store: FrameStore, on_error: str, share: tuple[int, int], gather: Gather) -> dict[str, str]:
    """Decodes what the cache lacks. All ranks: holds collectives.

    Args:
        clips: of the whole run, the same on all ranks.
        store: the cache.
        on_error: `stop` ends the run at the first broken clip; `skip` leaves it out.
        share: this process's number on its machine, and how many there are.
        gather: joins the lists of all ranks.

    Returns:
        The errors of the clips left out, by clip id, the same on all ranks.

    Raises:
        DataError: a clip is broken and `on_error` is `stop`, or the machines hold different clips.
        UserError: the cache cannot be written.
    """
    _check_same_clips(clips, gather)
    mine = clips[share[0] :: share[1]]
    broken = on_all_ranks(lambda: _prepare(mine, store, on_error, show=share[0] == 0), gather)
    together: dict[str, str] = {}
    for clip_id, message in gather(list(broken.items())):
        together.setdefault(clip_id, message)
    on_all_ranks(lambda: _settle([clip for clip in clips if clip.id not in together], store), gather)
    return together


def _check_same_clips(clips: Sequence[Clip], gather: Gather) -> None:
    """Machines with a disk each may hold different data."""
    listing = {f"{clip.id} ({clip.length} frames)" for clip in clips}
    listings = gather([listing])
    differing = sorted(set.union(*listings) - set.intersection(*listings))
    if differing:
        raise DataError(f"data.root: the machines do not hold the same clips; {differing[0]} is not on all of them")


def _prepare(clips: Sequence[Clip], store: FrameStore, on_error: str, show: bool) -> dict[str, str]:
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
                store.prepare(clip)
            except DataError as error:
                _drop(broken, clip, error, on_error)
            bar.update(clip.length)
            frames_done += clip.length
            if show and not on_terminal and frames_done >= next_line * frames_all:
                log.info("decoded %d of %d frames into %s", frames_done, frames_all, store.cache_dir)
                next_line = frames_done / frames_all + 0.1
    return broken


def _drop(broken: dict[str, str], clip: Clip, error: DataError, on_error: str) -> None:
    """Notes a broken clip, or ends the run."""
    if on_error == "stop":
        raise error
    broken[clip.id] = str(error)


def _settle(clips: Sequence[Clip], store: FrameStore) -> None:
    """Makes sure that this process finds every clip, whichever process of the machine has decoded it."""
    for clip in clips:
        if not store.is_prepared(clip):
            raise DataError(f"{clip.source}: decoded, yet not in {store.cache_dir}; all processes of a machine must share data.cache_dir")
