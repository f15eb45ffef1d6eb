"""Two tensor-parallel ranks generate what one process does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from emu3_megatron.inference.sampling import Sampling
from tests import programs
from tests.inference import worlds

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(1, 1), (2, 7), (5, 3), (6, 6), (4, 9)]


def generated(tensor_parallel: int) -> list[list[int]]:
    """Images of five sizes, greedy and sampled, guided and not, as one batch; groups must exist."""
    from emu3_megatron.inference.engine import Engine
    from emu3_megatron.parallel.config import ParallelConfig
    from tests.inference.test_engine import image_request

    model = worlds.tiny_model(parallel=ParallelConfig(tensor_model_parallel_size=tensor_parallel))
    requests = [
        image_request(
            "a red square"[: 3 + index],
            *size,
            seed=index,
            sampling=Sampling(temperature=temperature, guidance=guidance, top_k=20),
        )
        for index, size in enumerate(SIZES)
        for temperature in (0.0, 1.0)
        for guidance in (1.0, 3.0)
    ]
    return [done.ids.tolist() for done in Engine(model, worlds.dialect(), max_rows=11).generate(requests)]


def main() -> None:
    """One of two ranks: write the tokens to the file named. One of them has memory for a few rows only."""
    from emu3_megatron.inference import memory
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    torch.set_num_threads(1)
    initialize_parallel(ParallelConfig(tensor_model_parallel_size=2), platform.install("cpu"), seed=0)
    rank = torch.distributed.get_rank()
    memory.free_bytes = lambda device: (1 << 40, 200_000_000)[rank]
    tokens = generated(2)
    Path(f"{sys.argv[1]}-{rank}.json").write_text(json.dumps(tokens))


@pytest.mark.slow
def test_two_ranks_generate_what_one_does(tmp_path: Path) -> None:
    ended = programs.shared()("-m", __name__, tmp_path / "tokens", processes=2)
    assert ended.code == 0, ended.err[-3000:]
    with worlds.one_process():
        expected = generated(1)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"tokens-{rank}.json").read_text()) == expected


if __name__ == "__main__":
    main()
