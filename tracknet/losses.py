"""Losses on heatmap logits, one number per frame: the caller sums them over the labelled frames of a step and divides once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tracknet.schema.training import LossConfig


def frame_losses(logits: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """The loss of each frame, in float32 or better whatever the logits are.

    Args:
        logits: (..., h, w) float.
        target: (..., h, w) float, 0 to 1; 1 at the ball, all zero where there is none.
        config: which loss, and its constants.

    Returns:
        (...) float, >= 0.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    target = target.to(logits.dtype)
    if config.name == "focal":
        return focal_frame_losses(logits, target, config.alpha, config.beta)
    return mse_frame_losses(logits, target)


def mse_frame_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the cells of the squared difference between probability and target (TrackNet, arXiv 1907.03698, regresses the Gaussian).

    Shapes as in `frame_losses`.
    """
    return (torch.sigmoid(logits) - target).square().mean(dim=(-2, -1))


def focal_frame_losses(logits: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
    """The penalty-reduced focal loss of CornerNet (arXiv 1808.01244, eq. 1), summed over the cells.

    The paper's positive cell, whose target is 1, is here the cell nearest to the ball: targets are rendered at the exact position, so no
    cell needs to reach 1.

    Shapes as in `frame_losses`. `alpha` weighs down cells that are already right, `beta` cells near the ball.
    """
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    peak = target.amax(dim=(-2, -1), keepdim=True)
    is_ball = (target == peak) & (peak > 0)
    # powers as exponentials of logarithms: the gradient of p ** alpha is infinite at p = 0 where alpha is below 1
    at_ball = -(alpha * log_not_p).exp() * log_p
    elsewhere = -((1 - target) ** beta) * (alpha * log_p).exp() * log_not_p
    return torch.where(is_ball, at_ball, elsewhere).sum(dim=(-2, -1))
