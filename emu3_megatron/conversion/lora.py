"""Adapters of a run: merged into the weights, or as a folder that the PEFT library loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from emu3_megatron.conversion.checkpoints import save_weights
from emu3_megatron.conversion.configuration import architecture
from emu3_megatron.conversion.lazy import whole
from emu3_megatron.conversion.maps import LAYER, LAYOUTS, Layout
from emu3_megatron.conversion.publish import publish_folder, refuse_existing
from emu3_megatron.conversion.rules import Architecture, Rule, separated
from emu3_megatron.errors import UserError
from emu3_megatron.files import write_json_atomic
from emu3_megatron.model import LoRAConfig

StrPath = str | os.PathLike[str]

PEFT_PREFIX = "base_model.model."
"""Stands before every name in a PEFT file."""


def merge_run(source: StrPath, run: StrPath, *, overwrite: bool = False) -> Path:
    """Write a run with adapters as the first checkpoint of a new run of plain weights.

    Args:
        source: a run or a committed checkpoint, trained with adapters.
        run: appears whole or not at all, with ``checkpoints/step-00000000``.
        overwrite: replace an existing folder.

    Raises:
        UserError: `source` has no adapters, or `run` exists.
    """
    from emu3_megatron.training.checkpoint import load_model_for_inference
    from emu3_megatron.training.checkpoint_files import step_folder

    refuse_existing(run, overwrite=overwrite)
    folder, config, _ = _adapted(source)
    (model,), _, vocabulary = load_model_for_inference(folder)
    merged = {name: value for name, value in config.items() if name != "lora"}
    with publish_folder(run, overwrite=overwrite) as unfinished:
        save_weights(model, step_folder(unfinished / "checkpoints", 0), vocabulary.to_dict(), merged)
    return step_folder(Path(run) / "checkpoints", 0)


def export_adapters(
    source: StrPath,
    folder: StrPath,
    *,
    layout: str = "transformers-5",
    base_model: str = "",
    overwrite: bool = False,
) -> Path:
    """Write the adapters of a run as PEFT reads them: ``adapter_config.json``, ``adapter_model.safetensors``.

    PEFT has a pair of matrices for each of query, key and value, gate and up; where ours share A, it is
    written for each.

    Args:
        source: a run or a committed checkpoint, trained with adapters.
        folder: where the result appears, whole or not at all.
        layout: names of the model that PEFT will wrap: ``transformers-5``
            (`Emu3ForConditionalGeneration`) or ``emu3`` (`Emu3ForCausalLM`, and the released code).
        base_model: path or name of that model, for whoever reads the folder.
        overwrite: replace an existing folder.

    Raises:
        UserError: `source` has no adapters, or `folder` exists.
    """
    from emu3_megatron.model.lora import adapters
    from emu3_megatron.training.checkpoint import load_model_for_inference

    refuse_existing(folder, overwrite=overwrite)
    checkpoint, _, lora = _adapted(source)
    (model,), config, vocabulary = load_model_for_inference(checkpoint, merge=False)
    sizes = replace(architecture(config, vocabulary), hidden_size=lora.rank)
    tensors: dict[str, Tensor] = {}
    for name, _, adapter in adapters(model):
        for module, half in _renamed(name, adapter.lora_B.detach(), sizes, LAYOUTS[layout]):
            tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = adapter.lora_A.detach().clone()
            tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = half
    with publish_folder(folder, overwrite=overwrite) as unfinished:
        save_file(tensors, str(unfinished / "adapter_model.safetensors"), metadata={"format": "pt"})
        write_json_atomic(unfinished / "adapter_config.json", _peft_config(lora, layout, base_model))
    return Path(folder)


def _adapted(source: StrPath) -> tuple[Path, dict[str, Any], LoRAConfig]:
    """The checkpoint, its run's configuration, and its adapters'."""
    from emu3_megatron.training.checkpoint import Record, has_adapters
    from emu3_megatron.training.checkpoint_choice import sound_checkpoint

    folder = sound_checkpoint(Path(source))
    config = Record.read(folder).config
    if not has_adapters(config):
        raise UserError(f"{folder} has no adapters: it was trained with lora.rank=0")
    return folder, config, LoRAConfig(**config["lora"])


def _renamed(name: str, rows: Tensor, sizes: Architecture, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Their modules for the layer `name` of ours, each with its rows of a matrix ``[outputs, rank]``."""
    number = name.split(".")[2]
    (rule,) = (rule for rule in LAYER if rule.ours.format(layer=number) == f"{name}.weight")
    for theirs, part in zip(rule.theirs, _parts(rule, rows, sizes), strict=True):
        yield layout.rename(theirs.format(layer=number)).removesuffix(".weight"), part.contiguous().clone()


def _parts(rule: Rule, rows: Tensor, sizes: Architecture) -> Iterator[Tensor]:
    """Rows of one matrix are all of ours; `sizes` of several has the rank for their width."""
    if len(rule.theirs) == 1:
        yield rows
        return
    for which in range(len(rule.theirs)):
        yield whole(list(separated(rule, which, rows, sizes)))


def _peft_config(lora: LoRAConfig, layout: str, base_model: str) -> dict[str, Any]:
    """What PEFT needs. Targets are a pattern: the vision tokenizer has layers of the same names."""
    layers = LAYOUTS[layout].rename("model.layers.").replace(".", r"\.")
    names = {
        "linear_qkv": "self_attn.(q_proj|k_proj|v_proj)",
        "linear_proj": "self_attn.o_proj",
        "linear_fc1": "mlp.(gate_proj|up_proj)",
        "linear_fc2": "mlp.down_proj",
    }
    chosen = "|".join(names[target].replace(".", r"\.") for target in lora.targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": rf"{layers}\d+\.({chosen})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
