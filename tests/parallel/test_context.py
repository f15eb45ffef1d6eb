from types import SimpleNamespace

import pytest
import torch

from emu3_megatron.parallel.config import LayoutError
from emu3_megatron.parallel.context import split_batch_for_context_parallel, zigzag_indices

CU = torch.tensor([0, 16, 24, 64])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_window_without_overlap(size: int) -> None:
    held = [zigzag_indices(CU, size, rank) for rank in range(size)]
    assert all(len(part) == 64 // size for part in held)
    assert torch.cat(held).sort().values.tolist() == list(range(64))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_equal_causal_work(size: int) -> None:
    starts = torch.repeat_interleave(CU[:-1], CU.diff())
    seen = torch.arange(64) - starts + 1  # keys that each query attends to
    work = {int(seen[zigzag_indices(CU, size, rank)].sum()) for rank in range(size)}
    assert len(work) == 1


def test_a_document_is_cut_into_first_and_last_chunks() -> None:
    assert zigzag_indices(torch.tensor([0, 8]), 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_indices(torch.tensor([0, 8]), 2, 1).tolist() == [2, 3, 4, 5]


def test_a_document_that_cannot_be_cut_is_refused_with_the_remedy() -> None:
    with pytest.raises(LayoutError, match=r"document of 6 tokens.*alignment=4"):
        zigzag_indices(torch.tensor([0, 8, 14]), 2, 0)


def test_batches_are_split_along_the_window() -> None:
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    batch = {"tokens": torch.arange(64)[None], "weights": torch.rand(1, 64)}
    part = split_batch_for_context_parallel(batch, CU, group)  # type: ignore[arg-type]
    assert torch.equal(part["tokens"][0], zigzag_indices(CU, 2, 1))
    assert torch.equal(part["weights"][0], batch["weights"][0, part["tokens"][0]])


def test_one_rank_keeps_everything() -> None:
    batch = {"tokens": torch.arange(64)[None]}
    assert split_batch_for_context_parallel(batch, CU, None)["tokens"] is batch["tokens"]
