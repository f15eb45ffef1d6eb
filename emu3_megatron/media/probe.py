"""What a video file holds, found out before any frame is used: geometry, colour, and the time of every frame.

The frame table comes from a pass over the packets (no decoding), so that a frame is named by its
presentation time stamp and a seek can be checked against it. One frame is decoded, because only frames
state their rotation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from emu3_megatron.media.color import matrix_name
from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.files import Media
from emu3_megatron.media.riff import is_whole_avi

MAX_FRAME_PIXELS = 1 << 26
"""A frame larger than this (8192 x 8192) is refused before memory is taken for it."""

TAG_TOLERANCE, HEADER_TOLERANCE = 0.75, 2.5
"""Frames that a Matroska stream may lack before it counts as truncated: against the duration tag of the
stream, which FFmpeg writes exactly, and against the file's own duration."""

SOUGHT_BY_DTS = frozenset({"mpegts", "mpeg"})
"""Containers without an index, in which FFmpeg seeks the packet that is decoded, not shown, at an instant."""

DURATION_TAG = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)\s*$")
"""How FFmpeg and mkvmerge write a stream's duration; anybody may write anything there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoInfo:
    """One video stream: the first of its file."""

    codec: str
    """FFmpeg's name: ``h264``, ``vp9``, ``mjpeg``..."""
    width: int
    """Pixels across, as coded (before rotation)."""
    height: int
    """Pixels down, as coded (before rotation)."""
    pixel_format: str
    """FFmpeg's name, such as ``yuv420p``."""
    rotation: int
    """Quarter turns counter-clockwise, in degrees (0, 90, 180, 270), that make the picture upright."""
    pixel_aspect: float
    """Width of a pixel over its height, after rotation; 1.0 where the stream states none."""
    matrix: str
    """Colour matrix to RGB: ``bt601``, ``bt709``, ``bt2020``, ``smpte240m``, ``fcc``, or ``rgb`` for none."""
    full_range: bool
    """Whether luma spans 0..255 instead of 16..235."""
    time_base: Fraction
    """Seconds per tick of `pts`."""
    pts: npt.NDArray[np.int64]
    """Presentation time stamps in ticks of the frames that a player shows, ascending, int64 ``[N]``."""
    ordinal: bool
    """True where frames bear no time stamps, or wrong ones, and are known by their place alone."""
    key_frames: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((1, 2), np.int64))
    """Where decoding can begin, as the container says: places in `pts`, ascending from 0 on, and the ticks to
    seek for, int64 ``[K, 2]``."""

    @property
    def frame_count(self) -> int:
        """Number of frames a player shows."""
        return len(self.pts)

    @property
    def timestamps(self) -> npt.NDArray[np.float64]:
        """Seconds from the first frame to each frame, float64 ``[N]``."""
        return (self.pts - self.pts[0]) * float(self.time_base)

    def key_frame(self, place: int) -> tuple[int, int]:
        """The key frame from which the frame at `place` is decoded: its place, and the tick to seek for."""
        key, tick = self.key_frames[np.searchsorted(self.key_frames[:, 0], place, side="right") - 1]
        return int(key), int(tick)

    @property
    def fps(self) -> float:
        """Average frames per second; 1.0 for a single frame."""
        if self.frame_count < 2:
            return 1.0
        return (self.frame_count - 1) / float((self.pts[-1] - self.pts[0]) * self.time_base)

    @property
    def seconds(self) -> float:
        """Duration, the last frame shown for an average frame's time."""
        return self.frame_count / self.fps

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width in pixels after rotation."""
        turned = self.rotation in (90, 270)
        return (self.width, self.height) if turned else (self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class Packets:
    """What a pass over the packets of a stream tells. Time stamps are None where a container has none."""

    stamps: list[int | None]
    """Time stamps of the packets that yield frames."""
    shown: list[int | None]
    """Those that no edit list cuts away."""
    keys: list[tuple[int | None, int | None]]
    """Those of the shown that hold key frames, and the ticks to seek for."""
    corrupt: bool
    """Whether the container marks some as damaged."""
    opening: tuple[int | None, ...]
    """The `position` of the first packet, whatever it holds."""


def check_stream(container: Any) -> Any:
    """Return the first video stream, if its header allows decoding."""
    if not container.streams.video:
        raise MediaError("has no video stream")
    video = container.streams.video[0]
    context = video.codec_context
    if context is None or not context.width or not context.height:
        raise MediaError("has a video stream without a decoder or a picture size")
    if context.width * context.height > MAX_FRAME_PIXELS:
        raise MediaError(
            f"claims frames of {context.width}x{context.height} pixels, more than {MAX_FRAME_PIXELS} in all"
        )
    return video


def read_packets(container: Any) -> Packets:
    """Read the packets of an open container's first video stream to the end."""
    video = container.streams.video[0]
    codec = video.codec_context.codec.canonical_name
    by_dts = container.format.name in SOUGHT_BY_DTS
    stamps, shown, keys, corrupt = [], [], [], False
    opening: tuple[int | None, ...] = ()
    for packet in container.demux(video):
        opening = opening or position(packet)
        if not packet.size or not _yields_frame(packet, codec):
            continue
        stamp = packet.pts
        stamps.append(stamp)
        corrupt = corrupt or packet.is_corrupt
        if not packet.is_discard:
            shown.append(stamp)
            if packet.is_keyframe:
                keys.append((stamp, packet.dts if by_dts else stamp))
    return Packets(stamps=stamps, shown=shown, keys=keys, corrupt=corrupt, opening=opening)


