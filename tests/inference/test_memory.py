"""Rows of the cache are as many as the memory holds, and results do not depend on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.inference import memory
from emu3_megatron.inference.sampling import Sampling
from tests.inference import worlds
from tests.inference.test_engine import image_request


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def model():
    return worlds.tiny_model()


def requests():
    """Guided ones of two rows, and others of one."""
    return [
        image_request(
            "a red square"[: 3 + index], 2 + index % 3, 3, seed=index, sampling=Sampling(guidance=g)
        )
        for index in range(6)
        for g in (1.0, 2.0)
    ]


def free(monkeypatch: pytest.MonkeyPatch, amount: int | None) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: amount)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every cache that is made."""
    from emu3_megatron.inference import engine

    made = []

    class Watched(engine.CachedDecoder):
        def __init__(self, *arguments: object, **settings: object) -> None:
            super().__init__(*arguments, **settings)
            made.append(sum(cache.nbytes for cache in self._cache))

    monkeypatch.setattr(engine, "CachedDecoder", Watched)
    return made


@pytest.mark.parametrize("cache_dtype", [None, torch.float64])
def test_little_memory_means_few_rows_and_the_same_results(
    model, monkeypatch: pytest.MonkeyPatch, sizes: list[int], cache_dtype: torch.dtype | None
) -> None:
    from emu3_megatron.inference.engine import Engine

    engine = Engine(model, worlds.dialect(), cache_dtype=cache_dtype)
    free(monkeypatch, None)
    expected = engine.generate(requests())
    budget = memory.Budget(model, cache_dtype)
    length = max(request.length for request in requests())
    assert sizes == [18 * budget.row(length)]
    for rows in (2, 3, 7, 17):
        available = int(budget.whole(rows, length) / memory.SHARE) + 1
        free(monkeypatch, available)
        for found, right in zip(engine.generate(requests()), expected, strict=True):
            np.testing.assert_array_equal(found.ids, right.ids)
        assert sizes[-1] == rows * budget.row(length) < available


def test_what_does_not_fit_is_refused(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of its own, or a server's rows; more rows than asked for are never taken."""
    from emu3_megatron.inference.engine import Engine

    engine = Engine(model, worlds.dialect())
    budget = memory.Budget(model)
    free(monkeypatch, int(budget.whole(1, 100) / memory.SHARE) + 1)
    assert budget.rows(8, 1, 100) == 1
    with pytest.raises(UserError, match=r"2 rows of 100 positions take .* GB .*--area .*--frames"):
        budget.rows(8, 2, 100)
    with pytest.raises(UserError, match=r"rows of .* positions"):
        engine.generate([image_request("x" * 200, 3, 3, sampling=Sampling(guidance=2.0))])
    with pytest.raises(UserError, match="--rows"):
        engine.session(max_rows=8, max_length=100)
    free(monkeypatch, 1 << 50)
    assert budget.rows(8, 2, 100) == 8


def test_more_of_anything_takes_more(model) -> None:
    budget = memory.Budget(model)
    amounts = [[budget.whole(rows, length) for rows in range(1, 300, 7)] for length in (10, 1000, 100_000)]
    for row in amounts:
        assert row == sorted(row)
    for few, many in itertools.pairwise(amounts):
        assert all(a < b for a, b in zip(few, many, strict=True))


def test_a_cut_model_is_refused_as_one(model, monkeypatch: pytest.MonkeyPatch) -> None:
    from emu3_megatron.inference.engine import Engine

    monkeypatch.setattr(model, "post_process", False)
    with pytest.raises(ValueError, match="pipeline_model_parallel_size=1"):
        Engine(model, worlds.dialect()).generate(requests())


def test_free_memory_of_this_machine() -> None:
    found = memory.free_bytes(torch.device("cpu"))
    assert found is None or found > 0


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    """The least of what a group and those around it leave; what files take there can be given back."""
    job = tmp_path / "slurm" / "job"
    job.mkdir(parents=True)
    for group, most, used, cached in ((job, "max", 5, 0), (job.parent, 1000, 900, 200)):
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 3\ninactive_file {cached}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/elsewhere\n0::/slurm/job\n")
    assert list(memory._left_of_groups(membership, tmp_path)) == [300]
    assert list(memory._left_of_groups(tmp_path / "none", tmp_path)) == []
