"""What is made of results: longer clips, sheets of pictures, documents in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write
from emu3_megatron.grammar import Document, Text, Video
from emu3_megatron.inference.tasks import GeneratedVideo, Generator
from emu3_megatron.media import write_mp4, write_png

SHEET_FRAMES = 4
"""Frames of a clip that a sheet shows."""

_MARGIN = 4
"""Pixels between the pictures of a sheet."""


def extend_video(
    generator: Generator, clips_NTCHW: torch.Tensor, *, rounds: int, **settings: Any
) -> list[GeneratedVideo]:
    """Continue clips, then the end of the result, `rounds` times in all.

    Every round starts from as many frames as `clips_NTCHW` has and adds ``frames`` less those. `settings` are
    those of `Generator.continue_video`; every round takes the same seeds. `codes` are of the last round.
    """
    if rounds < 1:
        raise UserError(f"rounds={rounds} must be at least 1")
    given = clips_NTCHW.shape[1]
    videos = generator.continue_video(clips_NTCHW, **settings)
    for _ in range(rounds - 1):
        ends = np.stack([video.pixels[-given:] for video in videos])
        clips_NTCHW = torch.from_numpy(ends).movedim(-1, 2).float() / 127.5 - 1
        videos = [
            replace(
                more,
                pixels=np.concatenate([video.pixels, more.pixels[given:]]),
                tokens=video.tokens + more.tokens,
            )
            for video, more in zip(videos, generator.continue_video(clips_NTCHW, **settings), strict=True)
        ]
    return videos


def contact_sheet(clips: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """All results in one picture, in reading order.

    Args:
        clips: RGB, ``[T, H, W, 3]`` of one height and width; images have one frame, and stand in a square. Of
            clips, one stands in each row, with up to `SHEET_FRAMES` frames spread over it.

    Returns:
        RGB, uint8 ``[rows, columns, 3]``, on white.
    """
    frames = [np.linspace(0, len(clip) - 1, min(len(clip), SHEET_FRAMES)).round() for clip in clips]
    cells = np.concatenate([clip[own.astype(int)] for clip, own in zip(clips, frames, strict=True)])
    across = max(len(own) for own in frames)
    if across == 1:
        across = int(np.ceil(np.sqrt(len(cells))))
    down = -(-len(cells) // across)
    height, width = cells.shape[1] + _MARGIN, cells.shape[2] + _MARGIN
    sheet = np.full((down * height + _MARGIN, across * width + _MARGIN, 3), 255, dtype=np.uint8)
    for index, cell in enumerate(cells):
        top, left = index // across * height + _MARGIN, index % across * width + _MARGIN
        sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def write_document(generator: Generator, document: Document, folder: Path) -> list[dict[str, Any]]:
    """Write text and pictures into `folder`: ``document.json``, ``document.md``, PNG and MP4 files.

    Returns:
        What ``document.json`` holds: per segment ``{"text"}``, ``{"image"}`` or ``{"video"}``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    segments: list[dict[str, Any]] = []
    lines = []
    for number, segment in enumerate(document.segments):
        if isinstance(segment, Text):
            segments.append({"text": segment.text})
            lines.append(segment.text)
            continue
        (pixels,) = generator.pixels([segment.codes])
        if isinstance(segment, Video):
            name = f"{number:03d}.mp4"
            write_mp4(folder / name, pixels, segment.fps or 8.0)
            segments.append({"video": name})
            lines.append(f"[video]({name})")
        else:
            name = f"{number:03d}.png"
            write_png(folder / name, pixels)
            segments.append({"image": name})
            lines.append(f"![]({name})")
    for name, text in (
        ("document.md", "\n\n".join(lines) + "\n"),
        ("document.json", json.dumps(segments, ensure_ascii=False, indent=1) + "\n"),
    ):
        with atomic_write(folder / name) as stream:
            stream.write(text.encode())
    return segments