def position(packet: Any) -> tuple[int | None, ...]:
    """What tells a packet from the others of its file."""
    return packet.pos, packet.dts, packet.pts, packet.size


def describe(container: Any, packets: Packets, frame: Any) -> VideoInfo:
    """Put together what packets and the first frame tell of a stream."""
    video = container.streams.video[0]
    pts, time_base, ordinal = _frame_table(container, packets)
    aspect = float(video.sample_aspect_ratio or 1) or 1.0
    rotation = round(frame.rotation / 90) % 4 * 90
    return VideoInfo(
        codec=video.codec_context.codec.canonical_name,
        width=frame.width,
        height=frame.height,
        pixel_format=frame.format.name,
        rotation=rotation,
        pixel_aspect=1 / aspect if rotation in (90, 270) else aspect,
        matrix=matrix_name(int(frame.colorspace), frame.format.name),
        full_range=int(frame.color_range) == 2 or frame.format.name.startswith("yuvj"),
        time_base=time_base,
        pts=pts,
        ordinal=ordinal,
        key_frames=_key_frames(pts, [] if ordinal else packets.keys),
    )


def _key_frames(
    pts: npt.NDArray[np.int64], keys: list[tuple[int | None, int | None]]
) -> npt.NDArray[np.int64]:
    """`VideoInfo.key_frames` from the time stamps of key frames and the ticks to seek for."""
    known = sorted((stamp, tick) for stamp, tick in keys if stamp is not None and tick is not None)
    table = np.array(known, np.int64).reshape(-1, 2)
    table[:, 0] = np.searchsorted(pts, table[:, 0])
    if not known or table[0, 0] > 0:
        table = np.concatenate([np.array([[0, pts[0]]]), table])
    return table


def _yields_frame(packet: Any, codec: str) -> bool:
    """Whether a packet yields a frame: VP8 has packets that only update a reference (RFC 6386, 9.1)."""
    return codec != "vp8" or bool(bytes(packet)[0] & 0x10)


def check_complete(container: Any, packets: Packets, media: Media) -> None:
    """Refuse a stream with damaged packets, or shorter than its container says.

    Raises:
        MediaError: it is; the message says what is missing.
        OSError: a fault of the file system that may pass.
    """
    video, count = container.streams.video[0], len(packets.stamps)
    if not count:
        raise MediaError("has a video stream without frames")
    if packets.corrupt:
        raise MediaError("is damaged or truncated: the container marks packets as corrupt")
    if count < video.frames and not (container.format.name == "avi" and is_whole_avi(media)):
        raise MediaError(f"is truncated: the container promises {video.frames} frames, {count} are there")
    if not packets.shown:
        raise MediaError("has no frame that its edit list shows")
    promised, tolerance = _promised_seconds(container, video)
    stamps = sorted(stamp for stamp in packets.stamps if stamp is not None)
    if not promised or len(stamps) < 2:
        return
    start = min(stamps[0], video.start_time or 0)
    frame = (stamps[-1] - stamps[0]) / (len(stamps) - 1) * float(video.time_base)
    found = float((stamps[-1] - start) * video.time_base) + frame
    if found < promised - tolerance * frame:
        raise MediaError(f"is truncated: the container promises {promised:.2f} s, {found:.2f} s are there")


def _promised_seconds(container: Any, video: Any) -> tuple[float | None, float]:
    """Duration that a Matroska header states, and the tolerance in frames.

    Other containers state a frame count, or nothing that FFmpeg does not estimate from what is there.
    """
    if "matroska" not in container.format.name:
        return None, 0.0
    tag = DURATION_TAG.match(video.metadata.get("DURATION") or "")
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]), TAG_TOLERANCE
    if container.duration and len(container.streams) == 1:
        return float(container.duration) / av.time_base, HEADER_TOLERANCE
    return None, 0.0


def _frame_table(container: Any, packets: Packets) -> tuple[npt.NDArray[np.int64], Fraction, bool]:
    """Time stamps of the shown frames, seconds per tick, and whether frames must be counted."""
    video = container.streams.video[0]
    known = [stamp for stamp in packets.shown if stamp is not None]
    if len(known) < len(packets.shown):
        rate = video.average_rate or video.guessed_rate or Fraction(25)
        return np.arange(len(packets.stamps), dtype=np.int64), 1 / Fraction(rate), True
    stamps = np.array(sorted(set(known)), dtype=np.int64)
    if container.format.name != "avi":
        return stamps, Fraction(video.time_base), False
    if len(stamps) < len(known):
        # FFmpeg guesses the stamps of H.264 and of B-frames, and may give the last two of them the same one.
        places = np.arange(len(known))
        stamps = np.maximum.accumulate(np.sort(np.array(known, np.int64)) - places) + places
        return stamps, Fraction(video.time_base), True
    # AVI stamps packets in the order of decoding; frames that come in another order keep the wrong stamps.
    return stamps, Fraction(video.time_base), video.codec_context.has_b_frames > 0
