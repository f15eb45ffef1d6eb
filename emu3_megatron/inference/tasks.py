"""Text to image, text to video, image to text, video continuation: from prompts to pixels and captions.

Shape suffixes: N items, T frames, H W pixels, h w rows and columns of vision tokens, t latent frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Image, Text, Video
from emu3_megatron.inference.bundle import ModelBundle
from emu3_megatron.inference.engine import Engine
from emu3_megatron.inference.request import Completion, Request
from emu3_megatron.inference.sampling import Sampling

Ids = npt.NDArray[np.int64]
Progress = Callable[[int], object]

IMAGE_SAMPLING = Sampling(guidance=3.0, top_k=2048)
"""Released settings for images (github.com/baaivision/Emu3, image_generation.py)."""

CAPTION_SAMPLING = Sampling(temperature=0.0)
"""Greedy, as the released understanding example."""

POSITIVE_SUFFIX = " masterpiece, film grained, best quality."
"""What the released example adds to prompts for images; not added by itself."""

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""Negative prompt of the released example."""

_DECODE_PIXELS = 1 << 22
"""Most pixels that the vision tokenizer decodes at a time."""


@dataclass(frozen=True)
class GeneratedImage:
    """One image."""

    prompt: str
    seed: int
    codes: Ids
    """Vision codes, ``[h, w]``."""
    pixels: npt.NDArray[np.uint8]
    """RGB, ``[H, W, 3]``."""
    tokens: int
    """New tokens."""


@dataclass(frozen=True)
class GeneratedVideo:
    """One clip; for a continuation, the given frames come first."""

    prompt: str
    seed: int
    codes: Ids
    """Vision codes, ``[t, h, w]``."""
    pixels: npt.NDArray[np.uint8]
    """RGB, ``[T, H, W, 3]``."""
    fps: float
    tokens: int
    """New tokens."""
    given_frames: int = 0
    """How many of the first frames were given."""


@dataclass(frozen=True)
class Caption:
    """One text."""

    text: str
    seed: int
    finished: bool
    """False when it was cut off."""
    tokens: int
    """New tokens."""


