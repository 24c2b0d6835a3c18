"""The field's rules for calling a detection right."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """One evaluator's rule for calling a detection right.

    Attributes:
        name: as it stands in the metrics' names.
        distance_px: the largest distance between detection and label, in px of `size_wh`.
        strict: the distance must be below `distance_px`, not at most that.
        size_wh: picture size at which distances are measured; None is the original picture.
        truncate: coordinates become integers (towards zero) before the distance.
        ball: the visibility values that count as a ball; any other labelled frame counts as one without.
    """

    name: str
    distance_px: float
    strict: bool
    size_wh: tuple[int, int] | None
    truncate: bool
    ball: tuple[int, ...]


TRACKNETV2 = Protocol("tracknetv2", 4.0, strict=False, size_wh=(512, 288), truncate=True, ball=(1, 2, 3))
"""TrackNetV2 (Sun et al., ICPAI 2020): at most 4 px between integers at 512x288; every visibility >= 1 is a ball."""

WASB = Protocol("wasb", 4.0, strict=True, size_wh=None, truncate=False, ball=(1, 2))
"""WASB (Tarashima et al., BMVC 2023, arXiv 2311.05237): below 4 px in the original picture; occluded balls (3) do not count."""

PROTOCOLS = (TRACKNETV2, WASB)
