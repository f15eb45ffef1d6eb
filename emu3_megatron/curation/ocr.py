"""How much of a picture is covered by text: RapidOCR's detector, whose weights are in its package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np

from emu3_megatron.curation.config import TextCoverageConfig
from emu3_megatron.curation.frames import (
    Picture,
    clip_frames,
    frame_range,
    info_of,
    resize,
    small_size,
    spread,
)
from emu3_megatron.curation.units import KEEP, Decision, Score, Stage, Unit, drop

LARGEST_LETTERS = 0.4
"""Boxes whose height is more than this share of the picture's shorter edge are no text: the detector takes
round things, such as a cup, for one huge letter."""

BOX_THRESHOLD = 0.6
"""Least certainty of a text box; below, foliage and windows count as text."""


def detector_name() -> str:
    """Name and version, for the fingerprint of scores."""
    return f"rapidocr {version('rapidocr')}, boxes from {BOX_THRESHOLD}, up to {LARGEST_LETTERS}"


@lru_cache(maxsize=1)
def _detector() -> Any:
    """RapidOCR, for detection alone; recognition would stay off in this instance anyway."""
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.use_rec": False,
            "Global.log_level": "error",
            "Global.max_side_len": 4000,  # the picture's size is chosen here
            "Det.box_thresh": BOX_THRESHOLD,
            "Det.limit_type": "max",
            "Det.limit_side_len": 4000,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def text_coverage(picture: Picture) -> float:
    """Share of a picture (RGB, uint8 ``[H, W, 3]``) inside text boxes, 0 to 1."""
    result = _detector()(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), use_det=True, use_cls=False, use_rec=False)
    if result is None or result.boxes is None or not len(result.boxes):
        return 0.0
    mask = np.zeros(picture.shape[:2], np.uint8)
    for box in np.asarray(result.boxes, np.float32):  # corners, ``[4, 2]``; boxes overlap
        sides = [float(np.linalg.norm(box[i] - box[(i + 1) % 4])) for i in range(4)]
        if min(sides) <= LARGEST_LETTERS * min(picture.shape[:2]):
            cv2.fillPoly(mask, [np.round(box).astype(np.int32)], 1)
    return float(mask.mean())


def picture_coverage(picture: Picture, shorter_edge: int) -> float:
    """`text_coverage` of a picture made smaller to this shorter edge."""
    return round(text_coverage(resize(picture, shorter_edge=shorter_edge)), 4)


class TextCoverageStage(Stage):
    """Drops clips with much text: titles, slides, captions burnt in (paper: PaddleOCR at 2 FPS, edge 256)."""

    name = "text_coverage"

    def __init__(self, config: TextCoverageConfig) -> None:
        """`config` has the sampling and the threshold."""
        self._config = config

    def settings(self) -> Mapping[str, Any]:
        """The sampling and the detector."""
        config = self._config
        return {
            "fps": config.fps,
            "shorter_edge": config.shorter_edge,
            "max_frames": config.max_frames,
            "detector": detector_name(),
        }

    def score(self, unit: Unit) -> Score:
        """Mean and largest coverage over the frames looked at."""
        config, info = self._config, info_of(unit.file)
        first, stop = frame_range(unit, info)
        count = max(1, min(config.max_frames, round((stop - first) / info.fps * config.fps)))
        size = small_size(info, shorter_edge=config.shorter_edge)
        values = [text_coverage(frame) for frame in clip_frames(unit, spread(first, stop, count), size)]
        return {
            "coverage": round(float(np.mean(values)), 4),
            "largest": round(max(values), 4),
            "frames": count,
        }

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare the mean with the limit."""
        if score["coverage"] > self._config.max_coverage:
            return drop(
                "too much text",
                f"{score['coverage']:.1%} of the picture, more than {self._config.max_coverage:.1%}",
            )
        return KEEP
