"""The first look at a file: can it be decoded, and is it large and long enough?"""

from __future__ import annotations

from emu3_megatron.curation.config import ProbeConfig, SizeConfig
from emu3_megatron.curation.frames import frame_range, image_of, info_of
from emu3_megatron.curation.units import KEEP, Decision, Score, Stage, Unit, drop
from emu3_megatron.files import entry_interval
from emu3_megatron.media import MediaError
from emu3_megatron.media import frame_range as media_range


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


class PartStage(Stage):
    """Finds the frames of an entry that means a part of its video by ``start`` and ``end``."""

    name = "part"

    def applies_to(self, unit: Unit) -> bool:
        """Whether an entry is a part of a video."""
        return unit.kind == "video" and entry_interval(unit.record) is not None

    def score(self, unit: Unit) -> Score:
        """First frame and the one after the last, the seconds of both, and the frames of the whole file."""
        info = info_of(unit.file)
        interval = entry_interval(unit.record) or (0.0, None)
        first, stop = media_range(info, interval)
        if stop == first:
            end = "its end" if interval[1] is None else f"{interval[1]:g} s"
            raise MediaError(f"lasts {info.seconds:.2f} s and has no frame from {interval[0]:g} s to {end}")
        times = info.timestamps
        return {
            "frames": [first, stop],
            "seconds": [round(float(times[first]), 6), round(float(times[stop - 1]) + 1 / info.fps, 6)],
            "of": info.frame_count,
        }

    def decide(self, unit: Unit, score: Score) -> Decision:
        """A part that has frames stays."""
        return KEEP

    def part(self, unit: Unit, score: Score) -> Unit:
        """The part as a unit."""
        (first, stop), (start, end) = score["frames"], score["seconds"]
        return unit.clip((first, stop), (start, end))


class VideoProbe(Stage):
    """Reads a video's packets, and compares its size, duration and rate with the limits."""

    name = "probe"

    def __init__(self, config: ProbeConfig) -> None:
        """`config` has the limits."""
        self._config = config

    def score(self, unit: Unit) -> Score:
        """What the file, or the part of it, holds."""
        info = info_of(unit.file)
        rows, columns = info.upright_size
        first, stop = frame_range(unit, info)
        start, end = unit.interval or (0.0, info.seconds)
        return {
            "width": columns,
            "height": rows,
            "seconds": round(end - start, 3),
            "fps": round(info.fps, 3),
            "frames": stop - first,
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
