"""Finds the nearest of many codes without comparing each with each: by sorted keys, each some bits of the code."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BANDS = 32  # keys of a code
PAIRS_AT_ONCE = 1 << 17

BITS_SET = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)


def nearest_codes(
    asking: NDArray[np.uint8], known: NDArray[np.uint8], *, count: int, key_bits: int, bucket: int, limit_bits: int
) -> NDArray[np.int64]:
    """Of each asking code the nearest known ones, among those that share one of `BANDS` keys with it.

    Args:
        asking: (n, bytes) packed codes.
        known: (m, bytes) packed codes.
        count: how many are kept of each.
        key_bits: length of a key, at most 48; the longer, the fewer share it by chance, and the nearer a code must be to be met.
        bucket: how many known codes of one key are looked at. This bounds the time to `BANDS` * n * bucket, beside the sorting.
        limit_bits: codes that differ in more bits are left out.

    Returns:
        (n, count) numbers of known codes, the nearest first; -1 where there is none.
    """
    nearest = np.full((len(asking), count), -1, np.int64)
    apart_of = np.full((len(asking), count), limit_bits + 1, np.int32)
    for one, other, apart in _met(asking, known, key_bits, bucket) if len(asking) and len(known) else ():
        rows = np.unique(one)  # each chunk's are few and near each other
        pairs = np.stack(
            [
                np.concatenate([one, np.repeat(rows, count)]),
                np.concatenate([apart, apart_of[rows].ravel()]),
                np.concatenate([other, nearest[rows].ravel()]),
            ]
        )
        pairs = pairs[:, pairs[1] <= limit_bits]
        pairs = np.unique(pairs, axis=1)  # sorts by asking code, then by distance
        starts = np.searchsorted(pairs[0], pairs[0], "left")
        place = np.arange(pairs.shape[1]) - starts
        pairs, place = pairs[:, place < count], place[place < count]
        nearest[pairs[0], place], apart_of[pairs[0], place] = pairs[2], pairs[1]
    return nearest


def bits_apart(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.int64]:
    """In how many bits packed codes differ, over the last axis."""
    differing = np.ascontiguousarray(one ^ other).view(np.uint16)
    count: NDArray[np.int64] = BITS_SET[differing].sum(axis=-1, dtype=np.int64)
    return count


def _met(
    asking: NDArray[np.uint8], known: NDArray[np.uint8], key_bits: int, bucket: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs that share a key, chunk by chunk: number of the asking code, number of the known one, bits apart."""
    for band in range(BANDS):
        keys = _keys(known, band, key_bits)
        order = np.argsort(keys, kind="stable")
        keys, asked = keys[order], _keys(asking, band, key_bits)
        first, last = np.searchsorted(keys, asked, "left"), np.searchsorted(keys, asked, "right")
        met = np.minimum(last - first, bucket)
        ends = np.cumsum(met)
        for start in range(0, int(ends[-1]), PAIRS_AT_ONCE):
            number = np.arange(start, min(start + PAIRS_AT_ONCE, int(ends[-1])))
            one = np.searchsorted(ends, number, "right")
            step = number - (ends[one] - met[one])
            other = order[first[one] + step * (last[one] - first[one]) // met[one]]  # spread over a bucket that holds more
            yield one, other, bits_apart(asking[one], known[other])


def _keys(codes: NDArray[np.uint8], band: int, bits: int) -> NDArray[np.uint64]:
    """(n,): `bits` bits of each code, from two bytes per band on."""
    columns = (2 * band + np.arange(8)) % codes.shape[1]
    eight_bytes: NDArray[np.uint64] = np.ascontiguousarray(codes[:, columns]).view(">u8")[:, 0].astype(np.uint64)
    return eight_bytes >> np.uint64(64 - bits)
