"""The two data sets of a run: found, checked and decoded."""

import logging
from dataclasses import dataclass

from tracknet.data.augment import training_transform
from tracknet.data.dataset import WindowDataset
from tracknet.data.formats import check_game_names, check_sides, read_clips
from tracknet.data.frames import cache_root, frame_store
from tracknet.data.games_root import games_root
from tracknet.data.index import Clip, ClipIndex
from tracknet.data.prepare import Gather, claim_clips, of_one_process, on_all_ranks, prepare_clips
from tracknet.errors import ConfigError, DataError
from tracknet.schema.data import DataConfig

log = logging.getLogger("tracknet")


@dataclass(frozen=True)
class Datasets:
    """Both sides of the split."""

    train: WindowDataset
    val: WindowDataset
    input_wh: tuple[int, int]  # size of a whole picture for the network
    dropped: list[str]  # errors of the clips that `data.on_error=skip` left out


def build_datasets(config: DataConfig, seed: int, *, share: tuple[int, int] = (0, 1), gather: Gather = of_one_process) -> Datasets:
    """Finds, checks and decodes the clips of both sides. All ranks: holds collectives; all end with the same clips or the same error.

    Args:
        config: the section `data`, which `check_config` has passed.
        seed: of the augmentation.
        share: this process's number on its machine, and how many there are: the clips are decoded by turns.
        gather: joins the lists of all ranks, in the order of the ranks; it is a barrier too.

    Raises:
        ConfigError: a key of `data` cannot be honoured with these clips.
        DataError: footage or labels are broken, or one side of the split is empty.
        UserError: the cache's folder is none.
    """
    check_game_names([*config.split.train_games, *config.split.val_games])
    cache_dir = on_all_ranks(lambda: cache_root(config.cache_dir), gather)
    root = games_root(config, [*config.split.train_games, *config.split.val_games], cache_dir, share[0], gather)
    train, train_errors = on_all_ranks(lambda: read_clips(root, config.split.train_games, config.on_error, cache_dir), gather)
    val, val_errors = on_all_ranks(lambda: read_clips(root, config.split.val_games, config.on_error, cache_dir), gather)
    on_all_ranks(lambda: check_sides(train, val), gather)
    if config.on_error == "stop":  # no clip will be left out, so what they cannot agree on shows before hours of decoding
        on_all_ranks(lambda: _input_size(config, train, val), gather)
    val_store = frame_store(config, config.preprocess.resize_wh)
    train_store = val_store.in_form(config.cache_form)  # for training alone: what scores a model shall be what it meets in a video
    claim_clips(train.clips, train_store)
    claim_clips(val.clips, val_store)
    broken = prepare_clips(train.clips, train_store, config.on_error, share, gather)
    broken |= prepare_clips(val.clips, val_store, config.on_error, share, gather)
    train, val = train.without(broken), val.without(broken)
    dropped = [str(error) for error in [*train_errors, *val_errors]] + list(broken.values())
    _warn_of(dropped, len(train.clips) + len(val.clips))
    input_wh = on_all_ranks(lambda: _input_size(config, train, val), gather)
    background = config.background == "median"
    transform = training_transform(config)
    datasets = Datasets(
        WindowDataset(train, train_store, config.sequence, background=background, seed=seed, training=transform),
        WindowDataset(val, val_store, config.sequence, background=background, seed=seed, training=None),
        input_wh,
        dropped,
    )
    _tell_of_short_clips([*train.clips, *val.clips], datasets.train.window_frames)
    return datasets


def _warn_of(dropped: list[str], kept: int) -> None:
    for message in dropped:
        log.warning("clip skipped (data.on_error=skip): %s", message)
    if dropped:
        log.warning("%d of %d clips skipped (data.on_error=skip)", len(dropped), len(dropped) + kept)


def _tell_of_short_clips(clips: list[Clip], length: int) -> None:
    short = sum(clip.length < length for clip in clips)
    if short:
        log.info("%d of %d clips have fewer than data.sequence.length=%d frames; their last is repeated", short, len(clips), length)


def _input_size(config: DataConfig, train: ClipIndex, val: ClipIndex) -> tuple[int, int]:
    """Width and height of a whole picture for the network, once both sides have clips and fit it."""
    for key, index, games in (("train_games", train, config.split.train_games), ("val_games", val, config.split.val_games)):
        if not index.clips:
            raise DataError(f"data.split.{key}: no usable clip is left in {', '.join(games)}; all were skipped (data.on_error=skip)")
    clips = [*train.clips, *val.clips]
    resize_wh = config.preprocess.resize_wh
    if resize_wh is None:
        other = next((clip for clip in clips if clip.size_wh != clips[0].size_wh), None)
        if other is not None:
            sizes = " and ".join(f"{clip.id} {clip.size_wh[0]}x{clip.size_wh[1]}" for clip in (clips[0], other))
            raise ConfigError(f"data.preprocess.resize: null needs clips of one size, but there are {sizes}; set it to [width, height]")
        return clips[0].size_wh
    return resize_wh
