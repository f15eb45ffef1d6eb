"""Text that is told as it comes is the text of the whole."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from emu3_megatron.inference.dialogue import TextStream
from emu3_megatron.text import ByteTokenizer, TextTokenizer, load_text_tokenizer, train_sentencepiece

WORDS = [
    "two",
    " red",
    "  circles",
    "\n\n    if x:",
    " größer",
    " 两只狗",
    " 🐕‍🦺!",
    " \ufffd",
    " ",
    "3.14",
    " a",
]
NAMES = ["bytes", "ours", "llama", "byte-level"]


@pytest.fixture(scope="module")
def all_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    """Every kind, one that drops the first space of a text among them."""
    root = tmp_path_factory.mktemp("tokenizers")
    texts = ["".join(WORDS), "a red circle and two blue squares of a kind"] * 4
    train_sentencepiece(texts, root / "ours.model", 330)
    llama = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=llama,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    (root / "llama.model").write_bytes(llama.getvalue())
    whole = tokenizers.ByteLevelBPETokenizer()
    whole.train_from_iterator(texts, vocab_size=300, show_progress=False)
    whole.save(str(root / "tokenizer.json"))
    files = {"ours": "ours.model", "llama": "llama.model", "byte-level": "tokenizer.json"}
    return {
        "bytes": ByteTokenizer(),
        **{name: load_text_tokenizer(root / file) for name, file in files.items()},
    }


class Counting:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: Any) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids)


def stream_of(tokenizer: Any) -> TextStream:
    dialect: Any = SimpleNamespace(text_tokenizer=tokenizer, vocabulary=SimpleNamespace(eos=-1))
    return TextStream(dialect)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_the_whole(all_tokenizers: dict[str, TextTokenizer], name: str) -> None:
    """However tokens come, the pieces are the beginning of the text, and all of it but a cut character."""
    tokenizer, generator = all_tokenizers[name], np.random.default_rng(0)
    for _ in range(60):
        ids = [*tokenizer.encode("".join(generator.choice(WORDS, 12))), *tokenizer.encode(" end")]
        stream, told, place = stream_of(tokenizer), "", 0
        while place < len(ids):
            more = int(generator.integers(1, 4))
            stream.extend(ids[place : place + more])
            place += more
            told += stream.read()
            assert tokenizer.decode(ids).startswith(told)
            assert not stream.read()
        stream.extend([-1])
        assert told + stream.read() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_are_no_text_break_nothing(all_tokenizers: dict[str, TextTokenizer], name: str) -> None:
    """What a random model writes; it may end within a character."""
    tokenizer, generator = all_tokenizers[name], np.random.default_rng(1)
    for _ in range(60):
        ids = generator.integers(0, tokenizer.size, 30).tolist()
        stream, told = stream_of(tokenizer), ""
        for token in ids:
            stream.extend([token])
            told += stream.read()
        assert tokenizer.decode(ids).startswith(told)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_answer_costs_as_much_a_token_as_a_short_one(
    all_tokenizers: dict[str, TextTokenizer], name: str
) -> None:
    """Ids decoded, not seconds: each a bounded number of times."""
    counting = Counting(all_tokenizers[name])
    stream = stream_of(counting)
    ids = all_tokenizers[name].encode("".join(WORDS) * 40)
    for token in ids:
        stream.extend([token])
        stream.read()
    assert counting.decoded < 20 * len(ids)
