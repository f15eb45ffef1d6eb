"""The weight map of every model family: one table each, read in both directions.

Names on the right are those of Emu3 as released (``model.*``, ``lm_head.weight``); a `Layout` renames their
prefixes for the other places the same tensors live in. Adding a model is adding a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emu3_megatron.conversion.lazy import InMemory, LazyTensors, Placed, blocks_of, select, whole
from emu3_megatron.conversion.rules import (
    Architecture,
    ConversionError,
    Copy,
    FusedQKV,
    GatedMLP,
    PaddedVocabulary,
    Rule,
    joined,
    separated,
)

LAYERS = "decoder.layers."
"""What the names of our layers begin with."""

_OURS = LAYERS + "{layer}."
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
        split_axis=1,
    ),
    Copy(_OURS + "pre_mlp_layernorm.weight", _THEIRS + "post_attention_layernorm.weight", ("hidden_size",)),
    GatedMLP(
        _OURS + "mlp.linear_fc1.weight",
        _THEIRS + "mlp.gate_proj.weight",
        _THEIRS + "mlp.up_proj.weight",
    ),
    Copy(
        _OURS + "mlp.linear_fc2.weight",
        _THEIRS + "mlp.down_proj.weight",
        ("hidden_size", "ffn_hidden_size"),
        split_axis=1,
    ),
)
"""Tensors of one decoder layer."""

QK_NORM: tuple[Rule, ...] = (
    Copy(_OURS + "self_attention.q_layernorm.weight", _THEIRS + "self_attn.q_norm.weight", ("kv_channels",)),
    Copy(_OURS + "self_attention.k_layernorm.weight", _THEIRS + "self_attn.k_norm.weight", ("kv_channels",)),
)
"""Additional tensors of a layer with normalised queries and keys (Emu3.5, Qwen3)."""

QKV_BIAS: tuple[Rule, ...] = (
    FusedQKV(
        _OURS + "self_attention.linear_qkv.bias",
        _THEIRS + "self_attn.q_proj.bias",
        _THEIRS + "self_attn.k_proj.bias",
        _THEIRS + "self_attn.v_proj.bias",
        is_bias=True,
    ),
)
"""Additional tensors of a layer with biases on queries, keys and values (Qwen2)."""

IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Released names of tensors that old versions of transformers stored though they follow from the
configuration."""

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

    def released(self, name: str) -> str:
        """The released name of a tensor of this layout; a name that is in none of its places stays."""
        for old, new in self.prefixes:
            if name.startswith(new):
                return old + name[len(new) :]
        return name


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


FLOATING = (torch.float32, torch.bfloat16, torch.float16)
"""Types that weights may have."""


