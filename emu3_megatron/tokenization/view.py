"""Windows as a page to look at: text, decoded images and clips, borders, loss weights, padding."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Picture

from emu3_megatron.data.manifest import Manifest
from emu3_megatron.data.plan import Plan
from emu3_megatron.data.window import NO_SOURCE, Window
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, GrammarError, Image, Modality
from emu3_megatron.media.preprocess import to_uint8
from emu3_megatron.text import load_text_tokenizer
from emu3_megatron.vision import VisionTokenizer

COLOURS = {
    Modality.TEXT: "#4878d0",
    Modality.VISION: "#ee854a",
    Modality.META: "#6acc64",
    Modality.BREAK: "#956cb4",
    Modality.CONTROL: "#d65f5f",
    Modality.PADDING: "#dddddd",
    Modality.PROMPT: "#9ec1e8",
    Modality.END: "#8c613c",
}
"""Colour of each class of label."""

HOTTEST = 10.0
"""Loss in nats that has the last colour; a uniform choice among 32,768 codes is 10.4."""

HEAT_SHARES = (0.0, 0.35, 0.7, 1.0)
"""Shares of `HOTTEST` between which colours are interpolated."""

HEAT = ((10, 10, 40), (140, 30, 110), (240, 110, 30), (255, 250, 200))
"""Their colours: dark is well predicted."""

CODE_PIXELS = 8
"""Pixels of a code in a map of losses, where no picture says how many it has."""

MAX_RUNS = 400
"""Runs of one class drawn in a segment's bar; breaks between rows would otherwise be thousands."""

PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; margin: 2em; max-width: 1100px }}
.window {{ border: 1px solid #888; margin: 1em 0; padding: 0.6em }}
.segment {{ border-left: 4px solid #444; margin: 0.5em 0; padding-left: 0.6em }}
.padding {{ border-left-color: #ddd; color: #888 }}
.bar {{ display: flex; height: 10px; margin: 2px 0 }}
.bar span {{ height: 10px }} pre {{ white-space: pre-wrap; margin: 2px 0 }}
img {{ image-rendering: pixelated }}
</style></head><body><h1>{title}</h1><p>{legend}</p>{body}</body></html>
"""


@dataclass(frozen=True)
class Decoder:
    """Turns ids back into something to look at, with the tokenizers that are given."""

    dialect: Dialect | None
    """With the text tokenizer; without it, ids are shown."""
    vision: VisionTokenizer | None
    """Without it, only the sizes of spans are shown."""

    @classmethod
    def open(
        cls,
        manifest: Manifest,
        text_tokenizer: str | os.PathLike[str] | None,
        vision_tokenizer: str | os.PathLike[str] | None,
    ) -> Decoder:
        """Open the tokenizers of a dataset.

        Raises:
            UserError: one of them is not the dataset's, or a vision tokenizer is given without a text one.
        """
        if text_tokenizer is None:
            if vision_tokenizer is not None:
                raise UserError(
                    "a vision tokenizer alone cannot read the sizes of spans: give --text-tokenizer"
                )
            return cls(None, None)
        text = load_text_tokenizer(text_tokenizer)
        vision = VisionTokenizer.from_pretrained(vision_tokenizer) if vision_tokenizer is not None else None
        seen = vision.fingerprint if vision else ""
        for kind, path, own, expected in (
            ("text", text_tokenizer, text.fingerprint, manifest.text_tokenizer_fingerprint),
            ("vision", vision_tokenizer, seen, manifest.vision_tokenizer_fingerprint),
        ):
            if own and expected and own != expected:
                raise UserError(
                    f"{path} is not the {kind} tokenizer of dataset {manifest.name!r} ({own[:12]}, not "
                    f"{expected[:12]}): give that one"
                )
        name = manifest.dialect_name or "emu3"
        return cls(Dialect.preset(name, manifest.vocabulary, text), vision.eval() if vision else None)

    def text(self, ids: npt.NDArray[np.int64]) -> str:
        """HTML of a run of text ids; ids that are no text stand in brackets."""
        if self.dialect is None:
            return f"<pre>{' '.join(map(str, ids.tolist()))}</pre>"
        size = self.dialect.text_tokenizer.size
        parts = np.split(ids, np.flatnonzero(np.diff(ids < size)) + 1) if len(ids) else []
        shown = [
            self.dialect.text_tokenizer.decode(part.tolist())
            if part[0] < size
            else f"[{' '.join(map(str, part))}]"
            for part in parts
        ]
        return f"<pre>{html.escape(''.join(shown))}</pre>"

    def span(self, ids: npt.NDArray[np.int64], losses: npt.NDArray[np.float32] | None = None) -> str:
        """HTML of a span, from BOI to EOI, with a map of the losses of its codes where they are given."""
        if self.dialect is None:
            return f"<p>span of {len(ids)} tokens</p>"
        try:
            span = self.dialect.parse_span(ids)
        except GrammarError as error:
            return f"<p><b>a span that cannot be read</b>: {html.escape(str(error))}</p>"
        kind = "image" if isinstance(span, Image) else "video"
        label = f"{kind} of {'&times;'.join(map(str, span.codes.shape))} codes"
        images, factor = [], CODE_PIXELS
        if self.vision is not None:
            with torch.no_grad():
                pixels = self.vision.decode(torch.from_numpy(np.asarray(span.codes, dtype=np.int64))[None])[0]
            frames = to_uint8(pixels)
            factor = frames.shape[-2] // span.codes.shape[-1]
            images.append(frames)
        if losses is not None:
            of_codes = losses[ids >= self.dialect.vocabulary.vision_offset].reshape(span.codes.shape)
            label += f", loss {np.nanmean(of_codes):.3f}"
            images.append(heat_map(of_codes, factor))
        shown = " ".join(f'<img src="{_data_url(image)}">' for image in images)
        return f"<p>{label}{'<br>' if images else ''}{shown}</p>"


def heat_map(losses: npt.NDArray[np.float32], factor: int) -> npt.NDArray[np.uint8]:
    """Losses ``[..., H, W]`` as RGB ``[..., H * factor, W * factor, 3]``; grey where there is none (NaN)."""
    heat = np.nan_to_num(losses) / HOTTEST
    channels = [np.interp(heat, HEAT_SHARES, [colour[channel] for colour in HEAT]) for channel in range(3)]
    pixels = np.stack(channels, -1).round().astype(np.uint8)
    pixels[np.isnan(losses)] = 128
    return pixels.repeat(factor, axis=-3).repeat(factor, axis=-2)


def windows_page(
    plan: Plan,
    indices: Sequence[int],
    decoder: Decoder,
    *,
    weights: Sequence[Sequence[float]] | None = None,
    losses: Callable[[Window], npt.NDArray[np.float32]] | None = None,
    title: str,
) -> str:
    """An HTML page, complete in itself, of windows of a plan.

    Args:
        plan: The plan.
        indices: Numbers of the windows.
        decoder: The tokenizers.
        weights: Loss weights of each source, one a class in the order of `Modality`; all 1 where None.
        losses: What a model loses on every token of a window, fp32 ``[S]`` in nats, NaN where nothing
            predicts it; shown as a strip over the tokens, and as a map beside every picture.
        title: Heading of the page.
    """
    alike = [float(modality != Modality.PADDING) for modality in Modality]
    loss = [alike] * len(plan.mixture.sources) if weights is None else weights
    legend = " ".join(
        f'<span style="background:{COLOURS[modality]}">&nbsp;{modality.name.lower()} '
        f"(weight {' or '.join(f'{w:g}' for w in sorted({row[modality] for row in loss}))})&nbsp;</span>"
        for modality in Modality
    )
    windows = [plan.window(index) for index in indices]
    body = "".join(
        _window(plan, window, decoder, loss, losses(window) if losses else None) for window in windows
    )
    return PAGE.format(title=html.escape(title), legend=legend, body=body)


def _window(
    plan: Plan,
    window: Window,
    decoder: Decoder,
    weights: Sequence[Sequence[float]],
    losses: npt.NDArray[np.float32] | None,
) -> str:
    parts = []
    for place, number in enumerate(window.source.tolist()):
        here = slice(int(window.cu_seqlens[place]), int(window.cu_seqlens[place + 1]))
        length = int(window.length[place])
        if number == NO_SOURCE:
            parts.append(f'<div class="segment padding">padding: {here.stop - here.start} places</div>')
            continue
        source = plan.mixture.sources[number]
        document, start = int(window.document[place]), int(window.start[place])
        weight = float(
            np.asarray(weights[number])[window.modality[here]][
                window.modality[here] != Modality.PADDING
            ].sum()
        )
        head = (
            f"places {here.start} to {here.stop - 1}: <b>{html.escape(source.name)}</b> "
            f"{html.escape(source.dataset.sample_id(document))}, {length} tokens"
            + (f" from token {start}" if start else "")
            + f", {here.stop - here.start - length} padding, loss weight {weight:g}"
        )
        lost = None if losses is None else losses[here][:length]
        content = _segments(window.tokens[here][:length], plan.mixture.vocabulary, decoder, lost)
        strips = _bar(window.modality[here]) + _loss_strip(lost)
        parts.append(f'<div class="segment">{head}{strips}{content}</div>')
    total = int(window.length.sum())
    return (
        f'<div class="window"><b>window {window.index}</b>: {len(window.source)} segments, {total} tokens, '
        f"{len(window.tokens) - total} padding{''.join(parts)}</div>"
    )


def _segments(
    ids: npt.NDArray[np.int64],
    vocabulary: Any,
    decoder: Decoder,
    losses: npt.NDArray[np.float32] | None,
) -> str:
    """Text and spans of a document (or a piece of a text), in order."""
    parts = []
    index = 0
    starts, ends = np.flatnonzero(ids == vocabulary.boi), np.flatnonzero(ids == vocabulary.eoi) + 1
    for start, end in [*zip(starts.tolist(), ends.tolist(), strict=False), (len(ids), len(ids))]:
        text = ids[index:start]
        text = text[(text != vocabulary.bos) & (text != vocabulary.eos)]
        if len(text):
            parts.append(decoder.text(text))
        if end > start:
            parts.append(decoder.span(ids[start:end], None if losses is None else losses[start:end]))
        index = end
    return "".join(parts)


def _bar(modality: npt.NDArray[np.uint8]) -> str:
    """The classes of a segment's labels as a strip, one part a run."""
    borders = np.concatenate([[0], np.flatnonzero(np.diff(modality)) + 1, [len(modality)]])
    if len(borders) > MAX_RUNS:  # rows and their ends: draw every n-th run, each as wide as n
        borders = borders[np.linspace(0, len(borders) - 1, MAX_RUNS).astype(int)]
    spans = "".join(
        f'<span style="flex:{last - first};background:{COLOURS[Modality(int(modality[first]))]}"></span>'
        for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
    )
    return f'<div class="bar">{spans}</div>'


def _loss_strip(losses: npt.NDArray[np.float32] | None) -> str:
    """The losses of a segment's tokens from left to right, means of equal runs of them."""
    if losses is None or np.isnan(losses).all():
        return ""
    runs = np.array_split(losses, min(MAX_RUNS, len(losses)))
    means = np.array([np.nan if np.isnan(run).all() else np.nanmean(run) for run in runs], np.float32)
    url = _data_url(heat_map(means[None], 1))
    return f'<img style="width:100%;height:10px" title="loss {np.nanmean(losses):.3f}" src="{url}">'


def _data_url(frames: npt.NDArray[np.uint8]) -> str:
    """A picture ``[H, W, 3]`` as PNG, a clip ``[T, H, W, 3]`` as a GIF that repeats, inside the page."""
    buffer = io.BytesIO()
    if frames.ndim == 3:
        Picture.fromarray(frames).save(buffer, format="PNG")
        kind = "png"
    else:
        first, *others = [Picture.fromarray(frame) for frame in frames]
        first.save(buffer, format="GIF", save_all=True, append_images=others, loop=0, duration=125)
        kind = "gif"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
