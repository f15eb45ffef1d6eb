"""The chain, with the settings as they are, runs to its end: every layout divides, every dataset is made."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from emu3_megatron.curation import CurationConfig
from emu3_megatron.posttraining.conversation_job import ConversationConfig
from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.posttraining.selection import SelectionConfig
from emu3_megatron.settings import read_settings
from emu3_megatron.training.command_line import parse_as
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.vision.training_config import VisionTrainingConfig
from tests.programs import ROOT

SCRIPTS = ROOT / "examples" / "slurm"
SETTINGS = (SCRIPTS / "settings.sh").read_text()
STAGES = re.findall(r"^(\w+)_CONFIG=", SETTINGS, re.MULTILINE)


@cache
def settings(expression: str) -> list[str]:
    """Words that the settings make of an expression of bash."""
    script = f'set -eu; EMU3_ROOT={ROOT}; source {SCRIPTS}/settings.sh; printf "%s\\n" {expression}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def ranks(stage: str) -> int:
    nodes, each = settings(f"${stage}_NODES $TASKS_PER_NODE")
    return int(nodes) * int(each)


def config_of(stage: str) -> Path:
    (path,) = settings(f"${stage}_CONFIG")
    return ROOT / path


def value_of(option: str, words: list[str]) -> str:
    return words[words.index(option) + 1]


@cache
def tokenized() -> dict[str, list[str]]:
    """Options of every dataset, by its folder."""
    datasets = {}
    for name in settings('"${DATASETS[@]}"'):
        words = settings(f'"$(tokenize_options {name}; printf "%s\\n" "${{OPTIONS[@]}}")"')
        datasets[value_of("--output", words)] = words
    return datasets


@pytest.mark.parametrize("stage", STAGES)
def test_every_training_can_be_shared_by_its_ranks(stage: str) -> None:
    arguments = ["--config", str(config_of(stage))]
    if stage == "VISION":
        read_settings(VisionTrainingConfig, None, arguments).check(ranks(stage))
        return
    kind = PreferenceTrainingConfig if stage == "DPO" else TrainingConfig
    parse_as(kind, [*arguments, "--world-size", str(ranks(stage))])


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "VISION"])
def test_every_dataset_of_a_training_is_made(stage: str) -> None:
    """By tokenization, or from pairs; held-out ones are opened at the start as well."""
    pairs = settings('"${PAIRS_OPTIONS[@]}"')
    made = {*tokenized(), value_of("--output", pairs), value_of("--held-out", pairs)}
    data = yaml.safe_load(config_of(stage).read_text())["data"]
    used = [source["path"] for part in ("sources", "validation") for source in data[part].values()]
    assert used
    assert set(used) <= made


def test_manifests_and_splits_are_what_earlier_jobs_write(tmp_path: Path) -> None:
    curation = read_settings(CurationConfig, None, settings('"${CURATE_OPTIONS[@]}"'))
    chosen = read_settings(SelectionConfig, None, settings('"${SELECT_OPTIONS[@]}"'))
    assert curation.held_out
    assert chosen.manifest == (curation.output / "manifest.jsonl",)
    assert "quality" in {*curation.image.stages} & {*curation.video.stages}
    assert set(chosen.scores) == {"quality"}
    assert chosen.skip_unscored  # texts have none
    for folder, words in tokenized().items():
        name = Path(folder).name
        if name.endswith("conversations"):
            config = read_settings(ConversationConfig, None, words)
            assert config.manifest == (Path(f"{name}.json"),)
            continue
        manifest = Path(value_of("--manifest", words))
        assert manifest == (chosen.output if "quality" in name else chosen.manifest[0])
        side = "held-out-" if name.startswith("held-out-") else ""
        kind = name.removeprefix("held-out-").removeprefix("quality-").removesuffix("s")
        assert value_of("--split", words) == f"{side}{kind}s"


def test_a_dataset_that_is_not_there_is_one_line() -> None:
    script = f"EMU3_ROOT={ROOT}; source {SCRIPTS}/settings.sh; tokenize_options pictures"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: settings name no dataset 'pictures'; DATASETS are: text images")
