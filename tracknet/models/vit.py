"""`vit_heatmap`: every frame through a ViT, its patch tokens back on their grid, the frames fused, an upsampling decoder."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracknet.models.decoder import UpsamplingDecoder
from tracknet.models.fusion import TemporalFusion, input_adapter
from tracknet.models.layers import heatmap_head, resample
from tracknet.schema.model import DecoderConfig


def tokens_to_grid(tokens: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Patch tokens as a map.

    Args:
        tokens: (N, prefix + h * w, D): class and register tokens, which are dropped, then the patches row by row.
        grid_hw: h and w in patches.

    Returns:
        (N, D, h, w).
    """
    height, width = grid_hw
    return tokens[:, -height * width :].transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


class VitHeatmap(nn.Module):
    """Pictures of a window to one map of logits per frame.

    Args:
        backbone: a model of the ViT family that takes RGB.
        frames: T.
        picture_channels: 3, or 6 with the difference to the background.
        decoder: the keys under `model.decoder`.
    """

    def __init__(self, backbone: PreTrainedModel, frames: int, picture_channels: int, decoder: DecoderConfig) -> None:
        super().__init__()
        self.patch_size: int = backbone.config.patch_size
        # The plain ViT interpolates its positions only when asked; the others always do.
        self.backbone_options = {"interpolate_pos_encoding": True} if backbone.config.model_type == "vit" else {}
        self.adapter = input_adapter(picture_channels)
        self.backbone = backbone
        self.fusion = TemporalFusion(frames, backbone.config.hidden_size, decoder.channels[0])
        self.decoder = UpsamplingDecoder(decoder.channels[0], decoder)
        self.head = heatmap_head(decoder.channels[-1], frames)

    def forward(self, pictures: Tensor, size_hw: tuple[int, int], dropout_keys: Tensor | None) -> Tensor:
        """(B, T, C, H, W) float, any H and W; keys (B,) int64 -> logits (B, T, *size_hw)."""
        features = self.patch_features(self.adapter(pictures.flatten(0, 1)))
        logits = self.head(self.decoder(self.fusion(features), dropout_keys))
        return resample(logits, (logits.shape[-2], logits.shape[-1]), size_hw)

    def patch_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, D, h, w), whose grid spans the whole picture: that is resized to the next multiple of the patch size."""
        height, width = (-(-side // self.patch_size) for side in x.shape[-2:])
        wanted_hw = (height * self.patch_size, width * self.patch_size)
        if tuple(x.shape[-2:]) != wanted_hw:
            x = F.interpolate(x, size=wanted_hw, mode="bilinear", align_corners=False)
        tokens: Tensor = self.backbone(pixel_values=x, **self.backbone_options).last_hidden_state
        return tokens_to_grid(tokens, (height, width))
