"""Bodies of requests: OpenAI's fields, and our sampler's.

Fields that are not listed are ignored, because clients send many (``user``, ``quality``).
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from emu3_megatron.errors import UserError
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.server.limits import Limits
from emu3_megatron.inference.server.work import Upload

_DATA_URL = re.compile(r"data:(image|video)/[a-zA-Z0-9.+-]+;base64,")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def _encodable(text: str) -> str:
    """JSON can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("text holds half of a surrogate pair") from error
    return text


Words = Annotated[str, Field(max_length=32_768), AfterValidator(_encodable)]
"""Text of a client."""


class Sampler(BaseModel):
    """How tokens are drawn."""

    model_config = ConfigDict(allow_inf_nan=False, strict=True)

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the first result; the next ones count up."""
    temperature: float | None = None
    top_k: int | None = Field(default=None, ge=0)
    """0 keeps all."""
    top_p: float | None = None
    min_p: float = 0.0

    def sampling(self, *, guidance: float, temperature: float) -> Sampling:
        """The settings, with defaults of the task. Raises `ValueError` for values out of range."""
        return Sampling(
            temperature=temperature if self.temperature is None else self.temperature,
            top_k=(2048 if self.top_k is None else self.top_k) or None,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            guidance=guidance,
        )


class Picture(Sampler):
    """Body of ``/v1/images/generations``."""

    prompt: Words
    negative_prompt: Words = ""
    n: int = Field(default=1, ge=1)
    size: str = "auto"
    """``WIDTHxHEIGHT`` in pixels, or ``auto``."""
    guidance: float = Field(default=3.0, ge=0, le=100)
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False

    def dimensions(self, limits: Limits, factor: int) -> tuple[int, int]:
        """Height and width in pixels. Raises `UserError` for a size that cannot be drawn."""
        if self.size == "auto":
            side = max(factor, math.isqrt(limits.pixels) // factor * factor)
            return min(side, 512), min(side, 512)
        match = _SIZE.fullmatch(self.size)
        if match is None:
            raise UserError(
                f"size {self.size[:40]!r} must be WIDTHxHEIGHT in pixels, such as 512x512, or auto"
            )
        width, height = int(match[1]), int(match[2])
        if width % factor or height % factor:
            raise UserError(f"size {self.size}: both sides must be multiples of {factor}")
        if width * height > limits.pixels:
            raise UserError(f"size {self.size} has more than {limits.pixels} pixels; ask for fewer")
        return height, width


class Clip(Picture):
    """Body of ``/v1/videos/generations``."""

    seconds: float = Field(default=1.0, gt=0, le=3600)
    """Duration of the whole clip."""
    fps: float = Field(default=8.0, gt=0, le=120)
    video: str | None = None
    """A clip to continue, as a data URL."""
    given_frames: int = Field(default=4, ge=1)
    """Frames of it to continue from."""

    def frames(self, limits: Limits, factor: int) -> int:
        """Frames of the whole clip: `seconds` rounded up to whole latent frames."""
        frames = math.ceil(self.seconds * self.fps / factor) * factor
        if frames > limits.frames:
            raise UserError(f"{self.seconds:g} seconds are {frames} frames, more than {limits.frames}")
        if self.video is not None and (self.given_frames % factor or self.given_frames >= frames):
            raise UserError(
                f"given_frames={self.given_frames} must be a multiple of {factor} and less than the {frames} "
                "frames of the whole clip"
            )
        return frames


class Link(BaseModel):
    """Where a part's media are."""

    url: str


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text", "image_url", "video_url"]
    text: Words | None = None
    image_url: Link | None = None
    video_url: Link | None = None


class ChatMessage(BaseModel):
    """A message."""

    role: Literal["system", "user", "assistant"]
    content: Words | list[Part]

    def read(self, limits: Limits) -> tuple[str, str, list[Upload]]:
        """Role, text and files."""
        if isinstance(self.content, str):
            return self.role, self.content, []
        texts: list[str] = []
        uploads: list[Upload] = []
        for part in self.content:
            link = part.image_url or part.video_url
            if part.type == "text" and part.text is not None:
                texts.append(part.text)
            elif part.type != "text" and link is not None:
                uploads.append(read_upload(link.url, limits, part.type.removesuffix("_url")))
            else:
                raise UserError(f"a part of the type {part.type} needs the field {part.type}")
        return self.role, "\n".join(texts), uploads


class Chat(Sampler):
    """Body of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=64)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: Literal[1] = 1
    stream: bool = False
    frames: int = Field(default=8, ge=1)
    """First frames of a clip that the model sees."""

    def read(self, limits: Limits) -> list[tuple[str, str, list[Upload]]]:
        """The messages. Raises `UserError` for too many files, before any is read."""
        contents = [message.content for message in self.messages if not isinstance(message.content, str)]
        files = sum(part.type != "text" for content in contents for part in content)
        if files > limits.uploads:
            raise UserError(f"the messages hold {files} files, more than {limits.uploads}; send fewer")
        return [message.read(limits) for message in self.messages]

    def most_tokens(self, limits: Limits) -> int:
        """Longest answer."""
        asked = self.max_completion_tokens or self.max_tokens or 512
        if asked > limits.length:
            raise UserError(f"max_tokens={asked} is more than the {limits.length} positions of this server")
        return asked


def read_upload(url: str, limits: Limits, kind: str) -> Upload:
    """The file in a data URL. Nothing is fetched, from the network or from disk.

    Raises `UserError` for another URL, base64 that is none, or a file of another kind.
    """
    match = _DATA_URL.match(url)
    if match is None or match[1] != kind:
        raise UserError(
            f"{kind} URL {url[:40]!r} must be data:{kind}/...;base64,... - this server fetches nothing"
        )
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the {kind} is no base64: {error}") from error
    if not data:
        raise UserError(f"the {kind} is empty")
    return Upload(kind, data)
