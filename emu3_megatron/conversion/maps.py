"""The weight map of every model family: one table each, read in both directions.

Names on the right are those of Emu3 as released (``model.*``, ``lm_head.weight``); a `Layout` renames their
prefixes for the other places the same tensors live in. Adding a model is adding a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from emu3_megatron.conversion.rules import (
    Architecture,
    ConversionError,
    Copy,
    FusedQKV,
    GatedMLP,
    PaddedVocabulary,
    Rule,
)

_OURS = "decoder.layers.{layer}."
_THEIRS = "model.layers.{layer}."

OUTER: tuple[Rule, ...] = (
    PaddedVocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Copy("decoder.final_layernorm.weight", "model.norm.weight", ("hidden_size",)),
    PaddedVocabulary("output_layer.weight", "lm_head.weight"),
)
"""Tensors outside the layers."""

LAYER: tuple[Rule, ...] = (
    Copy(_OURS + "input_layernorm.weight", _THEIRS + "input_layernorm.weight", ("hidden_size",)),
    FusedQKV(
        _OURS + "self_attention.linear_qkv.weight",
        _THEIRS + "self_attn.q_proj.weight",
        _THEIRS + "self_attn.k_proj.weight",
        _THEIRS + "self_attn.v_proj.weight",
    ),
    Copy(
        _OURS + "self_attention.linear_proj.weight",
        _THEIRS + "self_attn.o_proj.weight",
        ("hidden_size", "num_attention_heads*kv_channels"),
    ),
    Copy(_OURS + "pre_mlp_layernorm.weight", _THEIRS + "post_attention_layernorm.weight", ("hidden_size",)),
    GatedMLP(
        _OURS + "mlp.linear_fc1.weight",
        _THEIRS + "mlp.gate_proj.weight",
        _THEIRS + "mlp.up_proj.weight",
    ),
    Copy(
        _OURS + "mlp.linear_fc2.weight", _THEIRS + "mlp.down_proj.weight", ("hidden_size", "ffn_hidden_size")
    ),
)
"""Tensors of one decoder layer."""

QK_NORM: tuple[Rule, ...] = (
    Copy(_OURS + "self_attention.q_layernorm.weight", _THEIRS + "self_attn.q_norm.weight", ("kv_channels",)),
    Copy(_OURS + "self_attention.k_layernorm.weight", _THEIRS + "self_attn.k_norm.weight", ("kv_channels",)),
)
"""Additional tensors of a layer with normalised queries and keys (Emu3.5, Qwen3)."""

TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine fuses a norm with the matrix after it and names the norm's weight after that matrix."""


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a family live in a Hugging Face file."""

    name: str
    """As on the command line."""
    prefixes: tuple[tuple[str, str], ...]
    """(prefix of the released name, prefix in this layout)."""

    def rename(self, released: str) -> str:
        """The name in this layout of a tensor that is called `released` in the released files."""
        for old, new in self.prefixes:
            if released.startswith(old):
                return new + released[len(old) :]
        raise ConversionError(f"layout {self.name!r} has no place for tensor {released!r}")


LAYOUTS: dict[str, Layout] = {
    "transformers": Layout(
        "transformers", (("model.", "text_model.model."), ("lm_head.", "text_model.lm_head."))
    ),
    "transformers-5": Layout("transformers-5", (("model.", "model.text_model."), ("lm_head.", "lm_head."))),
    "emu3": Layout("emu3", (("model.", "model."), ("lm_head.", "lm_head."))),
}
"""``transformers``: what its conversion script writes and every version reads; ``transformers-5``: the names
that its version 5 holds in memory and saves; ``emu3``: as released (also `Emu3ForCausalLM` of
transformers)."""

VISION_PREFIXES = {"transformers": "vqmodel.", "transformers-5": "model.vqmodel."}
"""Prefix of the vision tokenizer's tensors in the layouts that hold it."""


@dataclass(frozen=True)
class WeightMap:
    """The rules of one model of given sizes under one layout."""

    sizes: Architecture
    layout: Layout

    def rules(self) -> Iterator[tuple[Rule, str, tuple[str, ...]]]:
        """Every rule with its concrete name of ours and names of theirs, outermost first, then by layer."""
        for rule in OUTER:
            yield rule, rule.ours, tuple(self.layout.rename(name) for name in rule.theirs)
        table = LAYER + (QK_NORM if self.sizes.qk_layernorm else ())
        for layer in range(self.sizes.num_layers):
            for rule in table:
                names = tuple(self.layout.rename(name.format(layer=layer)) for name in rule.theirs)
                yield rule, rule.ours.format(layer=layer), names

    def to_hugging_face(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Their tensors one by one from our whole state dict.

        Raises `ConversionError` that lists all missing, unexpected and mis-shaped tensors at once.
        """
        tensors = canonical_names(ours)
        expected = {name: rule.our_shape(self.sizes) for rule, name, _ in self.rules()}
        _check("megatron-core state dict", tensors, expected)
        for rule, name, theirs in self.rules():
            yield from zip(theirs, rule.split(tensors[name], self.sizes), strict=True)

    def from_hugging_face(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Our tensors one by one from their state dict (a lazy mapping reads each tensor once).

        Raises `ConversionError` that lists all missing, unexpected and mis-shaped tensors at once.
        """
        expected = {
            name: shape
            for rule, _, names in self.rules()
            for name, shape in zip(names, rule.their_shapes(self.sizes), strict=True)
        }
        _check("Hugging Face state dict", theirs, expected)
        for rule, name, names in self.rules():
            yield name, rule.join([theirs[part] for part in names], self.sizes)


def canonical_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict without Transformer Engine's names and without its ``_extra_state`` entries."""
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("_extra_state"):
            continue
        for fused, plain in TRANSFORMER_ENGINE_NAMES.items():
            if name.endswith(fused):
                name = name[: -len(fused)] + plain
        tensors[name] = tensor
    return tensors


def detect_layout(names: Mapping[str, object] | set[str]) -> Layout:
    """The layout of a Hugging Face file by the name of its embedding.

    Raises `ConversionError` when no layout fits.
    """
    for layout in LAYOUTS.values():
        if layout.rename("model.embed_tokens.weight") in names:
            return layout
    known = ", ".join(layout.rename("model.embed_tokens.weight") for layout in LAYOUTS.values())
    raise ConversionError(
        f"no embedding among {len(names)} tensors; expected one of: {known} "
        f"(found for example {sorted(names)[:3]})"
    )


def _check(what: str, tensors: Mapping[str, object], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with what the map expects, and report everything at once."""
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in expected:
        if name in tensors:
            found = _shape_of(tensors, name)
            if found != expected[name]:
                problems.append(f"{name} has shape {list(found)}, expected {list(expected[name])}")
    if problems:
        raise ConversionError(f"{what} does not fit the model: " + "; ".join(problems))


def _shape_of(tensors: Mapping[str, object], name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it where the mapping can tell (`TensorFiles.shape`)."""
    shape = getattr(tensors, "shape", None)
    if callable(shape):
        return tuple(shape(name))
    tensor = tensors[name]
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
