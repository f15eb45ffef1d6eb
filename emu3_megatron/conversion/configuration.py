"""``config.json`` and its companions: our model configuration to Hugging Face's and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emu3_megatron.conversion.names import IMAGE_PLACEHOLDER, read_vocabulary
from emu3_megatron.conversion.rules import Architecture, ConversionError
from emu3_megatron.model import ModelConfig
from emu3_megatron.vocabulary import EMU3_CONTROL_COUNT, Vocabulary

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""``You are a helpful assistant. USER: <image>text ASSISTANT:``, as transformers' Emu3-Chat."""

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` whose decoder is ours, with biases or normalised queries and keys where it has
them."""

IMAGE_AREA = {"min_pixels": 512 * 512, "max_pixels": 1024 * 1024}
"""Sizes that the released image processor resizes to, in pixels."""


def architecture(config: ModelConfig, vocabulary: Vocabulary) -> Architecture:
    """The sizes that decide tensor shapes."""
    return Architecture(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_size,
        vocabulary_size=vocabulary.size,
        padded_vocabulary_size=vocabulary.padded_size,
        qk_layernorm=config.qk_layernorm,
        qkv_bias=config.qkv_bias,
    )


def text_config(config: ModelConfig, vocabulary: Vocabulary, dtype: str) -> dict[str, Any]:
    """``text_config`` of `transformers.Emu3Config` (and the body of the released ``config.json``)."""
    values = {
        "vocab_size": vocabulary.size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        # version 4 reads the first, version 5 the second
        "rope_theta": float(config.rotary_base),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rotary_base)},
        "attention_dropout": config.attention_dropout,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": False,
        "use_cache": True,
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "torch_dtype": dtype,
    }
    if config.head_size * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.head_size
    return values


def transformers_config(
    config: ModelConfig,
    vocabulary: Vocabulary,
    *,
    names: Mapping[str, int],
    vision: Mapping[str, Any],
    dtype: str,
) -> dict[str, Any]:
    """``config.json`` of `Emu3ForConditionalGeneration`.

    Raises `ConversionError` for a model that transformers' Emu3 cannot express.
    """
    if config.qk_layernorm or config.qkv_bias:
        what = "normalised queries and keys (qk_layernorm)" if config.qk_layernorm else "biases (qkv_bias)"
        raise ConversionError(f"transformers' Emu3 has no {what}; export with --layout emu3")
    if vision.get("codebook_size") != vocabulary.codebook_size:
        raise ConversionError(
            f"the vision tokenizer has {vision.get('codebook_size')} codes, the vocabulary "
            f"{vocabulary.codebook_size}: they do not belong together"
        )
    text = text_config(config, vocabulary, dtype)
    return {
        "architectures": ["Emu3ForConditionalGeneration"],
        "model_type": "emu3",
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        "image_token_id": names[IMAGE_PLACEHOLDER],
        "text_config": {"model_type": "emu3_text_model", **text},
        "vq_config": {"model_type": "emu3_vqgan", **vision},
        "vocabulary_map": dict(names),
    }


def released_config(config: ModelConfig, vocabulary: Vocabulary, *, dtype: str) -> dict[str, Any]:
    """``config.json`` of Emu3 as released (``Emu3ForCausalLM``, remote code).

    A model with normalised queries and keys, or with biases on them, computes what transformers' Qwen3 or
    Qwen2 does: its folder says so, and loads as one.
    """
    values = text_config(config, vocabulary, dtype)
    if config.qk_layernorm and not config.qkv_bias:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **values,
            "head_dim": config.head_size,
        }
    del values["rope_parameters"], values["mlp_bias"]
    if config.qkv_bias and not config.qk_layernorm:
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **values}
    return {"architectures": ["Emu3ForCausalLM"], "model_type": "Emu3", "rope_scaling": None, **values}


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """``generation_config.json`` with the released sampling settings."""
    return {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
        "do_sample": True,
        "top_k": 2048,
    }


def image_processor_config(spatial_factor: int, *, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """``preprocessor_config.json``: pixels go to [-1, 1], as the vision tokenizer takes them."""
    return {
        "image_processor_type": "Emu3ImageProcessor",
        "processor_class": "Emu3Processor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_pixels": max_pixels,
        "min_pixels": min_pixels,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "spatial_factor": spatial_factor,
    }


def read_model_config(values: Mapping[str, Any], path: Path | str = "config.json") -> ModelConfig:
    """Our configuration from a ``config.json`` of any layout.

    Args:
        values: Its contents.
        path: Where it stands, for messages.

    Raises `ConversionError` when a field is missing or states something our model does not have.
    """
    text = values.get("text_config", values)
    if not isinstance(text, Mapping):
        raise ConversionError(f"{path}: text_config is no JSON object")
    for name, allowed in _REFUSED.items():
        if text.get(name) not in allowed:
            raise ConversionError(f"{path}: {name}={text[name]!r} is not supported; expected {allowed[0]!r}")
    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        size = int(text.get("head_dim") or hidden // heads)
        dropout = float(text.get("attention_dropout", 0.1))
        config = ModelConfig(
            num_layers=int(text["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_hidden_size=int(text["intermediate_size"]),
            num_attention_heads=heads,
            num_query_groups=int(text.get("num_key_value_heads") or heads),
            kv_channels=None if size * heads == hidden else size,
            max_position_embeddings=int(text["max_position_embeddings"]),
            rotary_base=int(_rotary_base(text)),
            layernorm_epsilon=float(text["rms_norm_eps"]),
            embedding_dropout=dropout,
            attention_dropout=dropout,
            hidden_dropout=dropout,
            init_method_std=float(text.get("initializer_range", 0.02)),
        )
        config.validate()
    except KeyError as error:
        raise ConversionError(f"{path} lacks {error.args[0]!r}; is this an Emu3 configuration?") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConversionError(f"{path} does not describe a model: {error}") from error
    return config


_REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "hidden_act": ("silu", None),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}
"""Fields to the values that our model has."""


def read_vocabulary_of(values: Mapping[str, Any], path: Path | str = "config.json") -> Vocabulary:
    """The vocabulary that a ``config.json`` states: by its map, by the released size, or by the ids of its
    control tokens, which stand in one block between text and vision.

    Raises `ConversionError` when none of them tells.
    """
    if values.get("vocabulary_map"):
        return read_vocabulary(values["vocabulary_map"])
    text = values.get("text_config", values)
    size, pad = text.get("vocab_size"), text.get("pad_token_id")
    for name in ("emu3", "emu3.5"):
        if Vocabulary.preset(name).size == size:
            return Vocabulary.preset(name)
    if isinstance(size, int) and isinstance(pad, int):
        codes = size - pad - EMU3_CONTROL_COUNT
        if pad > 0 and codes > 0:
            vocabulary = Vocabulary.build("imported", text_size=pad, codebook_size=codes)
            if (vocabulary.bos, vocabulary.eos) == (text.get("bos_token_id"), text.get("eos_token_id")):
                return vocabulary
    kind = values.get("model_type")
    remedy = "; start from a text model with the command `extend`" if kind in TEXT_MODELS else ""
    raise ConversionError(
        f"{path} (model_type={kind!r}, vocab_size={size}) states no vocabulary of Emu3: it has neither a "
        f"vocabulary_map, nor the vocab_size of Emu3 (184622) or Emu3.5 (282926), nor the pad, bos and eos "
        f"ids of Emu3's block of {EMU3_CONTROL_COUNT} control ids{remedy}"
    )


def _rotary_base(text: Mapping[str, Any]) -> float:
    """The rotary base from either version's field."""
    parameters = text.get("rope_parameters") or {}
    if parameters.get("rope_type", "default") != "default":
        raise ConversionError(
            f"config.json: rope_parameters={parameters!r} is not supported; expected the default"
        )
    return float(parameters.get("rope_theta") or text["rope_theta"])
