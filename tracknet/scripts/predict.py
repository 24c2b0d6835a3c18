"""Finds the ball in videos: `python -m tracknet.scripts.predict --checkpoint DIR rally.mp4 --overlay`.

Writes `<name>.csv`, one row per decoded frame, `<name>.json` and, with `--overlay`, `<name>.overlay.mp4`.
Exit codes: 0 done, 1 failure (also of one of several videos), 2 options or checkpoint, 75 stopped by SIGTERM, 130 interrupted.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tracknet.errors import DataError, UserError, shown
from tracknet.scripts.command import EXIT_INTERRUPTED, Parser, fraction, positive, print_result, run_command, say

EXIT_STOPPED = os.EX_TEMPFAIL  # 75, as in training: start it again with --resume and it goes on


class _StoppedError(BaseException):
    """SIGTERM. Not an `Exception`: no handler of errors may take it for one."""


def build_parser() -> Parser:
    """All options of prediction."""
    parser = Parser(prog="python -m tracknet.scripts.predict", description="Find the ball in every frame of videos.", allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="VIDEO", help="a video file or a folder of pictures")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="folder of a checkpoint or of an exported model")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/predictions"), metavar="DIR", help="where files go (default: %(default)s)"
    )
    parser.add_argument("--overlay", action="store_true", help="also write <name>.overlay.mp4, the video with the ball and its trail")
    parser.add_argument(
        "--resume", action="store_true", help="go on where an earlier run was stopped; finished videos are left as they are"
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        metavar="T",
        help="a peak at or above it is a ball (default: the model's own); with the trajectory, peaks from 0.7 on may count too where they "
        "lie on the ball's path",
    )
    parser.add_argument("--no-trajectory", action="store_true", help="leave detections as they are: drop no jumps, fill no gaps")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the accelerator where there is one)")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="windows at once (default: %(default)s)")
    return parser


def predict_all(arguments: argparse.Namespace) -> int:
    """Predicts one source after another; one that fails costs its own files only. Returns the exit code."""
    from tracknet.inference.outputs import name_outputs  # here, because torch takes seconds that --help need not wait for
    from tracknet.inference.prediction import Request, predict
    from tracknet.inference.summary import model_about
    from tracknet.inference.tracker import BallTracker

    sources = list({os.path.abspath(text) if text else text: text for text in reversed(arguments.sources)}.values())[::-1]
    outputs = name_outputs([Path(text) for text in sources], arguments.output)
    tracker = BallTracker.from_pretrained(
        arguments.checkpoint,
        device=arguments.device,
        threshold=arguments.threshold,
        trajectory=not arguments.no_trajectory,
        batch_windows=arguments.batch_size,
    )
    if tracker.network.config.detection is None and arguments.threshold is None:
        say(f"{arguments.checkpoint}: no detection threshold was chosen for this model; {tracker.threshold} is taken (--threshold T)")
    request = Request(tracker, model_about(arguments.checkpoint), arguments.resume, arguments.overlay)
    codes = []
    for source, files in zip(sources, outputs, strict=True):
        try:
            print_result(f"{predict(_path(source), files, request, say)}\n")
        except UserError as error:
            say(" ".join(str(error).split()))
            codes.append(error.exit_code)
    if codes and len(sources) > 1:
        say(f"{len(codes)} of {len(sources)} failed; --resume leaves the others as they are")
        return 1
    return codes[0] if codes else 0


def _path(text: str) -> Path:
    """Raises DataError where it can be no path."""
    if not text:
        raise DataError("a VIDEO is empty text; give a video file or a folder of pictures")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise DataError(f"{shown(text)}: is an address; download the video and give the file")
    return Path(text)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _StoppedError


def _run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return predict_all(arguments)
    except _StoppedError:
        say("stopped by a signal; --resume goes on with what is done")
        return EXIT_STOPPED
    except KeyboardInterrupt:
        say("interrupted; --resume goes on with what is done")
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """The program, for a caller that goes on; returns the exit code."""
    return run_command(lambda: _run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
