"""Adapters: the model before, with and after them; what PEFT loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emu3_megatron.conversion.checkpoints import (
    export_checkpoint,
    read_weights,
    save_weights,
)
from emu3_megatron.conversion.compare import first_difference
from emu3_megatron.conversion.lora import export_adapters, merge_run
from emu3_megatron.conversion.tensor_files import TensorFiles
from emu3_megatron.errors import UserError
from emu3_megatron.model import LoRAConfig
from emu3_megatron.parallel.context import packed_sequence_parameters
from tests.inference import worlds

LORA = LoRAConfig(rank=3, alpha=5.0)
STEP = "checkpoints/step-00000007"


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


def adapted_model(lora: LoRAConfig = LORA):
    """A model whose adapters do something."""
    from emu3_megatron.model.lora import adapters, add_adapters

    model = worlds.tiny_model()
    add_adapters(model, lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            adapter.lora_B.normal_(0, 0.2, generator=generator)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40)[None] * 3 % worlds.VOCABULARY.size
    whole = packed_sequence_parameters(torch.tensor([0, 25, 40], dtype=torch.int32))
    with torch.no_grad():
        return model(ids, packed_seq_params=whole, logits="all")[0]


def save(run: Path, model, lora: LoRAConfig | None) -> Path:
    config = {"model": asdict(model.model_config), "seed": 0, "trainer": {"precision": "fp32"}}
    if lora is not None:
        config["lora"] = asdict(lora)
    save_weights(model, run / STEP, worlds.VOCABULARY.to_dict(), config)
    return run


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("adapted") / "run", adapted_model(), LORA)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that was adapted, as `Emu3ForCausalLM` reads it."""
    run = save(tmp_path_factory.mktemp("base") / "run", worlds.tiny_model(), None)
    return export_checkpoint(run, run.parent / "exported", layout="emu3", dialect="emu3")


def test_new_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    from emu3_megatron.model.lora import add_adapters

    model = worlds.tiny_model()
    before = logits(model)
    add_adapters(model, LORA, seed=3)
    assert torch.equal(logits(model), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * len(model.decoder.layers)
    assert all(name.endswith(("_adapter.lora_A", "_adapter.lora_B")) for name in trained)
    assert (logits(adapted_model()) - before).abs().max() > 0.1


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_adapter_has_a_gradient(recompute: str) -> None:
    from emu3_megatron.model.lora import adapters, add_adapters

    model = worlds.tiny_model(worlds.model_config(recompute=recompute)).train()
    add_adapters(model, LORA, seed=3)
    for _, _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.lora_B)
    ids = torch.arange(40)[None]
    hidden = model(
        ids, packed_seq_params=packed_sequence_parameters(torch.tensor([0, 40], dtype=torch.int32))
    )
    model.weighted_loss(hidden, ids, torch.ones(40)).total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_merged_equals_unmerged() -> None:
    from emu3_megatron.model.lora import merge_adapters

    model = adapted_model()
    expected = logits(model)
    merge_adapters(model)
    assert set(dict(model.named_parameters())) == set(dict(worlds.tiny_model().named_parameters()))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_run_loads_merged_and_merges_into_a_plain_run(adapted: Path, tmp_path: Path) -> None:
    from emu3_megatron.training.checkpoint import Record, load_model_for_inference

    (loaded,), _, _ = load_model_for_inference(adapted)
    torch.testing.assert_close(logits(loaded), logits(adapted_model()), rtol=1e-5, atol=1e-5)
    merged = merge_run(adapted, tmp_path / "merged")
    assert "lora" not in Record.read(merged).config
    assert first_difference(read_weights(adapted), read_weights(merged)) is None
    with pytest.raises(UserError, match="no adapters"):
        merge_run(merged, tmp_path / "again")


def test_the_exported_file_holds_the_difference_of_the_weights(
    adapted: Path, base: Path, tmp_path: Path
) -> None:
    """Without PEFT: base + alpha / rank * B A, module by module, is what the merged model exports."""
    folder = export_adapters(adapted, tmp_path / "peft", layout="emu3", base_model="base")
    merged = TensorFiles(export_checkpoint(adapted, tmp_path / "merged", layout="emu3", dialect="emu3"))
    plain = TensorFiles(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 5.0, "base")
    modules = {name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name}
    assert len(modules) == 2 * 7
    for module in modules:
        name = module.removeprefix("base_model.model.")
        assert re.fullmatch(config["target_modules"], name)
        a, b = (tensors[f"{module}.lora_{half}.weight"] for half in "AB")
        expected = plain[f"{name}.weight"] + 5.0 / 3 * (b @ a)
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [["linear_qkv"], LORA.targets], ids=["qkv", "all"])
def test_peft_loads_the_exported_file(base: Path, tmp_path: Path, targets: list[str]) -> None:
    import peft
    import transformers

    lora = LoRAConfig(rank=3, alpha=5.0, targets=targets)
    model = adapted_model(lora)
    run = save(tmp_path / "run", model, lora)
    folder = export_adapters(run, tmp_path / "peft", layout="emu3")
    theirs = transformers.Emu3ForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    ids = torch.arange(40)[None] * 3 % worlds.VOCABULARY.size
    with torch.no_grad():
        parts = [theirs(input_ids=part).logits[0] for part in (ids[:, :25], ids[:, 25:])]
    torch.testing.assert_close(logits(model), torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_a_run_without_adapters_is_refused(tmp_path: Path) -> None:
    run = save(tmp_path / "run", worlds.tiny_model(), None)
    with pytest.raises(UserError, match=r"lora.rank=0"):
        export_adapters(run, tmp_path / "peft")
