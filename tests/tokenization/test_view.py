"""Pages of packed windows, conversion between dialects, lint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import DatasetWriter, Mixture, MultimodalDataset, Plan, Source, Window
from emu3_megatron.data.lint import lint
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, Image, Video
from emu3_megatron.text.bytes import ByteTokenizer
from emu3_megatron.tokenization import convert as conversion
from emu3_megatron.tokenization.view import Decoder, heat_map, windows_page
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vocabulary import Vocabulary
from tools import dataset as tool

ROOT = Path(__file__).parents[2]
VOCABULARY = Vocabulary.build("view", text_size=256, codebook_size=16)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Images and clips with captions of bytes."""
    dialect = Dialect.preset("emu3", VOCABULARY, ByteTokenizer())
    rng = np.random.default_rng(0)
    with DatasetWriter(
        tmp_path / "a", "a", vocabulary=VOCABULARY, num_shards=2, dialect_name="emu3",
        dialect_fingerprint=dialect.fingerprint,
    ) as writer:  # fmt: skip
        for number in range(12):
            span = (
                Image(rng.integers(0, 16, (3, 2)))
                if number % 2
                else Video(rng.integers(0, 16, (2, 3, 2)), fps=8, seconds=1)
            )
            caption = dialect.encode_text(f"a <b> number {number}")
            writer.add_document([(caption, 0), (dialect.encode_span(span), 1)], f"s{number}")
    return tmp_path / "a"


def test_a_page_shows_text_pictures_borders_weights_and_padding(dataset: Path) -> None:
    dialect = Dialect.preset("emu3", VOCABULARY, ByteTokenizer())
    vision = VisionTokenizer(
        VisionTokenizerConfig(
            channels=32, channel_multiplier=(1, 1), num_res_blocks=0, attention_resolutions=(),
            codebook_size=16,
        )
    ).eval()  # fmt: skip
    plan = Plan(Mixture([Source(path=str(dataset))]), seed=0, context_length=200)
    page = windows_page(plan, [0, 1], Decoder(dialect, vision), title="t")
    for index in (0, 1):
        window = plan.window(index)
        for number in window.document[window.document >= 0].tolist():
            name = plan.mixture.sources[0].dataset.sample_id(number)
            assert f"a &lt;b&gt; number {name[1:]}<" in page
    assert page.count("data:image/png") + page.count("data:image/gif") == page.count("codes<br>")
    assert "padding:" in page
    assert "loss weight" in page
    assert "<b> number" not in page, "a caption is text, not markup"
    bare = windows_page(plan, [0], Decoder(None, None), title="t")
    assert "span of" in bare


def test_a_page_maps_losses_over_pictures(dataset: Path) -> None:
    decoder = Decoder(Dialect.preset("emu3", VOCABULARY, ByteTokenizer()), None)
    plan = Plan(Mixture([Source(path=str(dataset))]), seed=0, context_length=200)

    def losses(window: Window) -> np.ndarray:
        return np.arange(len(window.tokens), dtype=np.float32)

    page = windows_page(plan, [0], decoder, losses=losses, title="t")
    tokens = plan.window(0).tokens
    spans = np.count_nonzero(tokens == VOCABULARY.boi)
    segments = np.count_nonzero(plan.window(0).document >= 0)
    assert page.count("data:image") == spans + segments  # a map each, and a strip each
    first = np.flatnonzero(tokens == VOCABULARY.boi)[0], np.flatnonzero(tokens == VOCABULARY.eoi)[0]
    codes = np.flatnonzero(tokens[first[0] : first[1]] >= VOCABULARY.vision_offset) + first[0]
    assert f"loss {codes.mean():.3f}" in page


def test_a_map_of_losses_is_dark_where_they_are_low_and_grey_where_there_are_none() -> None:
    pixels = heat_map(np.array([[0.0, 5.0, 20.0], [1.0, 2.0, np.nan]], np.float32), 4)
    assert pixels.shape == (8, 12, 3)
    light = pixels.astype(int).sum(-1)[::4, ::4]
    assert light[0, 0] < light[1, 0] < light[1, 1] < light[0, 1] < light[0, 2]
    assert pixels[-1, -1].tolist() == [128, 128, 128]
    assert (pixels[:4, :4] == pixels[0, 0]).all()


