"""Decodes a data set into the cache before training: `python -m tracknet.scripts.cache --data tennis data.root=FOLDER`.

Takes the options and settings of training. Several may fill one cache at once, on several machines of a shared disk too.
Exit codes: 0 done, 1 failure (also a full disk), 2 configuration, 130 interrupted.
"""

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from tracknet.scripts.command import Parser, print_result, run_command
from tracknet.utils.config import add_config_cli_arguments, cfg_from_arguments

if TYPE_CHECKING:
    from tracknet.data.fill import Filling


def build_parser() -> Parser:
    """All options, those of training."""
    parser = Parser(
        prog="python -m tracknet.scripts.cache",
        usage="%(prog)s [options] [key=value ...]",
        description="Decode the frames of all games of a data set into the cache, so that training starts at once. Takes the options and"
        " settings of training; data.cache_form, data.cache_limit_gb and data.cache_dir say how, how much and where.",
        allow_abbrev=False,
    )
    add_config_cli_arguments(parser)
    return parser


def fill(argv: Sequence[str]) -> None:
    """Parses and fills."""
    arguments, overrides = build_parser().parse_with_overrides(argv)
    dry_run, arguments.dry_run = arguments.dry_run, True  # no run begins, so no run's folders are made
    cfg = cfg_from_arguments(arguments, overrides)
    if dry_run:
        print_result(OmegaConf.to_yaml(cfg))
        return
    from tracknet.data.fill import fill_cache  # here, because the decoders take time that --help need not wait for
    from tracknet.utils.config.build import typed
    from tracknet.utils.logging import setup_logging

    setup_logging(True, None)
    print_result(summary(fill_cache(typed(cfg).data)))


def summary(filling: "Filling") -> str:
    """What is printed in the end."""
    limit = "" if filling.bytes_allowed is None else f" of {_gb(filling.bytes_allowed)} (data.cache_limit_gb)"
    lines = [
        f"decoded {_clips(filling.decoded)}",
        f"{filling.folder} holds {_clips(filling.held)} of this configuration; with all others {_gb(filling.bytes_used)}{limit}",
    ]
    if filling.left_out[0]:
        lines.append(f"no room for {_clips(filling.left_out)}: they are decoded whenever they are read")
    if filling.skipped:
        lines.append(f"skipped {filling.skipped} broken clips (data.on_error=skip)")
    return "".join(f"{line}\n" for line in lines)


def _clips(count: Sequence[int]) -> str:
    return f"{count[0]:,} clips ({count[1]:,} frames)"


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The program, for a caller that goes on; returns the exit code."""
    before = signal.signal(signal.SIGTERM, _stop)  # what is half written goes
    try:
        return run_command(lambda: fill(sys.argv[1:] if argv is None else argv))
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
