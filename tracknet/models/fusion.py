"""How the frames of a window meet in the networks whose backbone sees one picture at a time."""

import torch
from torch import Tensor, nn


class InputAdapter(nn.Module):
    """Six channels (RGB and difference to the background) to the three that a pretrained backbone knows.

    A 1x1 convolution that starts as the identity on RGB and ignores the difference, so that training begins with the backbone as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 3, kernel_size=1)
        start = torch.zeros(3, 6, 1, 1)
        start[:, :3, 0, 0] = torch.eye(3)
        with torch.no_grad():
            self.conv.weight.copy_(start)
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6, H, W) -> (N, 3, H, W)."""
        y: Tensor = self.conv(x)
        return y


def input_adapter(picture_channels: int) -> nn.Module:
    """What stands before a backbone that takes RGB: nothing, or the adapter where the difference to the background goes in too."""
    return InputAdapter() if picture_channels == 6 else nn.Identity()


class TemporalFusion(nn.Module):
    """The features of a window's frames beside each other, mixed by a 1x1 convolution.

    Args:
        frames: T.
        in_channels: of one frame's features.
        out_channels: of the window's features.
    """

    def __init__(self, frames: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(frames * in_channels, out_channels, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B * T, C, h, w), the frames of a window next to each other -> (B, out_channels, h, w)."""
        height, width = features.shape[-2:]
        y: Tensor = self.conv(features.reshape(features.shape[0] // self.frames, self.conv.in_channels, height, width))
        return y
