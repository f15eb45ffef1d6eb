"""Several captions of one image: one is shown a draw, each in its turn, the same for everybody."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from emu3_megatron.data import (
    DatasetWriter,
    Manifest,
    Mixture,
    MultimodalDataset,
    Plan,
    ShardWriter,
    Source,
    Template,
    Window,
)
from emu3_megatron.data.format import ALTERNATIVE_MODE, MAX_CAPTIONS, SPAN_MODE, TEXT_MODE
from emu3_megatron.data.lint import lint
from emu3_megatron.data.loader import WindowLoader
from emu3_megatron.data.template import choose_captions
from emu3_megatron.data.verify import describe, show, verify
from emu3_megatron.data.window import Canvas
from emu3_megatron.errors import UserError
from tests.data.builders import VOCABULARY, make_span, make_text
from tests.data.test_plan import FIELDS, equal

DOCUMENTS, CAPTIONS, CONTEXT_LENGTH = 60, 5, 128
MIXED = Template(caption_after_probability=0.4, caption_dropout=0.25)


def stored(captions: list[npt.NDArray[np.integer]], span: npt.NDArray[np.integer]) -> list[tuple]:
    """Segments of a document of these captions."""
    return [
        *((ids, ALTERNATIVE_MODE if place else TEXT_MODE) for place, ids in enumerate(captions)),
        (span, SPAN_MODE),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs of one to five captions (number % 6, 1 at least) of different lengths, and texts."""
    rng = np.random.default_rng(0)
    with DatasetWriter(
        tmp_path / "a", "a", vocabulary=VOCABULARY, num_shards=3, dialect_name="emu3"
    ) as writer:
        for number in range(DOCUMENTS):
            captions = [make_text(rng, int(rng.integers(2, 40))) for _ in range(max(1, number % 6))]
            span = make_span(rng, int(rng.integers(4, 30)))
            document = [(make_text(rng, 200), TEXT_MODE)] if number % 6 == 0 else stored(captions, span)
            writer.add_document(document, f"a-{number}")
    return tmp_path / "a"


def plan_of(folder: Path, template: Template = MIXED, **options) -> Plan:
    source = Source(path=str(folder), template=template)
    settings = {"seed": 1, "context_length": CONTEXT_LENGTH, "block_draws": 50, "min_piece": 8, **options}
    return Plan(Mixture([source]), **settings)


def shown(plan: Plan, window: Window) -> list[tuple[int, int | None]]:
    """Document and number of the caption that stands in each segment of a window, read from its tokens alone;
    None where it is dropped or there is none."""
    found: list[tuple[int, int | None]] = []
    for place in np.flatnonzero(window.source >= 0).tolist():
        document = int(window.document[place])
        start = int(window.cu_seqlens[place])
        ids = window.tokens[start : start + int(window.length[place])].tolist()
        *captions, (span, _) = plan.mixture.sources[0].dataset.document(document)
        whole = {
            (VOCABULARY.bos, *order, VOCABULARY.eos): number
            for number, (caption, _) in enumerate(captions)
            for order in ([*caption, *span], [*span, *caption])
        }
        found.append((document, whole.get(tuple(ids))))
    return found


def test_windows_equal_the_template_in_numpy(folder: Path) -> None:
    """What C++ reads and lays out, label by label, captions cut and dropped, one file open at a time."""
    template = Template(caption_after_probability=0.4, caption_dropout=0.2, overlong="cut_caption")
    plan = plan_of(folder, template, context_length=52, alignment=2, fill=True)
    (source,) = plan.mixture.sources
    source.dataset._files.limit = 1
    numbers = set()
    for index in range(200):
        window = plan.window(index)
        block, local = plan.locate(index)
        canvas = Canvas(plan.context_length, VOCABULARY.pad)
        for place in np.flatnonzero(window.source >= 0).tolist():
            piece = int(block.window_offsets[local]) + place
            ids, modality = template.assemble(
                source.dataset.document(int(window.document[place])),
                VOCABULARY,
                chosen=int(block.chosen[piece]),
                caption_after=bool(block.caption_after[piece]),
                caption_tokens=int(block.caption_tokens[piece]),
            )
            start, length = int(window.start[place]), int(window.length[place])
            canvas.write(ids, modality, start=start, length=length, at=int(window.cu_seqlens[place]))
            if source.dataset.describe(window.document[place : place + 1]).captions[0]:
                assert (start, length) == (0, len(ids)), "the plan counted another length"
            numbers.add(int(block.chosen[piece]))
        for name in ("tokens", "labels", "modality"):
            assert np.array_equal(getattr(window, name), getattr(canvas, name)), (index, name)
    assert numbers == set(range(CAPTIONS))
    statistics = plan.statistics(200)
    assert statistics.captions_cut > 0
    assert statistics.tokens == sum(int(plan.window(index).length.sum()) for index in range(200))


