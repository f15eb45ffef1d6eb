"""How much a clip moves: mean optical flow over the shorter edge (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from emu3_megatron.curation.config import MotionConfig
from emu3_megatron.curation.frames import Picture, clip_frames, frame_range, info_of, small_size, spread
from emu3_megatron.curation.models import OnnxModel, load_torchscript
from emu3_megatron.curation.units import KEEP, Decision, Score, Stage, Unit, drop
from emu3_megatron.errors import UserError
from emu3_megatron.files import sha256_file
from emu3_megatron.media import VideoInfo

Flow = npt.NDArray[np.float32]
"""Displacement in pixels, float32 ``[H, W, 2]``: columns, rows."""


class FlowEstimator(Protocol):
    """Gives the displacement of every pixel between two pictures of the same size."""

    name: str
    """Goes into the fingerprint of scores."""

    def __call__(self, first: Picture, second: Picture) -> Flow:
        """Flow from `first` to `second`."""
        ...


class DISFlow:
    """OpenCV's Dense Inverse Search (Kroeger et al., 2016), medium preset."""

    name = f"DIS medium, OpenCV {cv2.__version__}"

    def __init__(self) -> None:
        self._estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, first: Picture, second: Picture) -> Flow:
        """See `FlowEstimator`."""
        grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (first, second)]
        return np.asarray(self._estimator.calc(grey[0], grey[1], None), np.float32)  # type: ignore[call-overload]


class ModelFlow:
    """A network such as RAFT, as ONNX or TorchScript: two float32 ``[1, 3, H, W]`` in 0..255 to flow
    ``[1, 2, H, W]`` (the last one, where it gives a list of refinements). Sides are padded to multiples of 8.
    """

    def __init__(self, path: Path) -> None:
        """Load the weights. Raises `UserError` where they cannot be."""
        self.name = f"model {sha256_file(path)}"
        if path.suffix == ".onnx":
            self._run: Any = OnnxModel(path)
        else:
            self._run = load_torchscript(path)

    def __call__(self, first: Picture, second: Picture) -> Flow:
        """See `FlowEstimator`."""
        rows, columns = first.shape[:2]
        pad = ((0, -rows % 8), (0, -columns % 8), (0, 0))
        inputs = [
            np.pad(picture, pad, mode="edge").astype(np.float32).transpose(2, 0, 1)[None]
            for picture in (first, second)
        ]
        flow = np.asarray(self._run(*inputs)[-1], np.float32)
        if flow.ndim != 4 or flow.shape[1] != 2:
            raise UserError(f"motion.model gives {list(flow.shape)}; flow is [1, 2, H, W]")
        return flow[0, :, :rows, :columns].transpose(1, 2, 0)


def flow_estimator(config: MotionConfig) -> FlowEstimator:
    """DIS, or the network of the configuration."""
    return DISFlow() if config.model is None else ModelFlow(config.model)


class MotionStage(Stage):
    """Drops clips that stand still, and those that move more than flow can follow."""

    name = "motion"

    def __init__(self, config: MotionConfig) -> None:
        """`config` has the sampling, the model and the range."""
        self._config = config
        self._flow = flow_estimator(config)

    def settings(self) -> Mapping[str, Any]:
        """The sampling and the estimator."""
        config = self._config
        sampling = {"fps": config.fps, "width": config.width, "max_pairs": config.max_pairs}
        return {**sampling, "flow": self._flow.name}

    def score(self, unit: Unit) -> Score:
        """Mean magnitude over the shorter edge, averaged over the pairs, and its range."""
        info = info_of(unit.file)
        pairs = frame_pairs(info, *frame_range(unit, info), self._config)
        if not pairs:
            return {"motion": 0.0, "least": 0.0, "most": 0.0, "pairs": 0}
        indices = sorted({place for pair in pairs for place in pair})
        size = small_size(info, width=self._config.width)
        frames = dict(zip(indices, clip_frames(unit, indices, size), strict=True))
        values = [
            float(np.linalg.norm(self._flow(frames[a], frames[b]), axis=-1).mean()) / min(size)
            for a, b in pairs
        ]
        return {
            "motion": round(float(np.mean(values)), 6),
            "least": round(min(values), 6),
            "most": round(max(values), 6),
            "pairs": len(pairs),
        }

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare with the range."""
        config, motion = self._config, score["motion"]
        if motion < config.min_motion:
            return drop("too little motion", f"{motion:.4f}, less than {config.min_motion:g}")
        if motion > config.max_motion:
            return drop("too much motion", f"{motion:.4f}, more than {config.max_motion:g}")
        return KEEP


def frame_pairs(info: VideoInfo, first: int, stop: int, config: MotionConfig) -> list[tuple[int, int]]:
    """Pairs of frames ``1 / config.fps`` apart (or neighbours, in a slower stream), spread over a clip."""
    step = max(1, round(info.fps / config.fps))
    starts = spread(first, max(first, stop - step), config.max_pairs)
    return [(start, start + step) for start in starts]
