"""The key that names a clip in the cache of frames."""

import hashlib
import os
import platform

import av
import cv2
import numpy as np
import PIL

from tracknet.data.index import Clip
from tracknet.errors import DataError

CODE_VERSION = 2  # to be raised whenever the same source would be decoded to other pixels
DECODERS = (
    f"{platform.machine()} {PIL.__version__} {av.__version__} {av.library_versions} {cv2.__version__}"  # others may give other pixels
)


def clip_key(clip: Clip, size_wh: tuple[int, int], form: str) -> str:
    """16 hexadecimal digits.

    They change with the source's place, with the size and time of any of its files, with the size and form of the frames, and with the
    decoders and the code.

    Raises:
        DataError: a file has gone since the clips were listed.
    """
    identity = hashlib.sha256(_bytes(repr((CODE_VERSION, DECODERS, form, str(clip.source.absolute()), size_wh))))
    try:
        if clip.frame_names is None:
            states = [_state(os.stat(clip.source))]
        else:
            folder = os.fspath(clip.source)
            names = list(clip.frame_names)
            states = [_state(os.stat(os.path.join(folder, name))) for name in names]
            identity.update(_bytes("\0".join(names)))
    except OSError as error:
        raise DataError(f"{error.filename}: has gone since the clips were listed ({error.strerror})") from error
    identity.update(np.array(states, np.int64).tobytes())
    return identity.hexdigest()[:16]


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns % (1 << 63)  # a disk may hold times that 64 bits do not


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # names may be in any encoding