class Generator:
    """The tasks over one model."""

    def __init__(self, bundle: ModelBundle, *, max_rows: int = 128) -> None:
        """`max_rows` bounds the batch; guided requests count twice."""
        self.bundle = bundle
        self.engine = Engine(bundle.model, bundle.dialect, max_rows=max_rows)
        self._dialect = bundle.dialect
        self._vocabulary = bundle.dialect.vocabulary
        self._vision = bundle.vision_tokenizer

    def text_to_image(
        self,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        sampling: Sampling = IMAGE_SAMPLING,
        seeds: Sequence[int] | None = None,
        negative_prompt: str = "",
        progress: Progress | None = None,
    ) -> list[GeneratedImage]:
        """Draw one image per prompt.

        Args:
            prompts: captions.
            height: pixels; a multiple of the vision tokenizer's spatial factor.
            width: pixels, likewise.
            sampling: how tokens are drawn.
            seeds: one per prompt; 0, 1, 2, ... by default.
            negative_prompt: prompt of the unconditional stream; empty is what caption dropout trained.
            progress: called with the number of images just finished.

        Raises:
            UserError: for a size that is no multiple of the factor.
        """
        rows, columns = self._latent(height, "height"), self._latent(width, "width")
        span = self._dialect.open_span(rows, columns)
        length = self._dialect.span_length(rows, columns) - len(span)
        requests = self.span_requests(
            prompts, [span] * len(prompts), length, sampling, seeds, negative_prompt
        )
        completions = self.engine.generate(requests, progress=progress)
        codes = [self._parse(span, completion) for completion in completions]
        return [
            GeneratedImage(prompt, request.seed, own, picture, len(completion.ids))
            for prompt, request, own, picture, completion in zip(
                prompts, requests, codes, self.pixels(codes), completions, strict=True
            )
        ]

    def text_to_video(
        self,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        frames: int,
        fps: float,
        sampling: Sampling = IMAGE_SAMPLING,
        seeds: Sequence[int] | None = None,
        negative_prompt: str = "",
        progress: Progress | None = None,
    ) -> list[GeneratedVideo]:
        """Draw one clip per prompt; `frames` is a multiple of the temporal factor, the rest as
        `text_to_image`."""
        return self._videos(
            prompts, None, height, width, frames, fps, sampling, seeds, negative_prompt, progress
        )

    def continue_video(
        self,
        clips_NTCHW: torch.Tensor,
        *,
        frames: int,
        fps: float,
        prompts: Sequence[str] | None = None,
        sampling: Sampling = IMAGE_SAMPLING,
        seeds: Sequence[int] | None = None,
        negative_prompt: str = "",
        progress: Progress | None = None,
    ) -> list[GeneratedVideo]:
        """Continue clips whose first frames are given.

        Args:
            clips_NTCHW: first frames, float in [-1, 1], ``[N, T, 3, H, W]``; T a multiple of the temporal
                factor.
            frames: length of the whole clips, given frames included.
            fps: frames per second.
            prompts: captions, one per clip; none by default.
            sampling: how tokens are drawn.
            seeds: one per clip; 0, 1, 2, ... by default.
            negative_prompt: prompt of the unconditional stream, which sees the given frames too.
            progress: called with the number of clips just finished.

        Raises:
            UserError: the given frames are not fewer than `frames`, or sizes are no multiples of the factors.
        """
        count, given, _, height, width = clips_NTCHW.shape
        if not given < frames:
            raise UserError(f"{given} frames are given and {frames} asked for in all; ask for more")
        prompts = [""] * count if prompts is None else prompts
        codes = [self._vision.encode(clip[None])[0].cpu().numpy() for clip in clips_NTCHW]
        videos = self._videos(
            prompts, codes, height, width, frames, fps, sampling, seeds, negative_prompt, progress
        )
        return [replace(video, given_frames=given) for video in videos]

    def image_to_text(
        self,
        images_NCHW: torch.Tensor | Sequence[Ids | Video],
        *,
        prefix: str = "",
        max_new_tokens: int = 256,
        sampling: Sampling = CAPTION_SAMPLING,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Caption]:
        """Describe images.

        Args:
            images_NCHW: float in [-1, 1], ``[N, 3, H, W]``; or their codes, ``[h, w]`` each, or ``[t, h, w]``
                of clips in a dialect that states no frame rate; or clips with their rate and duration.
            prefix: beginning of the caption, in the result too.
            max_new_tokens: longest caption.
            sampling: how tokens are drawn; guidance has no meaning here and must be 1.
            seeds: one per image; 0, 1, 2, ... by default.
            progress: called with the number of captions just finished.
        """
        if sampling.guidance != 1.0:
            raise UserError(f"guidance={sampling.guidance}: captions are generated without; leave it at 1")
        codes: Sequence[Ids | Video] = (
            self.encode_images(images_NCHW) if isinstance(images_NCHW, torch.Tensor) else images_NCHW
        )
        start = self._dialect.encode_text(prefix)
        spans = [self._dialect.encode_span(_span(own)) for own in codes]
        requests = [
            Request(
                prompt=np.concatenate([[self._vocabulary.bos], span, start]),
                sampling=sampling,
                seed=seed,
                max_new_tokens=max_new_tokens,
                forbidden=frozenset([self._vocabulary.boi]),
            )
            for span, seed in zip(spans, _seeds(seeds, len(spans)), strict=True)
        ]
        captions = []
        for request, completion in zip(
            requests, self.engine.generate(requests, progress=progress), strict=True
        ):
            ids = completion.ids[completion.ids != self._vocabulary.eos]
            text: Text = self._dialect.parse_text(np.concatenate([start, ids]))
            captions.append(Caption(text.text, request.seed, completion.finished, len(completion.ids)))
        return captions

    def encode_images(self, images_NCHW: torch.Tensor) -> list[Ids]:
        """Codes ``[h, w]`` of images in [-1, 1]."""
        size = max(1, _DECODE_PIXELS // math.prod(images_NCHW.shape[-2:]))
        return [own.cpu().numpy() for part in images_NCHW.split(size) for own in self._vision.encode(part)]

    def encode_clip(self, pixels_TCHW: torch.Tensor, fps: float, seconds: float) -> Video:
        """A clip of frames in [-1, 1] as codes, with what its meta text says of it."""
        codes_THW = self._vision.encode(pixels_TCHW[None])[0].cpu().numpy()
        return Video(codes_THW, fps=fps, seconds=round(seconds, 3))

    def _videos(
        self,
        prompts: Sequence[str],
        given: list[Ids] | None,
        height: int,
        width: int,
        frames: int,
        fps: float,
        sampling: Sampling,
        seeds: Sequence[int] | None,
        negative_prompt: str,
        progress: Progress | None,
    ) -> list[GeneratedVideo]:
        """Clips from prompts, with or without first frames."""
        rows, columns = self._latent(height, "height"), self._latent(width, "width")
        steps = self._latent_frames(frames)
        if given is None:
            spans = [self._dialect.open_span(rows, columns, steps, fps, frames / fps)] * len(prompts)
        else:
            spans = [
                self._dialect.open_span(rows, columns, steps, fps, frames / fps, codes) for codes in given
            ]
        length = self._dialect.span_length(rows, columns, steps, fps, frames / fps)
        lengths = length - min((len(span) for span in spans), default=0)
        requests = self.span_requests(prompts, spans, lengths, sampling, seeds, negative_prompt)
        completions = self.engine.generate(requests, progress=progress)
        codes = [self._parse(span, done) for span, done in zip(spans, completions, strict=True)]
        return [
            GeneratedVideo(prompt, request.seed, own, picture, fps, len(completion.ids))
            for prompt, request, own, picture, completion in zip(
                prompts, requests, codes, self.pixels(codes), completions, strict=True
            )
        ]

    def span_requests(
        self,
        prompts: Sequence[str],
        spans: Sequence[Ids],
        length: int,
        sampling: Sampling,
        seeds: Sequence[int] | None,
        negative_prompt: str,
    ) -> list[Request]:
        """Requests of at most `length` tokens to finish a span (its beginning given) after a caption."""
        bos = np.array([self._vocabulary.bos])
        negative = np.concatenate([bos, self._dialect.encode_text(negative_prompt)])
        return [
            Request(
                prompt=np.concatenate([bos, self._dialect.encode_text(prompt), span]),
                negative_prompt=np.concatenate([negative, span]) if sampling.guidance != 1.0 else None,
                sampling=sampling,
                seed=seed,
                max_new_tokens=length,
                stop=frozenset([self._vocabulary.eoi]),
            )
            for prompt, span, seed in zip(prompts, spans, _seeds(seeds, len(prompts)), strict=True)
        ]

    def _parse(self, span: Ids, completion: Completion) -> Ids:
        """Codes of a finished span."""
        return self._dialect.parse_span(np.concatenate([span, completion.ids])).codes

    def pixels(self, codes: Sequence[Ids]) -> list[npt.NDArray[np.uint8]]:
        """Decode images or clips; those of the same shape together, as many as memory allows."""
        from emu3_megatron.media import to_uint8

        pixels: list[npt.NDArray[np.uint8] | None] = [None] * len(codes)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, own in enumerate(codes):
            by_shape.setdefault(own.shape, []).append(index)
        factor = self._vision.spatial_factor**2 * self._vision.temporal_factor
        for shape, members in by_shape.items():
            size = max(1, _DECODE_PIXELS // (math.prod(shape) * factor))
            for first in range(0, len(members), size):
                part = members[first : first + size]
                decoded = self._vision.decode(torch.from_numpy(np.stack([codes[index] for index in part])))
                for index, picture in zip(part, to_uint8(decoded), strict=True):
                    pixels[index] = picture
        return [picture for picture in pixels if picture is not None]

    def _latent(self, pixels: int, name: str) -> int:
        """Vision tokens along a side of `pixels`."""
        factor = self._vision.spatial_factor
        if pixels < factor or pixels % factor:
            raise UserError(
                f"{name}={pixels} must be a multiple of {factor}, the vision tokenizer's spatial factor"
            )
        return pixels // factor

    def _latent_frames(self, frames: int) -> int:
        """Latent frames of a clip."""
        factor = self._vision.temporal_factor
        if frames < factor or frames % factor:
            raise UserError(
                f"frames={frames} must be a multiple of {factor}, the vision tokenizer's temporal factor"
            )
        return frames // factor


def _span(codes: Ids | Video) -> Image | Video:
    """What codes show, by their shape."""
    if isinstance(codes, Video):
        return codes
    return Image(codes) if codes.ndim == 2 else Video(codes)


def image_size(ratio: str, area: int, factor: int) -> tuple[int, int]:
    """Height and width in pixels of the released size rule.

    Args:
        ratio: ``width:height``.
        area: pixels to aim for (released: 518,400 = 720x720).
        factor: spatial factor of the vision tokenizer.

    Raises:
        UserError: `ratio` is not two positive integers, or `area` is not positive.
    """
    if area < 1:
        raise UserError(f"area={area} must be at least 1 pixel")
    parts = ratio.split(":")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"ratio {ratio!r} must be WIDTH:HEIGHT, such as 16:9")
    width, height = (int(part) for part in parts)
    scale = math.sqrt(area / (height * width))
    return round(height * scale / factor) * factor, round(width * scale / factor) * factor


def _seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
    """One seed per item."""
    chosen = list(range(count)) if seeds is None else list(seeds)
    if len(chosen) != count:
        raise UserError(f"{len(chosen)} seeds for {count} items; give one each")
    return chosen
