"""Frames of a video by index: from DALI or from PyAV, behind one protocol and with the same pixels.

Both convert YCbCr to RGB with FFmpeg's converter. Given the same flags, its results are equal bit for bit,
so on a CPU it does not matter which source decoded a frame. NVDEC on a GPU decodes to the same YCbCr but
converts with its own kernel: expect differences of one level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import av
import numpy as np
import numpy.typing as npt

from emu3_megatron.media import dali
from emu3_megatron.media.color import correct_matrix
from emu3_megatron.media.convert import RGBConverter
from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.files import Media, open_media, read_media
from emu3_megatron.media.probe import VideoInfo

Frames = npt.NDArray[np.uint8]
"""RGB frames, uint8 ``[T, H, W, 3]``, upright."""

DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
"""What DALI decodes without a GPU (2.1.1 and later)."""

DALI_GPU_CODECS = frozenset({"h264", "hevc", "av1", "mpeg4", "vp8", "vp9"})
"""What NVDEC decodes."""

DALI_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
"""Chroma layouts that DALI reads the same way on CPU and GPU; H.264 4:2:2 and 4:4:4 are not in NVDEC."""


class FrameSource(Protocol):
    """Reads exact frames of a probed video."""

    name: str
    """Goes into a dataset's provenance."""

    def supports(self, info: VideoInfo) -> bool:
        """Whether this source decodes such a stream."""
        ...

    def frames(self, media: Media, info: VideoInfo, indices: Sequence[int]) -> Frames:
        """Decode the frames at `indices` of ``info.pts`` (ascending, repeats allowed).

        Raises:
            MediaError: a wanted frame is missing or damaged.
            OSError: a fault of the file system that may pass.
        """
        ...


