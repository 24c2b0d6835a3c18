"""From a run folder to its page: the history, the evaluation (made now where there is none), and the worst frames."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracknet.data.frames import frame_store
from tracknet.data.index import ClipIndex
from tracknet.data.prepare import of_one_process, prepare_clips
from tracknet.errors import ConfigError, DataError, UserError
from tracknet.evaluation.detection import Detections
from tracknet.evaluation.from_file import PREDICTIONS, SCORES
from tracknet.evaluation.predictions import Predictions, fit_to_labels, read_predictions
from tracknet.evaluation.run import evaluate_folder
from tracknet.evaluation.split import read_split
from tracknet.inference.network import load_network
from tracknet.report.gallery import OUTCOMES, draw_mistake, judge, map_errors, worst
from tracknet.report.history import RunHistory, read_history
from tracknet.report.page import Evaluation, Gallery, render_page
from tracknet.schema.data import DataConfig
from tracknet.schema.root import Config
from tracknet.utils.config import saved_cfg, typed
from tracknet.utils.config.files import read_yaml
from tracknet.utils.run_directory import RunDirectory, write_atomically

FRAMES_PER_KIND = 8
GAMES_MAPPED = 12


@dataclass(frozen=True)
class Source:
    """Where the pictures of an evaluation come from.

    Attributes:
        data: the section `data`.
        games: that were scored.
        input_wh: size of the stored frames.
    """

    data: DataConfig
    games: list[str]
    input_wh: tuple[int, int] | None


def write_report(run_folder: Path, evaluation: Path | None, output: Path, say: Callable[[str], None]) -> None:
    """Writes the page of a run.

    Args:
        run_folder: `outputs/logs/run-...`.
        evaluation: folder with predictions.csv and scores.json; None takes `evaluation` in the run folder, and makes that of the best
            checkpoint on the validation games where it is not there.
        output: the HTML file.
        say: takes a line about what happens.

    Raises:
        UserError: no run, an evaluation that was asked for and is not there, or a page that cannot be written.
    """
    run_folder = run_folder.absolute()  # a run has a name, which "." has not
    history = read_history(run_folder)
    config = typed(saved_cfg(RunDirectory(run_folder).config_file, dry_run=True))
    folder, notes = evaluation or run_folder / "evaluation", []
    if evaluation is None and not (folder / SCORES).is_file():
        try:
            _evaluate(run_folder, config, folder, say)
        except (ConfigError, DataError) as error:  # data or checkpoint are gone; the curves are worth a page all the same
            notes.append(f"There are no scores and no pictures: {' '.join(str(error).split())}")
    shown = None
    if not notes:
        shown, notes = _read_evaluation(folder, config)
    for note in notes:
        say(note)
    write_atomically(output, _rendered(history, shown, notes, folder).encode(), "make room or choose another place with --output")


def _rendered(history: RunHistory, evaluation: Evaluation | None, notes: list[str], folder: Path) -> str:
    try:
        return render_page(history, evaluation, notes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if evaluation is None:
            raise
        raise _not_ours(folder / SCORES) from error


def _not_ours(path: Path) -> UserError:
    return UserError(f"{path}: is not what this version of tracknet.scripts.evaluate writes; evaluate once more")


def _evaluate(run_folder: Path, config: Config, folder: Path, say: Callable[[str], None]) -> None:
    """The best checkpoint on the validation games."""
    checkpoint = _best_checkpoint(run_folder)
    say(f"no evaluation in {folder}; making that of {checkpoint} on {', '.join(config.data.split.val_games)}")
    evaluate_folder(checkpoint, load_network(checkpoint), config.data, config.data.split.val_games, folder, say=say)


def _best_checkpoint(run_folder: Path) -> Path:
    """As the run's own config.yaml places it; where that folder has moved, beside the logs, as runs have it by default."""
    runtime: Any = read_yaml(RunDirectory(run_folder).config_file).tree.get("runtime")
    saved = Path(str(runtime["ckpt_dir"])) if isinstance(runtime, dict) and "ckpt_dir" in runtime else None
    places = [root / run_folder.name / "best" for root in (saved, run_folder.absolute().parent.parent / "checkpoints") if root]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(f"the run has no best checkpoint in {places[0].parent}; it has not been evaluated yet, or the folder has moved")


def _read_evaluation(folder: Path, config: Config) -> tuple[Evaluation, list[str]]:
    """The scores, and the pictures where their data is there; what is missing, in words."""
    scores = _read_scores(folder / SCORES)
    own = {*config.data.split.val_games, *config.data.split.train_games, *config.data.split.test_games}
    games = [str(game) for game in scores["games"]]
    about = _about(scores)
    if not own.issuperset(games):
        others = ", ".join(sorted(set(games) - own))
        return Evaluation(scores, [], [], about), [f"There are no pictures: {others} is none of the run's games."]
    source = Source(config.data, games, config.data.preprocess.resize_wh)
    try:
        galleries, maps = _pictures(folder / PREDICTIONS, source)
    except (ConfigError, DataError) as error:
        return Evaluation(scores, [], [], about), [f"There are no pictures: {' '.join(str(error).split())}"]
    return Evaluation(scores, galleries, maps, about), []


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a folder that tracknet.scripts.evaluate has written") from error
    except (ValueError, RecursionError) as error:
        raise _not_ours(path) from error
    kinds = {"protocols": dict, "games": list, "notes": list, "frames": int, "clips": int}
    if not isinstance(scores, dict) or not all(isinstance(scores.get(name), kind) for name, kind in kinds.items()):
        raise _not_ours(path)
    return scores


def _about(scores: dict[str, Any]) -> str:
    sentences = [f"{scores['frames']:,} frames with a label in {scores['clips']} clips of {', '.join(scores['games'])}."]
    sentences += [f"{note[0].upper()}{note[1:]}." for note in scores["notes"]]
    if scores.get("diagnosis"):
        sentences.insert(0, f"Warning: {scores['diagnosis']}")
    return " ".join(sentences)


def _pictures(path: Path, source: Source) -> tuple[list[Gallery], list[Any]]:
    index, _ = read_split(source.data, source.games)
    predictions, _ = fit_to_labels(read_predictions(path), index, path)
    store = frame_store(source.data, source.input_wh)
    index = index.without(prepare_clips(index.clips, store, source.data.on_error, (0, 1), of_one_process))
    detections, visible = _of_index(predictions, index)
    verdicts = judge(index, detections, visible)
    galleries = []
    for kind in ("FP1", "FP2", "FN"):
        mistakes = [draw_mistake(index, verdicts, int(place), store) for place in worst(index, verdicts, kind, FRAMES_PER_KIND)]
        galleries.append(Gallery(kind, int((verdicts.outcome == OUTCOMES.index(kind)).sum()), mistakes))
    return galleries, [map_errors(index, verdicts, store, game) for game in index.games[:GAMES_MAPPED]]


def _of_index(predictions: Predictions, index: ClipIndex) -> tuple[Detections, Any]:
    """The answers in the order of the index's rows, and whether each claims a ball."""
    clips = [predictions.clips[clip.id] for clip in index.clips]
    row = np.arange(len(index), dtype=np.int64)
    score = np.concatenate([clip.score for clip in clips])
    return Detections(row, np.concatenate([clip.xy_px for clip in clips]), score), np.concatenate([clip.visible for clip in clips])
