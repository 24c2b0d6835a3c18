"""Scores a model, or any program's predictions: `python -m tracknet.scripts.evaluate --checkpoint FOLDER --data tennis`.

Two stages: the model's answers go into predictions.csv, and the scores come from that file and the labels alone. With `--predictions FILE`
only the second is done. Several processes share the windows, as in training: `accelerate launch --multi_gpu --num_processes 2 -m ...`.
Arguments that no option takes are overrides: `data.root=FOLDER`. Exit codes: 0 done, 1 failure, 2 configuration, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracknet.errors import ConfigError, shown
from tracknet.schema.data import DataConfig
from tracknet.schema.training import TrainingConfig
from tracknet.scripts.command import Parser, fraction, positive, print_result, run_command, say
from tracknet.utils.config.build import DEFAULT_NAMES
from tracknet.utils.config.scored import scored_data

if TYPE_CHECKING:
    from tracknet.training.ranks import Ranks

MODULE = "tracknet.scripts.evaluate"
DEFAULT_OUTPUT = Path("outputs") / "evaluation"
DIGITS = 18


def build_parser() -> Parser:
    """All options."""
    parser = Parser(
        prog="python -m tracknet.scripts.evaluate",
        usage="%(prog)s (--checkpoint FOLDER | --predictions FILE) [options] [key=value ...]",
        description="Score a model, or a file of predictions, under the field's protocols. key=value changes the data's place, such as"
        " data.root=FOLDER or 'data.split.val_games=[game8]'.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=_path, metavar="FOLDER", help="the model: a checkpoint, or what the export wrote")
    parser.add_argument("--predictions", type=_path, metavar="FILE", help="a CSV game,clip,frame,visible,x,y,score; no model is needed")
    parser.add_argument("--data", default=DEFAULT_NAMES["data"], metavar="NAME", help="YAML of configs/data (default: %(default)s)")
    parser.add_argument("--split", default="val", choices=("val", "train", "test"), help="which games (default: %(default)s)")
    parser.add_argument("--protocol", nargs="+", action="extend", metavar="NAME", help="which rules (default: all)")
    parser.add_argument(
        "--output", type=_path, metavar="FOLDER", help="where the files go (default: a folder of its own in outputs/evaluation)"
    )
    parser.add_argument("--threshold", type=fraction, metavar="T", help="in place of the one chosen for the model")
    parser.add_argument(
        "--batch-size", type=positive, default=4, metavar="N", help="windows at once, on a CPU in each thread (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the intervals (default: %(default)s)")
    return parser


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a path")
    return Path(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS):
        raise argparse.ArgumentTypeError(f"{shown(text)!r} must be a whole number from 0 on, of at most {DIGITS} digits")
    return int(text)


def evaluate(argv: Sequence[str]) -> int:
    """Parses and evaluates."""
    arguments, overrides = build_parser().parse_with_overrides(_with_protocols(argv))
    if (arguments.checkpoint is None) == (arguments.predictions is None):
        raise ConfigError("give either --checkpoint FOLDER or --predictions FILE" + (", not both" if arguments.checkpoint else ""))
    if arguments.predictions is not None and arguments.threshold is not None:
        raise ConfigError("--threshold and --predictions exclude each other: the file says which balls are claimed (visible)")
    # here, because even NumPy and OpenCV take time that --help need not wait for
    from tracknet.metrics.protocols import PROTOCOLS, protocol

    protocols = [protocol(name) for name in dict.fromkeys(arguments.protocol)] if arguments.protocol else list(PROTOCOLS)
    data = scored_data(arguments.data, overrides)
    games = getattr(data.split, f"{arguments.split}_games")
    if not games:
        raise ConfigError(f"data.split.{arguments.split}_games is empty; name the games to score, or choose another --split")
    if arguments.predictions is not None:
        return _score_file(arguments, data, games, protocols)
    return _evaluate_model(arguments, data, games, protocols)


def _with_protocols(argv: Sequence[str]) -> list[str]:
    """Takes overrides out from behind `--protocol`, for argparse would take them for names of protocols."""
    overrides: list[str] = []
    others: list[str] = []
    among_names = False
    for text in argv:
        if text.startswith("-"):
            among_names = text == "--protocol"
        (overrides if among_names and "=" in text and not text.startswith("-") else others).append(text)
    return [*overrides, *others]


def _default_output(subject: Path, arguments: argparse.Namespace) -> Path:
    """A folder named by the last two parts of the path of what is evaluated, and by the data."""
    return DEFAULT_OUTPUT / "-".join(subject.absolute().parts[-2:]) / f"{arguments.data}-{arguments.split}"


def _score_file(arguments: argparse.Namespace, data: DataConfig, games: list[str], protocols: list[Any]) -> int:
    if os.environ.get("RANK", "0") != "0":
        return 0  # there is nothing to share
    from tracknet.evaluation.from_file import score_file
    from tracknet.evaluation.split import read_split

    path: Path = arguments.predictions
    index, lines = read_split(data, games)
    output = arguments.output or _default_output(path.with_suffix(""), arguments)
    record = {"data": arguments.data, "split": arguments.split, "games": list(index.games)}
    scores = score_file(path, index, protocols, arguments.seed, output, record=record, notes=lines)
    _print(f"{path} on {arguments.data} {arguments.split}", scores, output)
    return 0


def _evaluate_model(arguments: argparse.Namespace, data: DataConfig, games: list[str], protocols: list[Any]) -> int:
    """On every rank."""
    from tracknet.evaluation.run import evaluate_folder
    from tracknet.evaluation.split import Share
    from tracknet.inference.network import load_network, model_hash, runs_in_onnx
    from tracknet.models.folder import read_model_config
    from tracknet.training.launch import world_from_environment

    folder: Path = arguments.checkpoint
    read_model_config(folder)  # before the processes meet
    output = arguments.output or _default_output(folder, arguments)
    with _ranks() as ranks:
        _, _, local_rank, local_size = world_from_environment(os.environ)
        network = ranks.together(lambda: load_network(folder, "cpu" if runs_in_onnx(folder) else str(ranks.device)))
        scores = evaluate_folder(
            folder,
            network,
            data,
            games,
            output,
            protocols=protocols,
            threshold=arguments.threshold,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            share=Share(ranks.rank, ranks.size, local_rank, local_size, ranks.gather),
            description={"data": arguments.data, "split": arguments.split, "model_sha256": model_hash(folder)},
            say=say if ranks.is_main else lambda line: None,
        )
        ranks.on_main(lambda: _print(f"{folder} on {arguments.data} {arguments.split}", scores, output))
    return 0


@contextmanager
def _ranks() -> "Iterator[Ranks]":
    """The processes that evaluate together, met and parted as in training."""
    from tracknet.training.accelerator import start_accelerator
    from tracknet.training.farewell import leaving_with_a_word
    from tracknet.training.launch import sharding_requested
    from tracknet.training.ranks import Ranks
    from tracknet.utils.logging import setup_logging

    if sharding_requested(os.environ):
        raise ConfigError("an evaluation does not shard the model; take --use_fsdp (ACCELERATE_USE_FSDP) out and use --multi_gpu")
    accelerator, _ = start_accelerator(TrainingConfig(precision="fp32", amp=False), MODULE)
    ranks = Ranks(accelerator)
    setup_logging(ranks.is_main, None)
    try:
        with leaving_with_a_word():
            yield ranks
    finally:
        accelerator.end_training()  # gloo's threads must not outlive the interpreter: they would abort, and the exit code be lost


def _print(subject: str, scores: dict[str, Any], output: Path) -> None:
    """The table, then what belongs beside it."""
    from tracknet.evaluation.table import scores_table

    frames = f"{scores['frames']} frames with a label in {scores['clips']} clips of {', '.join(scores['games'])}"
    remarks = [f"note: {line}" for line in scores["notes"]]
    if scores["diagnosis"] is not None:
        remarks.append(f"WARNING: {scores['diagnosis']}")
    print_result("\n".join([subject, frames, "", scores_table(scores), *remarks, f"written to {output}", ""]))


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    return run_command(lambda: evaluate(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
