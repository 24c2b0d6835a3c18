"""From a saved configuration to its network with random weights."""

from collections.abc import Callable

from tracknet.models.backbones import backbone_from_config
from tracknet.models.configuration import TrackNetConfig
from tracknet.models.convnext import ConvNextFpnHeatmap
from tracknet.models.unet import UnetHeatmap
from tracknet.models.vit import VitHeatmap
from tracknet.schema.model import DecoderConfig, FpnConfig

HeatmapNetwork = UnetHeatmap | VitHeatmap | ConvNextFpnHeatmap


def build_network(config: TrackNetConfig) -> HeatmapNetwork:
    """The network that `config.architecture` names; its `backbone` attribute is the part that can be frozen."""
    builders: dict[str, Callable[[TrackNetConfig], HeatmapNetwork]] = {
        "unet_heatmap": _unet,
        "vit_heatmap": _vit,
        "convnext_fpn_heatmap": _convnext,
    }
    return builders[config.architecture](config)


def _unet(config: TrackNetConfig) -> HeatmapNetwork:
    return UnetHeatmap(config.frames, config.picture_channels, config.backbone["channels"], config.backbone["blocks_per_stage"])


def _vit(config: TrackNetConfig) -> HeatmapNetwork:
    backbone = backbone_from_config(config.backbone_config or {})
    return VitHeatmap(backbone, config.frames, config.picture_channels, DecoderConfig(**config.decoder))


def _convnext(config: TrackNetConfig) -> HeatmapNetwork:
    backbone = backbone_from_config(config.backbone_config or {})
    return ConvNextFpnHeatmap(backbone, config.frames, config.picture_channels, FpnConfig(**config.fpn))
