import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from emu3_megatron.parallel import platform

platform.install("cpu")

from megatron.core import tensor_parallel  # noqa: E402

from emu3_megatron.model.attention import PackedAttention  # noqa: E402
from emu3_megatron.model.packing import (  # noqa: E402
    Group,
    WindowLayout,
    gather_rows,
    scatter_rows,
    window_layout,
)
from emu3_megatron.parallel.config import ParallelConfig  # noqa: E402

HEADS, GROUPS, SIZE = 4, 2, 8
WINDOWS = {
    "equal": [16, 16, 16],
    "nearly equal": [20, 17, 23, 18, 21],
    "mixed": [1, 40, 3, 41, 2, 90, 39],
    "one": [50],
    "with empty documents": [0, 7, 0, 9],
}


def _attention(dropout: float = 0.0) -> PackedAttention:
    config = SimpleNamespace(kv_channels=SIZE, attention_dropout=dropout, sequence_parallel=False)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return PackedAttention(config, layer_number=1, pg_collection=SimpleNamespace(cp=group, tp=group))


def _layout(lengths: list[int]) -> WindowLayout:
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return window_layout(cu, cp_size=1, cp_rank=0, all_to_all=False, device=torch.device("cpu"))


def _run(attention: PackedAttention, layout: WindowLayout, *heads: torch.Tensor) -> torch.Tensor:
    return scatter_rows(attention(*(gather_rows(x, layout.entry) for x in heads), layout), layout.entry)


def _naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    keep = (document[:, None] == document[None]) & torch.ones(len(document), len(document)).tril().bool()
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, key) / math.sqrt(SIZE)
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, value).flatten(1)


def _heads(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return tuple(  # type: ignore[return-value]
        torch.randn(tokens, heads, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    )


@pytest.mark.parametrize("lengths", WINDOWS.values(), ids=WINDOWS.keys())
def test_equals_a_naive_reference_with_a_document_mask(lengths: list[int]) -> None:
    heads = _heads(sum(lengths))
    out = _run(_attention().eval(), _layout(lengths), *heads)
    want = _naive(*heads, lengths)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, heads, cotangent),
        torch.autograd.grad(want, heads, cotangent),
        rtol=1e-5,
        atol=1e-5,
    )


def test_documents_of_similar_length_share_a_call() -> None:
    assert len(_layout([95, 97, 93, 96] * 5).groups) == 1
    assert len(_layout([95, 97, 30, 96, 210]).groups) == 3


def test_positions_count_from_each_document() -> None:
    layout = _layout([3, 1, 2])
    assert scatter_rows(layout.positions, layout.entry).tolist() == [0, 1, 2, 0, 0, 1]


def test_attention_dropout_keeps_the_mean_and_drops_the_stated_share(single_process: ParallelConfig) -> None:
    """With all values 1 an output is the mean of kept / (1 - p): mean 1, variance p / ((1 - p) * keys)."""
    keys, probability = 64, 0.25
    zero = torch.zeros(keys, HEADS, SIZE)
    attention, layout = _attention(probability).train(), _layout([keys])
    last = torch.stack(
        [
            _run(attention, layout, zero, zero[:, :GROUPS], zero[:, :GROUPS] + 1)[-1].view(HEADS, SIZE)[:, 0]
            for _ in range(400)
        ]
    )
    expected_variance = probability / ((1 - probability) * keys)
    assert abs(last.mean() - 1) < 5 * math.sqrt(expected_variance / last.numel())
    assert last.var().item() == pytest.approx(expected_variance, rel=0.2)
    assert torch.corrcoef(last.t()).fill_diagonal_(0).abs().max() < 0.25  # heads are dropped independently


def test_no_dropout_in_evaluation() -> None:
    heads = _heads(20)
    attention, layout = _attention(0.5).eval(), _layout([20])
    assert torch.equal(_run(attention, layout, *heads), _run(attention, layout, *heads))


def test_dropout_follows_the_tensor_parallel_random_state(single_process: ParallelConfig) -> None:
    heads, layout = _heads(20), _layout([12, 8])
    attention = _attention(0.5).train()
    draws = []
    for _ in range(2):
        tensor_parallel.model_parallel_cuda_manual_seed(9)
        before = torch.get_rng_state()
        draws.append(_run(attention, layout, *heads))
        assert torch.equal(torch.get_rng_state(), before)  # the common state is for replicated dropout only
        assert not torch.equal(_run(attention, layout, *heads), draws[-1])
    assert torch.equal(*draws)


class OnGPU(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


@pytest.mark.parametrize("masked", [False, True])
def test_a_masked_call_on_a_gpu_has_as_many_key_heads_as_query_heads(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask CUDA's kernels that hold no whole scores know no grouped heads (without one they do)."""
    query, key, value = (x.detach() for x in _heads(20))
    mask = torch.ones(20, 20).tril().bool()[None, None] if masked else None
    group = Group(batch=1, queries=20, keys=20, mask=mask)
    want = _attention().eval()._attend(group, query, key, value)
    calls = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((k.size(1), v.size(1), options["enable_gqa"]))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    got = _attention().eval()._attend(group, *(x.as_subclass(OnGPU) for x in (query, key, value)))
    assert calls == [(HEADS, HEADS, False) if masked else (GROUPS, GROUPS, True)]
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want)


@pytest.mark.parametrize("lengths", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize(("cp_size", "all_to_all"), [(1, False), (2, False), (2, True)])
def test_a_layout_of_lengths_on_the_host_reads_nothing_back_from_its_device(
    lengths: list[int], cp_size: int, all_to_all: bool
) -> None:
    """Nothing can be read from the meta device, so whatever would wait for a GPU fails here."""
    cu = torch.tensor([0, *(length * 2 * cp_size for length in lengths)]).cumsum(0)
    made = [
        window_layout(cu, cp_size=cp_size, cp_rank=0, all_to_all=all_to_all, device=torch.device(name))
        for name in ("cpu", "meta")
    ]
    host, meta = made
    assert meta.positions.is_meta
    assert [(g.batch, g.queries, g.keys) for g in meta.groups] == [
        (g.batch, g.queries, g.keys) for g in host.groups
    ]
    assert meta.positions.shape == host.positions.shape
