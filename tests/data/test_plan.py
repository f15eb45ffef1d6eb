"""Plans: windows are pure functions of the plan, hold whole documents, and keep the mixture."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.data import Mixture, MultimodalDataset, Plan, Source, Template, Window
from emu3_megatron.data.bounds import least_windows, least_windows_with_cuts
from emu3_megatron.data.index import Described
from emu3_megatron.data.mixture import OpenSource
from emu3_megatron.data.packing import pack
from emu3_megatron.data.permutation import permute, uniform
from emu3_megatron.data.report import report
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Modality
from emu3_megatron.vocabulary import Vocabulary
from tests.data.builders import VOCABULARY
from tests.data.keyed_reference import permute_reference
from tests.proofs import plan_scale

FIELDS = ("tokens", "labels", "modality", "cu_seqlens", "source", "document", "start", "length")


def equal(left: Window, right: Window) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in FIELDS)


def plan_of(
    *folders: Path, weights: tuple[float, ...] = (), template: Template | None = None, **options
) -> Plan:
    weights = weights or (1.0,) * len(folders)
    sources = [Source(path=str(path), weight=weight) for path, weight in zip(folders, weights, strict=True)]
    settings_ = {"seed": 1, "context_length": 128, "block_draws": 64, "min_piece": 8, **options}
    return Plan(Mixture(sources, template=template), **settings_)


def segments_of(plan: Plan, windows: int) -> list[tuple[int, int, int, int]]:
    """(source, document, start, length) of every segment of the first windows, in order."""
    found = []
    for index in range(windows):
        window = plan.window(index)
        columns = (window.source, window.document, window.start, window.length)
        found += [tuple(map(int, row)) for row in zip(*columns, strict=True) if row[0] >= 0]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutation_is_one_and_equals_the_reference(size: int, key: int) -> None:
    positions = np.arange(size)
    image = permute(positions, size, key)
    assert np.array_equal(np.sort(image), positions)
    assert np.array_equal(image, permute_reference(positions, size, key))


def test_permutation_mixes() -> None:
    image = permute(np.arange(100_000), 100_000, 7)
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.02
    assert np.count_nonzero(np.abs(np.diff(image)) < 10) < 100
    with pytest.raises(ValueError, match="position 5"):
        permute(np.array([5]), 5, 0)
    assert abs(uniform(3, np.arange(100_000)).mean() - 0.5) < 0.01


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("policy", ["online", "offline"])
@pytest.mark.parametrize("fill", [False, True])
def test_every_window_is_made_of_its_documents(make_dataset, alignment: int, policy: str, fill: bool) -> None:
    """Tokens, labels, classes and borders agree with the documents, rendered one by one."""
    folders = make_dataset("a", "pi", 30), make_dataset("b", "t", 20, text=300)
    template = Template(caption_after_probability=0.5, caption_dropout=0.3)
    plan = plan_of(*folders, template=template, alignment=alignment, policy=policy, fill=fill)
    datasets = [MultimodalDataset.open(folder) for folder in folders]
    for index in range(60):
        window = plan.window(index)
        assert window.cu_seqlens[0] == 0
        assert window.cu_seqlens[-1] == 128
        assert np.all(window.cu_seqlens % alignment == 0)
        assert np.all(np.diff(window.cu_seqlens) > 0)
        for place, source in enumerate(window.source):
            here = slice(window.cu_seqlens[place], window.cu_seqlens[place + 1])
            tokens, labels, classes = window.tokens[here], window.labels[here], window.modality[here]
            length, start = int(window.length[place]), int(window.start[place])
            assert np.all(tokens[length:] == VOCABULARY.pad)
            if source < 0:
                assert length == 0
                assert np.all(classes == Modality.PADDING)
                continue
            segments = datasets[source].document(int(window.document[place]))
            renderings = [
                template.assemble(segments, VOCABULARY, caption_after=after, caption_tokens=kept)
                for after, kept in ((False, None), (True, None), (False, 0))
            ]
            matching = [
                (ids, modality)
                for ids, modality in renderings
                if np.array_equal(ids[start : start + length], tokens[:length])
            ]
            assert matching
            ids, modality = matching[0]
            targets = ids[start + 1 : start + 1 + length]
            assert np.array_equal(labels[: len(targets)], targets)
            assert np.array_equal(classes[: len(targets)], modality[start + 1 : start + 1 + length])
            assert np.all(labels[len(targets) :] == 0)
            assert np.all(classes[len(targets) :] == Modality.PADDING)
            if any(mode == 1 for _, mode in segments):
                assert (start, length) == (0, len(ids)), "a span or its caption was cut"


def test_every_epoch_holds_every_document_once(make_dataset) -> None:
    """Whole documents and the pieces of split ones, over as many blocks as three epochs take."""
    plan = plan_of(make_dataset("a", "ptp", 48, text=200))
    assert plan.mixture.draw_shares(capacity=128) == [1]
    windows = plan.windows_before(3 * 48 * 4 // 64)
    counts: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for _, document, start, length in segments_of(plan, windows):
        counts[document] += start == 0
        tokens[document] += length
    assert set(counts.values()) == {12}
    dataset = plan.mixture.sources[0].dataset
    dropped = 0
    for number in range(48):
        length = sum(dataset.lengths(number)) + 2
        too_long = length > 128 and dataset.name(number)["task"] == "p"
        dropped += too_long
        assert tokens[number] == (0 if too_long else 12 * length)
    assert dropped > 0
    assert max(sum(dataset.lengths(number)) for number in tokens) > 128


def test_weights_are_shares_of_tokens(make_dataset) -> None:
    """Sources with documents of very different length, some too long, caption dropout and all."""
    folders = make_dataset("a", "p", 31), make_dataset("b", "t", 17, text=400), make_dataset("c", "pv", 30)
    template = Template(caption_dropout=0.2)
    plan = plan_of(*folders, weights=(5, 3, 2), template=template, block_draws=512)
    statistics = plan.statistics(20_000)
    shares = [count / statistics.tokens for count in statistics.tokens_per_source.values()]
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], rtol=0.01)


def test_draws_stay_within_one_of_their_share(make_dataset) -> None:
    plan = plan_of(make_dataset("a", "p", 31), make_dataset("b", "t", 17), make_dataset("c", "p", 5))
    shares = [float(share) for share in plan.mixture.draw_shares(capacity=128)]
    totals = np.zeros(3)
    for number in range(40):
        drawn = [len(each.document) for each in plan._draw(number)]
        totals += drawn
        assert np.all(np.abs(np.array(drawn) - np.array(shares) * 64) <= 1)
        assert np.all(np.abs(totals - np.array(shares) * 64 * (number + 1)) <= 1)


def test_windows_do_not_depend_on_how_they_are_asked_for(make_dataset, tmp_path: Path) -> None:
    folders = make_dataset("a", "p", 30), make_dataset("b", "t", 20, text=300)
    ordered = [plan_of(*folders).window(index) for index in range(80)]
    cached = plan_of(*folders, cache=tmp_path / "cache", cached_blocks=1)
    again = pickle.loads(pickle.dumps(cached))
    for index in np.random.default_rng(0).permutation(80).tolist():
        for plan in (cached, again, plan_of(*folders, cache=tmp_path / "cache")):
            assert equal(plan.window(index), ordered[index])


def test_cached_blocks_are_used_and_damaged_ones_built_again(
    make_dataset, tmp_path: Path, monkeypatch
) -> None:
    folder = make_dataset("a", "p", 30)
    truth = plan_of(folder, cache=tmp_path / "cache").window(20)
    files = sorted((tmp_path / "cache").rglob("*.npz"))
    assert len(files) >= 2
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "_build", lambda *_: pytest.fail("built although cached"))
        assert equal(plan_of(folder, cache=tmp_path / "cache").window(20), truth)
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert equal(plan_of(folder, cache=tmp_path / "cache").window(20), truth)


def test_seed_changes_order_and_nothing_else_does(make_dataset, tmp_path: Path) -> None:
    folder = make_dataset("a", "p", 30)
    first = segments_of(plan_of(folder), 30)
    assert first != segments_of(plan_of(folder, seed=2), 30)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert first == segments_of(plan_of(moved), 30)
    assert plan_of(moved).fingerprint == plan_of(moved).fingerprint


def test_template_shares_are_met_and_documents_keep_theirs(make_dataset) -> None:
    folder = make_dataset("a", "p", 400, text=30)
    dataset = MultimodalDataset.open(folder)
    documents = np.arange(400)
    described = dataset.describe(documents)
    template = Template(caption_after_probability=0.4, caption_dropout=0.25)
    decided = [template.decide(documents, described, key=key, capacity=999) for key in range(40)]
    after = np.mean([each.caption_after for each in decided])
    dropped = np.mean([each.caption_tokens == 0 for each in decided])
    assert abs(after - 0.4) < 0.02
    assert abs(dropped - 0.6 * 0.25) < 0.02
    one = Described(*(each[7:8] for each in described))
    alone = template.decide(documents[7:8], one, key=3, capacity=999)
    assert alone.caption_tokens[0] == decided[3].caption_tokens[7]
    expected = template.expected_tokens(described, capacity=999)
    mean = np.mean([each.length for each in decided], axis=0)
    assert abs(mean.sum() / expected.sum() - 1) < 0.01


def test_render_by_key() -> None:
    vocabulary = VOCABULARY
    span = np.array([vocabulary.boi, 1, vocabulary.img, vocabulary.vision_offset, vocabulary.eoi])
    segments = [(np.array([5, 6]), 0), (span, 1)]
    ids, modality = Template().render(segments, vocabulary, 0)
    assert ids.tolist() == [vocabulary.bos, 5, 6, *span.tolist(), vocabulary.eos]
    assert modality.tolist() == [4, 0, 0, 4, 2, 4, 1, 4, 4]
    ids, _ = Template(caption_after_probability=1.0, bos=False).render(segments, vocabulary, 0)
    assert ids.tolist() == [*span.tolist(), 5, 6, vocabulary.eos]
    ids, _ = Template(caption_dropout=1.0, eos=False).render(segments, vocabulary, 0)
    assert ids.tolist() == [vocabulary.bos, *span.tolist()]


def test_overlong_pairs_are_dropped_by_name_or_cut(make_dataset) -> None:
    folder = make_dataset("a", "pv", 20)
    statistics = plan_of(folder, block_draws=20).statistics(1)
    assert statistics.dropped == 10
    assert all(name.startswith("a: a-") and "tokens)" in name for name in statistics.dropped_names)
    # 38 tokens hold the longest span alone, but not with its caption.
    pairs = make_dataset("b", "p", 30, text=40)
    cut = plan_of(pairs, context_length=40, template=Template(overlong="cut_caption"))
    lengths = [length for *_, length in segments_of(cut, 60)]
    assert cut.statistics(60).dropped == 0
    assert max(lengths) == 40


def test_context_too_short_for_every_document(make_dataset) -> None:
    with pytest.raises(
        UserError, match=r"source 'a': no document fits context_length=12 \(the shortest takes"
    ):
        plan_of(make_dataset("a", "p", 8), context_length=12)


def test_resume_names_what_changed(make_dataset) -> None:
    folder = make_dataset("a", "p", 10)
    saved = json.loads(json.dumps(plan_of(folder).identity))
    plan_of(folder).require_same(saved)
    with pytest.raises(UserError, match="seed was 1, is 2"):
        plan_of(folder, seed=2).require_same(saved)
    with pytest.raises(UserError, match=r"sources, a, weight was 1.0, is 2.0"):
        plan_of(folder, weights=(2.0,)).require_same(saved)
    with pytest.raises(UserError, match="sources, b is new"):
        plan_of(folder, make_dataset("b", "t", 5)).require_same(saved)
    make_dataset("a", "p", 10, seed=5)
    with pytest.raises(UserError, match="sources, a, dataset, shards, a-00000-of-00002 was"):
        plan_of(folder).require_same(saved)


def test_bad_mixtures_are_refused(make_dataset) -> None:
    folder = str(make_dataset("a", "p", 5))
    for sources, message in (
        ([], "1 to"),
        ([Source(path=folder, weight=0)], "weight=0"),
        ([Source(path=folder), Source(path=folder)], "a repeats"),
        ([Source(path=folder + "x")], "no such file"),
        ([Source(path=str(make_dataset("e", "p", 0)))], "no documents"),
    ):
        with pytest.raises(UserError, match=message):
            Mixture(sources)
    with pytest.raises(UserError, match="vocabulary 'tiny'"):
        Mixture([Source(path=folder)], vocabulary=Vocabulary.preset("emu3"))


@pytest.mark.parametrize("kind", ["text_tokenizer", "vision_tokenizer"])
def test_one_mixture_has_one_tokenizer_of_each_kind(make_dataset, kind: str) -> None:
    """Ids of the same range and another tokenizer would be trained on without a sound."""
    sources = [
        Source(path=str(make_dataset(name, "p", 5, **{f"{kind}_fingerprint": fingerprint})))
        for name, fingerprint in (("a", "1" * 64), ("b", ""), ("c", "1" * 64), ("d", "2" * 64))
    ]
    assert Mixture(sources[:3]).tokenizers == {kind.replace("_", " "): "1" * 64}
    with pytest.raises(UserError, match=f"'a' and 'd' were made with different {kind.replace('_', ' ')}s"):
        Mixture(sources)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": 3}, "context_length=128 must be a multiple of alignment=3"),
        ({"context_length": 0}, "context_length=0"),
        ({"policy": "fast"}, "policy='fast'"),
        ({"block_draws": 0}, "block_draws=0"),
    ],
)
def test_bad_options_are_refused(make_dataset, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(make_dataset("a", "p", 5), **options)


def test_bad_templates_are_refused() -> None:
    with pytest.raises(UserError, match=r"caption_dropout=1.5"):
        Template(caption_dropout=1.5)
    with pytest.raises(UserError, match="overlong='cut'"):
        Template(overlong="cut")  # type: ignore[arg-type]


def test_statistics_add_up(make_dataset) -> None:
    plan = plan_of(make_dataset("a", "pi", 30), make_dataset("b", "t", 9, text=300), alignment=4)
    statistics = plan.statistics(50, start=13)
    windows = [plan.window(index) for index in range(13, 63)]
    tokens = sum(int(window.length.sum()) for window in windows)
    assert statistics.tokens == tokens
    assert statistics.tokens + statistics.padding_alignment + statistics.padding_tail == 50 * 128
    tails = sum(int(np.diff(window.cu_seqlens)[window.source < 0].sum()) for window in windows)
    assert statistics.padding_tail == tails
    assert statistics.splits == sum(int(np.count_nonzero(window.start)) for window in windows)
    assert statistics.fill == tokens / (50 * 128)


def test_a_source_is_measured_once(make_dataset, tmp_path: Path, monkeypatch) -> None:
    """Reading a whole index takes long where it is large; what came out is kept beside the blocks."""
    folder = make_dataset("a", "p", 30)
    first = plan_of(folder, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(OpenSource, "_measure", lambda *_: pytest.fail("measured again"))
        again = plan_of(folder, cache=tmp_path / "cache")
    assert again._shares == first._shares == plan_of(folder)._shares
    (path,) = (tmp_path / "cache").glob("mean-*.json")
    path.write_text(path.read_text()[:30])
    assert plan_of(folder, cache=tmp_path / "cache")._shares == first._shares


def test_blocks_ahead_are_built_in_the_background(make_dataset, monkeypatch) -> None:
    plan = plan_of(make_dataset("a", "p", 30))
    plan.window(0)
    plan.build_ahead(0)
    plan.finish_background()
    border = plan.windows_before(1)
    truth = plan_of(make_dataset("a", "p", 30)).window(border)
    assert 1 in plan._store._blocks
    assert equal(plan.window(border), truth)


ENDS_WHILE_BUILDING = """
import sys
import time
from emu3_megatron.data.block import BlockStore
from emu3_megatron.data.packing import pack
started = []
def build(number):
    started.append(number)
    for _ in range(100_000):
        pack([1], 5120)
