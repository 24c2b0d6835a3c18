"""An evaluation from a model folder to its files: predictions first, then scores from that file alone."""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tracknet.data.batch import Batch
from tracknet.data.dataset import WindowDataset
from tracknet.data.frames import FrameStore, frame_store
from tracknet.data.index import ClipIndex
from tracknet.data.prepare import on_all_ranks, prepare_clips
from tracknet.evaluation.detection import Detections, detect, join_detections
from tracknet.evaluation.diagnosis import diagnose, peak_statistics
from tracknet.evaluation.files import write_together
from tracknet.evaluation.forward import out_of_memory
from tracknet.evaluation.from_file import PREDICTIONS, SCORES, score_file
from tracknet.evaluation.predictions import predictions_csv, predictions_of
from tracknet.evaluation.split import ALONE, Share, check_usable, read_split
from tracknet.evaluation.threshold import Threshold, detection_threshold
from tracknet.metrics.protocols import PROTOCOLS
from tracknet.metrics.protocols import Protocol as Rule
from tracknet.models import TrackNetConfig
from tracknet.out_of_memory import is_out_of_memory, release_memory
from tracknet.schema.data import DataConfig, SequenceConfig


class Network(Protocol):
    """What is evaluated: a `TrackNetModel` in evaluation mode, or what `inference.network.load_network` gives.

    Attributes:
        config: says T, the input size and whether a background picture goes in.
    """

    config: TrackNetConfig

    def __call__(self, frames: Tensor, background: Tensor | None, dropout_keys: Tensor | None = None) -> Tensor:
        """Logits (B, T, h, w) of uint8 frames (B, T, 3, H, W) and background (B, 3, H, W)."""
        ...


def detect_split(network: Network, index: ClipIndex, store: FrameStore, *, share: Share = ALONE, batch_size: int = 4) -> Detections:
    """The peak of each frame of a data set, each once, in the order of its rows. All ranks: holds collectives.

    The windows are cut into batches that do not depend on the number of processes, and on a CPU each batch is the work of one thread: sums
    that several threads share come out in another last bit. So a frame has the same peak, to the bit, however many share the work.

    Args:
        network: in evaluation mode.
        index: clips whose frames the store holds.
        store: at the network's input size.
        share: this process among the others.
        batch_size: windows at once; on a CPU, in each thread.

    Raises:
        UserError: memory runs out, or the output is not finite; on all ranks.
    """
    config = network.config
    sequence = SequenceConfig(enabled=True, length=config.frames, stride=1)
    dataset = WindowDataset(index, store, sequence, background=config.background, seed=0, training=None)
    batches = [range(first, min(first + batch_size, len(dataset))) for first in range(0, len(dataset), batch_size)]
    mine = batches[share.rank :: share.size]
    shows = share.rank == 0 and sys.stderr.isatty()
    device = torch.device(getattr(network, "device", "cpu"))  # what has none runs in host memory

    def run() -> list[Detections]:
        with tqdm(total=len(mine), desc="evaluating", unit="batch", disable=not shows) as bar:
            return _detect_all(network, dataset, mine, device, bar.update)

    found = join_detections(share.gather(on_all_ranks(run, share.gather)))
    order = np.argsort(found.row, kind="stable")
    return Detections(found.row[order], found.xy_px[order], found.score[order])


def _detect_all(
    network: Network, dataset: WindowDataset, batches: Sequence[range], device: torch.device, done: Callable[[int], Any]
) -> list[Detections]:
    """One after the other, on a CPU as many at once as there are threads, each in one of them; `done` takes how many more are."""
    threads = torch.get_num_threads()
    at_once = threads if device.type == "cpu" else 1
    found: list[Detections] = []
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,)) as pool:
            for first in range(0, len(batches), at_once):
                # loaded here: the store's memory maps are not for several threads
                group = [dataset.batch([(0, window) for window in windows]) for windows in batches[first : first + at_once]]
                found += pool.map(lambda batch: _detect(network, batch, dataset.index, device), group)
                done(len(group))
    finally:
        torch.set_num_threads(threads)  # what the pool sets holds for threads that are yet to come too
    return found


def _detect(network: Any, batch: Batch, index: ClipIndex, device: torch.device) -> Detections:
    try:
        return detect(network, batch, index, device, contextlib.nullcontext)[0]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory(device)  # not in the `except` block: the traceback keeps the tensors alive
    raise out_of_memory(len(batch), device.type)


def evaluate_folder(
    checkpoint: Path,
    network: Network,
    data: DataConfig,
    games: Sequence[str],
    output: Path,
    *,
    protocols: Sequence[Rule] = PROTOCOLS,
    threshold: float | None = None,
    seed: int = 0,
    batch_size: int = 4,
    share: Share = ALONE,
    description: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluates a model on games: writes predictions.csv, predictions.json and scores.json. All ranks: holds collectives; rank 0 writes.

    Args:
        checkpoint: the model's folder, for the record.
        network: the model of that folder.
        data: where the games are; the model's own configuration decides all else.
        games: to score.
        output: folder for the files.
        protocols: the rules.
        threshold: in place of the one that was chosen for the model.
        seed: of the bootstrap.
        batch_size: windows at once; on a CPU, in each thread.
        share: this process among the others.
        description: what the files shall say besides, for JSON.
        say: takes a line about what happens.

    Returns:
        What scores.json holds, on every rank.

    Raises:
        UserError: a mistake outside the program; on all ranks.
    """
    limit = detection_threshold(network.config, threshold)
    index, lines = read_split(data, games, share)
    width, height = network.config.input_size
    store = frame_store(data, (width, height))
    broken = prepare_clips(index.clips, store, data.on_error, (share.local_rank, share.local_size), share.gather)
    lines += [f"clip skipped (data.on_error=skip): {message}" for message in broken.values()]
    index = index.without(broken)
    check_usable(index, games)
    for line in lines:
        say(line)
    detections = detect_split(network, index, store, share=share, batch_size=batch_size)
    notes = [*lines, *notes_on(network.config, limit, index.games)]
    diagnosis = diagnose(peak_statistics(index, detections, limit.value))
    record = {
        "model": {"folder": str(checkpoint), "config": json.loads(network.config.to_json_string())},
        "threshold": {"value": limit.value, "origin": limit.origin},
        "games": list(index.games),
        **(description or {}),
    }

    def write() -> list[dict[str, Any]]:
        if share.rank != 0:
            return []
        path = output / PREDICTIONS
        predictions = predictions_csv(predictions_of(index, detections, limit.value))
        write_together({path: predictions, path.with_suffix(".json"): json.dumps(record, indent=2) + "\n"}, outdated=[output / SCORES])
        return [score_file(path, index, protocols, seed, output, record=record, notes=notes, diagnosis=diagnosis)]

    scores: dict[str, Any] = share.gather(on_all_ranks(write, share.gather))[0]
    return scores


def notes_on(config: TrackNetConfig, threshold: Threshold, games: Sequence[str]) -> list[str]:
    """What a reader of the scores must know about threshold and games, one line each."""
    notes = [f"threshold {threshold.value:g}: {threshold.origin}"]
    if shared := sorted(set(threshold.chosen_on) & set(games)):
        notes.append(f"the threshold was chosen on {', '.join(shared)}, which are scored here: the scores are a little too good")
    trained_on = config.trained_on or {}
    for key, what in (("train_games", "the model was trained on"), ("val_games", "the checkpoint may have been selected on")):
        if shared := sorted(set(trained_on.get(key) or ()) & set(games)):
            notes.append(f"{what} {', '.join(shared)}, scored here: the scores do not say how well it does on other games")
    return notes
