"""From entries to pixels, ahead of the encoder, in threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.media import (
    Clip,
    FrameSource,
    Geometry,
    Media,
    MediaError,
    OpenVideo,
    Preprocessor,
    ResizeRule,
    decode_images,
    frame_source,
    image_dimensions,
    read_media,
)
from emu3_megatron.tokenization.config import TokenizationConfig
from emu3_megatron.tokenization.entries import BadEntry, Entry
from emu3_megatron.tokenization.retrying import retry

CHUNK_ENTRIES = 32
"""Entries decoded together at most; DALI takes images by the batch."""

CHUNK_BYTES = 1 << 26
"""Bytes of the pixels that a chunk gives at most, unless it is one clip: 2 clips of 8 frames of 512 x 512."""

CHUNKS_AHEAD = 2
"""Chunks kept ready for each thread, at most."""

AHEAD_BYTES = 1 << 31
"""Bytes of the pixels of all chunks that are begun or wait, at most, unless it is one: whatever the number of
threads."""

SOURCE_BYTES = 1 << 26
"""Bytes of decoded pictures at their own size that wait in a thread for the preprocessing graph; one more, of
any size, joins them before the graph runs."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An entry with its pixels, ready to be encoded."""

    entry: Entry
    """Where it comes from."""
    pixels: torch.Tensor | None
    """float32 ``[F, 3, H, W]`` in [-1, 1], F = 1 for an image; None for text."""
    clip: Clip | None
    """The frames chosen, for a video."""


@dataclass(frozen=True)
class _Pictures:
    """Decoded frames that wait for the preprocessing graph."""

    entry: Entry
    frames: npt.NDArray[np.uint8]
    geometry: Geometry
    clip: Clip | None


