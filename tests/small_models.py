"""Every network at a size for tests, and windows to put in."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from tracknet.models import TrackNetModel, build_model
from tracknet.schema.data import DataConfig
from tracknet.schema.model import (
    ConvNextBackboneConfig,
    ConvNextFpnHeatmapConfig,
    DecoderConfig,
    FpnConfig,
    HeatmapConfig,
    ModelConfig,
    UnetBackboneConfig,
    UnetHeatmapConfig,
    VitBackboneConfig,
    VitHeatmapConfig,
)

INPUT_WH = (96, 64)
HEATMAP_WH = (48, 32)


def unet() -> UnetHeatmapConfig:
    return UnetHeatmapConfig(backbone=UnetBackboneConfig(channels=[8, 12, 16]), heatmap=HeatmapConfig(size=list(HEATMAP_WH)))


def vit(**decoder: object) -> VitHeatmapConfig:
    backbone = VitBackboneConfig(patch_size=14, hidden_size=24, num_layers=2, num_heads=3)
    settings = {**asdict(DecoderConfig(channels=[16, 8])), **decoder}
    return VitHeatmapConfig(backbone=backbone, decoder=DecoderConfig(**settings), heatmap=HeatmapConfig(size=list(HEATMAP_WH)))


def convnext(fuse: str = "sum", return_stages: tuple[int, ...] = (1, 2, 4)) -> ConvNextFpnHeatmapConfig:
    backbone = ConvNextBackboneConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], return_stages=list(return_stages))
    return ConvNextFpnHeatmapConfig(
        backbone=backbone, fpn=FpnConfig(lateral_dim=16, fuse=fuse), heatmap=HeatmapConfig(size=list(HEATMAP_WH))
    )


FAMILIES: dict[str, Callable[[], ModelConfig]] = {"unet": unet, "vit": vit, "convnext": convnext}


def data_config(frames: int = 3, background: bool = True, normalize: bool = True) -> DataConfig:
    config = DataConfig(background="median" if background else "none")
    config.sequence.length = frames
    config.preprocess.normalize = normalize
    return config


def small_model(family: str, frames: int = 3, background: bool = True) -> TrackNetModel:
    torch.manual_seed(0)
    return build_model(FAMILIES[family](), data_config(frames, background), INPUT_WH)


def windows(count: int, frames: int = 3, size_hw: tuple[int, int] = (64, 96), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random frames uint8 (count, frames, 3, H, W) and backgrounds uint8 (count, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, frames, 3, *size_hw), dtype=torch.uint8, generator=generator)
    return pictures, torch.randint(0, 256, (count, 3, *size_hw), dtype=torch.uint8, generator=generator)
