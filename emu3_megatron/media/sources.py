"""Frames of a video by index: from DALI or from PyAV, behind one protocol and with the same pixels.

Both convert YCbCr to RGB with FFmpeg's converter. Given the same flags, its results are equal bit for bit,
so on a CPU it does not matter which source decoded a frame. NVDEC on a GPU decodes to the same YCbCr but
converts with its own kernel: expect differences of one level.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Protocol

import av
import numpy as np
import numpy.typing as npt

from emu3_megatron.errors import MachineFault
from emu3_megatron.media import dali
from emu3_megatron.media.color import correct_matrix
from emu3_megatron.media.convert import FFmpegConverter, RGBConverter
from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.files import read_media
from emu3_megatron.media.probe import VideoInfo
from emu3_megatron.media.video import OpenVideo

Frames = npt.NDArray[np.uint8]
"""RGB frames, uint8 ``[T, H, W, 3]``, upright."""

DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
"""What DALI decodes without a GPU (2.1.1 and later)."""

DALI_GPU_CODECS = frozenset({"h264", "hevc", "av1", "mpeg4", "vp8", "vp9"})
"""What NVDEC decodes."""

DALI_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
"""Chroma layouts that DALI reads the same way on CPU and GPU; H.264 4:2:2 and 4:4:4 are not in NVDEC."""


FRAMES_FOR_A_SEEK = 4
"""A decoder that starts anew costs as much as about so many frames."""


class FrameSource(Protocol):
    """Reads exact frames of a video."""

    name: str
    """Goes into a dataset's provenance."""

    def supports(self, info: VideoInfo) -> bool:
        """Whether this source decodes such a stream."""
        ...

    def frames(self, video: OpenVideo, indices: Sequence[int]) -> Frames:
        """Decode the frames at `indices` of ``video.info.pts`` (ascending, repeats allowed).

        Raises:
            MediaError: a wanted frame is missing or damaged.
            OSError: a fault of the file system that may pass.
        """
        ...


class PyAVSource:
    """FFmpeg's software decoders through PyAV: every codec, exact on every container."""

    name = f"pyav {version('av')}"

    def __init__(self) -> None:
        """Nothing is opened yet."""
        self._ffmpeg = FFmpegConverter()

    def supports(self, info: VideoInfo) -> bool:
        """Everything that could be probed."""
        return True

    def frames(
        self, video: OpenVideo, indices: Sequence[int], *, size: tuple[int, int] | None = None
    ) -> Frames:
        """See `FrameSource.frames`; with `size` (rows, columns, upright) the frames are scaled as they are
        converted, for whoever needs many small ones."""
        _check_indices(video.info, indices)
        places = sorted(set(indices))
        pictures = np.empty((len(places), *_coded_size(video.info, size), 3), np.uint8)
        convert, found, sought = RGBConverter(self._ffmpeg), 0, False
        for run in _runs(video.info, places):
            entry = video.entry(run[0])
            sought = sought or entry is not None
            before, found = found, found + _decode(video, run, pictures[found:], convert, entry)
            if found < before + len(run):
                break
        if found < len(places) and sought:
            # Some containers lie about key frames: transport streams, open groups, fragments.
            found = _decode(video, places, pictures, convert, None)
        if found < len(places):
            raise MediaError(
                f"is damaged: {len(places) - found} of {len(places)} chosen frames do not decode"
            )
        chosen = pictures if len(places) == len(indices) else pictures[np.searchsorted(places, indices)]
        return _upright(chosen, video.info)

    def stream(
        self,
        video: OpenVideo,
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
        info = video.info
        stop = info.frame_count if stop is None else stop
        given = first
        entry = video.entry(first)
        for start in (entry,) if entry is None else (entry, None):
            try:
                for picture in _stream(video, given, stop, size, RGBConverter(self._ffmpeg), start):
                    yield picture
                    given += 1
            except MediaError:
                if start is None:
                    raise
            if given >= stop:
                return
        raise MediaError(f"is damaged: frame {given} of {info.frame_count} does not decode")


def _runs(info: VideoInfo, places: Sequence[int]) -> list[Sequence[int]]:
    """Cut `places` where a seek to the next one's key frame passes over frames that nobody wants."""
    cuts = [
        number
        for number in range(1, len(places))
        if info.key_frame(places[number])[0] - places[number - 1] > FRAMES_FOR_A_SEEK
    ]
    return [places[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(places)])]


