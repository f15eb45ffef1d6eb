"""The data of a run: datasets opened (or made), one vocabulary, the plan, the loaders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from emu3_megatron.data import Manifest, Mixture, Plan, Source, Template
from emu3_megatron.data.loader import Batch, WindowLoader
from emu3_megatron.errors import UserError
from emu3_megatron.training.command_line import alignment_of
from emu3_megatron.training.config import DataConfig, SourceConfig, TrainingConfig
from emu3_megatron.training.modules import is_rank_zero, load_by_name
from emu3_megatron.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
VALIDATION_SEED_OFFSET = 1
"""Keeps the order of held-out windows apart from the training order."""


@dataclass(frozen=True)
class Reading:
    """How the documents of a run's sources become windows."""

    plan: type[Plan]
    """Packs documents, and reads windows."""
    template: Callable[[TrainingConfig, SourceConfig], Template]
    """Renders the documents of a source."""


PACKED = Reading(Plan, lambda config, source: source.template or config.data.template)
"""That of next-token prediction."""


@dataclass(frozen=True)
class TrainingData:
    """What the trainer needs to know of its data."""

    vocabulary: Vocabulary
    """The one that all datasets were made with."""
    plan: Plan
    """Order of the training windows."""
    validation_plan: Plan | None
    """Order of the held-out windows."""

    @classmethod
    def open(cls, config: TrainingConfig, reading: Reading = PACKED) -> TrainingData:
        """Open every source; rank 0 makes missing ones first, if `data.prepare` says how.

        Args:
            config: The run.
            reading: How documents become windows.

        Raises:
            UserError: a dataset is missing, damaged, or has another vocabulary than the rest.
        """
        data = config.data
        _prepare_missing(data, {**data.sources, **data.validation})
        plan = open_plan(config, reading)
        takedown = plan.mixture.takedown
        if takedown is not None and is_rank_zero():
            logger.log(logging.WARNING if takedown.unknown else logging.INFO, "%s", takedown)
        vocabulary = plan.mixture.vocabulary
        held_out = None
        if data.validation:
            seed = seed_of(config) + VALIDATION_SEED_OFFSET
            held_out = _plan(config, reading, data.validation, seed, vocabulary)
            _require_equal_tokenizers(plan.mixture.tokenizers, held_out.mixture.tokenizers)
        return cls(vocabulary=vocabulary, plan=plan, validation_plan=held_out)

    @staticmethod
    def vocabulary_if_ready(data: DataConfig) -> Vocabulary | None:
        """The vocabulary, if the first training dataset exists."""
        folder = Path(next(iter(data.sources.values())).path)
        return Manifest.load(folder).vocabulary if (folder / MANIFEST).exists() else None

    def batches(self, config: TrainingConfig, *, step: int, windows: int) -> Iterator[list[Batch]]:
        """Global batches of this rank for step `step` (from 0) and on, read ahead.

        Where the batch grows, a new loader begins at the window that the last one came to.
        """
        while True:
            size = config.trainer.batch_size(step)
            workers = config.data.num_workers
            batches = iter(_loader(config, self.plan, start=windows, size=size, num_workers=workers))
            while config.trainer.batch_size(step) == size:
                yield next(batches)
                step, windows = step + 1, windows + size

    def validation_loader(self, config: TrainingConfig) -> Iterable[list[Batch]]:
        """Global batches of held-out windows from the first on."""
        if self.validation_plan is None:
            raise UserError("data.validation is empty; name a held-out dataset")
        size = config.trainer.global_batch_size
        return _loader(config, self.validation_plan, start=0, size=size, num_workers=0)


def _prepare_missing(data: DataConfig, sources: Mapping[str, SourceConfig]) -> None:
    """Let rank 0 make datasets that have no manifest, while the others wait."""
    missing = [source.path for source in sources.values() if not (Path(source.path) / MANIFEST).exists()]
    if data.prepare is not None:
        if missing and is_rank_zero():
            prepare = load_by_name(data.prepare, "data.prepare")
            for path in missing:
                logger.info("making %s by %s", path, data.prepare)
                prepare(Path(path))
        torch.distributed.barrier()


def _require_equal_tokenizers(training: Mapping[str, str], held_out: Mapping[str, str]) -> None:
    """Refuse held-out data of other tokenizers (fingerprints by kind): its loss would say nothing."""
    for kind in training.keys() & held_out.keys():
        if training[kind] != held_out[kind]:
            raise UserError(
                f"data.validation was made with another {kind} ({held_out[kind][:12]}) than data.sources "
                f"({training[kind][:12]}): tokenize it again with theirs"
            )


def open_plan(config: TrainingConfig, reading: Reading = PACKED) -> Plan:
    """The order of a run's training windows; its blocks are kept in the run's folder.

    Raises:
        UserError: a dataset is missing, damaged, or has another vocabulary than the rest.
    """
    return _plan(config, reading, config.data.sources, seed_of(config))


def seed_of(config: TrainingConfig) -> int:
    """Seed of the plan's order."""
    return config.seed if config.data.seed is None else config.data.seed


def _plan(
    config: TrainingConfig,
    reading: Reading,
    sources: Mapping[str, SourceConfig],
    seed: int,
    vocabulary: Vocabulary | None = None,
) -> Plan:
    data = config.data
    cache = Path(config.run) / "plan"
    mixture = Mixture(
        [
            Source(
                name=name, path=source.path, weight=source.weight, template=reading.template(config, source)
            )
            for name, source in sources.items()
        ],
        vocabulary=vocabulary,
        takedown=data.takedown,
        cache=cache,
    )
    return reading.plan(
        mixture,
        seed=seed,
        context_length=data.context_length,
        alignment=alignment_of(config),
        policy=data.policy,
        fill=data.fill,
        cache=cache,
    )


def _loader(config: TrainingConfig, plan: Plan, *, start: int, size: int, num_workers: int) -> WindowLoader:
    from megatron.core import parallel_state

    return WindowLoader(
        plan,
        start=start,
        global_batch_size=size,
        micro_batch_size=config.trainer.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        num_workers=num_workers,
    )
