"""Fills the cache of frames for a configuration, without training."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tracknet.data.formats import check_game_names, read_clips
from tracknet.data.frames import FrameStore, cache_root, frame_store
from tracknet.data.games_root import games_root
from tracknet.data.index import Clip
from tracknet.data.prepare import claim_clips, of_one_process, prepare_clips
from tracknet.errors import DataError, UserError
from tracknet.schema.data import DataConfig

log = logging.getLogger("tracknet")


@dataclass
class Filling:
    """What has been done, and what there is now.

    Attributes:
        folder: of the files.
        decoded: clips and frames that were missing.
        held: clips and frames of the configuration that the cache holds.
        left_out: clips and frames of the configuration that it has no room for.
        skipped: clips that are broken (`data.on_error=skip`).
        bytes_used: of all files in the folder.
        bytes_allowed: None for no limit.
    """

    folder: Path
    bytes_allowed: int | None
    decoded: list[int] = field(default_factory=lambda: [0, 0])
    held: list[int] = field(default_factory=lambda: [0, 0])
    left_out: list[int] = field(default_factory=lambda: [0, 0])
    skipped: int = 0
    bytes_used: int = 0


def fill_cache(data: DataConfig) -> Filling:
    """Decodes what the cache lacks of all games of the split: training's in `data.cache_form`, the others raw.

    Several processes, on several machines, may fill one cache: each takes the clips in another order.

    Raises:
        ConfigError: the data set or a game is not there.
        DataError: footage or labels are broken, or there is no clip.
        UserError: the cache's folder is none, or its disk takes no more.
    """
    sides = [data.split.train_games, data.split.val_games, data.split.test_games]
    check_game_names([game for games in sides for game in games])
    store = frame_store(data, data.preprocess.resize_wh)
    stores = [store.in_form(data.cache_form), store, store]
    filling = Filling(store.folder.path, store.folder.limit)
    clips = [_clips(data, games, filling) for games in sides]
    if not any(clips):
        raise DataError(f"data.split: there is no usable clip in {', '.join(game for games in sides for game in games)}")
    for of_side, of_form in zip(clips, stores, strict=True):
        claim_clips(of_side, of_form)
    for of_side, of_form in zip(clips, stores, strict=True):
        _fill(of_side, of_form, data.on_error, filling)
    filling.bytes_used = store.folder.used_bytes()
    if store.folder.refuses:
        count = f"{filling.left_out[0]} of {filling.left_out[0] + filling.held[0]} clips"
        raise UserError(f"data.cache_dir: {count} are not in {filling.folder}, whose disk takes no more; make room or choose another place")
    return filling


def _clips(data: DataConfig, games: Sequence[str], filling: Filling) -> Sequence[Clip]:
    if not games:
        return ()
    cache_dir = cache_root(data.cache_dir)
    root = games_root(data, games, cache_dir, 0, of_one_process)
    index, errors = read_clips(root, games, data.on_error, cache_dir)
    _skip([str(error) for error in errors], filling)
    return index.clips


def _skip(messages: Sequence[str], filling: Filling) -> None:
    for message in messages:
        log.warning("clip skipped (data.on_error=skip): %s", message)
    filling.skipped += len(messages)


def _fill(clips: Sequence[Clip], store: FrameStore, on_error: str, filling: Filling) -> None:
    if not clips:
        return
    before = {clip.id for clip in clips if _holds(store, clip)}
    order = random.SystemRandom().randrange(1, 1 << 32)
    broken = prepare_clips(clips, store, on_error, (0, 1), of_one_process, order=order)
    _skip(list(broken.values()), filling)
    for clip in clips:
        if clip.id not in broken:
            held = store.holds(clip)
            _count(clip, filling.held if held else filling.left_out)
            if held and clip.id not in before:
                _count(clip, filling.decoded)


def _holds(store: FrameStore, clip: Clip) -> bool:
    try:
        return store.holds(clip)
    except DataError:  # gone since it was listed; preparing it tells
        return False


def _count(clip: Clip, into: list[int]) -> None:
    into[0] += 1
    into[1] += clip.length
