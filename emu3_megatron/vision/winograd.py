"""3x3 convolutions of stride 1 with a quarter of the multiplications (Winograd's F(4x4, 3x3)).

The picture is cut into tiles of 6x6 pixels that overlap by two. A transform of a tile and one of the kernel,
both linear, make the 4x4 outputs of a tile one product a place instead of nine: 36 products of matrices
[tiles, channels] x [channels, channels], 2.25 for every output instead of 9. Results differ from a plain
convolution's by a few roundings of fp32: about 1e-5 of their size, where bfloat16 is off by 4e-3. That is too
much for codes that are promised to be equal, and far less than bfloat16 costs.

Source of the algorithm: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015),
https://arxiv.org/abs/1509.09308.

Shapes: N frames, C channels given, O channels made, H W height and width, R rows of tiles, Q tiles in a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUT, IN = 4, 6
"""Sides of a tile after and before the convolution."""

AT_ONCE = 1 << 21
"""Most elements of the transformed tiles held at a time: 8 MiB, so that they stay in a CPU's cache."""

LEAST_CHANNELS = 64
"""With fewer the transforms cost more than the products that they save."""

_PIXELS = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
_KERNEL = (
    torch.tensor(
        [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
    )
    / 24
)
_KERNEL[0, 0] = 1 / 4
_OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float64,
)
"""The matrices of the transforms along one side, for the points 0, 1, -1, 2, -2 and infinity."""


def fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution can be done, and is worth doing, in this way."""
    plain = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (
        plain == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
    )


class WinogradConv2d(nn.Conv2d):
    """A convolution that `fits`, in fp32, for inference; it shares the weights of `conv`.

    The transformed kernel, four times the size of the weights, is made at the first call and kept. What is
    convolved may be overwritten: in this model it is always made for that and not used again.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self._kernel: Tensor | None = None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Convolve fp32 [N, C, H, W] to [N, O, H, W], in channels-last memory."""
        if self._kernel is None:
            self._kernel = transform_kernel(self.weight)
        return convolve(x_NCHW, self._kernel, self.bias)


def transform_kernel(weight_OC33: Tensor) -> Tensor:
    """Kernel of a convolution to [36, C, O]."""
    made, channels = weight_OC33.shape[:2]
    weight_9CO = weight_OC33.detach().permute(2, 3, 1, 0).reshape(9, channels * made)
    return (torch.kron(_KERNEL, _KERNEL).to(weight_9CO) @ weight_9CO).view(IN * IN, channels, made)


def convolve(x_NCHW: Tensor, kernel_36CO: Tensor, bias_O: Tensor | None) -> Tensor:
    """Convolve [N, C, H, W], zeros around, with a transformed kernel.

    Fresh memory for the result costs a CPU as much as a fifth of the work, so it takes the place of `x_NCHW`
    where it fits there: C = O, whole tiles, channels-last memory.

    Args:
        x_NCHW: [N, C, H, W]; may be overwritten.
        kernel_36CO: of `transform_kernel`.
        bias_O: added to every output.

    Returns:
        [N, O, H, W] in channels-last memory.
    """
    batch, channels, height, width = x_NCHW.shape
    made = kernel_36CO.shape[2]
    rows, columns = -(-height // OUT), -(-width // OUT)
    pixels, output = (torch.kron(one, one).to(x_NCHW) for one in (_PIXELS, _OUTPUT))
    each = max(1, AT_ONCE // (IN * IN * columns * max(channels, made)))
    x_NHWC = x_NCHW.permute(0, 2, 3, 1)
    size = (batch, rows * OUT, columns * OUT, made)
    y_NHWO = x_NHWC if x_NHWC.shape == size and x_NHWC.is_contiguous() else x_NCHW.new_empty(size)
    for x_HWC, y_HWO in zip(x_NHWC, y_NHWO, strict=True):
        above_WC = x_NCHW.new_zeros(width, channels)
        for first in range(0, rows, each):
            count = min(each, rows - first)
            top, bottom = OUT * first, OUT * (first + count)
            part_HWC = x_HWC[top : bottom + 1]
            right, below = columns * OUT + 1 - width, bottom + 1 - top - len(part_HWC)
            padded_HWC = F.pad(part_HWC, (0, 0, 1, right, 1, below)).contiguous()
            padded_HWC[0, 1 : width + 1] = above_WC
            above_WC = padded_HWC[OUT * count, 1 : width + 1]  # the picture's own may be overwritten now
            line = padded_HWC.shape[1] * channels
            tiles_66RQC = padded_HWC.as_strided(
                (IN, IN, count, columns, channels), (line, channels, OUT * line, OUT * channels, 1)
            )
            given = (pixels @ tiles_66RQC.reshape(IN * IN, -1)).view(IN * IN, count * columns, channels)
            products = torch.bmm(given, kernel_36CO)
            made_44RQO = (output @ products.view(IN * IN, -1)).view(OUT, OUT, count, columns, made)
            if bias_O is not None:
                made_44RQO += bias_O
            place = y_HWO[top:bottom].view(count, OUT, columns, OUT, made)
            place.copy_(made_44RQO.permute(2, 0, 3, 1, 4))
    return y_NHWO[:, :height, :width].permute(0, 3, 1, 2)
