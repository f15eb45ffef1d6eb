"""The windows of a run of preference training."""

from __future__ import annotations

from emu3_megatron.data import Mixture, MultimodalDataset, Source
from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.posttraining.preferences.pairs import PairPlan, PairTemplate
from emu3_megatron.training.command_line import alignment_of
from emu3_megatron.training.config import SourceConfig, TrainingConfig
from emu3_megatron.training.data import Reading, seed_of


def pair_template(config: TrainingConfig, source: SourceConfig) -> PairTemplate:
    """How the pairs of a source are rendered."""
    asked = source.template or config.data.template
    return PairTemplate(bos=asked.bos, eos=asked.eos, alignment=alignment_of(config))


PAIRS = Reading(PairPlan, pair_template)
"""Every document is a pair."""


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
