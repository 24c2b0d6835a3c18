"""What a saved model folder's `config.json` holds: all that rebuilds the network without the hub and without the run's YAML."""

from typing import Any

from transformers import PretrainedConfig

from tracknet.errors import ConfigError, shown


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
        trained_on: `data` (name of its configuration), `licence` (of that data, or null), `train_games`, `val_games`, and `step`, the
            updates made; null where no training run has made the folder, and in older folders.
        detection: `threshold` (a peak at or above it is a ball, above 0 and below 1), and how it was chosen: `protocol`, `f1` there (0 to
            1), `games`, `frames` (their number), `step` (updates made when it was). Null where none was chosen, and in older folders.
        **kwargs: fields of `PretrainedConfig`.

    Raises:
        ConfigError: `detection` or `trained_on` is something else.
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
        if not _is_origin(trained_on):
            raise ConfigError(f"config.json: trained_on is {shown(trained_on)}, not the data of a run; set it to null")
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


def is_detection(value: object) -> bool:
    """Whether a value out of a file can be the field `detection`."""
    match value:
        case None:
            return True
        case {
            "threshold": float(threshold),
            "protocol": str(),
            "f1": float(f1),
            "games": [*games],
            "frames": int(frames),
            "step": int(step),
        }:
            return 0 < threshold < 1 and 0 <= f1 <= 1 and _are_names(games) and frames >= 0 and step >= 0
    return False


def _is_origin(value: object) -> bool:
    match value:
        case None:
            return True
        case {"data": str(), "licence": str() | None, "train_games": [*train], "val_games": [*val], "step": int()}:
            return _are_names(train) and _are_names(val)
    return False


def _are_names(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
