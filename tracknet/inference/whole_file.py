"""Text files that stand under their name only when they are whole."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A file beside `path`, on the disk and renamed when the block ends, gone when it raises. Raises OSError where it cannot be written."""
    beside = path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex[:8]}.new")  # not longer than a name may be where the final one is not
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
