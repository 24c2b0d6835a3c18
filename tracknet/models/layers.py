"""Small parts that the networks share: normalisation, activation, dropout that is keyed per sample, resampling."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RARE_PEAK_BIAS = -4.0  # sigmoid(-4) = 0.018: a heatmap is almost everywhere empty, so training starts there
_SIGN_BIT = 1 << 63
_TWO_64 = 1 << 64


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of a (B, C, H, W) map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with up to 8 groups of at least two channels; unlike BatchNorm it is exact under micro-batches."""
    return nn.GroupNorm(math.gcd(8, channels, max(channels // 2, 1)), channels)


def norm_layer(name: str, channels: int) -> nn.Module:
    """The layer that `decoder.norm` names: `group`, `layer` (over channels) or `none`."""
    layers: dict[str, Callable[[int], nn.Module]] = {"group": group_norm, "layer": ChannelLayerNorm, "none": lambda _: nn.Identity()}
    return layers[name](channels)


def activation_layer(name: str) -> nn.Module:
    """The layer that `decoder.activation` names: `relu`, `gelu` or `silu`."""
    layers: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
    return layers[name]()


class PerSampleConv1x1(nn.Conv2d):
    """A 1x1 convolution that in training sums its weight's gradient sample by sample.

    As one sum over all positions of all samples, 51,200 for the demo's batch of 8, it was what float32 rounded most in the demo's U-Net:
    gradients of the batch and of its micro-batches differed by 2.0e-6 to 3.8e-6; like this by 0.2e-6 to 1.8e-6.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        if not self.training:
            return super().forward(input)
        count, _, height, width = input.shape
        weight, bias = self.weight.repeat(count, 1, 1, 1), None if self.bias is None else self.bias.repeat(count)
        # a group per sample, and not a batched matrix product, whose last bits depend on where in memory its operands lie
        return F.conv2d(input.reshape(1, -1, height, width), weight, bias, groups=count).reshape(count, -1, height, width)


def heatmap_head(channels: int, frames: int) -> nn.Conv2d:
    """The last 1x1 convolution: `channels` features to one map of logits per frame, starting near "no ball anywhere"."""
    head = PerSampleConv1x1(channels, frames, kernel_size=1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, RARE_PEAK_BIAS)  # type: ignore[arg-type]
    return head


def _int64(value: int) -> int:
    """The signed 64-bit integer with the bits of `value` modulo 2**64."""
    return (value + _SIGN_BIT) % _TWO_64 - _SIGN_BIT


def _mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), on int64 bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _int64(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def keyed_uniform(keys: Tensor, count: int, stream: int) -> Tensor:
    """Random numbers that are a pure function of (key, stream, position), the same on every device.

    Args:
        keys: (B,) int64, one per sample.
        count: numbers per sample.
        stream: tells apart the places that draw with the same keys.

    Returns:
        (B, count) float32, uniform in [0, 1).
    """
    golden = _int64(0x9E3779B97F4A7C15)  # SplitMix64's increment
    state = _mix(keys + _int64(golden * (stream + 1)))
    positions = torch.arange(1, count + 1, device=keys.device) * golden
    bits = _mix(state[:, None] + positions[None, :])
    return ((bits >> 40) & 0xFFFFFF).float() / (1 << 24)


class KeyedChannelDropout(nn.Module):
    """Drops whole channels; the mask of a sample depends on its key alone, never on its neighbours in the micro-batch.

    Args:
        probability: share of the channels dropped, 0 to below 1; the others are scaled up to keep the mean.
        stream: a number of its own for each place in the network.
    """

    def __init__(self, probability: float, stream: int) -> None:
        super().__init__()
        self.probability = probability
        self.stream = stream

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """(B, C, H, W), keys (B,) int64 -> the same shape; the identity outside training or at probability 0.

        Raises:
            ValueError: no keys in training.
        """
        if not self.training or self.probability == 0.0:
            return x
        if keys is None:
            raise ValueError("dropout above 0 needs `dropout_keys` in training")
        keep = keyed_uniform(keys, x.shape[1], self.stream) >= self.probability
        return x * (keep.to(x.dtype) / (1.0 - self.probability))[:, :, None, None]


def resample(x: Tensor, cells_hw: tuple[float, float], size_hw: tuple[int, int]) -> Tensor:
    """Bilinear resampling of a map that may reach beyond the picture, by the half-pixel rule of `tracknet.geometry`.

    Cell i of the map is centred at (i + 0.5) / cells of the picture's extent, before and after.

    Args:
        x: (B, C, H, W) map, with its first cell at the picture's top left corner.
        cells_hw: how many of its cells span the picture, at most H and W; a fraction where padding fills the last cell.
        size_hw: height and width wanted.

    Returns:
        (B, C, *size_hw); float32 where x has half precision.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if tuple(x.shape[-2:]) == tuple(cells_hw):
            return x if tuple(x.shape[-2:]) == size_hw else F.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)
        # torch's `interpolate` knows no picture that ends within a cell (with a `scale_factor` it copies where the sizes are equal).
        rows = _interpolation_matrix(cells_hw[0], x.shape[-2], size_hw[0], x)
        columns = _interpolation_matrix(cells_hw[1], x.shape[-1], size_hw[1], x)
        return rows @ x @ columns.mT


def _interpolation_matrix(cells: float, count: int, size: int, like: Tensor) -> Tensor:
    """(size, count): the weights with which `count` cells, of which `cells` span the picture, make `size` others."""
    position = ((torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) * (cells / size) - 0.5).clamp(0, count - 1)
    return (1 - (position[:, None] - torch.arange(count, device=like.device, dtype=like.dtype)).abs()).clamp(min=0)
