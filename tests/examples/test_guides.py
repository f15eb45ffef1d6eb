"""The code of docs/extending.md."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from emu3_megatron.grammar import Image, Video
from emu3_megatron.text.bytes import ByteTokenizer
from emu3_megatron.vocabulary import Vocabulary
from tests.programs import shared

ROOT = Path(__file__).parents[2]


def guide(name: str) -> ModuleType:
    """A file of examples/guides as a module."""
    spec = importlib.util.spec_from_file_location(
        f"guide_{name}", ROOT / "examples" / "guides" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dialect_of_ones_own_reads_what_it_wrote() -> None:
    text, image, video = guide("dialect").round_trip().segments
    assert text.text == "a cat"
    assert isinstance(image, Image)
    assert isinstance(video, Video)
    assert np.array_equal(image.codes, np.arange(6).reshape(2, 3))
    assert video.codes.shape == (2, 2, 2)
    assert video.fps == 8.0


def test_a_source_of_ones_own_opens(tmp_path: Path) -> None:
    from emu3_megatron.data import MultimodalDataset

    text = ByteTokenizer()
    vocabulary = Vocabulary.build("guide", text_size=text.size, codebook_size=64)
    codes = np.arange(12).reshape(3, 4)
    guide("source").write(tmp_path / "mine", [("a cat", codes), ("a dog", codes)], vocabulary, text)
    dataset = MultimodalDataset.open(tmp_path / "mine", vocabulary=vocabulary)
    assert len(dataset) == 2
    (caption, mode), (span, span_mode) = dataset.document(0)
    assert (mode, span_mode) == (0, 1)
    assert text.decode(caption.tolist()) == "a cat"
    assert (span >= vocabulary.vision_offset).sum() == codes.size


def test_a_shape_of_ones_own_counts_its_parameters() -> None:
    assert 1.8e9 < guide("model").parameters(184_622) < 2.1e9


@pytest.mark.slow
def test_a_callback_of_ones_own_ends_the_run(tmp_path: Path) -> None:
    program = ROOT / "examples" / "guides" / "callback.py"
    options = ["--run", tmp_path / "run", "--trainer.steps", "40", "--logging.tensorboard", "false"]
    config = tmp_path / "tiny.yaml"
    # The samples of this configuration are made beside the run.
    text = (ROOT / "examples" / "configs" / "tiny.yaml").read_text()
    config.write_text(text.replace("runs/tiny-data", str(tmp_path / "data")))
    ended = shared()(program, "--config", config, *options)
    assert ended.code == 0, ended.err
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 5.0
    assert len(losses) < 40
    assert all(loss >= 5.0 for loss in losses[:-1])
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/COMMIT"))) == 1
