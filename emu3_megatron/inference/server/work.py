"""What the server's jobs do: pictures, clips, answers."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Image, Video
from emu3_megatron.inference.dialogue import MediaReader, Message, TextStream, chat_request, read_text
from emu3_megatron.inference.request import Request
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.server.worker import Event
from emu3_megatron.inference.session import OnTokens, Ticket
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.media import load_clip, write_mp4
from emu3_megatron.text.chat import ChatTemplate

_CONTEXT = 2
"""Rows of tokens above new ones that are decoded with them, so that the seam does not show."""


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """An RGB picture as PNG in base64."""
    stream = io.BytesIO()
    PillowImage.fromarray(pixels).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def mp4(pixels: npt.NDArray[np.uint8], fps: float) -> str:
    """A clip as MP4 in base64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, pixels, fps)
        return base64.b64encode(path.read_bytes()).decode()


class ImageWork:
    """Pictures of one prompt."""

    def __init__(
        self,
        generator: Generator,
        *,
        prompt: str,
        negative_prompt: str,
        height: int,
        width: int,
        sampling: Sampling,
        seeds: Sequence[int],
        most_positions: int,
    ) -> None:
        self._generator, self._dialect = generator, generator.bundle.dialect
        self._most_positions = most_positions
        self._vision = generator.bundle.vision_tokenizer
        self._prompt, self._negative_prompt = prompt, negative_prompt
        self._rows, self._columns = (
            height // self._vision.spatial_factor,
            width // self._vision.spatial_factor,
        )
        self._sampling, self._seeds = sampling, list(seeds)
        self._codes: list[list[int]] = [[] for _ in self._seeds]
        self._shown = [0] * len(self._seeds)
        self._told = 0

    def requests(self, check: Callable[[], None]) -> list[tuple[Request, OnTokens]]:
        """One for each picture."""
        span = self._dialect.open_span(self._rows, self._columns)
        requests = self._generator.span_requests(
            [self._prompt] * len(self._seeds),
            [span] * len(self._seeds),
            self._dialect.span_length(self._rows, self._columns) - len(span),
            self._sampling,
            self._seeds,
            self._negative_prompt,
        )
        for request in requests:
            _check_length(request, self._most_positions)
        return [(request, self._take(index)) for index, request in enumerate(requests)]

    def _take(self, index: int) -> OnTokens:
        vocabulary = self._dialect.vocabulary
        codes = self._codes[index]

        def take(tokens: list[int]) -> None:
            codes.extend(
                token - vocabulary.vision_offset for token in tokens if token >= vocabulary.vision_offset
            )

        return take

    def news(self) -> Event | None:
        """How many rows are there, of all pictures together."""
        rows = sum(len(codes) // self._columns for codes in self._codes)
        if rows == self._told:
            return None
        self._told = rows
        return {"type": "progress", "rows": rows, "of": self._rows * len(self._codes)}

    def preview(self) -> Event | None:
        """New rows of the picture that has most of them."""
        rows = [len(codes) // self._columns for codes in self._codes]
        index = max(range(len(rows)), key=lambda i: rows[i] - self._shown[i])
        first, last = self._shown[index], rows[index]
        if first == last:
            return None
        self._shown[index] = last
        above = min(first, _CONTEXT)
        codes = np.array(self._codes[index][(first - above) * self._columns : last * self._columns])
        (pixels,) = self._generator.pixels([codes.reshape(-1, self._columns)])
        factor = self._vision.spatial_factor
        return {
            "type": "rows", "index": index, "top": first * factor, "b64_png": png(pixels[above * factor :]),
        }  # fmt: skip

    def result(self, tickets: list[Ticket]) -> Event:
        """All pictures."""
        shape = (self._rows, self._columns)
        codes = [np.array(own).reshape(shape) for own in self._codes]
        data = [
            {"b64_json": png(pixels), "seed": seed}
            for pixels, seed in zip(self._generator.pixels(codes), self._seeds, strict=True)
        ]
        return {"type": "done", "data": data, "tokens": usage(tickets)}


class VideoWork:
    """One clip, from words or from the first frames of another."""

    def __init__(
        self,
        generator: Generator,
        *,
        prompt: str,
        negative_prompt: str,
        size: tuple[int, int],
        frames: int,
        fps: float,
        sampling: Sampling,
        seed: int,
        clip: bytes | None,
        given_frames: int,
        reader: MediaReader,
        most_positions: int,
    ) -> None:
        self._generator, self._dialect = generator, generator.bundle.dialect
        self._prompt, self._negative_prompt = prompt, negative_prompt
        self._size, self._frames, self._fps = size, frames, fps
        self._sampling, self._seed = sampling, seed
        self._clip, self._given_frames, self._reader = clip, given_frames, reader
        self._most_positions = most_positions
        self._span = np.empty(0, dtype=np.int64)
        self._length, self._count, self._told = 1, 0, 0

    def requests(self, check: Callable[[], None]) -> list[tuple[Request, OnTokens]]:
        """One; its length is checked before the given frames are decoded."""
        vision = self._generator.bundle.vision_tokenizer
        rows, columns = (side // vision.spatial_factor for side in self._size)
        steps = self._frames // vision.temporal_factor
        shape = (rows, columns, steps, self._fps, self._frames / self._fps)
        _check_length(self._request(shape), self._most_positions)
        codes = None
        if self._clip is not None:
            self._reader.check_clip(self._clip, frames=self._given_frames, fps=self._fps)
            check()
            pixels_TCHW = load_clip(self._clip, self._given_frames, self._size, fps=self._fps)
            codes = vision.encode(pixels_TCHW[None])[0].cpu().numpy()
        return [(self._request(shape, codes), self._take)]

    def _request(
        self, shape: tuple[int, int, int, float, float], codes: npt.NDArray[np.int64] | None = None
    ) -> Request:
        """For a clip that begins with `codes`; its length is the same whatever they are."""
        self._span = self._dialect.open_span(*shape, codes)
        self._length = self._dialect.span_length(*shape) - len(self._span)
        (request,) = self._generator.span_requests(
            [self._prompt], [self._span], self._length, self._sampling, [self._seed], self._negative_prompt
        )
        return request

    def _take(self, tokens: list[int]) -> None:
        self._count += len(tokens)

    def news(self) -> Event | None:
        """Percents of the tokens."""
        done = 100 * self._count // self._length
        if done == self._told:
            return None
        self._told = done
        return {"type": "progress", "rows": done, "of": 100}

    def preview(self) -> Event | None:
        """Nothing: a clip is shown whole."""
        return None

    def result(self, tickets: list[Ticket]) -> Event:
        """The clip."""
        ids = np.concatenate([self._span, tickets[0].completion().ids])
        (pixels,) = self._generator.pixels([self._dialect.parse_span(ids).codes])
        data = [{"b64_mp4": mp4(pixels, self._fps), "seed": self._seed, "frames": len(pixels)}]
        return {"type": "done", "data": data, "tokens": usage(tickets)}


@dataclass(frozen=True)
class Upload:
    """A file that a message holds."""

    kind: str
    """``image`` or ``video``."""
    data: bytes = field(repr=False)


class AnswerWork:
    """The answer to a conversation."""

    def __init__(
        self,
        generator: Generator,
        reader: MediaReader,
        *,
        messages: Sequence[tuple[str, str, Sequence[Upload]]],
        template: ChatTemplate,
        frames: int,
        sampling: Sampling,
        seed: int,
        max_new_tokens: int,
        most_positions: int,
    ) -> None:
        self._dialect, self._reader = generator.bundle.dialect, reader
        self._most_positions = most_positions
        self._messages, self._template, self._frames = messages, template, frames
        self._sampling, self._seed, self._max_new_tokens = sampling, seed, max_new_tokens
        self._stream, self._text = TextStream(self._dialect), ""

    def requests(self, check: Callable[[], None]) -> list[tuple[Request, OnTokens]]:
        """One; its length is checked before any file is decoded and encoded."""
        _check_length(self._request(self._plan, check), self._most_positions)
        return [(self._request(self._read, check), self._stream.extend)]

    def _request(self, read: Callable[[Upload], Image | Video], check: Callable[[], None]) -> Request:
        """With what `read` makes of the files."""

        def checked(upload: Upload) -> Image | Video:
            check()
            return read(upload)

        return chat_request(
            self._dialect,
            [
                Message(role, text, tuple(checked(upload) for upload in uploads))
                for role, text, uploads in self._messages
            ],
            self._template,
            sampling=self._sampling,
            seed=self._seed,
            max_new_tokens=self._max_new_tokens,
        )

    def _plan(self, upload: Upload) -> Image | Video:
        if upload.kind == "image":
            return self._reader.plan_image(upload.data)
        return self._reader.plan_video(upload.data, frames=self._frames)

    def _read(self, upload: Upload) -> Image | Video:
        if upload.kind == "image":
            return self._reader.image(upload.data)
        return self._reader.video(upload.data, frames=self._frames)

    def news(self) -> Event | None:
        """The words that have come, as far as no character is cut."""
        text = self._stream.read()
        delta = text if self._text else text.lstrip()
        self._text += delta
        return {"type": "text", "text": delta} if delta else None

    def preview(self) -> Event | None:
        """Nothing: words are news."""
        return None

    def result(self, tickets: list[Ticket]) -> Event:
        """The whole answer, and what of it has not been told."""
        (ticket,) = tickets
        text = read_text(self._dialect, ticket.completion().ids).lstrip()
        rest = text[len(self._text) :] if text.startswith(self._text) else ""
        return {
            "type": "done", "text": text, "rest": rest, "finished": ticket.finished, "tokens": usage(tickets),
        }  # fmt: skip


def _check_length(request: Request, most: int) -> None:
    """Refuse what no sequence of this server holds."""
    if request.length > most:
        raise UserError(
            f"the request takes {request.length} positions, files and new tokens included, more than the "
            f"{most} of this server; send less, or ask for fewer pixels or tokens"
        )


def usage(tickets: Sequence[Ticket]) -> dict[str, int]:
    """Counts of tokens, by OpenAI's names."""
    prompt = sum(len(ticket.request.prompt) for ticket in tickets)
    new = sum(len(ticket.new) for ticket in tickets)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
