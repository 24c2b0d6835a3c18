"""What the scripts share: options whose mistakes are one line, exit codes, and output that a full disk or an early reader does not break.

Exit codes: 0 done, 1 failure, 2 configuration, 130 interrupted.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tracknet.errors import ConfigError, UserError, shown

EXIT_INTERRUPTED = 130
_OVERRIDE = re.compile(r"-*[A-Za-z_]\w*(\.\w+)+=")


def fraction(text: str) -> float:
    """An option's value above 0 and below 1. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a number above 0 and below 1")
    return value


def positive(text: str) -> int:
    """An option's value of at least 1. Raises ArgumentTypeError."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a whole number, 1 or more")
    return value


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a `ConfigError` in place of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raises `ConfigError`."""
        raise ConfigError(message)

    def parse_with_overrides(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the texts that no option takes: `key=value`, each still to be checked.

        Raises:
            ConfigError: an unknown option, with the one that is nearest, or a wrong value of one.
        """
        arguments, overrides = self.parse_known_args(argv)
        known = re.findall(r"--[a-z-]+", self.format_help())
        for text in overrides:
            if not text.startswith("-"):
                continue
            if _OVERRIDE.match(text):
                raise ConfigError(f"unknown option {text.split('=')[0]}; settings are written without dashes: {text.lstrip('-')}")
            name = text.split("=")[0]
            raise ConfigError(f"unknown option {name}; did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]}?")
        return arguments, overrides


def run_command(action: Callable[[], int | None]) -> int:
    """Runs a script's work; a mistake of the user ends in one line on stderr, anything else keeps its traceback.

    Of several processes that meet the same mistake, the first of each machine says it (the launchers set LOCAL_RANK).

    Args:
        action: the work, options included; what it returns is the exit code, None is 0.

    Returns:
        The exit code.
    """
    # Read when torch is first imported: threads that spin while they wait take the cores that others need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _fill_closed_streams()
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return action() or 0
    except UserError as error:
        if speaks or getattr(error, "speaks_for_machine", False):
            say(" ".join(str(error).split()))
        return error.exit_code
    except KeyboardInterrupt:
        if speaks:
            say("interrupted")
        return EXIT_INTERRUPTED


def _fill_closed_streams() -> None:
    """Lets no file be opened under the number of a closed stream (`2>&-`), for C libraries would write their warnings into it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def say(line: str) -> None:
    """Writes a line to stderr; where that was closed, nobody listens."""
    if sys.stderr is None:
        return
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def print_result(text: str) -> None:
    """Writes text to stdout; a reader that leaves early (`| head`) is no error, nor that nobody listens (`>&-`).

    Raises:
        UserError: stdout cannot be written, such as a file on a full disk.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # what is still in the buffer is written once more when the process ends; that must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"the result cannot be written to stdout: {error.strerror}") from None
