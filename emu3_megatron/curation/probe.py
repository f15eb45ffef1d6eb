"""The first look at a file: can it be decoded, and is it large and long enough?"""

from __future__ import annotations

from emu3_megatron.curation.config import ProbeConfig, SizeConfig
from emu3_megatron.curation.frames import image_of, info_of
from emu3_megatron.curation.units import KEEP, Decision, Score, Stage, Unit, drop


def check_size(rows: int, columns: int, config: SizeConfig) -> Decision:
    """Compare a picture's size with the limits."""
    size = f"{columns}x{rows}"
    if columns < config.min_width or rows < config.min_height:
        return drop("too small", f"{size}, less than {config.min_width}x{config.min_height}")
    if max(rows, columns) > config.max_aspect_ratio * min(rows, columns):
        return drop("too elongated", f"{size}, more than {config.max_aspect_ratio:g} to 1")
    return KEEP


class ImageProbe(Stage):
    """Decodes an image, and compares its size with the limits."""

    name = "probe"

    def __init__(self, config: SizeConfig) -> None:
        """`config` has the limits."""
        self._config = config

    def score(self, unit: Unit) -> Score:
        """Pixels across and down, upright."""
        rows, columns = image_of(unit.file).shape[:2]
        return {"width": columns, "height": rows}

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare with the limits."""
        return check_size(score["height"], score["width"], self._config)


class VideoProbe(Stage):
    """Reads a video's packets, and compares its size, duration and rate with the limits."""

    name = "probe"

    def __init__(self, config: ProbeConfig) -> None:
        """`config` has the limits."""
        self._config = config

    def score(self, unit: Unit) -> Score:
        """What the file holds."""
        info = info_of(unit.file)
        rows, columns = info.upright_size
        return {
            "width": columns,
            "height": rows,
            "seconds": round(info.seconds, 3),
            "fps": round(info.fps, 3),
            "frames": info.frame_count,
            "codec": info.codec,
        }

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare with the limits."""
        config = self._config
        decision = check_size(score["height"], score["width"], config)
        if not decision.keep:
            return decision
        if score["seconds"] < config.min_seconds:
            return drop("video too short", f"{score['seconds']:.2f} s, less than {config.min_seconds:g} s")
        if score["fps"] < config.min_fps:
            return drop("frame rate too low", f"{score['fps']:g} FPS, less than {config.min_fps:g}")
        return KEEP