def test_every_caption_is_shown_once_in_as_many_epochs_as_there_are(folder: Path) -> None:
    """Counted in the tokens of windows. 60 epochs, the least common multiple of 1 to 5, in a whole number of
    blocks: every caption of a document of n stands in 60 / n of them."""
    plan = plan_of(folder, Template(), block_draws=DOCUMENTS)
    counts: Counter[tuple[int, int | None]] = Counter()
    for index in range(plan.windows_before(60)):
        counts.update(shown(plan, plan.window(index)))
    assert plan.statistics(plan.windows_before(60)).dropped == 0
    described = plan.mixture.sources[0].dataset.describe(np.arange(DOCUMENTS))
    for document, captions in enumerate(described.captions.tolist()):
        for number in range(captions):
            assert counts[document, number] == 60 // captions, (document, number)


def test_any_run_of_epochs_shows_captions_in_turn_and_every_epoch_all_alike() -> None:
    documents = np.arange(30_000)
    captions = np.resize([0, 1, 2, 5, 256], 30_000)
    chosen = np.array([choose_captions(documents, captions, key=9, epoch=epoch) for epoch in range(300)])
    assert np.all(chosen < np.maximum(captions, 1))
    for count in (2, 5, 256):
        of_count = chosen[:, captions == count]
        for first in (0, 17, 44):
            assert np.all(np.sort(of_count[first : first + count], axis=0) == np.arange(count)[:, None])
        shares = np.bincount(of_count[3], minlength=count) / of_count.shape[1]
        assert np.all(np.abs(shares - 1 / count) < 5 / np.sqrt(of_count.shape[1] * count))
    other = choose_captions(documents, captions, key=10, epoch=0)
    assert np.mean(other == chosen[0], where=captions == 5) < 0.25


def test_tokens_of_an_epoch_are_as_expected(folder: Path) -> None:
    """The mean that shares of draws come from is that of the windows, over 60 epochs to the token."""
    plan = plan_of(folder, Template(), block_draws=DOCUMENTS)
    mean = plan.mixture.sources[0].mean_tokens(capacity=CONTEXT_LENGTH)
    tokens = plan.statistics(plan.windows_before(60)).tokens
    assert tokens == pytest.approx(60 * DOCUMENTS * mean, abs=1e-3)
    short = plan_of(folder, Template(), context_length=50, block_draws=DOCUMENTS)
    statistics = short.statistics(short.windows_before(60))
    expected = 60 * DOCUMENTS * short.mixture.sources[0].mean_tokens(capacity=50)
    assert statistics.dropped > 0, "captions that make a pair too long"
    assert statistics.tokens == pytest.approx(expected, abs=1e-3)
    assert statistics.dropped_names[0].startswith("a: a-")


def test_weights_are_shares_of_tokens(folder: Path, make_dataset) -> None:
    """Of sources with several captions and with one, some too long for a window."""
    sources = [
        Source(path=str(path), weight=weight)
        for path, weight in ((folder, 3), (make_dataset("b", "pc", 31), 1))
    ]
    mixture = Mixture(sources, template=Template(caption_dropout=0.2))
    plan = Plan(mixture, seed=1, context_length=52, block_draws=512, min_piece=8)
    statistics = plan.statistics(20_000)
    shares = [count / statistics.tokens for count in statistics.tokens_per_source.values()]
    np.testing.assert_allclose(shares, [0.75, 0.25], rtol=0.01)


