"""Takedown lists: named samples are never drawn, and the others stay where they were."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.data import Mixture, MultimodalDataset, Plan, Source
from emu3_megatron.data.manifest import canonical_sha256
from emu3_megatron.data.report import report
from emu3_megatron.data.takedown import SLICE, TakenDown, read_takedown
from emu3_megatron.errors import UserError
from tests.data.builders import VOCABULARY, write_stock


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
    assert set(without.mixture.sources[0].taken_down.numbers.tolist()) == gone
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


def test_a_flipped_bit_of_the_names_never_changes_what_is_taken_down(make_dataset, tmp_path: Path) -> None:
    """The names are no tokens, but the list decides by them which tokens are trained on."""
    folder = make_dataset("a", "p", 4, num_shards=1)
    names = tmp_path / "names.txt"
    names.write_text("a-1\na-2\n")
    truth = plan_of(folder, names).mixture.sources[0].taken_down.numbers.tolist()
    assert truth == [1, 2]
    path = folder / "a-00000-of-00001.jsonl"
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            with pytest.raises(UserError, match=path.name):
                Mixture([Source(path=str(folder))], takedown=names)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_lists_of_other_editors_are_read(make_dataset, tmp_path: Path, encoding: str, line_end: str) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes(line_end.join(["a-0", "", "# a comment", "a-3"]).encode(encoding))
    assert list(read_takedown(names)) == ["a-0", "a-3"]
    takedown = plan_of(make_dataset("a", "p", 8), names).mixture.takedown
    assert (takedown.listed, takedown.found, takedown.unknown) == (2, 2, ())
    names.write_bytes("a-0\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"names\.txt: cannot be read"):
        list(read_takedown(names))


def test_ids_that_no_source_has_are_named(make_dataset, tmp_path: Path) -> None:
    folders = make_dataset("a", "p", 8), make_dataset("b", "t", 8)
    names = tmp_path / "names.txt"
    names.write_text("b-7\nc-1\na-2\nA-2\na-2\nc-2\nc-3\n")
    mixture = Mixture([Source(path=str(folder)) for folder in folders], takedown=names)
    assert str(mixture.takedown) == (
        f"takedown list {names}: 2 of 6 ids found, 2 documents; no source has c-1, A-2, c-2, ..."
    )
    plan = Plan(mixture, seed=1, context_length=128, block_draws=64)
    assert str(mixture.takedown) in "\n".join(report(plan, 4))


def test_what_a_list_names_is_found_once(make_dataset, tmp_path: Path, monkeypatch) -> None:
    """And found again where the list, a dataset, or a byte of what is kept has changed."""
    folder, names, cache = make_dataset("a", "pt", 30), tmp_path / "names.txt", tmp_path / "cache"
    names.write_text("a-5\na-6\nnobody\n")

    def taken() -> tuple[list[int], str, str]:
        mixture = Mixture([Source(path=str(folder))], takedown=names, cache=cache)
        taken_down = mixture.sources[0].taken_down
        return taken_down.numbers.tolist(), taken_down.fingerprint, str(mixture.takedown)

    truth = taken()
    with monkeypatch.context() as patch:
        patch.setattr(MultimodalDataset, "find", lambda *_: pytest.fail("names read again"))
        assert taken() == truth
    assert truth[1] == canonical_sha256(truth[0])
    (path,) = cache.glob("takedown-*.npz")
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert taken() == truth, place
    names.write_text("a-5\n")
    assert len(taken()[0]) == 1
    make_dataset("a", "pt", 30, seed=3)
    assert len(taken()[0]) == 1
    assert len(list(cache.glob("takedown-*.npz"))) == 3


def test_a_source_of_which_nothing_is_left_is_named(make_dataset, tmp_path: Path) -> None:
    folder, names = make_dataset("a", "p", 5), tmp_path / "names.txt"
    names.write_text("".join(f"a-{number}\n" for number in range(5)))
    with pytest.raises(UserError, match=r"source 'a': all its 5 documents are taken down"):
        plan_of(folder, names)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400).flatmap(lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1)))))
def test_what_remains_is_what_is_not_named(drawn_set: tuple[int, set[int]]) -> None:
    size, gone = drawn_set
    taken_down = TakenDown(np.array(sorted(gone), dtype=np.int64), size)
    documents = np.random.default_rng(size).permutation(size)
    assert taken_down.remain(documents).tolist() == [number not in gone for number in documents.tolist()]


def test_the_borders_of_large_datasets_remain() -> None:
    size = 2 * SLICE + 5
    gone = np.array([0, SLICE - 1, SLICE, 2 * SLICE - 8, size - 1])
    assert np.flatnonzero(~TakenDown(gone, size).remain(np.arange(size))).tolist() == gone.tolist()


def test_ids_of_plain_text_are_found(tmp_path: Path) -> None:
    prefix, names = tmp_path / "web", tmp_path / "names.txt"
    write_stock(prefix, [[[1, 2]]] * 12)
    names.write_text("web:7\nweb:007\nweb:11\nweb:12\nweb:-1\nweb:x\nbed:1\n")
    mixture = Mixture([Source(path=str(prefix))], vocabulary=VOCABULARY, takedown=names)
    assert mixture.sources[0].taken_down.numbers.tolist() == [7, 11]
    assert mixture.takedown.found == 2
