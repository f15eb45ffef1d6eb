"""Takedown lists: named samples are never drawn, and the others stay where they were."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from emu3_megatron.data import Mixture, Plan, Source
from emu3_megatron.errors import UserError


def plan_of(folder: Path, takedown: Path | None = None, **options) -> Plan:
    mixture = Mixture([Source(path=str(folder))], takedown=takedown)
    return Plan(mixture, seed=1, context_length=128, block_draws=64, **options)


def drawn(plan: Plan, blocks: int) -> list[int]:
    return [document for number in range(blocks) for document in plan._draw(number)[0].document.tolist()]


def test_taken_down_samples_are_never_drawn(make_dataset, tmp_path: Path) -> None:
    folder = make_dataset("a", "pt", 32, num_shards=3)
    names = tmp_path / "names.txt"
    names.write_text("# by request\n\na-5\na-17\nnobody\n")
    whole, without = plan_of(folder), plan_of(folder, names)
    dataset = whole.mixture.sources[0].dataset
    gone = {number for number in range(32) if dataset.sample_id(number) in ("a-5", "a-17")}
    assert set(without.mixture.sources[0].taken_down.tolist()) == gone
    # Four blocks are eight epochs: every other document as often as before, in the same order.
    assert Counter(drawn(without, 4)) == {number: 8 for number in range(32) if number not in gone}
    assert drawn(without, 4) == [number for number in drawn(whole, 4) if number not in gone]
    seen = {int(number) for index in range(60) for number in without.window(index).document}
    assert not seen & gone


def test_a_list_changes_the_plan_only_where_it_names_something(make_dataset, tmp_path: Path) -> None:
    folder = make_dataset("a", "p", 20)
    names = tmp_path / "names.txt"
    names.write_text("nobody\n")
    whole = plan_of(folder)
    assert plan_of(folder, names).fingerprint == whole.fingerprint
    names.write_text("a-3\n")
    with pytest.raises(UserError, match="sources, a, taken down is new"):
        plan_of(folder, names).require_same(whole.identity)
    with pytest.raises(UserError, match=r"takedown list .*nowhere: cannot be read"):
        plan_of(folder, tmp_path / "nowhere")
