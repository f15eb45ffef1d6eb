"""A video file held open, so that looking into it and taking frames from it share their work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from types import TracebackType
from typing import Any

import av

from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.files import Media, open_media
from emu3_megatron.media.probe import (
    VideoInfo,
    check_complete,
    check_stream,
    describe,
    position,
    read_packets,
)

ALONE = {"protocol_whitelist": "none"}
"""Playlists and session descriptions name other files and hosts; FFmpeg may open none but the file itself."""


class OpenVideo:
    """A video, open until the end of ``with OpenVideo(media) as video``. Not for several threads.

    FFmpeg opens the file when something is first asked of it. The frame that the probe decodes is the first
    of `decode`, and the decoder goes on from there.
    """

    def __init__(self, media: Media, info: VideoInfo | None = None) -> None:
        """Name the file.

        Args:
            media: the video.
            info: what was found in the same file before; it is not probed again then.
        """
        self.media = media
        self._info = info
        self._files = ExitStack()
        self._container: Any = None
        self._frames: Iterator[Any] | None = None

    def __enter__(self) -> OpenVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def info(self) -> VideoInfo:
        """What the file holds: the packets of its first video stream are read, and one frame is decoded.

        Raises:
            MediaError: not a video, damaged, without frames, or with fewer than the container promises.
            OSError: a fault of the file system that may pass.
        """
        if self._info is None:
            try:
                self._info = self._probe()
            except av.FFmpegError as error:
                raise MediaError(f"cannot be read as video: {_reason(error)}") from error
        return self._info

    def entry(self, place: int) -> int | None:
        """Where to begin decoding for the sake of the frame at `place`, as `decode` takes it."""
        key, tick = self.info.key_frame(place)
        return tick if key else None

    def decode(self, tick: int | None = None) -> Iterator[Any]:
        """PyAV's frames in the order of showing; whatever an earlier call gave has ended.

        Args:
            tick: begin at the key frame that the container finds at this tick, which may be the wrong one;
                None: begin at the first frame.

        Raises:
            MediaError: the decoder gives up.
            OSError: a fault of the file system that may pass.
        """
        try:
            yield from self._from_first() if tick is None else self._from_key(tick)
        except av.FFmpegError as error:
            raise MediaError(f"cannot be decoded: {_reason(error)}") from error

    def _from_first(self) -> Iterator[Any]:
        """All frames. Where some were taken before, the file is opened anew: seeking may lead elsewhere."""
        frames, self._frames = self._frames or self._open(), None
        return frames

    def _from_key(self, tick: int) -> Iterator[Any]:
        """The frames from a key frame on."""
        if self._container is None:
            self._open()
        self._frames = None
        video = self._container.streams.video[0]
        self._container.seek(tick, stream=video, backward=True, any_frame=False)
        frames: Iterator[Any] = self._container.decode(video)
        return frames

    def _open(self) -> Iterator[Any]:
        """Open the file, anew where it is open, and return its frames; they are not decoded yet."""
        self._close()
        stream = self._files.enter_context(open_media(self.media))
        self._container = self._files.enter_context(av.open(stream, metadata_errors="replace", options=ALONE))
        video = check_stream(self._container)
        video.codec_context.thread_count = 1  # threads take longer to start than a clip to decode
        frames: Iterator[Any] = self._container.decode(video)
        return frames

    def _close(self) -> None:
        """Close the file where it is open."""
        self._files.close()
        self._container = self._frames = None

    def _probe(self) -> VideoInfo:
        """Read the packets, then decode the first frame, which stays the first of `_frames`."""
        self._open()
        packets = read_packets(self._container)
        check_complete(self._container, packets, self.media)
        frames = self._rewound(packets.opening)
        frame = next(frames, None)
        if frame is None:
            raise MediaError("has no frame that can be decoded")
        self._frames = chain([frame], frames)
        return describe(self._container, packets, frame)

    def _rewound(self, opening: tuple[int | None, ...]) -> Iterator[Any]:
        """The frames from the file's first packet on, which is recognised: not all containers seek to it."""
        video = self._container.streams.video[0]
        self._container.seek(0)
        packets = self._container.demux(video)
        packet = next(packets)
        if position(packet) != opening:
            return self._open()
        return (frame for packet in chain([packet], packets) for frame in packet.decode())


def probe_video(media: Media) -> VideoInfo:
    """What a video file holds; see `OpenVideo.info` for errors, and use that to take frames as well."""
    with OpenVideo(media) as video:
        return video.info


def _reason(error: Any) -> str:
    """FFmpeg's words alone, without its error number and the name of the stream object."""
    return str(getattr(error, "strerror", None) or error).split(";")[0]
