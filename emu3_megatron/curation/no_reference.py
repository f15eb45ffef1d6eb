"""Quality without a reference and without weights: PIQE, sharpness and colourfulness."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from emu3_megatron.curation.frames import Picture, resize

BLOCK, SEGMENT = 16, 6
"""Sides in pixels of PIQE's blocks, and of the segments of a block's edge."""

ACTIVE, IMPAIRED = 0.1, 0.1
"""PIQE's thresholds: variance of a block that the eye looks at; deviation of a segment that is no texture."""

SCORED_EDGE = 512
"""Shorter edge at which quality is judged: about the size that the vision tokenizer sees."""

Float = npt.NDArray[Any]


def piqe(grey: Float) -> float:
    """Perception based Image Quality Evaluator (Venkatanath et al., NCC 2015).

    Args:
        grey: luma, ``[H, W]``; scaled so that its largest value is 255.

    Returns:
        0 (best) to 100; 100 for a picture without any texture. Up to 20 is excellent, 35 good, 50 fair.
    """
    rows, columns = grey.shape
    pad = ((0, -rows % BLOCK), (0, -columns % BLOCK))
    values = np.pad(
        np.asarray(grey, np.float64), pad, mode="symmetric" if min(rows, columns) >= BLOCK else "edge"
    )
    values = np.round(255 * values / max(values.max(), 1e-12))
    mean = cv2.GaussianBlur(values, (7, 7), 7 / 6, borderType=cv2.BORDER_REPLICATE)
    square = cv2.GaussianBlur(values * values, (7, 7), 7 / 6, borderType=cv2.BORDER_REPLICATE)
    normal = (values - mean) / (np.sqrt(np.abs(square - mean * mean)) + 1)
    down, across = (side // BLOCK for side in normal.shape)
    blocks = normal.reshape(down, BLOCK, across, BLOCK).transpose(0, 2, 1, 3).reshape(-1, BLOCK, BLOCK)
    variance = blocks.var(axis=(1, 2), ddof=1)
    blocks, variance = blocks[variance > ACTIVE], variance[variance > ACTIVE]
    if not len(blocks):
        return 100.0
    impaired, noisy = _impaired(blocks), _noisy(blocks, variance)
    distortion = float((impaired * (1 - variance) + noisy * variance).sum())
    return 100 * (distortion + 1) / (len(blocks) + 1)


def _impaired(blocks: Float) -> npt.NDArray[np.bool_]:
    """Whether a segment of a block's edges is flat: blocking, smearing, blur."""
    edges = np.stack([blocks[:, 0], blocks[:, -1], blocks[:, :, 0], blocks[:, :, -1]], axis=1)
    segments = np.lib.stride_tricks.sliding_window_view(edges, SEGMENT, axis=-1)
    return np.asarray((segments.std(axis=-1, ddof=1) < IMPAIRED).any(axis=(1, 2)))


def _noisy(blocks: Float, variance: Float) -> npt.NDArray[np.bool_]:
    """Whether a block's centre varies as its surround does: noise, not structure."""
    middle = BLOCK // 2
    centre = blocks[:, :, middle - 1 : middle + 1].reshape(len(blocks), -1).std(axis=-1, ddof=1)
    rest = np.delete(blocks, [middle - 1, middle], axis=2).reshape(len(blocks), -1).std(axis=-1, ddof=1)
    ratio, deviation = centre / np.maximum(rest, 1e-12), np.sqrt(variance)
    beta = np.abs(deviation - ratio) / np.maximum(np.maximum(deviation, ratio), 1e-12)
    return np.asarray(deviation > 2 * beta)


def sharpness(grey: Float) -> float:
    """Variance of the Laplacian of a grey picture, 0 upwards; below about 50 looks blurred."""
    return float(cv2.Laplacian(np.asarray(grey, np.float64), cv2.CV_64F).var())


def colourfulness(picture: Picture) -> float:
    """Hasler and Suesstrunk (2003), 0 for grey, above 60 vivid."""
    red, green, blue = np.moveaxis(picture.astype(np.float64), -1, 0)
    first, second = red - green, (red + green) / 2 - blue
    spread = np.hypot(first.std(), second.std())
    return float(spread + 0.3 * np.hypot(first.mean(), second.mean()))


def no_reference_parts(picture: Picture) -> dict[str, float]:
    """The measures behind `no_reference_score`, at `SCORED_EDGE`."""
    small = resize(picture, shorter_edge=SCORED_EDGE)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    return {"piqe": piqe(grey), "sharpness": sharpness(grey), "colourfulness": colourfulness(small)}


def combine(parts: dict[str, float]) -> float:
    """One score, 0 to 10: 5 for what PIQE leaves, 3.5 for sharpness (full from a Laplacian variance of 1000,
    on a logarithmic scale from 10), 1.5 for colour (full from 40, so that a grey photograph loses little)."""
    intact = 1 - parts["piqe"] / 100
    sharp = np.clip(np.log10(max(parts["sharpness"], 1e-9) / 10) / 2, 0, 1)
    return float(5 * intact + 3.5 * sharp + 1.5 * min(parts["colourfulness"] / 40, 1))
