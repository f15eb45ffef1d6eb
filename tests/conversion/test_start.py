"""An imported run trains from the ``train.yaml`` it came with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from emu3_megatron.conversion import ExportedModel, export_hugging_face
from emu3_megatron.conversion.checkpoints import import_checkpoint
from emu3_megatron.conversion.companions import TRAINING
from emu3_megatron.data import Manifest
from emu3_megatron.errors import UserError
from emu3_megatron.training.command_line import parse
from emu3_megatron.vocabulary import Vocabulary
from tests.conversion.test_hugging_face import build
from tests.inference import worlds
from tests.training import runs


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


def write(folder: Path, vocabulary: Vocabulary) -> None:
    config = worlds.model_config()
    about = ExportedModel(config=config, vocabulary=vocabulary)
    export_hugging_face(folder, build(config, vocabulary).state_dict(), about, layout="emu3")


@pytest.mark.slow
def test_training_starts_from_the_imported_weights(tmp_path: Path) -> None:
    """Two steps through the real command line, on a dataset whose vocabulary has another name."""
    from emu3_megatron.samples.tiny import prepare

    prepare(tmp_path / "stills")
    vocabulary = Manifest.load(tmp_path / "stills").vocabulary
    write(tmp_path / "hf", vocabulary)
    (tmp_path / "hf" / "emu3_megatron.json").unlink()
    import_checkpoint(tmp_path / "hf", tmp_path / "run", datasets=[tmp_path / "stills"])
    short = ["--trainer.steps", "2", "--optimizer.warmup_steps", "1", "--platform", "cpu"]
    done = runs.train(tmp_path / "run" / TRAINING, tmp_path / "trained", *short)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 0


def test_the_configuration_is_whole_and_datasets_must_fit(tmp_path: Path) -> None:
    vocabulary = Vocabulary.build("mine", text_size=90, codebook_size=16)
    write(tmp_path / "hf", vocabulary)
    checkpoint = import_checkpoint(tmp_path / "hf", tmp_path / "run")
    file = tmp_path / "run" / TRAINING
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        parse(["--config", str(file)])
    config = parse(["--config", str(file), "--data.sources", '{"a": {"path": "somewhere"}}']).config
    assert config.model == worlds.model_config()
    assert config.checkpoint.load == str(checkpoint)
    assert config.trainer.precision == "fp32"
