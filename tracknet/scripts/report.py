"""Makes one page of a run: `python -m tracknet.scripts.report outputs/logs/run-...`.

The page holds its pictures and needs no server. Exit codes: 0 done, 1 failure, 2 configuration, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tracknet.scripts.command import Parser, print_result, run_command, say


def build_parser() -> Parser:
    """All options."""
    parser = Parser(
        prog="python -m tracknet.scripts.report",
        description="Write one self-contained HTML page about a run: its curves, its scores by game and protocol, and its worst frames.",
        allow_abbrev=False,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN_DIR", help="the run's log folder, outputs/logs/run-...")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FOLDER",
        help="what tracknet.scripts.evaluate has written (default: RUN_DIR/evaluation; made of the best checkpoint where it is not there)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: RUN_DIR/report.html)")
    return parser


def report(argv: Sequence[str]) -> None:
    """Parses and writes the page."""
    arguments = build_parser().parse_args(argv)
    from tracknet.report.build import write_report  # here, because torch and matplotlib take time that --help need not wait for

    output: Path = arguments.output or arguments.run_folder / "report.html"
    write_report(arguments.run_folder, arguments.evaluation, output, say)
    print_result(f"{output}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    return run_command(lambda: report(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
