"""The windows of a run of preference training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from emu3_megatron.data import Mixture, MultimodalDataset, Source
from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.posttraining.preferences.pairs import PairPlan, PairTemplate
from emu3_megatron.training.command_line import alignment_of
from emu3_megatron.training.config import SourceConfig
from emu3_megatron.training.data import (
    VALIDATION_SEED_OFFSET,
    TrainingData,
    prepare_missing,
    require_equal_tokenizers,
    seed_of,
)
from emu3_megatron.vocabulary import Vocabulary


def pair_template(config: PreferenceTrainingConfig, source: SourceConfig) -> PairTemplate:
    """How the pairs of a source are rendered."""
    asked = source.template or config.data.template
    return PairTemplate(bos=asked.bos, eos=asked.eos, alignment=alignment_of(config))


def open_pairs(config: PreferenceTrainingConfig) -> TrainingData:
    """Open every source of pairs; rank 0 makes missing ones first, if `data.prepare` says how.

    Raises:
        UserError: a dataset is missing, damaged, or has another vocabulary than the rest.
    """
    data = config.data
    prepare_missing(data, {**data.sources, **data.validation})
    plan = _plan(config, data.sources, seed_of(config))
    held_out = None
    if data.validation:
        seed = seed_of(config) + VALIDATION_SEED_OFFSET
        held_out = _plan(config, data.validation, seed, plan.mixture.vocabulary)
        require_equal_tokenizers(plan.mixture.tokenizers, held_out.mixture.tokenizers)
    return TrainingData(vocabulary=plan.mixture.vocabulary, plan=plan, validation_plan=held_out)


def every_pair(config: PreferenceTrainingConfig, name: str, source: SourceConfig) -> tuple[PairPlan, int]:
    """A plan whose first windows hold every pair of a source once, and the number of those windows."""
    size = len(MultimodalDataset.open(source.path))
    plan = PairPlan(
        Mixture([Source(name=name, path=source.path, template=pair_template(config, source))]),
        seed=seed_of(config),
        context_length=config.data.context_length,
        alignment=alignment_of(config),
        block_draws=size,
    )
    return plan, plan.block(0).num_windows


def _plan(
    config: PreferenceTrainingConfig,
    sources: Mapping[str, SourceConfig],
    seed: int,
    vocabulary: Vocabulary | None = None,
) -> PairPlan:
    data = config.data
    mixture = Mixture(
        [
            Source(name=name, path=source.path, weight=source.weight, template=pair_template(config, source))
            for name, source in sources.items()
        ],
        vocabulary=vocabulary,
        takedown=data.takedown,
    )
    return PairPlan(
        mixture,
        seed=seed,
        context_length=data.context_length,
        alignment=alignment_of(config),
        policy=data.policy,
        cache=Path(config.run) / "plan",
    )