def _decode(
    video: OpenVideo, places: Sequence[int], pictures: Frames, convert: RGBConverter, entry: int | None
) -> int:
    """Decode the frames at `places` into the first of `pictures`, as coded; returns how many were found.

    After a seek it gives up where the first of them is passed by, or a frame is damaged, which may only lack
    what it refers to.
    """
    info = video.info
    missing = dict(zip(_names(info, places), pictures, strict=False))
    first = next(iter(missing))
    for name, frame in _named(video, entry):
        if frame.is_corrupt:
            if entry is not None:
                break
            raise _damaged(frame)
        if name in missing:
            _convert(frame, info, convert, missing.pop(name))
        if not missing or (entry is not None and first in missing and name is not None and name > first):
            break
    return len(places) - len(missing)


def _stream(
    video: OpenVideo,
    first: int,
    stop: int,
    size: tuple[int, int] | None,
    convert: RGBConverter,
    entry: int | None,
) -> Iterator[Frames]:
    """Frames in order for as long as none is missing; after a seek the first may be."""
    info = video.info
    places = {name: place for place, name in enumerate(_names(info, range(info.frame_count)))}
    for name, frame in _named(video, entry):
        place = places.get(name, -1)
        if frame.is_corrupt and not (entry is not None and place < first):
            raise _damaged(frame)
        if place > first:
            return
        if place == first:
            picture = np.empty((*_coded_size(info, size), 3), np.uint8)
            _convert(frame, info, convert, picture)
            yield _upright(picture, info)
            first += 1
        if first >= stop:
            return


def _names(info: VideoInfo, places: Sequence[int]) -> list[int]:
    """What decoded frames at these places are known by: their time stamps, or their number."""
    return list(places) if info.ordinal else [int(info.pts[place]) for place in places]


def _named(video: OpenVideo, entry: int | None) -> Iterator[tuple[Any, Any]]:
    """Frames from an entry on, each with its name."""
    for number, frame in enumerate(video.decode(entry)):
        yield (number if video.info.ordinal else frame.pts), frame


def _damaged(frame: Any) -> MediaError:
    """The error for a frame that the decoder could only conceal; so is all that refers to it."""
    return MediaError(f"is damaged: the decoder marks the frame at tick {frame.pts} as corrupt")


class DALISource:
    """DALI's video decoder: NVDEC on a GPU; on a CPU, VP8, VP9 and Motion JPEG."""

    name = f"dali {version(dali.distribution())}"

    def __init__(self, *, device: str = "cpu", device_index: int | None = None) -> None:
        """Decode on ``cpu`` or ``gpu``: on the GPU of that index, or the thread's current one where None."""
        self._device = dali.check_device(device)
        self._index = device_index if device == "gpu" else None
        self._codecs = DALI_GPU_CODECS if self._device == "gpu" else DALI_CPU_CODECS

    def supports(self, info: VideoInfo) -> bool:
        """Whether DALI has the codec on its device, and the container has time stamps."""
        return info.codec in self._codecs and info.pixel_format in DALI_PIXEL_FORMATS and not info.ordinal

    def frames(self, video: OpenVideo, indices: Sequence[int]) -> Frames:
        """See `FrameSource.frames`."""
        info = video.info
        _check_indices(info, indices)
        encoded = np.frombuffer(read_media(video.media), np.uint8)
        try:
            decoded = self._decode(encoded, indices)
        except RuntimeError as error:
            if not self.supports(info):
                raise MediaError(f"cannot be decoded by DALI: {dali.reason(error)}") from error
            decoded = self._decode_again(encoded, indices)
        # NVDEC drops the last row and column of odd sizes; DALI ignores rotation and knows only BT.601.
        pad = ((0, 0), (0, info.height - decoded.shape[1]), (0, info.width - decoded.shape[2]), (0, 0))
        if any(after for _, after in pad):
            decoded = np.pad(decoded, pad, mode="edge")
        return _upright(correct_matrix(decoded, info.matrix), info)

    def _decode(self, encoded: npt.NDArray[np.uint8], indices: Sequence[int]) -> Frames:
        return dali.decode_video(encoded, indices, self._device, self._index)

    def _decode_again(self, encoded: npt.NDArray[np.uint8], indices: Sequence[int]) -> Frames:
        """Decode a file that failed, once the decoder has shown that it works.

        DALI's errors do not say whether the file or the machine is to blame, and codes must not depend on a
        GPU's state.
        """
        try:
            self._decode(np.frombuffer(known_clip(self._device), np.uint8), [0])
        except RuntimeError as error:
            raise MachineFault(
                f"DALI's decoder on the {self._device} fails with a clip known to be good "
                f"({dali.reason(error)}); look after the GPU and its driver, or take --frame-source pyav"
            ) from error
        try:
            return self._decode(encoded, indices)
        except RuntimeError as error:
            raise MediaError(f"cannot be decoded by DALI: {dali.reason(error)}") from error


