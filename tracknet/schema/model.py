"""Types and defaults of `configs/model/*.yaml`; `model_name` chooses the family."""

from dataclasses import dataclass, field

from tracknet.schema.bounds import bounded


@dataclass
class HeatmapConfig:
    size: list[int] = bounded(factory=lambda: [128, 72], low=1, length=2)  # (width, height) for the whole picture
    sigma: float = bounded(2.0, above=0.0)  # of the Gaussian target, in heatmap cells


@dataclass
class VitBackboneConfig:
    """`hidden_size`, `num_layers` and `num_heads` build a network with random weights where `pretrained_model_name` is null."""

    freeze: bool = False
    device_map: str | None = None
    local_files_only: bool = False
    patch_size: int = bounded(14, low=1)
    hidden_size: int = bounded(384, low=1)
    num_layers: int = bounded(12, low=1)
    num_heads: int = bounded(6, low=1)


@dataclass
class ConvNextBackboneConfig:
    """`hidden_sizes` and `depths` build a network with random weights where `pretrained_model_name` is null."""

    freeze: bool = False
    return_stages: list[int] = bounded(factory=lambda: [1, 2, 3, 4], low=1, high=4)  # stage 1 has stride 4, 4 has 32
    device_map: str | None = None
    local_files_only: bool = False
    hidden_sizes: list[int] = bounded(factory=lambda: [96, 192, 384, 768], low=1, length=4)
    depths: list[int] = bounded(factory=lambda: [3, 3, 9, 3], low=1, length=4)


@dataclass
class UnetBackboneConfig:
    """A small U-Net; `channels[0]` is at half resolution, each further one at half of the one before."""

    freeze: bool = False
    channels: list[int] = bounded(factory=lambda: [16, 32, 48, 64], low=1)
    blocks_per_stage: int = bounded(1, low=1)


@dataclass
class DecoderConfig:
    channels: list[int] = bounded(factory=lambda: [128, 64], low=1)  # one entry per doubling of the resolution
    upsample: str = bounded("bilinear", choices=("bilinear", "nearest", "deconv", "pixelshuffle"))
    blocks_per_stage: int = bounded(1, low=1)
    norm: str = bounded("group", choices=("group", "layer", "none"))
    activation: str = bounded("gelu", choices=("relu", "gelu", "silu"))
    use_depthwise: bool = False
    use_se: bool = False
    se_reduction: int = bounded(8, low=1)
    dropout: float = bounded(0.0, low=0.0, below=1.0)


@dataclass
class FpnConfig:
    lateral_dim: int = bounded(128, low=1)
    fuse: str = bounded("sum", choices=("sum", "concat"))


@dataclass
class VitHeatmapConfig:
    model_name: str = bounded("vit_heatmap", choices=("vit_heatmap",))
    pretrained_model_name: str | None = None
    backbone: VitBackboneConfig = field(default_factory=VitBackboneConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    heatmap: HeatmapConfig = field(default_factory=HeatmapConfig)


@dataclass
class ConvNextFpnHeatmapConfig:
    model_name: str = bounded("convnext_fpn_heatmap", choices=("convnext_fpn_heatmap",))
    pretrained_model_name: str | None = None
    backbone: ConvNextBackboneConfig = field(default_factory=ConvNextBackboneConfig)
    fpn: FpnConfig = field(default_factory=FpnConfig)
    heatmap: HeatmapConfig = field(default_factory=HeatmapConfig)


@dataclass
class UnetHeatmapConfig:
    """The network for CPUs; it has no pretrained weights, so `pretrained_model_name` stays null."""

    model_name: str = bounded("unet_heatmap", choices=("unet_heatmap",))
    pretrained_model_name: str | None = None
    backbone: UnetBackboneConfig = field(default_factory=UnetBackboneConfig)
    heatmap: HeatmapConfig = field(default_factory=HeatmapConfig)


ModelConfig = VitHeatmapConfig | ConvNextFpnHeatmapConfig | UnetHeatmapConfig

MODELS: dict[str, type[ModelConfig]] = {
    "vit_heatmap": VitHeatmapConfig,
    "convnext_fpn_heatmap": ConvNextFpnHeatmapConfig,
    "unet_heatmap": UnetHeatmapConfig,
}
