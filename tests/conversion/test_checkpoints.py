"""Training checkpoints of any layout to Hugging Face and back."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from emu3_megatron.conversion.checkpoints import (
    checkpoint_weights,
    export_checkpoint,
    import_checkpoint,
    logit_difference,
    read_weights,
)
from emu3_megatron.conversion.compare import compare, first_difference
from emu3_megatron.conversion.maps import canonical_names
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.errors import UserError
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.training.checkpoint import load_model_for_inference
from emu3_megatron.training.checkpoint_files import resolve
from emu3_megatron.vision import VisionTokenizer
from tests import programs
from tests.conversion.test_hugging_face import VISION
from tests.inference import worlds

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    VisionTokenizer(VISION).eval().save_pretrained(folder)
    return folder


def save_run(run: Path, model) -> None:
    """A committed checkpoint as training writes it."""
    from dataclasses import asdict

    from emu3_megatron.conversion.checkpoints import save_weights

    config = {"model": asdict(model.model_config), "seed": 0, "trainer": {"precision": "fp32"}}
    save_weights(model, run / "checkpoints" / "step-00000007", worlds.VOCABULARY.to_dict(), config)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_run(folder, worlds.tiny_model())
    return folder


def test_export_import_export(run: Path, vision: Path, tmp_path: Path) -> None:
    """Checkpoint -> folder -> checkpoint -> folder: equal weights all along, equal logits in transformers."""
    first = export_checkpoint(run, tmp_path / "first", vision_tokenizer=vision, dialect="emu3")
    import_checkpoint(first, tmp_path / "imported")
    second = export_checkpoint(tmp_path / "imported", tmp_path / "second", vision_tokenizer=vision)
    weights = read_weights(run)
    for other in (first, tmp_path / "imported", second):
        assert first_difference(weights, read_weights(other)) is None
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, worlds.VOCABULARY.size, (3, 50), generator=generator).tolist()
    assert logit_difference(worlds.tiny_model(), second, sequences) < 1e-4


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_files_cut_for_a_layout_hold_the_same(run: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    """Read part by part, and loaded whole by megatron-core."""
    folder = export_checkpoint(run, tmp_path / "hf", layout="emu3")
    layout = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    import_checkpoint(folder, tmp_path / "cut", parallel=layout)
    assert compare(folder, tmp_path / "cut").tensors
    (model,), _, _ = load_model_for_inference(tmp_path / "cut")
    state = canonical_names(model.state_dict())
    weights = read_weights(run)
    assert all(torch.equal(state[name][: len(value)], value) for name, value in weights.items())


def test_tensors_stay_when_their_checkpoint_is_closed_and_no_thread_does(run: Path) -> None:
    before = set(threading.enumerate())
    with checkpoint_weights(resolve(run)) as (tensors, _, _):
        weights = dict(tensors)
    assert set(threading.enumerate()) <= before
    state = canonical_names(worlds.tiny_model().state_dict())
    assert all(torch.equal(state[name][: len(value)], value) for name, value in weights.items())


def test_differences_are_named(run: Path) -> None:
    weights = read_weights(run)
    assert first_difference(weights, dict(weights)) is None
    name = "decoder.final_layernorm.weight"
    without = {key: tensor for key, tensor in weights.items() if key != name}
    assert first_difference(weights, without) == f"{name} is only in the first"
    assert first_difference(without, weights) == f"{name} is only in the second"
    changed = {**weights, name: weights[name].clone()}
    changed[name][3] += 1e-6
    assert f"{name} differs" in (first_difference(weights, changed) or "")
    assert "torch.bfloat16" in (first_difference(weights, {**weights, name: weights[name].bfloat16()}) or "")
    assert "shape" in (first_difference(weights, {**weights, name: weights[name][:3]}) or "")


def test_nothing_is_left_of_a_failed_import(run: Path, vision: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(run, tmp_path / "hf", vision_tokenizer=vision)
    own = json.loads((folder / "emu3_megatron.json").read_text())
    own["model"]["num_layers"] = 3
    (folder / "emu3_megatron.json").write_text(json.dumps(own))
    with pytest.raises(ConversionError, match=r"num_layers is 2 in config.json, 3 in emu3_megatron.json"):
        import_checkpoint(folder, tmp_path / "run")
    with pytest.raises(UserError, match="precision"):
        import_checkpoint(
            export_checkpoint(run, tmp_path / "ok", vision_tokenizer=vision),
            tmp_path / "run",
            precision="int8",
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ok"]


SAVE_WITH_TENSOR_PARALLELISM = """
import sys
import threading
import torch
from pathlib import Path
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.groups import initialize_parallel
if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    initialize_parallel(parallel, platform.install("cpu"), seed=0)
    from dataclasses import asdict
    from megatron.core import dist_checkpointing
    from emu3_megatron.files import write_json_atomic
    from emu3_megatron.inference.engine import Engine
    from emu3_megatron.training import checkpoint_files as files
    from emu3_megatron.training.checkpoint import CONTENT_METADATA, Progress, Record, model_state
    from tests.inference import worlds
    from tests.inference.test_engine import image_request
    model = worlds.tiny_model(parallel=parallel)
    folder = Path(sys.argv[1]) / "checkpoints" / "step-00000001"
    rank = torch.distributed.get_rank()
    if rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model_state([model]), str(folder), content_metadata=CONTENT_METADATA)
    requests = [image_request("red", seed=1), image_request("a blue dog", height=2, seed=2)]
    from dataclasses import replace
    from emu3_megatron.inference.sampling import Sampling
    requests += [replace(request, sampling=Sampling(guidance=3.0, temperature=0)) for request in requests]
    completions = Engine(model, worlds.dialect()).generate(requests)
    if rank == 0:
        config = {"model": asdict(model.model_config), "seed": 0, "trainer": {"precision": "fp32"}}
        record = Record(progress=Progress(), vocabulary=worlds.VOCABULARY.to_dict(), plan_fingerprint="",
                        plan={}, config=config)
        write_json_atomic(folder / files.RECORD, asdict(record))
        files.commit(folder, files.seal(folder, files.payload(folder)), 1)
    write_json_atomic(f"{sys.argv[1]}/ids-{rank}.json", [completion.ids.tolist() for completion in
    completions])
