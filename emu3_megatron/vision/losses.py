"""Losses of the vision tokenizer's training.

Shapes: N frames, C channels, H W height and width, R rows (latents), D length of a codebook vector.
Pixels are in [-1, 1].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def foreground_mask(target_NCHW: Tensor, background_NC: Tensor, threshold: float = 0.16) -> Tensor:
    """Where a pixel or one of its eight neighbours differs from the background; float 0 or 1, [N, 1, H, W].

    Args:
        target_NCHW: pixels in [-1, 1].
        background_NC: the commonest colour of each frame, in [-1, 1].
        threshold: largest difference of a channel that counts as background; 0.16 is 20 of 255.
    """
    distance_N1HW = (target_NCHW - background_NC[:, :, None, None]).abs().amax(1, keepdim=True)
    return F.max_pool2d((distance_N1HW > threshold).float(), 3, 1, 1)


LEAST_SHARE = 0.02
"""Share of a frame that a foreground counts as covering at least, where frames are to count alike."""


def pixel_weights(
    target_NCHW: Tensor,
    foreground_N1HW: Tensor,
    *,
    foreground_weight: float,
    edge_weight: float,
    frames_alike: bool = False,
) -> Tensor | None:
    """Weight of every pixel, [N, 1, H, W]: 1 on the background, more on the foreground and at edges.

    On pictures that are mostly plain, a plain mean spends the capacity on the plain part.

    Args:
        target_NCHW: pixels in [-1, 1].
        foreground_N1HW: from `foreground_mask`.
        foreground_weight: added on the foreground.
        edge_weight: added, times the local contrast (0 to 1), where neighbouring pixels differ.
        frames_alike: divide what is added to a frame by the share of the frame that its foreground covers,
            over the mean of that share in the batch: small objects then count as much as large ones.

    Returns:
        The weights, or None where both are 0.
    """
    if foreground_weight == 0 and edge_weight == 0:
        return None
    added_N1HW = foreground_weight * foreground_N1HW
    if edge_weight:
        high, low = F.max_pool2d(target_NCHW, 3, 1, 1), -F.max_pool2d(-target_NCHW, 3, 1, 1)
        added_N1HW = added_N1HW + edge_weight * (high - low).amax(1, keepdim=True) / 2
    if frames_alike:
        share_N111 = foreground_N1HW.mean((1, 2, 3), keepdim=True).clamp_min(LEAST_SHARE)
        added_N1HW = added_N1HW * (share_N111.mean() / share_N111)
    return 1 + added_N1HW


def reconstruction_loss(
    reconstruction_NCHW: Tensor,
    target_NCHW: Tensor,
    weights_N1HW: Tensor | None = None,
    *,
    l1_weight: float = 0.0,
) -> Tensor:
    """Mean squared error plus `l1_weight` times mean absolute error, weighted by pixel; a scalar."""
    error = reconstruction_NCHW.float() - target_NCHW
    loss = error.square()
    if l1_weight:
        loss = loss + l1_weight * error.abs()
    if weights_N1HW is not None:
        loss = loss * weights_N1HW
    return loss.mean()


def commitment_loss(rows_RD: Tensor, quantized_RD: Tensor, weights_R: Tensor) -> Tensor:
    """Weighted mean squared distance that pulls latents to their codebook vectors; those get no gradient."""
    return ((rows_RD - quantized_RD.detach()).square().mean(1) * weights_R).mean()


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `latents` (van den Oord et al. 2017)."""
    return latents + (quantized - latents).detach()
