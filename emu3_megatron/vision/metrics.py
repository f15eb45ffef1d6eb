"""How good reconstructions are, and how much of the codebook is used.

Shapes: N frames, C channels, H W height and width, K codes. Pixels are in [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
"""Side of the Gaussian window, and `SSIM_SIGMA` its width, of Wang et al. 2004."""
SSIM_SIGMA = 1.5


def psnr(reconstruction: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], any equal shapes; clipped before comparing."""
    error = (reconstruction.float().clamp(-1, 1) - target.float()).square().mean()
    return float(10 * torch.log10(4 / error.clamp_min(1e-12)))


def ssim(reconstruction_NCHW: Tensor, target_NCHW: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), mean over frames, channels and the windows inside a frame.

    Raises `ValueError` for frames smaller than the 11x11 window.
    """
    if min(target_NCHW.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"frames are {list(target_NCHW.shape[-2:])}: SSIM needs {SSIM_WINDOW} pixels a side")
    x_MHW, y_MHW = (t.float().clamp(-1, 1).flatten(0, 1)[:, None] for t in (reconstruction_NCHW, target_NCHW))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float32, device=x_MHW.device) - SSIM_WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    line = line / line.sum()

    def blur(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, line[None, None, :, None]), line[None, None, None, :])

    mean_x, mean_y = blur(x_MHW), blur(y_MHW)
    variance_x, variance_y = blur(x_MHW.square()) - mean_x.square(), blur(y_MHW.square()) - mean_y.square()
    covariance = blur(x_MHW * y_MHW) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


@dataclass(frozen=True, kw_only=True)
class CodebookUse:
    """How a set of codes spreads over the codebook."""

    used: int
    """Number of different codes."""
    fraction: float
    """The same, over the codebook's size."""
    perplexity: float
    """2 to the entropy of the codes: as many equally frequent codes would be as hard to predict."""
    bits: float
    """Entropy of one code, in bits, its neighbours not considered."""


def codebook_use(codes: Tensor, codebook_size: int) -> CodebookUse:
    """Usage of integer `codes` of any shape."""
    return codebook_use_of_counts(torch.bincount(codes.flatten(), minlength=codebook_size))


def codebook_use_of_counts(counts_K: Tensor) -> CodebookUse:
    """Usage where each code of the codebook was seen as often as `counts_K` says."""
    counts_K = counts_K.double()
    shares = counts_K[counts_K > 0] / counts_K.sum()
    bits = float(-(shares * shares.log2()).sum())
    used = int((counts_K > 0).sum())
    return CodebookUse(used=used, fraction=used / len(counts_K), perplexity=math.pow(2, bits), bits=bits)