@lru_cache(maxsize=2)
def known_clip(device: str) -> bytes:
    """A small clip that DALI decodes on ``cpu`` or ``gpu``, where the decoder works at all."""
    codec, pixel_format = ("mpeg4", "yuv420p") if device == "gpu" else ("mjpeg", "yuvj420p")
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video: Any = container.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = 256, 256, pixel_format
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((256, 256, 3), np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return stream.getvalue()


class AutomaticSource:
    """NVDEC for what it decodes, PyAV for the rest and where NVDEC fails."""

    def __init__(self, *, device_index: int | None = None) -> None:
        """Decode on the GPU of that index, or the thread's current one where None."""
        self._dali = DALISource(device="gpu", device_index=device_index)
        self._pyav = PyAVSource()
        self.name = f"auto ({self._dali.name} on gpu, {self._pyav.name})"

    def supports(self, info: VideoInfo) -> bool:
        """Everything that could be probed."""
        return True

    def frames(self, video: OpenVideo, indices: Sequence[int]) -> Frames:
        """See `FrameSource.frames`."""
        if self._dali.supports(video.info):
            try:
                return self._dali.frames(video, indices)
            except MediaError:
                pass  # PyAV has the last word, and the better message
        return self._pyav.frames(video, indices)


def frame_source(name: str = "auto", *, device: str = "cpu", device_index: int | None = None) -> FrameSource:
    """Make a source by name.

    Args:
        name: ``dali``, ``pyav``, or ``auto``: DALI where it is the cheaper one, which is on a GPU.
        device: ``cpu`` or ``gpu``, for DALI.
        device_index: which GPU, as CUDA counts them; the current one of the thread that decodes where None.

    Raises:
        ValueError: another name, or a GPU where DALI sees none.
    """
    if name == "dali":
        return DALISource(device=device, device_index=device_index)
    if name == "auto" and dali.check_device(device) == "gpu":
        return AutomaticSource(device_index=device_index)
    if name in ("auto", "pyav"):
        return PyAVSource()
    raise ValueError(f"unknown frame source {name!r}; choose auto, dali or pyav")


def _check_indices(info: VideoInfo, indices: Sequence[int]) -> None:
    """Refuse an empty choice and indices outside the video."""
    if not len(indices) or min(indices) < 0 or max(indices) >= info.frame_count:
        raise ValueError(f"frame indices {list(indices)} must lie in 0..{info.frame_count - 1}, at least one")


def _coded_size(info: VideoInfo, size: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns before rotation of pictures that are `size` after it; the stream's own for None."""
    if size is None:
        return info.height, info.width
    return size[::-1] if info.rotation in (90, 270) else size


def _convert(frame: Any, info: VideoInfo, convert: RGBConverter, picture: Frames) -> None:
    """Fill `picture` with a PyAV frame as RGB, refusing a change of size."""
    if (frame.height, frame.width) != (info.height, info.width):
        raise MediaError(
            f"changes size midway, from {info.width}x{info.height} to {frame.width}x{frame.height}"
        )
    convert(frame, picture)


def _upright(frames: Frames, info: VideoInfo) -> Frames:
    """Turn pictures ``[..., H, W, 3]`` as the stream's display matrix says."""
    if info.rotation == 0:
        return frames
    return np.ascontiguousarray(np.rot90(frames, info.rotation // 90, axes=(-3, -2)))
