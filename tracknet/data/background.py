"""A clip's background: its median picture, in which nothing that moves remains."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

FRAMES_USED = 25  # spread over the whole clip; more change little and cost time
ROWS_AT_ONCE = 32  # so that those of all frames fit into a core's cache


def frames_used(length: int) -> NDArray[np.int64]:
    """Positions of the frames that make the background of a clip of `length` frames; the first and the last are among them."""
    return np.linspace(0, length - 1, min(FRAMES_USED, length)).round().astype(np.int64)


def median_picture(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The median of some `FRAMES_USED` frames, for each pixel and colour by itself.

    By a sorting network, whose steps are minima and maxima of whole rows: some 40 times as fast as `np.partition`, which sorts each pixel.

    Args:
        frames: (n, H, W, 3) uint8; may be a memory map.

    Returns:
        (H, W, 3) uint8. Of an even number of frames (a short clip) the lower of the two middle values, so that every value was seen.
    """
    chosen = frames_used(len(frames)).tolist()
    middle = (len(chosen) - 1) // 2
    picture = np.empty(frames.shape[1:], np.uint8)
    for top in range(0, len(picture), ROWS_AT_ONCE):
        strips = [np.array(frames[number, top : top + ROWS_AT_ONCE]) for number in chosen]
        spare = np.empty_like(strips[0])
        for low, high in _median_network(len(chosen)):
            np.minimum(strips[low], strips[high], out=spare)
            np.maximum(strips[low], strips[high], out=strips[high])
            strips[low], spare = spare, strips[low]
        picture[top : top + ROWS_AT_ONCE] = strips[middle]
    return picture


@cache
def _median_network(count: int) -> list[tuple[int, int]]:
    """Places to be compared, and exchanged where the first holds more, until the middle place holds the (lower) median."""
    wanted, kept = {(count - 1) // 2}, []
    for low, high in reversed(_sorting_network(count)):
        if low in wanted or high in wanted:
            wanted |= {low, high}
            kept.append((low, high))
    return kept[::-1]


def _sorting_network(count: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange (Knuth, The Art of Computer Programming 3, section 5.2.2, algorithm M)."""
    pairs: list[tuple[int, int]] = []
    first = 1 << (count - 1).bit_length() >> 1
    step = first
    while step:
        other, remainder, distance = first, 0, step
        while True:
            pairs += [(place, place + distance) for place in range(count - distance) if place & step == remainder]
            if other == step:
                break
            distance, other, remainder = other - step, other >> 1, step
        step >>= 1
    return pairs