def test_blocks_cached_before_captions_were_chosen_are_built_again(folder: Path, tmp_path: Path) -> None:
    truth = plan_of(folder, cache=tmp_path / "cache").window(20)
    for path in (tmp_path / "cache").rglob("*.npz"):
        with np.load(path) as arrays:
            rest = {name: arrays[name] for name in arrays.files if name != "chosen"}
        np.savez(path, **rest)
    assert equal(plan_of(folder, cache=tmp_path / "cache").window(20), truth)


def test_dropped_and_moved_captions_keep_their_shares(folder: Path) -> None:
    plan = plan_of(folder, context_length=512)
    drawn = [plan._draw(number)[0] for number in range(400)]
    captions = plan.mixture.sources[0].dataset.describe(np.arange(DOCUMENTS)).captions
    several = np.concatenate([captions[each.document] > 1 for each in drawn])
    after = np.concatenate([each.decided.caption_after for each in drawn])[several]
    kept = np.concatenate([each.decided.caption_tokens for each in drawn])[several]
    assert abs(after.mean() - 0.4) < 0.02
    assert abs((kept == 0).mean() - 0.6 * 0.25) < 0.02


def test_the_same_windows_for_every_process_order_and_restart(folder: Path, tmp_path: Path) -> None:
    ordered = [plan_of(folder).window(index) for index in range(60)]
    cached = plan_of(folder, cache=tmp_path / "cache", cached_blocks=1)
    again = pickle.loads(pickle.dumps(cached))
    for index in np.random.default_rng(0).permutation(60).tolist():
        for plan in (cached, again, plan_of(folder, cache=tmp_path / "cache")):
            assert equal(plan.window(index), ordered[index])


def test_resume_and_layouts_see_the_same_tokens(folder: Path) -> None:
    """Steps of 8 windows in one go, and resumed in the middle on two ranks with another micro-batch."""
    plan = plan_of(folder)

    def tokens(first: int, steps: int, ranks: int, micro: int) -> list[Counter[bytes]]:
        taken: list[Counter[bytes]] = [Counter() for _ in range(steps)]
        for rank in range(ranks):
            loader = WindowLoader(
                plan, start=first, global_batch_size=8, micro_batch_size=micro,
                data_parallel_rank=rank, data_parallel_size=ranks, num_workers=0,
            )  # fmt: skip
            for counted, batches in zip(taken, loader, strict=False):
                for batch in batches:
                    counted.update(row.numpy().tobytes() for row in batch.tokens.reshape(micro, -1))
        return taken

    whole = tokens(0, 6, 1, 2)
    assert tokens(16, 4, 2, 1) == whole[2:]
    assert tokens(40, 1, 2, 4) == whole[5:]


def test_a_flipped_byte_in_an_alternative_is_found(folder: Path) -> None:
    """`verify` names the sequence; a window that shows it is refused, and those that do not are right."""
    plan, truth = (plan_of(folder, Template(), block_draws=DOCUMENTS) for _ in range(2))
    dataset = truth.mixture.sources[0].dataset
    number = next(each for each in range(DOCUMENTS) if len(dataset.document(each)) == 6)
    shard, local = dataset._locate(number)
    first, start, lengths, _ = shard.index().document(local)
    windows = [truth.window(index) for index in range(truth.windows_before(5))]
    captions = [[each for each in shown(truth, window) if each[0] == number] for window in windows]
    path = shard.path(".bin")
    data = bytearray(path.read_bytes())
    data[start + 4 * sum(lengths[:3]) + 1] ^= 64
    path.write_bytes(data)
    assert any(f"{path.name}: sequence {first + 3} (from byte" in fault for fault in verify(folder))
    seen: Counter[int | None] = Counter()
    for index, window in enumerate(windows):
        seen.update(caption for _, caption in captions[index])
        if (number, 3) in captions[index]:
            with pytest.raises(UserError, match=rf"{path.name}: sequence {first + 3} \(from byte"):
                plan.window(index)
        else:
            assert equal(plan.window(index), window)
    assert seen == dict.fromkeys(range(5), 1)


