"""The field's rules for calling a detection right, each as its evaluator has it; docs/protocols.md says what is peculiar about them."""

from dataclasses import dataclass

from tracknet.errors import ConfigError, shown


@dataclass(frozen=True)
class Protocol:
    """One evaluator's rule for calling a detection right.

    Attributes:
        name: as users write it and as it stands in the metrics' names.
        source: the repository and the file of the evaluator that it was read in.
        distance_px: the largest distance between detection and label, in px of `size_wh`.
        strict: the distance must be below `distance_px`, not at most that.
        size_wh: picture size at which distances are measured; None is the original picture.
        truncate: label and detection become integers (towards zero) before the distance.
        ball: the visibility values that count as a ball; any other labelled frame counts as one without.
        truncate_distance: the distance becomes an integer (towards zero) before it is compared.
        occluded_distance_px: stands for `distance_px` where the ball is occluded (visibility 3); None: no difference is made.
        fp1_in_recall: a ball whose detection is too far off (FP1) counts in the recall's denominator; else it is in neither of its terms.
        window: a frame counts as often as windows of this many frames, moved by one within the clip, hold it.
    """

    name: str
    source: str
    distance_px: float
    strict: bool
    size_wh: tuple[int, int] | None
    truncate: bool
    ball: tuple[int, ...]
    truncate_distance: bool = False
    occluded_distance_px: float | None = None
    fp1_in_recall: bool = False
    window: int = 1


WASB = Protocol(
    name="wasb",
    source="nttcom/WASB-SBDT src/utils/evaluator.py, src/configs/runner/eval.yaml, src/configs/dataset/tennis.yaml",
    distance_px=4,
    strict=True,
    size_wh=None,
    truncate=False,
    ball=(1, 2),
)
"""WASB (Tarashima et al., BMVC 2023, arXiv 2311.05237): below 4 px in the original picture; occluded balls (3) do not count."""

TRACKNETV2 = Protocol(
    name="tracknetv2",
    source="TrackNetV4/TrackNetV4 src/util.py (outcome), src/dataset.py; wolfyeva/TrackNetV2 utils.py (evaluation)",
    distance_px=4,
    strict=False,
    size_wh=(512, 288),
    truncate=True,
    ball=(1, 2, 3),
)
"""TrackNetV2 (Sun et al., ICPAI 2020) and V4: at most 4 px between integers at 512x288; every visibility >= 1 is a ball."""

TRACKNETV2_X3 = Protocol(
    name="tracknetv2-x3",
    source="TrackNetV4/TrackNetV4 src/dataset.py (windows of 3, moved by 1), src/util.py (outcome)",
    distance_px=4,
    strict=False,
    size_wh=(512, 288),
    truncate=True,
    ball=(1, 2, 3),
    window=3,
)
"""As `tracknetv2`, each frame counted in every window that holds it, as the papers' totals are: three times but at a clip's ends."""

TRACKNETV3 = Protocol(
    name="tracknetv3",
    source="qaz812345/TrackNetV3 test.py (evaluate), utils/metric.py, dataset.py",
    distance_px=4,
    strict=False,
    size_wh=(512, 288),
    truncate=True,
    ball=(1, 2, 3),
)
"""TrackNetV3 (Chen and Wang, MMAsia 2023): TrackNetV2's rule, each frame once; its own numbers are on labels that it corrected."""

TRACKNETV5_CODE = Protocol(
    name="tracknetv5-code",
    source="codelancera-offical/TracknetV5 metrics_factory/metrics/tracknetv2_metric.py, configs/final/*.py",
    distance_px=4,
    strict=True,
    size_wh=(512, 288),
    truncate=True,
    ball=(1, 2, 3),
)
"""TrackNetV5 as its code has it: below 4 px between integers at 512x288 (its paper says 4 px in the original picture)."""

GRIDTRACKNET = Protocol(
    name="gridtracknet",
    source="VKorpelshoek/GridTrackNet Train.py (calcOutcomeStats), DataGen.py",
    distance_px=4,
    strict=False,
    size_wh=(768, 432),
    truncate=True,
    ball=(1, 2, 3),
    truncate_distance=True,
)
"""GridTrackNet: at most 4 px between integers at 768x432, the distance truncated first, so that 4.99 px are still right."""

YASTREBKSV = Protocol(
    name="yastrebksv",
    source="yastrebksv/TrackNet general.py (validate), datasets.py",
    distance_px=5,
    strict=True,
    size_wh=(1280, 720),
    truncate=False,
    ball=(1, 2, 3),
    fp1_in_recall=True,
)
"""yastrebksv's TrackNet: below 5 px at 1280x720; recall is of all frames with a ball."""

TOTNET = Protocol(
    name="totnet",
    source="AugustRushG/TOTNet src/test.py (test), src/config/config.py, src/data_process/dataset.py",
    distance_px=5,
    strict=False,
    size_wh=(512, 288),
    truncate=True,
    ball=(1, 2, 3),
    occluded_distance_px=10,
    fp1_in_recall=True,
)
"""TOTNet (Xu et al., arXiv 2508.09650): at most 5 px, 10 where the ball is occluded, between integers at 512x288.

Its result is the share of right frames per visibility class, which is the recall here.
"""

PROTOCOLS = (WASB, TRACKNETV2, TRACKNETV2_X3, TRACKNETV3, TRACKNETV5_CODE, GRIDTRACKNET, YASTREBKSV, TOTNET)

TRAINING_PROTOCOLS = (TRACKNETV2, WASB)
"""What a training run logs."""


def protocol(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        ConfigError: there is none; the message has the allowed names.
    """
    for one in PROTOCOLS:
        if one.name == name:
            return one
    allowed = ", ".join(one.name for one in PROTOCOLS)
    raise ConfigError(f"protocol {shown(name)!r} does not exist; choose from {allowed}")
