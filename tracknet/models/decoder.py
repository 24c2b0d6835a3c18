"""The upsampling decoder of `vit_heatmap`: one stage per entry of `decoder.channels`, each doubling the resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracknet.models.layers import KeyedChannelDropout, activation_layer, norm_layer
from tracknet.schema.model import DecoderConfig


class Interpolate(nn.Module):
    """Doubles both sides by the half-pixel rule."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        # torch takes align_corners only where the mode has corners; its nearest keeps the half-pixel rule at a factor of 2.
        corners = None if self.mode == "nearest" else False
        return F.interpolate(x, scale_factor=2.0, mode=self.mode, align_corners=corners)


def upsample_layer(name: str, in_channels: int, out_channels: int) -> nn.Module:
    """The doubling that `decoder.upsample` names; (B, in, h, w) -> (B, out, 2h, 2w)."""
    if name == "deconv":  # kernel 4, stride 2, padding 1: symmetric about each input cell
        return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1)
    if name == "pixelshuffle":  # Shi et al. 2016, arXiv 1609.05158
        return nn.Sequential(nn.Conv2d(in_channels, 4 * out_channels, kernel_size=1), nn.PixelShuffle(2))
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=1), Interpolate(name))


class SqueezeExcite(nn.Module):
    """Channel attention (Hu et al. 2018, arXiv 1709.01507) with C / `reduction` hidden units, at least one."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Conv2d(channels, hidden, kernel_size=1)
        self.excite = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same, channels weighted from 0 to 1."""
        weights = self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3), keepdim=True))))
        return x * torch.sigmoid(weights)


class DecoderBlock(nn.Module):
    """A residual 3x3 convolution, as depthwise and pointwise where asked, with normalisation, activation and channel attention."""

    def __init__(self, channels: int, config: DecoderConfig) -> None:
        super().__init__()
        if config.use_depthwise:
            depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False)
            convolution: nn.Module = nn.Sequential(depthwise, nn.Conv2d(channels, channels, kernel_size=1))
        else:
            convolution = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        attention = SqueezeExcite(channels, config.se_reduction) if config.use_se else nn.Identity()
        self.body = nn.Sequential(convolution, norm_layer(config.norm, channels), activation_layer(config.activation), attention)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        y: Tensor = x + self.body(x)
        return y


class DecoderStage(nn.Module):
    """Doubles the resolution, then `blocks_per_stage` blocks, then dropout of channels."""

    def __init__(self, in_channels: int, out_channels: int, config: DecoderConfig, number: int) -> None:
        super().__init__()
        self.upsample = nn.Sequential(
            upsample_layer(config.upsample, in_channels, out_channels),
            norm_layer(config.norm, out_channels),
            activation_layer(config.activation),
        )
        self.blocks = nn.Sequential(*(DecoderBlock(out_channels, config) for _ in range(config.blocks_per_stage)))
        self.dropout = KeyedChannelDropout(config.dropout, stream=number)

    def forward(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """(B, in, h, w), keys (B,) int64 -> (B, out, 2h, 2w)."""
        y: Tensor = self.dropout(self.blocks(self.upsample(x)), dropout_keys)
        return y


class UpsamplingDecoder(nn.Module):
    """(B, in_channels, h, w) -> (B, channels[-1], h * 2**n, w * 2**n) for n channels."""

    def __init__(self, in_channels: int, config: DecoderConfig) -> None:
        super().__init__()
        pairs = zip([in_channels, *config.channels], config.channels, strict=False)
        self.stages = nn.ModuleList(DecoderStage(before, after, config, number) for number, (before, after) in enumerate(pairs))

    def forward(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """The map through all stages; keys (B,) int64 are needed in training with dropout."""
        for stage in self.stages:
            x = stage(x, dropout_keys)
        return x
