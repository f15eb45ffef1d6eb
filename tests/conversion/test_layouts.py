"""Imports by several processes, loaded under tensor and pipeline parallelism, give transformers' logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emu3_megatron.conversion import ExportedModel, export_hugging_face
from emu3_megatron.conversion.compare import compare
from emu3_megatron.grammar import Document
from emu3_megatron.grammar.document import Image, Text
from emu3_megatron.vision import VisionTokenizer
from tests import programs
from tests.conversion.test_hugging_face import VISION
from tests.inference import worlds

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model = worlds.tiny_model()
    about = ExportedModel(config=model.model_config, vocabulary=worlds.VOCABULARY, dialect="emu3")
    torch.manual_seed(0)
    vision = VisionTokenizer(VISION).eval()
    return export_hugging_face(folder / "hf", model.state_dict(), about, vision_tokenizer=vision)


def launch(processes: int, script: Path, *arguments: object) -> None:
    ended = programs.shared()(script, *arguments, processes=processes)
    assert ended.code == 0, ended.err[-3000:]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_logits_under_a_layout(exported: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    """Text, an image, and both, as one row of ids."""
    tool = ROOT / "tools" / "convert_checkpoint.py"
    layout = ["--tensor-parallel", tensor, "--pipeline-parallel", pipeline]
    launch(2, tool, "import", "--source", exported, "--output", tmp_path / "run", *layout)
    assert compare(exported, tmp_path / "run").is_vision_compared
    codes = np.random.default_rng(0).integers(0, worlds.VOCABULARY.codebook_size, (3, 4))
    segments = (Text("a red dog"), Image(codes))
    documents = [(segments[0],), (segments[1],), segments, segments[::-1]]
    ids = torch.tensor(
        [[token for parts in documents for token in worlds.dialect().encode(Document(parts)).ids.tolist()]]
    )
    save_file({"ids": ids}, tmp_path / "ids")
    forward = ROOT / "tests" / "conversion" / "forward.py"
    files = (tmp_path / "run", tmp_path / "ids", tmp_path / "logits")
    launch(tensor * pipeline, forward, *files, tensor, pipeline)
    theirs = transformers.Emu3ForConditionalGeneration.from_pretrained(exported).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[0]
    ours = load_file(tmp_path / "logits")["logits"]
    assert (ours - expected).abs().max() < 1e-4
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    launch(2, tool, "export", "--source", tmp_path / "run", "--output", tmp_path / "back")
    first, second = (folder / "model.safetensors" for folder in (exported, tmp_path / "back"))
    assert first.read_bytes() == second.read_bytes()
