"""What a training step sees, as a function of the seed, the step and the process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from emu3_megatron.vision.corpus import Batch, VisionDataset, draw_batch
from emu3_megatron.vision.streaming import StreamedDataset
from emu3_megatron.vision.training_config import VisionTrainingConfig

AHEAD = 4
"""Batches that a worker draws ahead."""


@dataclass(frozen=True)
class Draw:
    """One step's data."""

    batch: Batch
    """Pixels, on the CPU."""
    frames: list[int]
    """Frames of each clip that are decoded; [0] for images."""


class Draws(Dataset["Draw | Exception"]):
    """Draws of every step; step k is drawn alone, so that workers and reruns give the same.

    Args:
        config: sizes, schedule and seed.
        dataset: what to draw from.
        rank: this process.
        processes: how many share a batch.
    """

    def __init__(
        self, config: VisionTrainingConfig, dataset: VisionDataset, rank: int, processes: int
    ) -> None:
        self.config, self.dataset, self.rank, self.processes = config, dataset, rank, processes
        self._ahead: Iterator[Draw | Exception] | None = None
        self._next = -1

    def __len__(self) -> int:
        return self.config.schedule.steps

    def __getitem__(self, step: int) -> Draw | Exception:
        """The draw of a step, or the user's error in its place: a worker's traceback helps nobody."""
        try:
            return self.draw(step)
        except (ValueError, OSError) as error:
            return error

    def take(self, step: int) -> Draw:
        """The draw of a step, by the workers where there are any.

        Raises:
            ValueError: a file is missing, or too many in a row cannot be decoded.
        """
        if not self.config.data.workers:
            return self.draw(step)
        if self._ahead is None or step != self._next:
            self._ahead = self._load_from(step)
        self._next = step + 1
        drawn = next(self._ahead)
        if isinstance(drawn, Exception):
            raise drawn
        return drawn

    def draw(self, step: int, again: int = 0) -> Draw:
        """Draw for a step; another `again` gives another draw of the same kind."""
        seed = _step_seed(self.config.seed, step, self.rank) + again * 0x9E3779B97F4A7C15
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        clips = self._is_clip_step(step)
        schedule = self.config.schedule
        whole = schedule.crop is None or step >= schedule.whole_from * schedule.steps
        size = (
            schedule.clip_batch_size if clips else schedule.whole_batch_size if whole else schedule.batch_size
        )
        size, crop = max(1, size // self.processes), None if whole else schedule.crop
        if isinstance(self.dataset, StreamedDataset):
            batch = self.dataset.draw(clips=clips, size=size, crop=crop, generator=generator)
        else:
            batch = draw_batch(
                self.dataset,
                clips=clips,
                size=size,
                crop=crop,
                multiple=self.config.model.spatial_factor,
                generator=generator,
            )
        return Draw(batch=batch, frames=self._decoded_frames(batch, generator))

    def _is_clip_step(self, step: int) -> bool:
        every = self.config.schedule.clip_every
        if self.dataset.num_images == 0:
            return True
        return bool(every and self.dataset.num_clips and step % every == every - 1)

    def _decoded_frames(self, batch: Batch, generator: torch.Generator) -> list[int]:
        if batch.pixels.dim() == 4:
            return [0]
        frames = batch.pixels.shape[1]
        count = min(frames, self.config.schedule.decoded_frames)
        return sorted(torch.randperm(frames, generator=generator)[:count].tolist())

    def _load_from(self, step: int) -> Iterator[Draw | Exception]:
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(step, len(self)),
            num_workers=self.config.data.workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
        )
        return iter(loader)


def _as_it_is(draw: Any) -> Any:
    return draw


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank
