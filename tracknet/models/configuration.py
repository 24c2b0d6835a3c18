"""What a saved model folder's `config.json` holds: all that rebuilds the network without the hub and without the run's YAML."""

import math
import unicodedata
from typing import Any

from transformers import PretrainedConfig

from tracknet.errors import ConfigError, shown
from tracknet.schema.model import MODELS

LARGEST_EDGE = 16384  # px or cells: pictures beyond any camera, whose memory would be asked for before anything is looked at


class TrackNetConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Architecture and input of a `TrackNetModel`.

    Args:
        architecture: `unet_heatmap`, `vit_heatmap` or `convnext_fpn_heatmap`; the `model_name` of the run.
        frames: T, frames per window.
        background: whether the clip's median picture goes in beside the frames.
        normalize: whether pictures have the ImageNet mean subtracted and are divided by its deviation.
        input_size: (width, height) in px of the whole picture that the network was trained for.
        heatmap_size: (width, height) in cells of the heatmap of that picture.
        sigma: of the training targets' Gaussian, in cells.
        backbone: the U-Net's `channels` and `blocks_per_stage`; empty otherwise.
        decoder: the ViT's decoder, keys of `model.decoder`; empty otherwise.
        fpn: ConvNeXt's pyramid, keys of `model.fpn`; empty otherwise.
        backbone_config: the transformers configuration of the ViT or ConvNeXt as a dict; null for the U-Net.
        pretrained: the model whose weights the backbone started from, an identifier on the hub or a folder's name; null for none.
        trained_on: `data` (name of its configuration), `licence` (of that data, or null), `train_games`, `val_games`, `step`, the
            updates made, and `started_from` (absent in older folders): the same less `step` of each run whose weights this one goes
            back to, the oldest first, or null for one that is not on record. Null where no training run has made the folder, and in
            older folders.
        detection: `threshold` (a peak at or above it is a ball, above 0 and below 1), and how it was chosen: `protocol`, `f1` there (0 to
            1), `games`, `frames` (their number), `step` (updates made when it was). Null where none was chosen, and in older folders.
        **kwargs: fields of `PretrainedConfig`.

    Raises:
        ConfigError: a field is not what it must be. An empty `architecture` describes no network, and its shape is not looked at.
    """

    model_type = "tracknet"

    def __init__(
        self,
        *,
        architecture: str = "",
        frames: int = 0,
        background: bool = False,
        normalize: bool = True,
        input_size: tuple[int, int] = (0, 0),
        heatmap_size: tuple[int, int] = (0, 0),
        sigma: float = 0.0,
        backbone: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        fpn: dict[str, Any] | None = None,
        backbone_config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        trained_on: dict[str, Any] | None = None,
        detection: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers makes empty configurations to compare with, so every argument has an empty default; none describes a network.
        if architecture != "":
            _check_shape(architecture, frames, background, normalize, input_size, heatmap_size, sigma)
            _check_parts(backbone, decoder, fpn, backbone_config)
        self.architecture = architecture
        self.frames = frames
        self.background = background
        self.normalize = normalize
        self.input_size = list(input_size)
        self.heatmap_size = list(heatmap_size)
        self.sigma = sigma
        self.backbone = backbone or {}
        self.decoder = decoder or {}
        self.fpn = fpn or {}
        self.backbone_config = backbone_config
        self.pretrained = pretrained
        self.trained_on = trained_on
        self.detection = detection
        if not is_detection(detection):
            raise ConfigError(f"config.json: detection is {shown(detection)}, not a chosen threshold; set it to null, or train again")
        check_past(pretrained, trained_on)
        super().__init__(**kwargs)

    @property
    def picture_channels(self) -> int:
        """Channels of one frame as the network sees it: RGB, and with the background its RGB difference to that."""
        return 6 if self.background else 3

    def heatmap_size_hw(self, picture_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width in cells of the heatmap of a picture of `picture_hw` px, a crop included: the stride stays the same."""
        height = round(picture_hw[0] * self.heatmap_size[1] / self.input_size[1])
        width = round(picture_hw[1] * self.heatmap_size[0] / self.input_size[0])
        return max(height, 1), max(width, 1)