"""


@pytest.mark.slow
def test_tensor_parallel_checkpoint_and_generation(run: Path, vision: Path, tmp_path: Path) -> None:
    """A checkpoint of two tensor-parallel ranks exports to the same bytes; they generate the same tokens."""
    from dataclasses import replace

    from emu3_megatron.inference.engine import Engine
    from emu3_megatron.inference.sampling import Sampling
    from tests.inference.test_engine import image_request

    script = tmp_path / "save.py"
    script.write_text(SAVE_WITH_TENSOR_PARALLELISM)
    ended = programs.shared()(script, tmp_path / "two", processes=2)
    assert ended.code == 0, ended.err[-3000:]
    assert first_difference(read_weights(run), read_weights(tmp_path / "two")) is None
    one = export_checkpoint(run, tmp_path / "hf1", vision_tokenizer=vision)
    two = export_checkpoint(tmp_path / "two", tmp_path / "hf2", vision_tokenizer=vision)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    requests = [image_request("red", seed=1), image_request("a blue dog", height=2, seed=2)]
    requests += [replace(request, sampling=Sampling(guidance=3.0, temperature=0)) for request in requests]
    completions = Engine(worlds.tiny_model(), worlds.dialect()).generate(requests)
    expected = [done.ids.tolist() for done in completions]
    for rank in (0, 1):
        assert json.loads((tmp_path / "two" / f"ids-{rank}.json").read_text()) == expected


def test_the_tool(run: Path, vision: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The program's commands."""
    specification = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "convert_checkpoint.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    export = ["export", "--source", run, "--output", tmp_path / "hf", "--vision-tokenizer", vision]
    call(*export)
    call("import", "--source", tmp_path / "hf", "--output", tmp_path / "run")
    assert call("verify", run, tmp_path / "run").startswith("equal: ")
    with pytest.raises(UserError, match="--overwrite"):
        call(*export)
    call(*export, "--overwrite", "--dtype", "bf16")
    with pytest.raises(UserError, match=r"is torch\.float32 in the first, torch\.bfloat16 in the second"):
        call("verify", run, tmp_path / "hf")