store = BlockStore(build, None, 4)
store.build_ahead(0)
while not started:
    time.sleep(0.001)
sys.exit(2)
"""


def test_a_process_that_ends_while_a_block_is_built_keeps_its_exit_code() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS_WHILE_BUILDING], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr


def test_a_block_that_cannot_be_built_fails_where_it_is_needed(make_dataset, monkeypatch) -> None:
    plan = plan_of(make_dataset("a", "p", 30))
    plan.window(0)

    def fail(_: int) -> None:
        raise UserError("damaged")

    monkeypatch.setattr(plan._store, "_build", fail)
    plan.build_ahead(0)
    plan.finish_background()
    with pytest.raises(UserError, match="damaged"):
        plan.block(1)


def test_cut_captions_are_counted_and_named(make_dataset) -> None:
    plan = plan_of(
        make_dataset("a", "p", 30, text=40), context_length=40, template=Template(overlong="cut_caption")
    )
    statistics = plan.statistics(60)
    source = plan.mixture.sources[0]
    expected = 0
    for index in range(60):
        window = plan.window(index)
        for number, length in zip(window.document.tolist(), window.length.tolist(), strict=True):
            expected += number >= 0 and sum(source.dataset.lengths(number)) + 2 > length
    assert statistics.captions_cut == expected > 0
    assert all(name.startswith("a: a-") for name in statistics.captions_cut_names)
    assert plan_of(make_dataset("a", "p", 30, text=40)).statistics(20).captions_cut == 0


def test_report_names_what_is_lost_and_what_would_help(make_dataset) -> None:
    """A span of about 530 tokens leaves a hole in a window of 600; more text would fill it."""
    folders = make_dataset("v", "v", 20), make_dataset("t", "t", 9, text=20)
    plan = plan_of(*folders, weights=(20, 1), context_length=600, fill=True)
    text = "\n".join(report(plan, 40, sampled=10))
    assert f"fill         {plan.statistics(40).fill:.4%}" in text
    for word in (
        "padding",
        "too long",
        "texts cut",
        "epochs",
        "block ends",
        "possible",
        "modality     vision",
    ):
        assert word in text
    assert "advice" in text


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_no_packing_beats_the_bound(lengths: list[int]) -> None:
    bound = least_windows(np.array(lengths), 60)
    assert -(-sum(lengths) // 60) <= bound <= pack(lengths, 60, policy="offline").num_windows
    assert (
        least_windows_with_cuts(np.array(lengths), 30, 60)
        <= pack(
            [*lengths, 30],
            60,
            splittable=[False] * len(lengths) + [True],
            policy="offline",
            fill=True,
            min_piece=1,
        ).num_windows
    )


def test_the_bound_sees_pairs_that_do_not_fit() -> None:
    assert least_windows(np.full(10, 31), 60) == 10
    assert least_windows(np.array([40, 40, 25, 25]), 60) == 3


def test_the_scale_proof_in_small(tmp_path: Path) -> None:
    """`tests/proofs/plan_scale.py`: no window of a large mixture waits for the whole plan."""
    seconds, memory = plan_scale.prove(tmp_path, tokens=2e7, shards=7, tries=1)
    assert seconds > 0
    assert memory < plan_scale.BYTES
