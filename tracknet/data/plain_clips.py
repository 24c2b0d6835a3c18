"""Lists the pictures of a clip folder in which nothing is unusual, all at once.

What is done here for whole lists is done in `formats` for one picture after the other, at many times the cost. There stands what is
allowed and what is said of a mistake; here stands only what can be seen at a glance to be right.
"""

import os
from functools import lru_cache
from operator import attrgetter

import numpy as np

HIDDEN = (".", "_")  # how the names of files begin that are nobody's pictures
NAME = attrgetter("name")


def plain_pictures(folder: str, label_file: str, pictures: tuple[str, ...], videos: tuple[str, ...]) -> list[str] | None:
    """The names of a clip's pictures in natural order; None where they must be looked at one by one.

    Args:
        folder: of the clip.
        label_file: its name; it must be there.
        pictures: endings, in lower case.
        videos: endings of what must not be there.
    """
    try:
        with os.scandir(folder) as entries:
            names = list(map(NAME, filter(os.DirEntry.is_file, entries)))
        names.remove(label_file)
    except (OSError, ValueError):
        return None
    names.sort()
    ordered = _in_order(names, pictures)
    if ordered is None:  # something else may lie there
        kept = [name for name in names if not name.startswith(HIDDEN) and name.lower().endswith((*pictures, *videos))]
        ordered = _in_order(kept, pictures) if len(kept) < len(names) else None
    return ordered


def numbers_of(names: list[str], endings: tuple[str, ...]) -> list[int] | None:
    """The numbers in names such as `0098.jpg`, of one ending for all or without any; None where they are others."""
    ending = "".join(names[0].partition(".")[1:])
    joined = "/".join([*names, ""])
    stems = joined.replace(f"{ending}/", "/")[:-1].split("/")
    digits = "".join(stems)
    if ending.lower() not in ("", *endings) or len(stems) != len(names) or not (digits.isdecimal() and digits.isascii()):
        return None
    if "" in stems or max(map(len, stems)) > 18:
        return None
    return list(map(int, stems))


def _in_order(names: list[str], pictures: tuple[str, ...]) -> list[str] | None:
    """Sorted names in natural order, once they are known to be pictures without a gap; None where they are not that plain."""
    if not names or names[0].startswith(HIDDEN) or not names[0].lower().endswith(pictures):
        return None
    stem, _, ending = names[0].rpartition(".")
    if not stem.strip("0") and names == _numbered(len(stem), ending, 1 << len(names).bit_length())[: len(names)]:
        return names
    if _have_one_shape(names):
        has_gap = stem.isdecimal() and int(names[-1][: len(stem)]) - int(stem) != len(names) - 1
        return None if has_gap else names
    by_length = sorted(names, key=len)  # 9.jpg before 10.jpg
    numbers = numbers_of(by_length, pictures) or [0]
    return by_length if numbers == list(range(numbers[0], numbers[0] + len(names))) else None


@lru_cache(16)
def _numbered(digits: int, ending: str, count: int) -> list[str]:
    """The names that most clips have: 0000.jpg, 0001.jpg and so on."""
    return [f"{number:0{digits}}.{ending}" for number in range(count)]


def _have_one_shape(names: list[str]) -> bool:
    """Whether names differ only in digits at the same places, as img_0001.jpg and img_0002.jpg do: then sorted is in natural order."""
    width = len(names[0]) + 1
    text = "/".join([*names, ""])
    if not text.isascii() or len(text) != len(names) * width:
        return False
    characters = np.frombuffer(text.encode(), np.uint8).reshape(-1, width)
    is_digit = (characters - ord("0") < 10).all(axis=0)
    return bool((is_digit | (characters == characters[0]).all(axis=0)).all())
