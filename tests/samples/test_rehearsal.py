"""The rehearsal's configurations fit the processes of any cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.samples.rehearsal import SCALES, STAGES, write_configurations
from emu3_megatron.settings import read_settings
from emu3_megatron.training.command_line import parse_as
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.vision.training_config import VisionTrainingConfig


@pytest.mark.parametrize(("scale", "ranks"), [("tiny", 1), ("tiny", 6), ("tiny", 16), ("small", 128)])
def test_every_training_of_a_rehearsal_can_be_shared(tmp_path: Path, scale: str, ranks: int) -> None:
    write_configurations(tmp_path, SCALES[scale], ranks)
    read_settings(VisionTrainingConfig, None, ["--config", str(tmp_path / "vision.yaml")]).check(ranks)
    for stage in STAGES:
        kind = PreferenceTrainingConfig if stage == "dpo" else TrainingConfig
        asked = parse_as(kind, ["--config", str(tmp_path / f"{stage}.yaml"), "--world-size", str(ranks)])
        assert asked.config.trainer.global_batch_size >= 4


def test_no_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ranks=0 must be at least 1"):
        write_configurations(tmp_path, SCALES["tiny"], 0)