@dataclass(frozen=True)
class WeightMap:
    """The rules of one model of given sizes under one layout."""

    sizes: Architecture
    layout: Layout

    def rules(self) -> Iterator[tuple[Rule, str, tuple[str, ...]]]:
        """Every rule with its concrete name of ours and names of theirs, outermost first, then by layer."""
        for rule in OUTER:
            yield rule, rule.ours, tuple(self.layout.rename(name) for name in rule.theirs)
        table = LAYER
        table += QK_NORM if self.sizes.qk_layernorm else ()
        table += QKV_BIAS if self.sizes.qkv_bias else ()
        for layer in range(self.sizes.num_layers):
            for rule in table:
                names = tuple(self.layout.rename(name.format(layer=layer)) for name in rule.theirs)
                yield rule, rule.ours.format(layer=layer), names

    def theirs(self, ours: LazyTensors) -> Converted:
        """Their tensors from ours (tensor parallelism 1, names of `canonical_names`).

        Raises `ConversionError` that lists all missing, unexpected, mis-shaped and mistyped tensors at once.
        """
        expected = {name: rule.our_shape(self.sizes) for rule, name, _ in self.rules()}
        check_fit("megatron-core state dict", ours, expected)
        return Converted(
            ours,
            {
                their_name: Conversion(rule, (name,), shape, which)
                for rule, name, names in self.rules()
                for which, (their_name, shape) in enumerate(
                    zip(names, rule.their_shapes(self.sizes), strict=True)
                )
            },
            self.sizes,
        )

    def ours(self, theirs: LazyTensors) -> Converted:
        """Our tensors (tensor parallelism 1) from theirs.

        Raises `ConversionError` that lists all missing, unexpected, mis-shaped and mistyped tensors at once.
        """
        expected = {
            name: shape
            for rule, _, names in self.rules()
            for name, shape in zip(names, rule.their_shapes(self.sizes), strict=True)
        }
        used = select(theirs, [name for name in theirs if not IGNORED.search(name)])
        check_fit("Hugging Face state dict", used, expected)
        return Converted(
            used,
            {
                name: Conversion(rule, names, rule.our_shape(self.sizes), None)
                for rule, name, names in self.rules()
            },
            self.sizes,
        )

    def to_hugging_face(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Their tensors one by one from our whole state dict; see `theirs`."""
        yield from self.theirs(InMemory(canonical_names(ours))).items()

    def from_hugging_face(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Our tensors one by one from their state dict; see `ours`."""
        lazy = theirs if isinstance(theirs, LazyTensors) else InMemory(theirs)
        yield from self.ours(lazy).items()


@dataclass(frozen=True)
class Conversion:
    """How one tensor is made by a rule."""

    rule: Rule
    inputs: tuple[str, ...]
    """Names of what it is made from."""
    shape: tuple[int, ...]
    which: int | None
    """Number of a tensor of theirs; None makes ours."""


class Converted(Placed[Conversion]):
    """Tensors made from others by rules; what the latest was made from is kept until something else is.

    Args:
        source: What they are made from.
        conversions: By the name of what is made.
        sizes: Of the model.
    """

    def __init__(self, source: LazyTensors, conversions: dict[str, Conversion], sizes: Architecture) -> None:
        super().__init__(conversions)
        self.source = source
        """What they are made from."""
        self._sizes = sizes
        self._latest: tuple[tuple[str, ...], list[Tensor]] = ((), [])

    def __getitem__(self, name: str) -> Tensor:
        """Make one tensor."""
        return whole(list(self._runs(name)))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Make one tensor block by block, with no memory for the whole."""
        for run in self._runs(name):
            yield from blocks_of(run)

    def _runs(self, name: str) -> Iterator[Tensor]:
        """The tensor as runs of rows."""
        conversion = self._places[name]
        if self._latest[0] != conversion.inputs:
            self._latest = ((), [])  # room for what comes
            self._latest = (conversion.inputs, [self.source[own] for own in conversion.inputs])
        inputs = self._latest[1]
        if conversion.which is None:
            return joined(conversion.rule, inputs, self._sizes)
        return separated(conversion.rule, conversion.which, inputs[0], self._sizes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements: that of what it is made from."""
        return self.source.dtype(self._places[name].inputs[0])

    def split_axis(self, name: str) -> tuple[int | None, int]:
        """Axis that tensor parallelism divides, and the parts of it that are divided each on its own."""
        rule = self._places[name].rule
        return rule.split_axis, rule.blocks


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


def check_fit(what: str, tensors: LazyTensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names, shapes and types with what a map expects, and report everything at once.

    Raises `ConversionError`.
    """
    names = set(tensors)
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in names]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name not in names:
            continue
        found = tensors.shape(name)
        if found != shape:
            problems.append(f"{name} has shape {list(found)}, expected {list(shape)}")
        if tensors.dtype(name) not in FLOATING:
            problems.append(f"{name} is {_words(tensors.dtype(name))}, expected fp32, bf16 or fp16")
    if problems:
        raise ConversionError(f"{what} does not fit the model: " + "; ".join(problems))


def one_dtype(what: str, tensors: LazyTensors) -> torch.dtype:
    """The type that all tensors have.

    Raises `ConversionError` that names those of another type than most.
    """
    kinds: dict[torch.dtype, list[str]] = {}
    for name in tensors:
        kinds.setdefault(tensors.dtype(name), []).append(name)
    usual = max(kinds, key=lambda kind: len(kinds[kind]))
    odd = [f"{name} is {_words(kind)}" for kind, names in kinds.items() if kind != usual for name in names]
    if odd:
        raise ConversionError(
            f"{what}: most tensors are {_words(usual)}, but {'; '.join(odd)}; give --dtype to cast all to one"
        )
    return usual


def _words(dtype: torch.dtype) -> str:
    """``float32`` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
