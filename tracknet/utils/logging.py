"""Where text goes: everything to stderr (stdout belongs to `--dry-run`), and from the main rank to `train.log` as well."""

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from tqdm import tqdm

from tracknet.errors import UserError

LOGGER_NAME = "tracknet"
FILE_ONLY = "file_only"  # logger.info(text, extra={FILE_ONLY: True}) keeps a line off the screen, where the progress bar says it already
KEPT_RECORDS = 1000  # before there is a file; a run says some ten lines until then


class _ScreenHandler(logging.Handler):
    """Writes to stderr above a progress bar that may stand there, instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # the rule of logging: text that cannot be shown never stops the program
            self.handleError(record)


class _ScreenFormatter(logging.Formatter):
    """`12:34:56 text`; warnings and errors say so, and ranks other than the main one give their number."""

    def __init__(self, rank: str | None) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._rank = rank

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        rank = f"[rank {self._rank}] " if self._rank is not None else ""
        return f"{record.asctime} {rank}{level}{record.message}"


def setup_logging(is_main: bool, log_file: Path | None) -> logging.Logger:
    """Sets up the logger "tracknet" of this process; a second call replaces what the first one set.

    Args:
        is_main: the main rank shows information and warnings; the others, to whom the same happens, only errors, with their rank.
        log_file: the main rank appends all its text here too; the folder is made. None keeps the text for the file of a later call.

    Returns:
        The logger "tracknet".

    Raises:
        UserError: the file cannot be written.
    """
    logger = logging.getLogger(LOGGER_NAME)
    kept: list[logging.LogRecord] = []
    for handler in list(logger.handlers):
        if isinstance(handler, logging.handlers.MemoryHandler):
            kept += handler.buffer
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    screen = _ScreenHandler()
    screen.setFormatter(_ScreenFormatter(None if is_main else os.environ.get("RANK", "?")))
    screen.addFilter(lambda record: not getattr(record, FILE_ONLY, False))
    logger.addHandler(screen)
    if is_main and log_file is None:
        logger.addHandler(logging.handlers.MemoryHandler(KEPT_RECORDS, flushLevel=logging.CRITICAL + 1))
    elif is_main and log_file is not None:
        file = _file_handler(log_file)
        for record in kept:
            file.handle(record)
        logger.addHandler(file)
    return logger


def _file_handler(log_file: Path) -> logging.Handler:
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_file, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {log_file}: {error.strerror}; choose another folder with --output-dir or training.log_dir"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler
