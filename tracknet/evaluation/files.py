"""Results on disk: files of one set come under their names together, each whole, or none does."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from tracknet.errors import UserError


def write_together(files: Mapping[Path, str], outdated: Sequence[Path] = ()) -> None:
    """Writes text files, folders included; what was there before stays until all are on the disk.

    Args:
        files: path and content.
        outdated: files that belong to the former ones; they go once all are on the disk, before any gets its name.

    Raises:
        UserError: one of them cannot be written; none is then, nor changed.
    """
    beside = {path: path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part") for path in files}
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(None, "it is a folder")
            with beside[path].open("w", encoding="utf-8", newline="") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in outdated:
            path.unlink(missing_ok=True)
        for path in files:
            beside[path].replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make room or choose another folder with --output") from error
    finally:
        for part in beside.values():
            _remove(part)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # its folder could not be made, or is a file: then nothing lies there
        if path.parent.is_dir():
            raise
