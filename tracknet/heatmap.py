"""Render target heatmaps from ball positions and decode positions from heatmaps: two inverse functions, side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor


def render_heatmaps(xy_heatmap: Tensor, visible: Tensor, size_hw: tuple[int, int], sigma: float) -> Tensor:
    """Gaussian targets, 1 at the ball's exact (sub-cell) position; all zero where no ball is visible.

    Args:
        xy_heatmap: (..., 2) float, position in heatmap cells (cell centres are whole numbers).
        visible: (...) bool.
        size_hw: height and width of the heatmap in cells.
        sigma: of the Gaussian, in cells.

    Returns:
        (..., h, w) of xy_heatmap's dtype, 0 to 1.
    """
    height, width = size_hw
    xy = torch.where(visible[..., None], xy_heatmap, torch.zeros_like(xy_heatmap))
    columns = torch.arange(width, device=xy.device, dtype=xy.dtype)
    rows = torch.arange(height, device=xy.device, dtype=xy.dtype)
    along_x = torch.exp(-((columns - xy[..., 0:1]) ** 2) / (2 * sigma**2))
    along_y = torch.exp(-((rows - xy[..., 1:2]) ** 2) / (2 * sigma**2)) * visible[..., None]
    return along_y[..., :, None] * along_x[..., None, :]


def decode_peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest peak of each heatmap.

    The position is refined below one cell by the parabola through the log-probabilities of the peak and its two neighbours on each
    axis, which is exact for a Gaussian (the Taylor step of DARK, arXiv 1910.06278, without the smoothing); a peak on the border stays
    where it is.

    Args:
        logits: (..., h, w) float.

    Returns:
        xy_heatmap (..., 2) float32 in cells and score (...) float32, the peak's probability, 0 to 1.
    """
    height, width = logits.shape[-2:]
    flat = F.logsigmoid(logits.float()).reshape(-1, height * width)
    best, position = flat.max(dim=1)
    row, column = position // width, position % width

    def offset(step: int, along: Tensor, size: int) -> Tensor:
        before = flat.gather(1, (position - step).clamp(min=0)[:, None])[:, 0]
        after = flat.gather(1, (position + step).clamp(max=flat.shape[1] - 1)[:, None])[:, 0]
        curvature = before - 2 * best + after
        inside = (along > 0) & (along < size - 1) & (curvature < 0)
        shift = 0.5 * (before - after) / torch.where(inside, curvature, torch.ones_like(curvature))
        return torch.where(inside, shift, torch.zeros_like(shift)).clamp(-0.5, 0.5)

    x = column + offset(1, column, width)
    y = row + offset(width, row, height)
    shape = logits.shape[:-2]
    return torch.stack([x, y], dim=-1).view(*shape, 2), best.exp().view(shape)
