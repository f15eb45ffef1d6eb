"""The benchmark for a GPU runs, at toy sizes on a CPU."""

from __future__ import annotations

import json

from tests import programs


def test_the_benchmark_runs_on_a_cpu() -> None:
    ended = programs.shared()("benchmarks/gpu/generation.py", "--smoke")
    assert ended.code == 0, ended.err[-3000:]
    _, *lines = map(json.loads, ended.out.splitlines())
    assert [(line["images"], line["rows_of_the_batch"]) for line in lines] == [(1, 2), (8, 16)]
    for line in lines:
        share = line["tokens_per_second"] / line["bound_tokens_per_second"]
        assert abs(line["share_of_the_bound"] / share - 1) < 0.01
