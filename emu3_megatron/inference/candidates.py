"""Draws candidates for preference pairs: K images of each prompt, kept as they were sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Image
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.posttraining.preferences.candidates import CandidateFolder, Candidates


@dataclass(frozen=True, kw_only=True)
class CandidateSettings:
    """What is drawn. Raises `UserError` for values out of range."""

    candidates: int = 8
    """Images of each prompt (paper: 8 to 10)."""
    height: int = 720
    """Pixels."""
    width: int = 720
    """Pixels."""
    sampling: Sampling = field(default_factory=lambda: Sampling(guidance=3.0))
    """How tokens are drawn."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: int = 0
    """Of the first image of the first prompt; all others count up."""

    def __post_init__(self) -> None:
        """Check the counts."""
        if self.candidates < 2:
            raise UserError(f"candidates={self.candidates} must be at least 2: a pair is made of two")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")


def sample_candidates(
    generator: Generator,
    path: Path,
    prompts: Sequence[str],
    settings: CandidateSettings,
    *,
    checkpoint: str,
    group: int = 16,
    worker: int = 0,
    num_workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> CandidateFolder:
    """Draw what is missing in a folder of candidates.

    An image depends on its prompt, the settings and its seed alone: killed and started again, or shared among
    workers, the folder's bytes are the same.

    Args:
        generator: The model.
        path: The folder, made if missing.
        prompts: All prompts.
        settings: What is drawn of each.
        checkpoint: Where the model came from, as the folder states it.
        group: Prompts drawn together.
        worker: This process draws every `num_workers`-th prompt, from this one on.
        num_workers: Processes that share the work.
        progress: Called with the number of prompts just finished, those found finished included.

    Raises:
        UserError: no prompts, or the folder was begun with other settings.
    """
    if not prompts:
        raise UserError("no prompts: give a file with a prompt a line")
    if not 0 <= worker < num_workers or group < 1:
        raise UserError(
            f"worker={worker} must lie in [0, num_workers={num_workers}), group={group} be above 0"
        )
    dialect, vision = generator.bundle.dialect, generator.bundle.vision_tokenizer
    folder = CandidateFolder.create(
        path,
        prompts=prompts,
        vocabulary=dialect.vocabulary,
        identity={
            "dialect_name": dialect.name,
            "dialect_fingerprint": dialect.fingerprint,
            "text_tokenizer_fingerprint": dialect.text_tokenizer.fingerprint,
            "vision_tokenizer_fingerprint": vision.fingerprint,
        },
        drawing={**asdict(settings), "checkpoint": checkpoint},
    )
    mine = range(worker, len(prompts), num_workers)
    missing = sorted(set(mine).difference(folder.finished()))
    if progress is not None:
        progress(len(mine) - len(missing))
    for first in range(0, len(missing), group):
        numbers = missing[first : first + group]
        _draw(generator, folder, numbers, settings)
        if progress is not None:
            progress(len(numbers))
    return folder


def _draw(
    generator: Generator, folder: CandidateFolder, numbers: Sequence[int], settings: CandidateSettings
) -> None:
    """Draw the candidates of some prompts in one call of the engine."""
    dialect, each = generator.bundle.dialect, settings.candidates
    prompts = folder.prompts
    images = generator.text_to_image(
        [prompts[number] for number in numbers for _ in range(each)],
        height=settings.height,
        width=settings.width,
        sampling=settings.sampling,
        seeds=[settings.seed + number * each + place for number in numbers for place in range(each)],
        negative_prompt=settings.negative_prompt,
    )
    for place, number in enumerate(numbers):
        own = images[place * each : (place + 1) * each]
        candidates = Candidates(
            prompt_ids=np.asarray(dialect.encode_text(prompts[number]), dtype=np.int32),
            spans=[dialect.encode_span(Image(image.codes)).astype(np.int32) for image in own],
            seeds=[image.seed for image in own],
        )
        folder.add(number, candidates, [image.pixels for image in own])
