"""Train on preferences.

::

    torchrun --nproc-per-node 2 -m emu3_megatron.posttraining.preferences --config
    examples/configs/post-training/dpo.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from emu3_megatron.errors import run_main
from emu3_megatron.parallel.platform import Platform
from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.posttraining.preferences.windows import PAIRS
from emu3_megatron.training.__main__ import launch
from emu3_megatron.training.config import SourceConfig
from emu3_megatron.training.data import TrainingData
from emu3_megatron.training.objective import Objective
from emu3_megatron.vocabulary import Vocabulary


def main() -> None:
    """Train, or explain a configuration."""
    launch(PreferenceTrainingConfig, Objectives(), open_data)


def open_data(config: PreferenceTrainingConfig, machine: Platform) -> TrainingData:
    """The pairs, and the reference's answers about them where they are kept."""
    from emu3_megatron.posttraining.preferences.references import fill_caches

    data = TrainingData.open(config, PAIRS)
    if config.dpo.reference_mode == "cached":
        fill_caches(config, machine)
    return data


class Objectives:
    """Makes the objectives of one run, see `ObjectiveFactory`; a reference in memory serves all of them."""

    def __init__(self) -> None:
        self._reference: list[torch.nn.Module] | None = None

    def __call__(
        self, config: Any, sources: Mapping[str, SourceConfig], vocabulary: Vocabulary, device: torch.device
    ) -> Objective:
        """The loss of pairs with its reference, for sources in the order of `Batch.source`."""
        from emu3_megatron.posttraining.preferences.objective import DPO, Reference
        from emu3_megatron.posttraining.preferences.references import (
            ReferenceModel,
            load_cached,
            load_reference,
        )
        from emu3_megatron.training.step import Groups

        reference: Reference
        if config.dpo.reference_mode == "cached":
            reference = load_cached(config, sources)
        else:
            if self._reference is None:
                self._reference = load_reference(config, vocabulary)
            reference = ReferenceModel(self._reference, tuple(sources), config.loss.chunk_size, device)
        return DPO(config.dpo, config.loss, reference, Groups.current())


if __name__ == "__main__":
    run_main(main)
