"""From a model configuration and a layout to the pipeline chunks of this rank."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from emu3_megatron.model.config import FP8Format, FP8Recipe, ModelConfig, ModelConfigError
from emu3_megatron.model.gpt import Emu3Model
from emu3_megatron.model.initialization import initialize_weights
from emu3_megatron.model.layers import block_specification, uses_transformer_engine
from emu3_megatron.parallel.config import ParallelConfig

Precision = Literal["fp32", "bf16"]


def transformer_config(
    config: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    *,
    fp8: FP8Format = "off",
    fp8_recipe: FP8Recipe = "delayed",
) -> TransformerConfig:
    """megatron-core's configuration of the model.

    Two of its settings are chosen to avoid silent errors: with an interleaved pipeline, communication is not
    batched (batched exchange gives wrong losses with two stages), and outputs are then kept until sent.

    Raises:
        ModelConfigError: `precision` is unknown, the shape is impossible, or FP8 cannot be had.
        LayoutError: the shape does not divide over the layout, or attention does not have its `cp_comm`.
    """
    if precision not in ("fp32", "bf16"):
        raise ModelConfigError(f"precision {precision!r} must be fp32 or bf16")
    config.validate(parallel)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    engine = uses_transformer_engine(config, cuda=_on_cuda())
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_size,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=config.layernorm_epsilon,
        qk_layernorm=config.qk_layernorm,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        init_method_std=config.init_method_std,
        perform_initialization=False,
        use_cpu_initialization=not _on_cuda(),
        bf16=precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_last_pipeline_stage=parallel.layers_in_last_stage,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        cp_comm_type=parallel.context_communication(transformer_engine=engine),
        calculate_per_token_loss=True,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=not interleaved,
        **_fusions(engine),
        **_recompute(config),
        **_fp8(fp8, fp8_recipe, engine),
    )


def _fusions(engine: bool) -> dict[str, Any]:
    # Without them rotary positions are a loop over documents that waits for the GPU, twice a layer. The torch
    # layers have their own of both.
    return {"apply_rope_fusion": engine, "bias_activation_fusion": engine}


def _fp8(form: FP8Format, recipe: FP8Recipe, engine: bool) -> dict[str, Any]:
    if form == "off":
        return {}
    if not engine:
        raise ModelConfigError(
            f"trainer.fp8={form} needs Transformer Engine on a GPU; install the `gpu` extra, or set it to off"
        )
    if torch.cuda.get_device_capability() < (8, 9):
        raise ModelConfigError(
            f"trainer.fp8={form}: {torch.cuda.get_device_name()} has no 8-bit matrix products (compute "
            "capability 8.9 or more); set it to off"
        )
    return {"fp8": form, "fp8_recipe": recipe}


def _on_cuda() -> bool:
    """Whether this run computes on a GPU: its process groups say so, not what the machine has."""
    return torch.distributed.get_backend() == "nccl"


def _recompute(config: ModelConfig) -> dict[str, Any]:
    if config.recompute == "none":
        return {}
    if config.recompute == "selective":
        return {"recompute_granularity": "selective"}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def build_model(
    config: ModelConfig,
    *,
    vocabulary_padded_size: int,
    vocabulary_size: int,
    parallel: ParallelConfig,
    seed: int,
    precision: Precision = "fp32",
    fp8: FP8Format = "off",
    fp8_recipe: FP8Recipe = "delayed",
    initialize: bool = True,
) -> list[Emu3Model]:
    """Build this rank's pipeline chunks; process groups must exist (`initialize_parallel`).

    Args:
        config: Shape of the model.
        vocabulary_padded_size: Rows of the embedding and the output layer.
        vocabulary_size: Ids in use.
        parallel: The layout.
        seed: Seed of the initial weights; they depend on nothing else, whatever the layout.
        precision: Type of parameters and activations.
        fp8: Number format of the layers' matrix products, see `TrainerConfig`.
        fp8_recipe: How their tensors are scaled.
        initialize: False leaves the weights undefined, for loading a checkpoint.

    Returns:
        One chunk, or one for each of the rank's layer groups.

    Raises:
        ModelConfigError: impossible shape, vocabulary or precision.
        LayoutError: the shape does not divide over the layout.
    """
    _check_vocabulary(vocabulary_size, vocabulary_padded_size, parallel)
    transformer = transformer_config(config, parallel, precision, fp8=fp8, fp8_recipe=fp8_recipe)
    cuda = _on_cuda()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    stages = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in [None] if stages is None else range(stages):
        chunk = _build_chunk(
            config, transformer, stage, vocabulary_padded_size, vocabulary_size, cuda=cuda
        ).to(device)
        _mark_split_parameters(chunk)
        if initialize:
            initialize_weights(
                chunk,
                config,
                seed=seed,
                tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
                tensor_size=parallel.tensor_model_parallel_size,
                vocabulary_size=vocabulary_size,
            )
        chunks.append(chunk)
    return chunks


def _check_vocabulary(size: int, padded_size: int, parallel: ParallelConfig) -> None:
    """Raise `ModelConfigError` where the rows do not hold the ids, or do not divide over the layout."""
    if not 0 < size <= padded_size:
        raise ModelConfigError(
            f"vocabulary_size={size} must lie in 1 .. vocabulary_padded_size={padded_size}"
        )
    if padded_size % parallel.tensor_model_parallel_size:
        raise ModelConfigError(
            f"vocabulary_padded_size={padded_size} is not divisible by tensor_model_parallel_size="
            f"{parallel.tensor_model_parallel_size}; use Vocabulary.padded_size"
        )


def _mark_split_parameters(chunk: torch.nn.Module) -> None:
    """Say which dimension is split over tensor parallelism; megatron-core does so only when initialising."""
    for module in chunk.modules():
        if isinstance(module, (layers.VocabParallelEmbedding, layers.ColumnParallelLinear)):
            dimension = 0
        elif isinstance(module, layers.RowParallelLinear):
            dimension = 1
        else:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):
            layers.set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)
        bias = getattr(module, "bias", None)
        if dimension == 0 and bias is not None and not hasattr(bias, "tensor_model_parallel"):
            layers.set_tensor_model_parallel_attributes(bias, True, 0, 1)


def _build_chunk(
    config: ModelConfig,
    transformer: TransformerConfig,
    stage: int | None,
    padded_size: int,
    vocabulary_size: int,
    *,
    cuda: bool,
) -> Emu3Model:
    transformer.rotary_base = config.rotary_base
    return Emu3Model(
        model_config=config,
        vocabulary_size=vocabulary_size,
        transformer_engine=uses_transformer_engine(config, cuda=cuda),
        config=transformer,
        transformer_layer_spec=block_specification(config, transformer, cuda=cuda, vp_stage=stage),
        vocab_size=padded_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        rotary_base=config.rotary_base,
        vp_stage=stage,
    )
