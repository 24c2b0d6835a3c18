"""`convnext_fpn_heatmap`: every frame through a ConvNeXt, the frames fused at each stage, a feature pyramid."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracknet.models.fusion import TemporalFusion, input_adapter
from tracknet.models.layers import group_norm, heatmap_head, resample
from tracknet.schema.model import FpnConfig


class FeaturePyramid(nn.Module):
    """A window's features at the finest stage's resolution (after Lin et al. 2017, arXiv 1612.03144).

    `sum` adds the coarser stages on the way down; `concat` lays all stages beside each other and mixes them by a 1x1 convolution.

    Args:
        frames: T.
        stage_channels: channels of each stage's features of one frame, finest first.
        config: the keys under `model.fpn`.
    """

    def __init__(self, frames: int, stage_channels: list[int], config: FpnConfig) -> None:
        super().__init__()
        width = config.lateral_dim
        self.fuse = config.fuse
        self.laterals = nn.ModuleList(TemporalFusion(frames, channels, width) for channels in stage_channels)
        self.mix = nn.Conv2d(width * len(stage_channels), width, kernel_size=1) if config.fuse == "concat" else nn.Identity()
        self.smooth = nn.Sequential(nn.Conv2d(width, width, kernel_size=3, padding=1), group_norm(width), nn.GELU())

    def forward(self, features: list[Tensor]) -> Tensor:
        """Per stage (B * T, C, h, w), finest first -> (B, lateral_dim, h, w) of the finest."""
        levels = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        fused = self._sum(levels) if self.fuse == "sum" else self._concat(levels)
        y: Tensor = self.smooth(self.mix(fused))
        return y

    @staticmethod
    def _sum(levels: list[Tensor]) -> Tensor:
        x = levels[-1]
        for level in levels[-2::-1]:
            x = level + F.interpolate(x, size=level.shape[-2:], mode="bilinear", align_corners=False)
        return x

    @staticmethod
    def _concat(levels: list[Tensor]) -> Tensor:
        size_hw = levels[0].shape[-2:]
        coarse = [F.interpolate(level, size=size_hw, mode="bilinear", align_corners=False) for level in levels[1:]]
        return torch.cat([levels[0], *coarse], dim=1)


class ConvNextFpnHeatmap(nn.Module):
    """Pictures of a window to one map of logits per frame.

    Args:
        backbone: a transformers ConvNeXt backbone that gives chosen stages.
        frames: T.
        picture_channels: 3, or 6 with the difference to the background.
        fpn: the keys under `model.fpn`.
    """

    def __init__(self, backbone: PreTrainedModel, frames: int, picture_channels: int, fpn: FpnConfig) -> None:
        super().__init__()
        first, last = min(backbone.config.out_indices), max(backbone.config.out_indices)
        self.stride = backbone.config.patch_size * 2 ** (first - 1)
        self.multiple = backbone.config.patch_size * 2 ** (last - 1)
        self.adapter = input_adapter(picture_channels)
        self.backbone = backbone
        self.pyramid = FeaturePyramid(frames, [backbone.config.hidden_sizes[stage - 1] for stage in backbone.config.out_indices], fpn)
        self.head = heatmap_head(fpn.lateral_dim, frames)

    def forward(self, pictures: Tensor, size_hw: tuple[int, int], dropout_keys: Tensor | None) -> Tensor:
        """(B, T, C, H, W) float, any H and W -> logits (B, T, *size_hw); it has no own dropout, so the keys are not needed."""
        height, width = pictures.shape[-2:]
        x = self.adapter(pictures.flatten(0, 1))
        bottom, right = -height % self.multiple, -width % self.multiple
        if bottom or right:  # the strided convolutions would leave out the last rows and columns
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        logits = self.head(self.pyramid(list(self.backbone(pixel_values=x).feature_maps)))
        return resample(logits, (height / self.stride, width / self.stride), size_hw)