class PyAVSource:
    """FFmpeg's software decoders through PyAV: every codec, exact on every container."""

    name = f"pyav {version('av')}"

    def __init__(self, *, threads: int = 1) -> None:
        """Decode with this many threads a file."""
        self._threads = threads

    def supports(self, info: VideoInfo) -> bool:
        """Everything that could be probed."""
        return True

    def frames(
        self,
        media: Media,
        info: VideoInfo,
        indices: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
    ) -> Frames:
        """See `FrameSource.frames`; with `size` (rows, columns, upright) the frames are scaled as they are
        converted, for whoever needs many small ones."""
        _check_indices(info, indices)
        wanted = {int(info.pts[i]) for i in indices}
        try:
            found = self._decode(media, info, wanted, size, seek=min(indices) > 0 and not info.ordinal)
            if found.keys() != wanted:
                # Some containers lie about key frames: transport streams, open groups, fragments.
                found = self._decode(media, info, wanted, size, seek=False)
        except av.FFmpegError as error:
            raise MediaError(f"cannot be decoded: {error.strerror or error}") from error
        if found.keys() != wanted:
            raise MediaError(
                f"is damaged: {len(wanted) - len(found)} of {len(wanted)} chosen frames do not decode"
            )
        return np.stack([found[int(info.pts[i])] for i in indices])

    def stream(
        self,
        media: Media,
        info: VideoInfo,
        *,
        first: int = 0,
        stop: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Iterator[Frames]:
        """Decode the frames from `first` to before `stop` (the end where None), one ``[H, W, 3]`` at a time.

        Raises:
            MediaError: a frame is missing or damaged; frames before it have been given.
            OSError: a fault of the file system that may pass.
        """
        stop = info.frame_count if stop is None else stop
        given = first
        for seek in ([True] if first > 0 and not info.ordinal else []) + [False]:
            try:
                for frame in self._stream(media, info, given, stop, size, seek=seek):
                    yield frame
                    given += 1
            except av.FFmpegError as error:
                raise MediaError(f"cannot be decoded: {error.strerror or error}") from error
            except MediaError:
                if not seek:
                    raise
            if given >= stop:
                return
        raise MediaError(f"is damaged: frame {given} of {info.frame_count} does not decode")

    def _stream(
        self,
        media: Media,
        info: VideoInfo,
        first: int,
        stop: int,
        size: tuple[int, int] | None,
        *,
        seek: bool,
    ) -> Iterator[Frames]:
        """Frames in order for as long as none is missing; after a seek the first may be."""
        places = {int(stamp): place for place, stamp in enumerate(info.pts)}
        convert = RGBConverter()
        with open_media(media) as opened, av.open(opened, metadata_errors="replace") as container:
            video = container.streams.video[0]
            video.codec_context.thread_count = self._threads
            if seek:
                container.seek(int(info.pts[first]), stream=video, backward=True, any_frame=False)
            for ordinal, frame in enumerate(container.decode(video)):
                place = places.get(ordinal if info.ordinal else frame.pts, -1)
                if frame.is_corrupt and not (seek and place < first):
                    raise MediaError(
                        f"is damaged: the decoder marks the frame at tick {frame.pts} as corrupt"
                    )
                if place > first:
                    return
                if place == first:
                    yield _picture(frame, info, convert, size)
                    first += 1
                if first >= stop:
                    return

    def _decode(
        self, media: Media, info: VideoInfo, wanted: set[int], size: tuple[int, int] | None, *, seek: bool
    ) -> dict[int, Any]:
        """Decode from the key frame before the first wanted stamp (or from the start) to the last one."""
        last = max(wanted)
        found: dict[int, Any] = {}
        convert = RGBConverter()
        with open_media(media) as stream, av.open(stream, metadata_errors="replace") as container:
            video = container.streams.video[0]
            video.codec_context.thread_count = self._threads
            if seek:
                container.seek(min(wanted), stream=video, backward=True, any_frame=False)
            for ordinal, frame in enumerate(container.decode(video)):
                if (
                    frame.is_corrupt
                ):  # so is all that refers to it; after a seek it may only lack its reference
                    if seek:
                        return {}
                    raise MediaError(
                        f"is damaged: the decoder marks the frame at tick {frame.pts} as corrupt"
                    )
                stamp = ordinal if info.ordinal else frame.pts
                if stamp in wanted:
                    found[stamp] = _picture(frame, info, convert, size)
                if stamp is not None and stamp >= last and len(found) == len(wanted):
                    break
        return found


class DALISource:
    """DALI's video decoder: NVDEC on a GPU; on a CPU, VP8, VP9 and Motion JPEG."""

    name = f"dali {version(dali.distribution())}"

    def __init__(self, *, device: str = "cpu") -> None:
        """Decode on ``cpu`` or ``gpu``."""
        self._device = dali.check_device(device)
        self._codecs = DALI_GPU_CODECS if self._device == "gpu" else DALI_CPU_CODECS

    def supports(self, info: VideoInfo) -> bool:
        """Whether DALI has the codec on its device, and the container has time stamps."""
        return info.codec in self._codecs and info.pixel_format in DALI_PIXEL_FORMATS and not info.ordinal

    def frames(self, media: Media, info: VideoInfo, indices: Sequence[int]) -> Frames:
        """See `FrameSource.frames`."""
        _check_indices(info, indices)
        encoded = np.frombuffer(read_media(media), np.uint8)
        try:
            decoded = dali.decode_video(encoded, indices, self._device)
        except RuntimeError as error:
            raise MediaError(f"cannot be decoded by DALI: {dali.reason(error)}") from error
        # NVDEC drops the last row and column of odd sizes; DALI ignores rotation and knows only BT.601.
        pad = ((0, 0), (0, info.height - decoded.shape[1]), (0, info.width - decoded.shape[2]), (0, 0))
        if any(after for _, after in pad):
            decoded = np.pad(decoded, pad, mode="edge")
        return _upright(correct_matrix(decoded, info.matrix), info)


class AutomaticSource:
    """DALI for what it decodes with the stream's own colours, PyAV for the rest and where DALI fails."""

    def __init__(self, *, device: str = "cpu") -> None:
        """Decode on ``cpu`` or ``gpu``."""
        self._dali = DALISource(device=device)
        self._pyav = PyAVSource()
        self._device = device
        self.name = f"auto ({self._dali.name} on {device}, {self._pyav.name})"

    def supports(self, info: VideoInfo) -> bool:
        """Everything that could be probed."""
        return True

    def frames(self, media: Media, info: VideoInfo, indices: Sequence[int]) -> Frames:
        """See `FrameSource.frames`."""
        exact = self._device == "gpu" or info.matrix == "bt601"
        if exact and self._dali.supports(info):
            try:
                return self._dali.frames(media, info, indices)
            except MediaError:
                pass  # PyAV has the last word, and the better message
        return self._pyav.frames(media, info, indices)


def frame_source(name: str = "auto", *, device: str = "cpu") -> FrameSource:
    """Make a source by name.

    Args:
        name: ``auto``, ``dali`` or ``pyav``.
        device: ``cpu`` or ``gpu``, for DALI.

    Raises:
        ValueError: another name, or a GPU where DALI sees none.
    """
    if name == "auto":
        return AutomaticSource(device=device)
    if name == "dali":
        return DALISource(device=device)
    if name == "pyav":
        return PyAVSource()
    raise ValueError(f"unknown frame source {name!r}; choose auto, dali or pyav")


def _check_indices(info: VideoInfo, indices: Sequence[int]) -> None:
    """Refuse an empty choice and indices outside the video."""
    if not len(indices) or min(indices) < 0 or max(indices) >= info.frame_count:
        raise ValueError(f"frame indices {list(indices)} must lie in 0..{info.frame_count - 1}, at least one")


def _picture(frame: Any, info: VideoInfo, convert: RGBConverter, size: tuple[int, int] | None) -> Frames:
    """One PyAV frame as RGB, uint8 ``[H, W, 3]``, upright, refusing a change of size; `size` is upright."""
    if (frame.height, frame.width) != (info.height, info.width):
        raise MediaError(
            f"changes size midway, from {info.width}x{info.height} to {frame.width}x{frame.height}"
        )
    if size is not None and info.rotation in (90, 270):
        size = size[::-1]
    return _upright(convert(frame, size), info)


def _upright(frames: Frames, info: VideoInfo) -> Frames:
    """Turn pictures ``[..., H, W, 3]`` as the stream's display matrix says."""
    if info.rotation == 0:
        return frames
    return np.ascontiguousarray(np.rot90(frames, info.rotation // 90, axes=(-3, -2)))
