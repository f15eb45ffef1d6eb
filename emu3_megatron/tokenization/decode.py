"""From entries to pixels, ahead of the encoder, in threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

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
    decode_images,
    frame_source,
)
from emu3_megatron.tokenization.config import TokenizationConfig
from emu3_megatron.tokenization.entries import BadEntry, Entry

CHUNK_ENTRIES = 32
"""Entries decoded together; DALI takes images by the batch."""

CHUNKS_AHEAD = 2
"""Chunks kept ready for each thread."""

RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waits before a passing fault (a disk, a network) is tried again; after the last the job stops."""

A = TypeVar("A")
R = TypeVar("R")


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
    """Decodes entries in order, in background threads. A context manager, which ends the threads."""

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
        """
        iterator = iter(entries)
        waiting: deque[Future[tuple[list[Sample | BadEntry], float]]] = deque()
        ahead = CHUNKS_AHEAD * self._config.decode_threads
        while True:
            while len(waiting) < ahead and (chunk := list(islice(iterator, CHUNK_ENTRIES))):
                waiting.append(self._pool.submit(self._decode, chunk))
            if not waiting:
                return
            begin = time.perf_counter()
            samples, seconds = waiting.popleft().result()
            self.waited += time.perf_counter() - begin
            self.seconds += seconds
            yield from samples

    def _decode(self, entries: list[Entry | BadEntry]) -> tuple[list[Sample | BadEntry], float]:
        """Decode one chunk; returns the time it took as well."""
        begin = time.perf_counter()
        images = self._images([e for e in entries if isinstance(e, Entry) and e.kind == "image"])
        outcomes = [self._outcome(entry, images) for entry in entries]
        pictures = [outcome for outcome in outcomes if isinstance(outcome, _Pictures)]
        pixels = iter(self._preprocessor([p.frames for p in pictures], [p.geometry for p in pictures]))
        samples = [
            Sample(entry=outcome.entry, pixels=next(pixels), clip=outcome.clip)
            if isinstance(outcome, _Pictures)
            else outcome
            for outcome in outcomes
        ]
        return samples, time.perf_counter() - begin

    def _outcome(
        self, entry: Entry | BadEntry, images: Iterator[npt.NDArray[np.uint8] | MediaError]
    ) -> Sample | BadEntry | _Pictures:
        """One entry's frames where it has some; `images` yields the decoded images in order."""
        if isinstance(entry, BadEntry):
            return entry
        if entry.media is None:
            return Sample(entry=entry, pixels=None, clip=None)
        try:
            return self._image(entry, next(images)) if entry.kind == "image" else retry(self._video, entry)
        except MediaError as error:
            reason = " ".join(str(error).split()) or "cannot be used"
            name = type(error).__name__
            return BadEntry(id=entry.id, path=str(entry.media), reason=reason, error=name, split=entry.split)

    def _images(self, entries: list[Entry]) -> Iterator[npt.NDArray[np.uint8] | MediaError]:
        """Decode images by the batch, in order."""
        loaded = [retry(_load_or_error, entry) for entry in entries]
        decoded = iter(retry(decode_images, [media for media in loaded if not isinstance(media, MediaError)]))
        return iter([media if isinstance(media, MediaError) else next(decoded) for media in loaded])

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
            device = self._config.media_device
            self._local.preprocessor = Preprocessor(device=device, batch_size=CHUNK_ENTRIES)
        preprocessor: Preprocessor = self._local.preprocessor
        return preprocessor

    @property
    def _source(self) -> FrameSource:
        """This thread's frame source."""
        if not hasattr(self._local, "source"):
            self._local.source = frame_source(self._config.frame_source, device=self._config.media_device)
        source: FrameSource = self._local.source
        return source


def _load(entry: Entry) -> Media:
    """Path or bytes of an entry's media."""
    assert entry.media is not None
    return entry.media.load()


def _load_or_error(entry: Entry) -> Media | MediaError:
    """The same, with what is wrong with the file as a value."""
    try:
        return _load(entry)
    except MediaError as error:
        return error


def retry(function: Callable[[A], R], argument: A) -> R:
    """Call `function`; after a passing fault of the file system wait and try again, a few times."""
    for seconds in RETRY_SECONDS:
        try:
            return function(argument)
        except OSError:
            time.sleep(seconds)
    return function(argument)
