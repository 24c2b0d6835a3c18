"""A small U-Net for CPUs: all frames of the window enter as channels, one map per frame leaves.

After Ronneberger et al. 2015 (arXiv 1505.04597), with strided convolutions, residual blocks, GroupNorm and skips by addition.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracknet.models.layers import group_norm, heatmap_head, resample


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside an identity: (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(x + self.norm2(self.conv2(y)), inplace=True)


class UnetEncoder(nn.Module):
    """Halves the resolution once per entry of `channels`, with kernels placed so that the half-pixel rule holds."""

    def __init__(self, in_channels: int, channels: list[int], blocks_per_stage: int) -> None:
        super().__init__()
        stages = []
        for before, after in zip([in_channels, *channels], channels, strict=False):
            # Kernel 4, stride 2, padding 1 covers the input px 2i - 1 to 2i + 2, whose centre is that of cell i.
            halve = [nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False), group_norm(after), nn.ReLU(inplace=True)]
            stages.append(nn.Sequential(*halve, *(ResidualBlock(after) for _ in range(blocks_per_stage))))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W), sides divisible by 2 ** stages -> the stages' features, finest (half resolution) first."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class UnetDecoder(nn.Module):
    """Back to half resolution; each stage's features join by addition."""

    def __init__(self, channels: list[int], blocks_per_stage: int) -> None:
        super().__init__()
        pairs = list(zip(channels[1:], channels[:-1], strict=True))[::-1]
        self.narrow = nn.ModuleList(nn.Conv2d(before, after, 1) for before, after in pairs)
        self.blocks = nn.ModuleList(nn.Sequential(*(ResidualBlock(after) for _ in range(blocks_per_stage))) for _, after in pairs)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Stages' features, finest first -> (B, channels[0], H / 2, W / 2)."""
        x = features[-1]
        for narrow, block, skip in zip(self.narrow, self.blocks, features[-2::-1], strict=True):
            x = block(skip + F.interpolate(narrow(x), scale_factor=2.0, mode="bilinear", align_corners=False))
        return x


class UnetHeatmap(nn.Module):
    """Pictures of a window to one map of logits per frame.

    Args:
        frames: T.
        picture_channels: channels of one picture, 3, or 6 with the difference to the background.
        channels: of each stage; the first is at half resolution.
        blocks_per_stage: residual blocks of two convolutions.
    """

    def __init__(self, frames: int, picture_channels: int, channels: list[int], blocks_per_stage: int) -> None:
        super().__init__()
        self.multiple = 2 ** len(channels)
        self.channels_last = True  # the order in memory of the features; about twice as fast on a CPU
        self.backbone = UnetEncoder(frames * picture_channels, channels, blocks_per_stage)
        self.decoder = UnetDecoder(channels, blocks_per_stage)
        self.head = heatmap_head(channels[0], frames)

    def forward(self, pictures: Tensor, size_hw: tuple[int, int], dropout_keys: Tensor | None) -> Tensor:
        """(B, T, C, H, W) float, any H and W -> logits (B, T, *size_hw); it has no dropout, so the keys are not needed."""
        height, width = pictures.shape[-2:]
        x = pictures.flatten(1, 2).contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        bottom, right = -height % self.multiple, -width % self.multiple
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        logits = self.head(self.decoder(self.backbone(x)))
        return resample(logits, (height / 2, width / 2), size_hw)