def test_conversion_keeps_all_but_the_dialect(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "load_text_tokenizer", lambda _: ByteTokenizer())
    old, new = (Dialect.preset(name, VOCABULARY, ByteTokenizer()) for name in ("emu3", "emu3-frames"))
    manifest = conversion.convert(dataset, tmp_path / "b", "emu3-frames", "bytes")
    assert (manifest.dialect_name, manifest.dialect_fingerprint) == ("emu3-frames", new.fingerprint)
    before, after = MultimodalDataset.open(dataset), MultimodalDataset.open(tmp_path / "b")
    assert len(before) == len(after)
    for number in range(len(before)):
        assert before.name(number) == after.name(number)
        (text, _), (span, _) = before.document(number)
        (same, _), (written, _) = after.document(number)
        assert np.array_equal(text, same)
        assert np.array_equal(old.parse_span(span).codes, new.parse_span(written).codes)
    with pytest.raises(UserError, match=r"sample 's\d+': dialect 'emu3.5' has no videos"):
        conversion.convert(dataset, tmp_path / "c", "emu3.5", "bytes")
    with pytest.raises(UserError, match="a folder of its own"):
        conversion.convert(dataset, dataset, "emu3", "bytes")


def test_several_captions_are_converted_and_shown(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    """All of them in the new dialect; a page shows one a window."""
    monkeypatch.setattr(conversion, "load_text_tokenizer", lambda _: ByteTokenizer())
    old, new = (Dialect.preset(name, VOCABULARY, ByteTokenizer()) for name in ("emu3", "emu3-frames"))
    captions = [old.encode_text(f"caption {letter}") for letter in "ABC"]
    codes = np.arange(6).reshape(3, 2)
    segments = [(captions[0], 0), (captions[1], 3), (captions[2], 3), (old.encode_span(Image(codes)), 1)]
    with DatasetWriter(
        tmp_path / "c", "c", vocabulary=VOCABULARY, dialect_name="emu3", dialect_fingerprint=old.fingerprint
    ) as writer:
        writer.add_document(segments, "s")
    conversion.convert(tmp_path / "c", tmp_path / "d", "emu3-frames", "bytes")
    *stored, (span, mode) = MultimodalDataset.open(tmp_path / "d").document(0)
    assert [(ids.tolist(), each) for ids, each in stored] == [
        (ids.tolist(), each) for ids, each in segments[:3]
    ]
    assert mode == 1
    assert np.array_equal(new.parse_span(span).codes, codes)
    plan = Plan(Mixture([Source(path=str(tmp_path / "d"))]), seed=0, context_length=40, block_draws=3)
    pages = [windows_page(plan, [index], Decoder(new, None), title="t") for index in range(3)]
    shown = [letter for page in pages for letter in "ABC" if f"caption {letter}<" in page]
    assert len(shown) == 3
    assert set(shown) == set("ABC")


def test_lint_finds_what_hurts(dataset: Path, tmp_path: Path) -> None:
    assert list(lint(dataset)) == []
    span = MultimodalDataset.open(dataset).document(0)[1]
    with DatasetWriter(tmp_path / "b", "b", vocabulary=VOCABULARY) as writer:
        writer.add_document([(np.array([1, 2]), 0), span], "one")
        writer.add_document([(np.array([1, 2]), 0), span], "twin")
        writer.add_document([span], "bare")
        writer.add_document([(np.array([VOCABULARY.eos]), 0)], "one")
    texts = " | ".join(map(str, lint(tmp_path / "b", context_length=20)))
    for expected in (
        "1 documents equal to an earlier one: twin",
        "1 documents with the sample id of an earlier one: one",
        "1 documents without any text (no caption): bare",
        "1 documents with control or vision ids in a text: one",
        "3 documents with images or videos longer than a window of 20: one, twin, bare",
    ):
        assert expected in texts
    (mismatch,) = lint(dataset, vocabulary=Vocabulary.preset("emu3"))
    assert "vocabulary mismatch" in str(mismatch)


def test_the_tool_compares_vocabularies(dataset: Path, capsys) -> None:
    arguments = tool._parser().parse_args(["lint", str(dataset), "--vocabulary", "emu3"])
    assert arguments.run(arguments) == 1
    assert "vocabulary mismatch: the dataset has 'view'" in capsys.readouterr().out


def test_the_tool_writes_a_page(dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.dataset", "view", str(dataset), "--context-length", "128"]
    output = tmp_path / "page.html"
    done = subprocess.run(
        [*command, "--windows", "2", "--output", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "window 1" in output.read_text()
    for wrong in (["--first", "-1"], ["--windows", "0"]):
        refused = subprocess.run(
            [*command, *wrong, "--output", str(output)], cwd=ROOT, capture_output=True, text=True
        )
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
        assert "windows count from 0" in refused.stderr
