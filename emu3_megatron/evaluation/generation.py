"""Draws what a benchmark asks for, into the files it expects; an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation.tasks import Task, write_tasks
from emu3_megatron.files import atomic_write, write_json_atomic
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.media import write_mp4, write_png

Pixels = npt.NDArray[np.uint8]

SETTINGS = "evaluation.json"
"""File in an evaluation's folder: suite, model and settings."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How samples are drawn."""

    height: int
    width: int
    frames: int
    """Of clips."""
    fps: float
    sampling: Sampling
    seed: int
    """Of the first sample; the next ones count up, whatever has been drawn already."""
    negative_prompt: str = ""
    suffix: str = ""
    """Added to every prompt."""
    batch: int = 32
    """Samples at a time."""


def draw(
    generator: Generator, tasks: Sequence[Task], drawing: Drawing, folder: Path, about: dict[str, Any]
) -> int:
    """Draw the samples of `tasks` into `folder`; files that are there already stay.

    Args:
        generator: The model.
        tasks: What to draw.
        drawing: Size and sampling.
        folder: Where the files go, with `SETTINGS` and the tasks.
        about: What `SETTINGS` shall say besides `drawing`.

    Returns:
        How many samples were drawn now.

    Raises:
        UserError: the folder holds samples of other settings.
    """
    settings = {**about, **asdict(drawing)}
    path = folder / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        changed = sorted(key for key in settings if key != "batch" and before.get(key) != settings[key])
        if changed:
            raise UserError(f"{folder} was drawn with another {', '.join(changed)}; give another folder")
    write_json_atomic(path, settings)
    write_tasks(folder, tasks)
    _write_metadata(folder, tasks)
    firsts = np.cumsum([0, *(task.samples for task in tasks)])
    missing = [
        (task, drawing.seed + int(first))
        for task, first in zip(tasks, firsts, strict=False)
        if not all((folder / name).is_file() for name in task.paths)
    ]
    count = sum(task.samples for task, _ in missing)
    with tqdm(total=count, unit="sample", disable=None) as bar:
        for video, group in groupby(missing, key=lambda pair: pair[0].video):
            waiting: list[tuple[Task, int]] = []
            for pair in group:
                if waiting and sum(task.samples for task, _ in [*waiting, pair]) > drawing.batch:
                    _draw_batch(generator, waiting, drawing, folder, video, bar)
                    waiting = []
                waiting.append(pair)
            _draw_batch(generator, waiting, drawing, folder, video, bar)
    return count


def _draw_batch(
    generator: Generator,
    pairs: Sequence[tuple[Task, int]],
    drawing: Drawing,
    folder: Path,
    video: bool,
    bar: Any,
) -> None:
    """Draw the samples of some tasks, each with the seed of its first one, and write them."""
    common: dict[str, Any] = {
        "prompts": [task.prompt + drawing.suffix for task, _ in pairs for _ in range(task.samples)],
        "seeds": [seed + number for task, seed in pairs for number in range(task.samples)],
        "height": drawing.height,
        "width": drawing.width,
        "sampling": drawing.sampling,
        "negative_prompt": drawing.negative_prompt,
        "progress": bar.update,
    }
    if video:
        clips = generator.text_to_video(**common, frames=drawing.frames, fps=drawing.fps)
        drawn = [clip.pixels for clip in clips]
    else:
        drawn = [image.pixels for image in generator.text_to_image(**common)]
    for task, _ in pairs:
        own, drawn = drawn[: task.samples], drawn[task.samples :]
        if task.grid:
            own = [grid(own)]
        for name, pixels in zip(task.paths, own, strict=True):
            if video:
                write_mp4(folder / name, pixels, drawing.fps)
            else:
                write_png(folder / name, pixels)


def grid(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures of one size, two a row and without a margin (one stays as it is); uint8 ``[H, W, 3]``."""
    if len(pictures) == 1:
        return pictures[0]
    rows = [np.concatenate(pictures[index : index + 2], axis=1) for index in range(0, len(pictures), 2)]
    return np.concatenate(rows)


def _write_metadata(folder: Path, tasks: Sequence[Task]) -> None:
    """Where a prompt has a folder of its own (GenEval), the benchmark's record of it goes there."""
    for task in tasks:
        own, _, rest = task.paths[0].partition("/samples/")
        if rest:
            with atomic_write(folder / own / "metadata.jsonl") as stream:
                stream.write(json.dumps(task.about, ensure_ascii=False).encode())
