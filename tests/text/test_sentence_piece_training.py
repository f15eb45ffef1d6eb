"""Training a tokenizer on a small corpus."""

import hashlib
import os
import random
import subprocess
import sys

import pytest

from emu3_megatron.grammar import Dialect, Document, Image, Text
from emu3_megatron.text import load_text_tokenizer, train_sentencepiece
from emu3_megatron.vocabulary import Vocabulary


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_training_is_deterministic(tmp_path, captions):
    first = train_sentencepiece(captions, tmp_path / "a.model", 600)
    second = train_sentencepiece(iter(captions), tmp_path / "b.model", 600)
    assert digest(tmp_path / "a.model") == digest(tmp_path / "b.model")
    assert first.fingerprint == second.fingerprint == load_text_tokenizer(tmp_path / "a.model").fingerprint


def test_training_is_deterministic_across_processes(tmp_path):
    program = (
        "import sys; from emu3_megatron.text import train_sentencepiece as t; "
        "t([f'{a} 红{b} {a}{b}' for a in 'xyz' for b in 'uvw'], sys.argv[1], 300)"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / f"{seed}.model")], env=environment, check=True
        )
    assert digest(tmp_path / "1.model") == digest(tmp_path / "2.model")


@pytest.mark.parametrize("vocab_size", [275, 300, 512, 5000])
def test_vocab_size_is_an_upper_bound(tmp_path, captions, vocab_size):
    tokenizer = train_sentencepiece(captions, tmp_path / "a.model", vocab_size)
    assert tokenizer.size <= vocab_size
    for caption in captions:
        assert tokenizer.decode(tokenizer.encode(caption)) == caption


@pytest.mark.parametrize(
    "texts", [["a"], ["红"], ["7"], ["9 *."], ["aa bb", "c"], [" x "], ["\u2581"], ["a" * 9999]]
)
def test_the_smallest_corpora_train(tmp_path, texts):
    tokenizer = train_sentencepiece(texts, tmp_path / "a.model", 1000)
    assert tokenizer.size <= 1000
    assert tokenizer.decode(tokenizer.encode("a 红 9*0.5\n\tb")) == "a 红 9*0.5\n\tb"


def test_words_of_captions_become_pieces(tmp_path, captions):
    tokenizer = train_sentencepiece(captions, tmp_path / "a.model", 600)
    assert len(tokenizer.encode("a red circle at the top left")) <= 8
    assert len(tokenizer.encode("左上角有一个红色圆形。")) <= 6


def test_characters_that_do_not_fit_are_spelled_in_bytes(tmp_path):
    letters = [chr(0x4E00 + number) for number in range(2000)]
    random.Random(0).shuffle(letters)
    texts = ["".join(letters[start : start + 20]) for start in range(0, 2000, 20)]
    tokenizer = train_sentencepiece(texts, tmp_path / "a.model", 400)
    assert tokenizer.size <= 400
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_digits_are_single_pieces_and_sizes_can_be_spelled(tmp_path, captions):
    tokenizer = train_sentencepiece([*captions, "size 90*90 and 1024"], tmp_path / "a.model", 600)
    assert len(tokenizer.encode("90*90")) == 5
    vocabulary = Vocabulary.build("captions", text_size=600, codebook_size=512)
    dialect = Dialect.preset("emu3", vocabulary, tokenizer)
    document = Document((Text(captions[0]), Image([[1, 2], [3, 4]])))
    assert dialect.parse(dialect.encode(document).ids) == document


def test_meta_text_needs_nothing_from_the_corpus(tmp_path):
    tokenizer = train_sentencepiece(["红"], tmp_path / "a.model", 300)
    vocabulary = Vocabulary.build("captions", text_size=300, codebook_size=512)
    assert Dialect.preset("emu3", vocabulary, tokenizer).span_length(90, 90) == 7 + 90 * 91 + 2


@pytest.mark.parametrize("texts", [[], [""], ["", "\n \n"]])
def test_no_text_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="no text to train"):
        train_sentencepiece(texts, tmp_path / "a.model", 1000)
    assert not list(tmp_path.iterdir())


def test_too_small_a_vocabulary_is_refused(tmp_path, captions):
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 272"):
        train_sentencepiece(captions, tmp_path / "a.model", 100)