def _check_shape(
    architecture: object, frames: object, background: object, normalize: object, input_size: object, heatmap_size: object, sigma: Any
) -> None:
    """Refuses input and output that no network has."""
    edges = f"[width, height], whole numbers from 1 to {LARGEST_EDGE}"
    for name, value, sound, wanted in (
        ("architecture", architecture, isinstance(architecture, str) and architecture in MODELS, f"one of {', '.join(MODELS)}"),
        ("frames", frames, _is_whole(frames, low=1), "a whole number from 1"),
        ("background", background, isinstance(background, bool), "true or false"),
        ("normalize", normalize, isinstance(normalize, bool), "true or false"),
        ("input_size", input_size, _is_size(input_size), edges),
        ("heatmap_size", heatmap_size, _is_size(heatmap_size), edges),
        ("sigma", sigma, _is_number(sigma) and 0 < sigma < math.inf, "a number above 0"),
    ):
        _check(name, value, sound, wanted)


def _check_parts(backbone: object, decoder: object, fpn: object, backbone_config: object) -> None:
    parts = {"backbone": backbone, "decoder": decoder, "fpn": fpn, "backbone_config": backbone_config}
    for name, value in parts.items():
        _check(name, value, value is None or isinstance(value, dict), "an object or null")


def _check(name: str, value: object, sound: bool, wanted: str) -> None:
    if not sound:
        raise ConfigError(f"config.json: {name} is {shown(value)}; it must be {wanted}")


def _is_size(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(_is_whole(edge, 1) and edge <= LARGEST_EDGE for edge in value)


def _is_whole(value: object, low: int) -> bool:
    """`true` is no number here."""
    return type(value) is int and value >= low


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_detection(value: Any) -> bool:
    """Whether a value out of a file can be the field `detection`."""
    match value:
        case None:
            return True
        case {"threshold": threshold, "protocol": protocol, "f1": f1, "games": games, "frames": frames, "step": step} if len(value) == 6:
            return (
                _is_number(threshold)
                and 0 < threshold < 1
                and is_name(protocol)
                and _is_number(f1)
                and 0 <= f1 <= 1
                and _are_games(games)
                and _is_whole(frames, low=0)
                and _is_whole(step, low=0)
            )
    return False


def check_past(pretrained: object, trained_on: object) -> None:
    """Refuses what cannot be the fields `pretrained` and `trained_on`.

    Raises:
        ConfigError: names the field.
    """
    if pretrained is not None and not is_name(pretrained):
        raise ConfigError(f"config.json: pretrained is {shown(pretrained)}, not the name of a model; set it to null")
    if not is_origin(trained_on):
        raise ConfigError(f"config.json: trained_on is {shown(trained_on)}, not the data of a run; set it to null")


def is_origin(value: object) -> bool:
    """Whether a value out of a file can be the field `trained_on`."""
    match value:
        case None:
            return True
        case {"step": step, "started_from": [*starts], **data}:
            return _is_whole(step, low=0) and is_data(data) and all(start is None or is_data(start) for start in starts)
        case {"step": step, **data}:  # an older folder; any other `started_from` is left over in `data`
            return _is_whole(step, low=0) and is_data(data)
    return False


def is_data(value: Any) -> bool:
    """Whether a value out of a file can be what `trained_on` tells of the data of one run."""
    match value:
        case {"data": data, "licence": licence, "train_games": train, "val_games": val} if len(value) == 4:
            return is_name(data) and (licence is None or is_name(licence)) and _are_games(train) and _are_games(val)
    return False


def _are_games(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_name, value))


def is_name(value: object) -> bool:
    """Whether it is text that stays in its line: without line breaks, control characters and halves of characters."""
    return isinstance(value, str) and not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value)