def test_a_span_damaged_behind_alternatives_is_named(folder: Path) -> None:
    dataset = MultimodalDataset.open(folder)
    number = next(each for each in range(DOCUMENTS) if len(dataset.document(each)) == 6)
    shard, local = dataset._locate(number)
    first, start, lengths, _ = shard.index().document(local)
    byte = start + 4 * sum(lengths[:5])
    data = bytearray(shard.path(".bin").read_bytes())
    data[byte + 9] ^= 1
    shard.path(".bin").write_bytes(data)
    plan = plan_of(folder, Template(), block_draws=DOCUMENTS)
    holding = [
        index
        for index in range(plan.windows_before(1))
        for block, local in [plan.locate(index)]
        if number in block.document[block.window_offsets[local] : block.window_offsets[local + 1]]
    ]
    with pytest.raises(UserError, match=rf"sequence {first + 5} \(from byte {byte}\)"):
        plan.window(holding[0])
    shard.path(".bin").write_bytes(data[: byte + 8])
    with pytest.raises(UserError, match=rf"{shard.bin_path}: has no byte"):
        plan.window(holding[0])


def test_documents_are_described_with_the_caption_asked_for(folder: Path) -> None:
    dataset = MultimodalDataset.open(folder)
    numbers = np.arange(DOCUMENTS)
    seen = np.zeros(DOCUMENTS, dtype=np.int64)
    for places, described in dataset.describe_captions(numbers):
        for place, length, caption, count in zip(
            places.tolist(), described.length, described.caption, described.captions, strict=True
        ):
            *captions, (last, _) = dataset.document(place)
            if count:
                assert (caption, count) == (len(captions[seen[place]][0]), len(captions))
                assert length == caption + len(last)
            else:
                assert (length, caption) == (200, 0)
            seen[place] += 1
    assert seen.tolist() == [max(1, number) for number in dataset.describe(numbers).captions]
    with pytest.raises(ValueError, match="caption 5 of a document with"):
        dataset.describe(numbers, np.full(DOCUMENTS, 5, dtype=np.uint8))
    with pytest.raises(ValueError, match="chosen has 1 entries"):
        dataset.describe(numbers, np.zeros(1, dtype=np.uint8))


@pytest.mark.parametrize(
    "modes", [[0, 3], [3, 1], [0, 3, 1, 0], [0, 1, 3], [0, 3, 1, 1], [2, 3, 1], [0, 3, 0, 1], [3], [1, 3, 1]]
)
def test_alternatives_elsewhere_are_refused(tmp_path: Path, modes: list[int]) -> None:
    rng = np.random.default_rng(0)
    document = [(make_span(rng, 4) if mode == SPAN_MODE else make_text(rng, 3), mode) for mode in modes]
    with ShardWriter(tmp_path, "a", vocabulary=VOCABULARY) as writer:
        with pytest.raises(UserError, match=r"document 'x': alternative captions \(mode 3\) must stand"):
            writer.add_document(document, "x")
        assert writer.num_documents == 0


