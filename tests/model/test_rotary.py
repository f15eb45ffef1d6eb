from types import SimpleNamespace

import pytest
import torch

from emu3_megatron.parallel import platform

platform.install("cpu")

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402

from emu3_megatron.model.packing import window_layout  # noqa: E402
from emu3_megatron.model.rotary import rotary_table, rotate, split_rotated  # noqa: E402

SIZE, BASE = 16, 1_000_000
CU = torch.tensor([0, 8, 32, 36, 64])


@pytest.mark.parametrize(("cp_size", "cp_rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_megatron_core_on_packed_windows(cp_size: int, cp_rank: int, dtype: torch.dtype) -> None:
    group = SimpleNamespace(size=lambda: cp_size, rank=lambda: cp_rank)
    embedding = RotaryEmbedding(SIZE, 1.0, rotary_base=BASE, use_cpu_initialization=True, cp_group=group)
    x = torch.randn(64 // cp_size, 3, SIZE, dtype=dtype)
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False, mrope_section=None
    )
    frequencies = embedding(28, packed_seq=True)
    want = rope_utils.apply_rotary_pos_emb(x, frequencies, config, cu_seqlens=CU, cp_group=group)

    layout = window_layout(CU, cp_size=cp_size, cp_rank=cp_rank, all_to_all=True, device=torch.device("cpu"))
    positions = layout.positions
    if layout.entry.slots is not None:
        positions = positions[layout.entry.slots]
    table = rotary_table(positions, channels=SIZE, repeat=1, base=BASE, dtype=dtype, known={})
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(rotate(x, table), want, rtol=tolerance, atol=tolerance)


def test_splitting_and_turning_at_once_equals_one_after_the_other() -> None:
    groups, repeat = 2, 3
    mixed = torch.randn(10, groups, repeat + 2, SIZE, requires_grad=True)
    table = rotary_table(
        torch.arange(10), channels=SIZE, repeat=repeat, base=BASE, dtype=torch.float32, known={}
    )
    got = split_rotated(mixed, table)
    query, key, value = mixed.split([repeat, 1, 1], -2)
    want = rotate(query.flatten(1, 2), table), rotate(key.squeeze(-2), table), value.squeeze(-2)
    torch.testing.assert_close(got, want)
    cotangents = [torch.randn_like(x) for x in want]
    (gradient,) = torch.autograd.grad(got, mixed, cotangents)
    (reference,) = torch.autograd.grad(want, mixed, cotangents)
    torch.testing.assert_close(gradient, reference)


def test_gradient_of_a_rotation_is_the_inverse_rotation() -> None:
    x = torch.randn(6, 2, SIZE, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.arange(6), channels=SIZE, repeat=1, base=100, dtype=torch.float64, known={})
    assert torch.autograd.gradcheck(lambda y: rotate(y, table), x)
