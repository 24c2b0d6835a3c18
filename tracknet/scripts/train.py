"""Trains a model: `python -m tracknet.scripts.train --data demo --model demo --training demo`.

Arguments that no option takes are overrides: `training.optimizer.lr=1e-4`. `--dry-run` prints the resolved configuration.
Exit codes: 0 done, 1 failure, 2 configuration, 75 stopped by a signal and saved, 130 interrupted.
"""

import argparse
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from omegaconf import OmegaConf

from tracknet.errors import UserError
from tracknet.scripts.command import Parser, print_result
from tracknet.training.exit_record import clear_exit_record, write_exit_record
from tracknet.training.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, StoppedBeforeTrainingError, stop_with_launcher, stopping_at_once
from tracknet.utils.config import add_config_cli_arguments, cfg_from_arguments

SAVED = {  # the log has said so already; launch.sh says it again below what accelerate prints
    EXIT_PREEMPTED: "stopped by a signal and saved; --resume auto continues it",
    EXIT_INTERRUPTED: "interrupted and saved; --resume auto continues it",
}
SPEAKER_SECONDS = 5.0  # within which the launcher ends the others after the speaker has left
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass
class Ending:
    """How the process ends.

    Attributes:
        code: the exit code.
        message: one line for stderr.
        speaks: whether it says the line for all processes of its machine.
    """

    code: int = 0
    message: str = ""
    speaks: bool = False

    @property
    def by_signal(self) -> bool:
        """Whether a signal has ended it."""
        return self.code in SAVED


def build_parser() -> Parser:
    """All options of training."""
    parser = Parser(
        prog="python -m tracknet.scripts.train",
        usage="%(prog)s [options] [key=value ...]",
        description="Train a ball tracker. key=value changes one setting, such as training.optimizer.lr=1e-4.",
        allow_abbrev=False,
    )
    add_config_cli_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="continue the newest run of the same names and seed under the output folder, or the run folder or checkpoint PATH",
    )
    return parser


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options and the overrides.

    Raises:
        ConfigError: an unknown option or a wrong value of one.
    """
    return build_parser().parse_with_overrides(_with_bare_resume(argv))


def _with_bare_resume(argv: Sequence[str]) -> list[str]:
    """Spells out `--resume auto` before an override, which argparse would take for the PATH; a path that exists is one."""
    spelled: list[str] = []
    for text in argv:
        if spelled and spelled[-1] == "--resume" and OVERRIDE.match(text) and not os.path.exists(text):
            spelled.append("auto")
        spelled.append(text)
    return spelled


def speaks_for_machine() -> bool:
    """Whether this is the first process of its machine; the launchers set LOCAL_RANK."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def report(ending: Ending) -> None:
    """Says how the process ends, in one line on stderr and in launch.sh's record.

    A mistake meets all ranks alike, and one process of each machine speaks for them. Where another one alone has failed, the speaker is
    still at work: then nobody has ended this process while it waited, and it speaks for itself. After a signal nobody waits.
    """
    speaks = ending.speaks or speaks_for_machine()
    if ending.message and not speaks and not ending.by_signal:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # after training it is ignored; here it is what is waited for
        time.sleep(SPEAKER_SECONDS)
        speaks = True
    if ending.message and speaks:
        sys.stderr.write(f"{ending.message}\n")
    write_exit_record(ending.code, ending.message or SAVED.get(ending.code, ""), os.environ)


def run(argv: Sequence[str]) -> Ending:
    """Parses, then prints or trains; every mistake of the user ends in one line on stderr."""
    # Read when torch is first imported. A thread that spins while it waits for another takes the core that the other needs: on two
    # cores with one more busy process, spinning threads trained at 9 samples/s, sleeping ones at 66; undisturbed, at 120 and 105.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if speaks_for_machine():
        clear_exit_record(os.environ)
    else:
        logging.getLogger("tracknet").setLevel(logging.ERROR)
    ending = Ending()
    try:
        arguments, overrides = parse_arguments(argv)
        cfg = cfg_from_arguments(arguments, overrides)
        if arguments.dry_run:
            if os.environ.get("RANK", "0") == "0":
                print_result(OmegaConf.to_yaml(cfg))
            return ending
        from tracknet.training.run import train  # here, because torch and its company take seconds that --help need not wait for

        ending.code = train(cfg, arguments.resume)
    except UserError as error:
        # where the first process of the machine is the one that has gone, another one speaks
        ending = Ending(error.exit_code, " ".join(str(error).split()), speaks=getattr(error, "speaks_for_machine", False))
    except StoppedBeforeTrainingError:
        message = "stopped by a signal before the first step; start it again, with --resume auto where a run is to go on"
        ending = Ending(EXIT_PREEMPTED, message)
    except KeyboardInterrupt:
        ending = Ending(EXIT_INTERRUPTED, "interrupted")
    if ending.code:
        report(ending)
    return ending


def leave(ending: Ending) -> NoReturn:
    """Ends the process with its code, which no signal changes any more; after a signal without delay, for the time to leave is short.

    The interpreter would take a second or two to take itself apart, wait for a thread in the middle of its work where nothing is to be
    saved any more, and abort over the threads of a process group that has not been left.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ending.by_signal:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain that workers end
        for child in multiprocessing.active_children():
            child.kill()  # one that hangs in its start obeys nothing else
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code)
    sys.exit(ending.code)


def main(argv: Sequence[str] | None = None) -> int:
    """The program, for a caller that goes on; returns the exit code."""
    with stopping_at_once():
        return run(sys.argv[1:] if argv is None else argv).code


if __name__ == "__main__":
    with stopping_at_once():
        stop_with_launcher()
        ENDING = run(sys.argv[1:])
    leave(ENDING)
