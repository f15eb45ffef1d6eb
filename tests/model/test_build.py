import contextlib
import re
from typing import Any

import pytest
import torch

from emu3_megatron.model import ModelConfig, ModelConfigError, build_model
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.config import LayoutError, ParallelConfig
from emu3_megatron.parallel.context import packed_sequence_parameters

platform.install("cpu")

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.transformer import mlp  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from emu3_megatron.model import build, layers  # noqa: E402
from emu3_megatron.model.gpt import Emu3Model  # noqa: E402
from emu3_megatron.model.initialization import global_parameter_names, initialize_weights  # noqa: E402

IN_USE, PADDED = 979, 1024


def _build(
    layout: ParallelConfig, *, precision: str = "fp32", seed: int = 1, **overrides: object
) -> Emu3Model:
    config = ModelConfig.preset("tiny", num_layers=2, hidden_size=64, ffn_hidden_size=96, **overrides)
    (model,) = build_model(
        config,
        vocabulary_padded_size=PADDED,
        vocabulary_size=IN_USE,
        parallel=layout,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]
    )
    return model


def _window(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, IN_USE, (1, sum(lengths)), generator=generator)
    return tokens, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_the_parameter_count_is_that_of_the_built_model(
    single_process: ParallelConfig, qk_layernorm: bool
) -> None:
    model = _build(single_process, qk_layernorm=qk_layernorm)
    assert sum(p.numel() for p in model.parameters()) == model.model_config.parameter_count(PADDED)


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_documents_packed_together_give_what_each_gives_alone(
    single_process: ParallelConfig, qk_layernorm: bool
) -> None:
    model = _build(single_process, qk_layernorm=qk_layernorm)
    lengths = [9, 30, 27, 1, 60]
    tokens, cu = _window(lengths)
    packed = model(tokens, packed_seq_params=packed_sequence_parameters(cu), logits="all")
    for part, got in zip(tokens.split(lengths, 1), packed.split(lengths, 1), strict=True):
        alone = packed_sequence_parameters(torch.tensor([0, part.size(1)], dtype=torch.int32))
        want = model(part, packed_seq_params=alone, logits="all")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_losses_of_documents_packed_together_are_those_of_each_alone(single_process: ParallelConfig) -> None:
    model = _build(single_process)
    lengths = [9, 30, 27, 2, 60]
    tokens, cu = _window(lengths)
    labels = tokens.roll(-1, 1)
    packed = model(tokens, packed_seq_params=packed_sequence_parameters(cu))
    losses = model.token_losses(packed, labels).losses
    for part, target, got in zip(
        tokens.split(lengths, 1), labels.split(lengths, 1), losses.split(lengths), strict=True
    ):
        alone = packed_sequence_parameters(torch.tensor([0, part.size(1)], dtype=torch.int32))
        want = model.token_losses(model(part, packed_seq_params=alone), target).losses
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputation_changes_no_gradient(single_process: ParallelConfig, dropout: float) -> None:
    """With dropout this holds because backward draws again what forward drew."""
    tokens, cu = _window([9, 30, 20])
    gradients = []
    for recompute in ("none", "selective", "full"):
        model = _build(
            single_process, recompute=recompute, attention_dropout=dropout, hidden_dropout=dropout
        ).train()
        tensor_parallel.model_parallel_cuda_manual_seed(3)
        hidden = model(tokens, packed_seq_params=packed_sequence_parameters(cu))
        model.weighted_loss(hidden, tokens, torch.ones(tokens.shape)).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_output_layers_gradient_goes_straight_to_the_buffer_where_it_is_large(
    single_process: ParallelConfig, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    tokens, cu = _window([9, 30, 20])
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    gradients = []
    for least in (10**9, 0):
        monkeypatch.setattr(layers, "LEAST_FUSED_WEIGHTS", least)
        model = _build(single_process)
        wrapped = DistributedDataParallel(model.config, settings, model)
        wrapped.zero_grad_buffer()
        for last in (False, True):  # two micro-batches
            with contextlib.nullcontext() if last else wrapped.no_sync():
                hidden = wrapped(tokens, packed_seq_params=packed_sequence_parameters(cu))
                model.weighted_loss(hidden, tokens, torch.full(tokens.shape, 0.01)).total.backward()
        wrapped.finish_grad_sync()
        assert all(parameter.grad is None for parameter in model.parameters())
        gradients.append([parameter.main_grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("place", ["embedding_dropout", "attention_dropout", "hidden_dropout"])
def test_each_dropout_acts_in_training_and_not_in_evaluation(
    single_process: ParallelConfig, place: str
) -> None:
    model = _build(single_process, **{place: 0.3})
    tokens, cu = _window([40, 20])
    parameters = packed_sequence_parameters(cu)
    model.train()
    assert not torch.equal(
        model(tokens, packed_seq_params=parameters), model(tokens, packed_seq_params=parameters)
    )
    model.eval()
    assert torch.equal(
        model(tokens, packed_seq_params=parameters), model(tokens, packed_seq_params=parameters)
    )


def test_bf16_stays_near_fp32(single_process: ParallelConfig) -> None:
    tokens, cu = _window([40, 20])
    losses = []
    for precision in ("fp32", "bf16"):
        model = _build(single_process, precision=precision)
        hidden = model(tokens, packed_seq_params=packed_sequence_parameters(cu))
        losses.append(model.token_losses(hidden, tokens).losses)
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)


def test_a_forward_without_window_is_refused(single_process: ParallelConfig) -> None:
    with pytest.raises(ValueError, match="packed_seq_params"):
        _build(single_process)(torch.zeros(1, 5, dtype=torch.int64))


def test_initial_weights_depend_on_seed_and_name_alone(single_process: ParallelConfig) -> None:
    first, again, other = (_build(single_process, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(99)
    for (name, a), b, c in zip(
        global_parameter_names(first), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.dim() == 1 or not torch.equal(a, c), name
    weights = [p for p in first.parameters() if p.dim() == 2]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_shards_are_slices_of_the_whole(single_process: ParallelConfig) -> None:
    whole = dict(global_parameter_names(_build(single_process)))
    size, shards = 2, []
    for rank in range(size):
        shard = _build(single_process)
        for parameter in shard.parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                shape = list(parameter.shape)
                shape[parameter.partition_dim] //= size
                parameter.data = torch.empty(shape)
        initialize_weights(
            shard, shard.model_config, seed=1, tensor_rank=rank, tensor_size=size, vocabulary_size=IN_USE
        )
        shards.append(dict(global_parameter_names(shard)))
    for name, parameter in whole.items():
        parts = [shard[name] for shard in shards]
        if not getattr(parameter, "tensor_model_parallel", False):
            joined = parts[0]
        elif "linear_fc1" in name:
            joined = torch.cat([part.chunk(2)[half] for half in range(2) for part in parts])
        else:
            joined = torch.cat(parts, parameter.partition_dim)
        assert torch.equal(joined, parameter), name


def test_scaled_output_initialisation_narrows_the_residual_outputs(single_process: ParallelConfig) -> None:
    plain, scaled = (
        dict(_build(single_process, scaled_output_init=flag).named_parameters()) for flag in (False, True)
    )
    for name, weight in plain.items():
        factor = (
            0.5 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1.0
        )  # sqrt(2 * 2 layers)
        torch.testing.assert_close(scaled[name], weight * factor)


def test_padding_rows_of_the_vocabulary_start_at_zero(single_process: ParallelConfig) -> None:
    weights = dict(_build(single_process).named_parameters())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert not weights[name][IN_USE:].any()
        assert weights[name][:IN_USE].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"vocabulary_size": 2000}, "vocabulary_size=2000"),
        ({"precision": "fp64"}, "fp64"),
        ({"parallel": ParallelConfig(tensor_model_parallel_size=3)}, "tensor_model_parallel_size=3"),
    ],
)
def test_impossible_builds_are_refused(
    single_process: ParallelConfig, arguments: dict[str, object], words: str
) -> None:
    common = {
        "vocabulary_padded_size": PADDED,
        "vocabulary_size": IN_USE,
        "parallel": single_process,
        "seed": 1,
        "precision": "fp32",
    }
    with pytest.raises((ModelConfigError, LayoutError), match=words):
        build_model(ModelConfig.preset("tiny"), **{**common, **arguments})  # type: ignore[arg-type]


def test_transformer_engine_is_refused_where_it_cannot_run(single_process: ParallelConfig) -> None:
    with pytest.raises(ModelConfigError, match="attention_backend=transformer_engine"):
        _build(single_process, attention_backend="transformer_engine")


@pytest.mark.parametrize(
    ("layout", "cuda", "said"),
    [
        ({}, False, "one causal call"),
        (
            {"context_parallel_size": 2},
            False,
            "a mask for each document's chunks, context parallelism by all_gather",
        ),
        ({"context_parallel_size": 2, "cp_comm": "a2a"}, True, "one causal call .* by a2a"),
    ],
)
def test_a_run_says_what_computes_its_attention(layout: dict[str, Any], cuda: bool, said: str) -> None:
    config = ModelConfig.preset("tiny", attention_backend="torch", attention_dropout=0.25)
    line = layers.describe_attention(config, ParallelConfig(**layout), context_length=131_072, cuda=cuda)
    assert re.fullmatch(rf"attention: torch \S+, {said}.*; dropout 0.25", line) is not None


def test_masks_that_do_not_fit_a_gpu_are_refused() -> None:
    config, split = (
        ModelConfig.preset("tiny", attention_backend="torch"),
        ParallelConfig(context_parallel_size=2),
    )
    with pytest.raises(
        ModelConfigError, match=r"masks of 5.0 GiB .* 131072 tokens, more than 1; .*cp_comm to a2a"
    ):
        layers.describe_attention(config, split, context_length=131_072, cuda=True)
    layers.describe_attention(config, split, context_length=32_768, cuda=True)


@pytest.fixture
def with_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if layers were Transformer Engine's: what is asked of them can be seen without a GPU."""
    monkeypatch.setattr(build, "uses_transformer_engine", lambda config, *, cuda: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", _fused_rotary)


def _fused_rotary(heads: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    """In the place of Transformer Engine's: marks what it was given."""
    return heads + 1


def _settings(**layout: Any) -> TransformerConfig:
    return build.transformer_config(ModelConfig.preset("tiny"), ParallelConfig(**layout), "bf16")


def test_transformer_engine_exchanges_keys_from_rank_to_rank(
    single_process: ParallelConfig, with_engine: None
) -> None:
    """Of its ways, p2p is the one that knows packed windows in every version since 2.1."""
    assert _settings(context_parallel_size=2).cp_comm_type == "p2p"
    assert _settings(context_parallel_size=2, cp_comm="p2p").cp_comm_type == "p2p"
    for other in ("all_gather", "a2a"):
        with pytest.raises(
            LayoutError, match=rf"parallel\.cp_comm={other}: .* Transformer Engine takes only p2p"
        ):
            _settings(context_parallel_size=2, cp_comm=other)


def test_rotary_positions_of_transformer_engine_do_not_loop_over_documents(
    single_process: ParallelConfig, with_engine: None
) -> None:
    """The loop fetches the documents' lengths from the GPU, for queries and keys of every layer."""
    heads, cu = torch.zeros(10, 2, 8), torch.tensor([0, 4, 10])
    rotated = rope_utils.apply_rotary_pos_emb(heads, torch.zeros(6, 1, 1, 8), _settings(), cu_seqlens=cu)
    assert torch.equal(rotated, heads + 1)


def test_the_gated_activation_of_transformer_engines_layers_is_one_operation(
    single_process: ParallelConfig, with_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fused(gated: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(gated.shape)
        return bias_swiglu_impl(gated, *arguments)

    monkeypatch.setattr(mlp, "bias_swiglu_impl", fused)
    submodules = mlp.MLPSubmodules(
        linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=tensor_parallel.RowParallelLinear
    )
    group = parallel_state.get_tensor_model_parallel_group()
    layer = mlp.MLP(config=_settings(), submodules=submodules, tp_group=group)
    layer(torch.zeros(5, 1, layer.config.hidden_size, dtype=torch.bfloat16))
    assert calls == [(5, 1, 2 * layer.config.ffn_hidden_size)]


def test_the_torch_layers_have_fusions_of_their_own(single_process: ParallelConfig) -> None:
    settings = _settings()
    assert not settings.apply_rope_fusion
    assert not settings.bias_activation_fusion


def test_the_torch_attention_gathers_keys_unless_told_otherwise(single_process: ParallelConfig) -> None:
    assert _settings(context_parallel_size=2).cp_comm_type == "all_gather"
    assert _settings(context_parallel_size=2, cp_comm="a2a").cp_comm_type == "a2a"
    with pytest.raises(LayoutError, match=r"parallel\.cp_comm=p2p: .* torch takes only all_gather and a2a"):
        _settings(context_parallel_size=2, cp_comm="p2p")


def test_eight_bit_products_are_refused_where_there_are_none(single_process: ParallelConfig) -> None:
    with pytest.raises(ModelConfigError, match=r"trainer\.fp8=hybrid needs Transformer Engine on a GPU"):
        build_model(
            ModelConfig.preset("tiny"),
            vocabulary_padded_size=PADDED,
            vocabulary_size=IN_USE,
            parallel=single_process,
            seed=1,
            precision="bf16",
            fp8="hybrid",
        )
