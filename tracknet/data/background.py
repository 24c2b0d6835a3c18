"""A clip's background: its median picture, in which nothing that moves remains."""

import numpy as np
from numpy.typing import NDArray

FRAMES_USED = 25  # spread over the whole clip; more change little and cost time
ROWS_AT_ONCE = 64  # keeps the working memory small whatever the picture's size


def frames_used(length: int) -> NDArray[np.int64]:
    """Positions of the frames that make the background of a clip of `length` frames; the first and the last are among them."""
    return np.linspace(0, length - 1, min(FRAMES_USED, length)).round().astype(np.int64)


def median_picture(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The median of some `FRAMES_USED` frames, for each pixel and colour by itself.

    Args:
        frames: (n, H, W, 3) uint8; may be a memory map.

    Returns:
        (H, W, 3) uint8. Of an even number of frames (a short clip) the lower of the two middle values, so that every value was seen.
    """
    chosen = frames_used(len(frames))
    middle = (len(chosen) - 1) // 2
    picture = np.empty(frames.shape[1:], np.uint8)
    for top in range(0, len(picture), ROWS_AT_ONCE):
        strips = frames[chosen, top : top + ROWS_AT_ONCE]
        picture[top : top + ROWS_AT_ONCE] = np.partition(strips, middle, axis=0)[middle]
    return picture