def test_as_many_captions_as_fit_a_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    span = make_span(rng, 4)
    captions = [np.array([number % 200, number // 200]) for number in range(MAX_CAPTIONS + 1)]
    with DatasetWriter(tmp_path / "a", "a", vocabulary=VOCABULARY) as writer:
        with pytest.raises(UserError, match="257 captions are more than 256"):
            writer.add_document(stored(captions, span), "x")
        writer.add_document(stored(captions[:MAX_CAPTIONS], span), "y")
    plan = plan_of(tmp_path / "a", Template(), block_draws=MAX_CAPTIONS)
    seen = Counter(
        number for index in range(plan.windows_before(1)) for _, number in shown(plan, plan.window(index))
    )
    assert seen == dict.fromkeys(range(MAX_CAPTIONS), 1)


def test_tools_tell_of_captions(folder: Path, tmp_path: Path) -> None:
    dataset = MultimodalDataset.open(folder)
    number = next(each for each in range(DOCUMENTS) if len(dataset.document(each)) == 4)
    lines = list(show(folder, dataset.sample_id(number)))
    kinds = [line.split(": ", 1)[1].split(",")[0] for line in lines[1:]]
    assert kinds == ["text", "alternative caption", "alternative caption", "span"]
    text = "\n".join(describe(folder))
    assert "40 documents have 2 to 5 to choose from, 3.5 on average" in text
    assert Manifest.load(folder).num_tokens == sum(sum(dataset.lengths(each)) for each in range(DOCUMENTS))
    rng = np.random.default_rng(0)
    span = make_span(rng, 4)
    control = np.array([VOCABULARY.bos])
    with DatasetWriter(tmp_path / "b", "b", vocabulary=VOCABULARY) as writer:
        writer.add_document(stored([np.array([1]), np.array([2] * 20)], span), "long")
        writer.add_document(stored([np.array([1]), control], span), "foreign")
    assert sorted(map(str, lint(tmp_path / "b", context_length=20))) == [
        "1 documents with control or vision ids in a text: foreign",
        "1 documents with images or videos longer than a window of 20: long",
    ]


def test_taken_down_documents_leave_the_captions_of_others(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a-5\na-11\n")
    mixture = Mixture([Source(path=str(folder), template=MIXED)], takedown=names)
    whole = plan_of(folder)
    without = Plan(mixture, seed=1, context_length=CONTEXT_LENGTH, block_draws=50, min_piece=8)

    def drawn(plan: Plan) -> list[tuple[int, int]]:
        draws = [plan._draw(number)[0] for number in range(12)]
        return [
            pair for each in draws for pair in zip(each.document.tolist(), each.chosen.tolist(), strict=True)
        ]

    gone = set(mixture.sources[0].taken_down.numbers.tolist())
    assert len(gone) == 2
    assert drawn(without) == [pair for pair in drawn(whole) if pair[0] not in gone]


def test_a_document_can_be_rendered_by_a_key_alone() -> None:
    rng = np.random.default_rng(0)
    captions, span = [make_text(rng, 2 + number) for number in range(3)], make_span(rng, 5)
    seen = set()
    for key in range(40):
        ids, modality = Template().render(stored(captions, span), VOCABULARY, key)
        (number,) = (each for each in range(3) if len(ids) == len(captions[each]) + len(span) + 2)
        assert ids.tolist() == [VOCABULARY.bos, *captions[number], *span, VOCABULARY.eos]
        assert len(modality) == len(ids)
        seen.add(number)
    assert seen == {0, 1, 2}


def write_plain(folder: Path) -> None:
    """Pairs of one caption, interleaved documents and texts, without chance."""
    v = VOCABULARY

    def text(number: int, length: int) -> npt.NDArray[np.int64]:
        return (np.arange(length) * 7 + number) % v.text_size

    def span(number: int, codes: int) -> npt.NDArray[np.int64]:
        body = v.vision_offset + (np.arange(codes) * 5 + number) % (v.size - v.vision_offset)
        return np.concatenate([[v.boi, 49, v.img], body, [v.eol, v.eof, v.eoi]])

    with DatasetWriter(folder, "plain", vocabulary=v, num_shards=2) as writer:
        for number in range(60):
            segments = [(text(number, 1 + number % 23), 0)]
            if number % 4 == 1:
                segments = [(span(number, 3), 1), *segments, (span(number, 9), 1)]
            elif number % 4 == 2:
                segments = [(text(number, 40 + 6 * number), 0)]
            else:
                segments.append((span(number, 4 + number), 1))
            writer.add_document(segments, f"plain-{number}")


def test_windows_of_documents_with_one_caption_stay_as_they_were(tmp_path: Path) -> None:
    """Every byte of 150 windows, and the plan's fingerprint, as before documents could have several captions:
    a run of then goes on with the same data."""
    write_plain(tmp_path / "plain")
    template = Template(caption_after_probability=0.4, caption_dropout=0.2, overlong="cut_caption")
    mixture = Mixture([Source(path=str(tmp_path / "plain"), template=template)])
    plan = Plan(mixture, seed=3, context_length=80, alignment=2, block_draws=100, min_piece=8, fill=True)
    digest = hashlib.sha256()
    for index in range(150):
        window = plan.window(index)
        for name in FIELDS:
            column = getattr(window, name)
            digest.update(column.astype(column.dtype.newbyteorder("<")).tobytes())
    assert digest.hexdigest() == "ce6bb920df2a12a83e5b1abbda0ae6897c2d0811d85a646cbccd2bfd9913aa2c"
    assert plan.fingerprint == "c45be454bd33f2aeca52c693f1830aef5813b0848c2b9c2f39ee77352188e3df"
    assert mixture.sources[0].mean_tokens(capacity=80).hex() == "0x1.68e76c8b43959p+6"