class SampleDecoder:
    """Decodes entries in order, in background threads. A context manager, which ends the threads.

    What waits is bounded in bytes: pixels for the encoder by `AHEAD_BYTES` over all threads; pictures of
    their own size, in each thread, by `SOURCE_BYTES` and one picture, twice for stills.
    """

    def __init__(self, config: TokenizationConfig, spatial_factor: int) -> None:
        """Prepare the rules; each thread builds its own decoders."""
        self._config = config
        self._clip_rule = config.clip_rule()
        self._rules = {kind: config.resize_rule(kind, spatial_factor) for kind in ("image", "video")}
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self.seconds = 0.0
        """Time spent decoding, all threads together."""
        self.waited = 0.0
        """Time for which whoever takes the samples had to wait for one."""

    def __enter__(self) -> SampleDecoder:
        """Nothing to do: threads start with the first work."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what is not begun, and wait for the rest."""
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, entries: Iterable[Entry | BadEntry]) -> Iterator[Sample | BadEntry]:
        """Yield each entry's sample, or what is wrong with it, in the order of `entries`.

        Raises:
            OSError: a fault of the file system that did not pass.
            OutOfMemory: memory stayed too short.
        """
        chunks = self._chunks(entries)
        waiting: deque[tuple[Future[tuple[list[Sample | BadEntry], float]], int]] = deque()
        most, held = CHUNKS_AHEAD * self._config.decode_threads, 0
        following = next(chunks, None)
        while following is not None or waiting:
            while following is not None and (
                not waiting or (len(waiting) < most and held + following[1] <= AHEAD_BYTES)
            ):
                chunk, size = following
                waiting.append((self._pool.submit(self._decode, chunk), size))
                held += size
                following = next(chunks, None)
            begin = time.perf_counter()
            future, size = waiting.popleft()
            samples, seconds = future.result()
            del future  # which holds the samples, too
            self.waited += time.perf_counter() - begin
            self.seconds += seconds
            yield from samples
            del samples
            held -= size

    def _chunks(self, entries: Iterable[Entry | BadEntry]) -> Iterator[tuple[list[Entry | BadEntry], int]]:
        """Cut `entries` into chunks, each with about how many bytes of pixels it gives.

        Where they are cut changes no pixel: every picture is decoded and preprocessed for itself.
        """
        chunk: list[Entry | BadEntry] = []
        size = 0
        for entry in entries:
            more = self._result_bytes(entry)
            if chunk and (len(chunk) == CHUNK_ENTRIES or size + more > CHUNK_BYTES):
                yield chunk, size
                chunk, size = [], 0
            chunk.append(entry)
            size += more
        if chunk:
            yield chunk, size

    def _result_bytes(self, entry: Entry | BadEntry) -> int:
        """About how many bytes of pixels an entry gives, before anything of it is read."""
        if isinstance(entry, BadEntry) or entry.media is None:
            return 0
        rule = self._rules[entry.kind]
        pixels = rule.area if isinstance(rule, ResizeRule) else rule.max_area
        frames = 1 if entry.kind == "image" else self._config.video_frames
        return frames * pixels * 3 * torch.float32.itemsize

    def _decode(self, entries: list[Entry | BadEntry]) -> tuple[list[Sample | BadEntry], float]:
        """Decode one chunk; returns the time it took as well."""
        begin = time.perf_counter()
        samples: dict[int, Sample | BadEntry] = {}
        ready: dict[int, _Pictures] = {}
        held = 0
        for place, outcome in self._outcomes(entries):
            if isinstance(outcome, _Pictures):
                ready[place] = outcome
                held += outcome.frames.nbytes
                if held > SOURCE_BYTES:
                    samples |= retry(self._preprocess, ready)
                    ready, held = {}, 0
            else:
                samples[place] = outcome
            del outcome  # it must not outlive the graph's run while the next picture is decoded
        samples |= retry(self._preprocess, ready)
        return [samples[place] for place in range(len(entries))], time.perf_counter() - begin

    def _preprocess(self, pictures: Mapping[int, _Pictures]) -> dict[int, Sample]:
        """Bring pictures to the encoder's sizes."""
        if not pictures:
            return {}
        chosen = pictures.values()
        results = self._preprocessor([p.frames for p in chosen], [p.geometry for p in chosen])
        return {
            place: Sample(entry=picture.entry, pixels=pixels, clip=picture.clip)
            for (place, picture), pixels in zip(pictures.items(), results, strict=True)
        }

    def _outcomes(
        self, entries: list[Entry | BadEntry]
    ) -> Iterator[tuple[int, Sample | BadEntry | _Pictures]]:
        """What becomes of every entry, with its place: first the images, by the batch, then the others."""
        images = [(n, e) for n, e in enumerate(entries) if isinstance(e, Entry) and e.kind == "image"]
        for batch in _image_batches(images):
            pictures = retry(decode_images, [media for *_, media in batch if isinstance(media, bytes)])[::-1]
            for place, image, media in batch:
                yield place, self._outcome(image, media if isinstance(media, MediaError) else pictures.pop())
        for place, entry in enumerate(entries):
            if isinstance(entry, BadEntry):
                yield place, entry
            elif entry.kind != "image":
                yield place, self._outcome(entry, None)

    def _outcome(
        self, entry: Entry, image: npt.NDArray[np.uint8] | MediaError | None
    ) -> Sample | BadEntry | _Pictures:
        """One entry's frames where it has some; `image` is what an image was decoded to."""
        if entry.media is None:
            return Sample(entry=entry, pixels=None, clip=None)
        try:
            if image is None:
                return retry(self._video, entry, name=str(entry.media))
            return self._image(entry, image)
        except MediaError as error:
            reason = " ".join(str(error).split()) or "cannot be used"
            name = type(error).__name__
            return BadEntry(id=entry.id, path=str(entry.media), reason=reason, error=name, split=entry.split)

    def _image(self, entry: Entry, decoded: npt.NDArray[np.uint8] | MediaError) -> _Pictures:
        """Measure an image."""
        if isinstance(decoded, MediaError):
            raise decoded
        geometry = self._rules["image"].plan(*decoded.shape[:2])
        return _Pictures(entry, decoded[None], geometry, None)

    def _video(self, entry: Entry) -> _Pictures:
        """Choose and decode a video's frames."""
        with OpenVideo(_load(entry)) as video:
            info = video.info
            clip = self._clip_rule.select(info, entry.interval)
            geometry = self._rules["video"].plan(*info.upright_size, pixel_aspect=info.pixel_aspect)
            return _Pictures(entry, self._source.frames(video, clip.indices), geometry, clip)

    @property
    def _preprocessor(self) -> Preprocessor:
        """This thread's preprocessing graph."""
        if not hasattr(self._local, "preprocessor"):
            self._local.preprocessor = Preprocessor(
                device=self._config.media_device,
                device_index=self._config.device_index,
                batch_size=CHUNK_ENTRIES,
            )
        preprocessor: Preprocessor = self._local.preprocessor
        return preprocessor

    @property
    def _source(self) -> FrameSource:
        """This thread's frame source."""
        if not hasattr(self._local, "source"):
            config = self._config
            self._local.source = frame_source(
                config.frame_source, device=config.media_device, device_index=config.device_index
            )
        source: FrameSource = self._local.source
        return source


def _load(entry: Entry) -> Media:
    """Path or bytes of an entry's media."""
    assert entry.media is not None
    return entry.media.load()


def _read(entry: Entry) -> bytes | MediaError:
    """All encoded bytes of an entry's media, or what is wrong with the file as a value."""
    try:
        return read_media(_load(entry))
    except MediaError as error:
        return error


def _image_batches(
    images: Iterable[tuple[int, Entry]],
) -> Iterator[list[tuple[int, Entry, bytes | MediaError]]]:
    """Read images, with their places; together they decode to `SOURCE_BYTES` at most, unless it is one."""
    batch: list[tuple[int, Entry, bytes | MediaError]] = []
    size = 0
    for place, entry in images:
        media = retry(_read, entry, name=str(entry.media))
        more = 0 if isinstance(media, MediaError) else _decoded_bytes(media)
        if batch and size + more > SOURCE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((place, entry, media))
        size += more
    if batch:
        yield batch


def _decoded_bytes(image: bytes) -> int:
    """Bytes of RGB that an image's header promises; 0 where it is no image, as decoding will say."""
    try:
        height, width = image_dimensions(image)
    except MediaError:
        return 0
    return height * width * 3
