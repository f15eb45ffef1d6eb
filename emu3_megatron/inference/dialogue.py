"""Questions about images and clips, and documents in which text and images alternate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, Document, Image, Text, Video
from emu3_megatron.inference.request import Completion, Request
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import CAPTION_SAMPLING, Generator, Progress
from emu3_megatron.media import (
    Clip,
    ClipRule,
    Geometry,
    MediaError,
    OpenVideo,
    Preprocessor,
    ResizeRule,
    VideoInfo,
    decode_image,
    frame_source,
    image_dimensions,
    probe_video,
)
from emu3_megatron.media.files import Media
from emu3_megatron.text.chat import CHAT_TEMPLATES, ChatTemplate

Ids = npt.NDArray[np.int64]

UNDERSTANDING_AREA = 512 * 512
"""Pixels of an image that is asked about (released: 512x512 to 1024x1024)."""

PASSED_OVER = 64
"""Most pixels that may be decoded for a clip, in times of those that may be taken."""

ROLES = ("system", "user", "assistant")
"""Who says a message, in OpenAI's names."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation. Raises `UserError` for another role, or an assistant with media."""

    role: str
    text: str
    media: tuple[Image | Video, ...] = ()

    def __post_init__(self) -> None:
        """Check the role."""
        if self.role not in ROLES:
            raise UserError(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        if self.media and self.role != "user":
            raise UserError(f"a message of the {self.role} holds media; only the user's may")


@dataclass(frozen=True)
class Answer:
    """What the model says."""

    text: str
    seed: int
    finished: bool
    """False when it was cut off."""
    tokens: int
    """New tokens."""


@dataclass(frozen=True)
class Story:
    """Text and images in their order, the prompt included."""

    document: Document
    seed: int
    finished: bool
    """False when it was cut off; an image that was cut off is left out."""
    tokens: int
    """New tokens, those of a part that is left out included."""


class MediaReader:
    """Images and clips to vision codes, at their own aspect ratio."""

    def __init__(
        self,
        generator: Generator,
        *,
        area: int = UNDERSTANDING_AREA,
        most_pixels: int | None = None,
        most_clip_pixels: int | None = None,
    ) -> None:
        """Bounds hold where they are given.

        Args:
            generator: the model.
            area: pixels to bring each picture to, about.
            most_pixels: of an image, or of one frame of a clip.
            most_clip_pixels: of all frames that are taken from a clip.
        """
        self._most_pixels, self._most_clip_pixels = most_pixels, most_clip_pixels
        self._generator = generator
        self._vision = generator.bundle.vision_tokenizer
        self._rule = ResizeRule(area=area, spatial_factor=self._vision.spatial_factor)
        self._preprocessor = Preprocessor(batch_size=1)

    def image(self, media: Media) -> Image:
        """Codes of an image file. Raises `MediaError`, without the file's name."""
        if self._most_pixels is not None:
            self._check(*image_dimensions(media))
        picture = decode_image(media)
        (pixels_1CHW,) = self._preprocessor([picture[None]], [self._rule.plan(*picture.shape[:2])])
        return Image(self._generator.encode_images(pixels_1CHW)[0])

    def video(self, media: Media, *, frames: int, fps: float | None = None) -> Video:
        """Codes of the first `frames` frames of a clip (see `ClipRule` for the rate).

        Raises `MediaError`, without the file's name, and `UserError` for a number of frames that the vision
        tokenizer does not take.
        """
        self._latent_frames(frames)
        with OpenVideo(media) as opened:
            info = opened.info
            clip = self._select(info, frames, fps)
            pictures = frame_source().frames(opened, clip.indices)
        geometry = self._rule.plan(*info.upright_size, pixel_aspect=info.pixel_aspect)
        (pixels_TCHW,) = self._preprocessor([pictures], [geometry])
        return self._generator.encode_clip(pixels_TCHW, clip.fps, clip.seconds)

    def plan_image(self, media: Media) -> Image:
        """What `image` would give, as far as the header shows, with zeros for codes. Raises `MediaError`.

        A picture that its file says to turn may need a few tokens more: every row has an end.
        """
        size = image_dimensions(media)
        self._check(*size)
        rows, columns = sorted(self._latent(self._rule.plan(*size)))
        return Image(np.zeros((rows, columns), dtype=np.int64))

    def plan_video(self, media: Media, *, frames: int, fps: float | None = None) -> Video:
        """What `video` would give, with zeros for codes; one frame is decoded. Raises as `video` does."""
        steps = self._latent_frames(frames)
        info = probe_video(media)
        clip = self._select(info, frames, fps)
        geometry = self._rule.plan(*info.upright_size, pixel_aspect=info.pixel_aspect)
        codes_THW = np.zeros((steps, *self._latent(geometry)), dtype=np.int64)
        return Video(codes_THW, fps=clip.fps, seconds=round(clip.seconds, 3))

    def check_clip(self, media: Media, *, frames: int, fps: float | None) -> None:
        """Raise `MediaError` where a clip cannot be had from a video, or is too large."""
        self._select(probe_video(media), frames, fps)

    def _select(self, info: VideoInfo, frames: int, fps: float | None) -> Clip:
        """Frames to take, within the bounds."""
        height, width = info.upright_size
        self._check(height, width)
        clip = ClipRule(frames=frames, fps=fps).select(info)
        if (most := self._most_clip_pixels) is not None:
            if frames * height * width > most:
                raise MediaError(f"has {frames} frames of {width}x{height} pixels, more than {most} in all")
            if (passed := clip.indices[-1] + 1) * height * width > PASSED_OVER * most:
                raise MediaError(
                    f"has {passed} frames of {width}x{height} pixels up to the last one wanted, more than "
                    f"{PASSED_OVER * most} in all; cut it, or ask for a higher rate"
                )
        return clip

    def _latent(self, geometry: Geometry) -> tuple[int, int]:
        """Rows and columns of codes."""
        factor = self._vision.spatial_factor
        return geometry.height // factor, geometry.width // factor

    def _latent_frames(self, frames: int) -> int:
        """Latent frames; raises `UserError` for frames that make none."""
        factor = self._vision.temporal_factor
        if frames < factor or frames % factor:
            raise UserError(f"frames={frames} must be a multiple of {factor}, the temporal factor")
        return frames // factor

    def _check(self, height: int, width: int) -> None:
        if self._most_pixels is not None and height * width > self._most_pixels:
            raise MediaError(f"has {width}x{height} pixels, more than {self._most_pixels} in all")


def chat_template(name: str) -> ChatTemplate:
    """A released template, or one's own pattern. Raises `UserError` for neither."""
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    try:
        return ChatTemplate(name)
    except ValueError as error:
        raise UserError(f"{error}; or name one of {', '.join(CHAT_TEMPLATES)}") from error


def chat_request(
    dialect: Dialect,
    messages: Sequence[Message],
    template: ChatTemplate,
    *,
    sampling: Sampling,
    seed: int,
    max_new_tokens: int,
) -> Request:
    """Answer the last question of a conversation; its ids are those of the conversations of post-training.

    A system message stands first and takes the place of the template's opening; EOS follows every answer, and
    later questions begin without the opening. The released models saw one question, without a system message.

    Raises:
        UserError: questions and answers do not alternate, a question does not come last, a system message is
            not the first, or guidance is asked for, which is for spans.
    """
    if sampling.guidance != 1.0:
        raise UserError(f"guidance={sampling.guidance}: text is generated without; leave it at 1")
    system, said = None, list(messages)
    if said and said[0].role == "system":
        system, said = said[0].text.strip() or None, said[1:]
    for number, message in enumerate(said):
        if message.role == "system":
            raise UserError("a system message must be the first message, and the only one; join several")
        if message.role != ("user", "assistant")[number % 2]:
            raise UserError("questions of the user and answers of the assistant must alternate")
    if len(said) % 2 == 0:
        raise UserError("the last message must be a question of the user")
    ids, history = [np.array([dialect.vocabulary.bos])], 0
    for number, message in enumerate(said):
        if message.role == "assistant":
            ids.append(dialect.encode_text(template.answer(message.text.strip())))
            ids.append(np.array([dialect.vocabulary.eos]))
            history = sum(map(len, ids))
        else:
            later = number > 0
            prompt = template.prompt([Text(message.text)], message.media, system=system, later=later)
            ids.append(dialect.encode(prompt).ids[1:-1])
    return Request(
        prompt=np.concatenate(ids),
        history=history,
        sampling=sampling,
        seed=seed,
        max_new_tokens=max_new_tokens,
        forbidden=frozenset([dialect.vocabulary.boi]),
    )


def read_text(dialect: Dialect, ids: Ids) -> str:
    """The text of the new tokens of a `chat_request`."""
    return dialect.text_tokenizer.decode(ids[ids != dialect.vocabulary.eos].tolist())


class TextStream:
    """The text of new tokens as they come; each is decoded a few times, however many there are.

    What is new is the difference of two decodings that begin at the same earlier token, because tokenizers
    treat the beginning of a text in ways of their own.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._decode, self._eos = dialect.text_tokenizer.decode, dialect.vocabulary.eos
        self._context: list[int] = []
        """Tokens whose text was told last."""
        self._fresh: list[int] = []
        """Tokens after them."""
        self._read = 0

    def extend(self, ids: Sequence[int]) -> None:
        """Take new tokens."""
        self._fresh += (token for token in ids if token != self._eos)

    def read(self) -> str:
        """The text that has come since the last time, as far as no character is cut."""
        if self._read == len(self._fresh):
            return ""
        self._read = len(self._fresh)
        before, text = self._decode(self._context), self._decode(self._context + self._fresh)
        if text.endswith("\ufffd") or not text.startswith(before) or text == before:
            return ""
        new = text[len(before) :]
        # a tokenizer may drop all spaces that a text begins with, so that spaces alone are no context
        self._context = self._fresh if new.strip() else self._context + self._fresh
        self._fresh, self._read = [], 0
        return new


def answer(
    generator: Generator,
    conversations: Sequence[Sequence[Message]],
    *,
    template: ChatTemplate,
    sampling: Sampling = CAPTION_SAMPLING,
    seeds: Sequence[int],
    max_new_tokens: int = 1024,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answer the last question of each conversation."""
    dialect = generator.bundle.dialect
    requests = [
        chat_request(
            dialect,
            messages,
            template,
            sampling=sampling,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        for messages, seed in zip(conversations, seeds, strict=True)
    ]
    completions = generator.engine.generate(requests, progress=progress)
    return [
        Answer(read_text(dialect, done.ids).strip(), request.seed, done.finished, len(done.ids))
        for request, done in zip(requests, completions, strict=True)
    ]


def interleave(
    generator: Generator,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    max_new_tokens: int,
    progress: Progress | None = None,
) -> list[Story]:
    """Continue texts freely, with images where the model puts them, of the sizes it gives them.

    Guidance must be 1: where the model chooses between text and an image there is no unconditional stream.
    """
    if sampling.guidance != 1.0:
        raise UserError(f"guidance={sampling.guidance}: documents are generated without; leave it at 1")
    dialect = generator.bundle.dialect
    bos = [dialect.vocabulary.bos]
    requests = [
        Request(
            prompt=np.concatenate([bos, dialect.encode_text(prompt)]),
            sampling=sampling,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    completions = generator.engine.generate(requests, progress=progress)
    return [_story(dialect, *pair) for pair in zip(requests, completions, strict=True)]


def _story(dialect: Dialect, request: Request, completion: Completion) -> Story:
    """The document as far as it is whole."""
    vocabulary = dialect.vocabulary
    ids = np.concatenate([request.prompt, completion.ids])
    opened = np.flatnonzero(ids == vocabulary.boi)
    if len(opened) > np.count_nonzero(ids == vocabulary.eoi):
        ids = ids[: opened[-1]]
    if ids[-1] != vocabulary.eos:
        ids = np.append(ids, vocabulary.eos)
    return Story(dialect.parse(ids), request.seed, completion.finished, len(completion.ids))
