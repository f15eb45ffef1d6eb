"""Text tokenizers of every kind become a tokenizer.json with the same ids."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from emu3_megatron.conversion.names import read_vocabulary, special_names, vocabulary_map
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.conversion.tokenizer_files import build_tokenizer
from emu3_megatron.text import load_text_tokenizer, train_sentencepiece
from emu3_megatron.vocabulary import Vocabulary

CORPUS = [f"a {size} {colour} circle, {n}*{n}" for size in ("small", "large") for colour in ("red", "blue")
          for n in range(10)] + ["一个红色的圆", "zwei blaue Kreise"]  # fmt: skip
TEXTS = [*CORPUS, "Never Seen: ß 漢字 😀\n\n  x", "", " ", "<|image start|>8*8<|image token|>"]


def agrees(path: Path, vocabulary: Vocabulary, texts: list[str] = TEXTS) -> None:
    """The same ids and, as added tokens, all control and vision tokens at theirs."""
    ours, theirs = load_text_tokenizer(path), build_tokenizer(path, vocabulary)
    for text in texts:
        if "<|" not in text:
            assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text
    for name, token in special_names(vocabulary).items():
        assert theirs.token_to_id(name) == token
    assert theirs.encode("<|image start|>", add_special_tokens=False).ids == [vocabulary.boi]
    assert theirs.get_vocab_size(with_added_tokens=True) == vocabulary.size


def test_sentencepiece_bpe(tmp_path: Path) -> None:
    train_sentencepiece(CORPUS, tmp_path / "a.model", 330)
    agrees(tmp_path / "a.model", Vocabulary.build("a", text_size=400, codebook_size=8))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_with_its_own_defaults(kind: str, tmp_path: Path) -> None:
    """NFKC normalisation, a dummy prefix, collapsed spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=model,
        model_type=kind,
        vocab_size=340,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path / "default.model"
    path.write_bytes(model.getvalue())
    agrees(path, Vocabulary.build("a", text_size=400, codebook_size=8), CORPUS)


def test_hugging_face(tmp_path: Path) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CORPUS, vocab_size=300, show_progress=False)
    tokenizer.add_special_tokens(["<|other|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    agrees(tmp_path / "tokenizer.json", Vocabulary.build("a", text_size=350, codebook_size=8))


def test_small_ranks_file(tmp_path: Path) -> None:
    """Bytes and a few merges, among them one that two pairs can make."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc", b" a", b"re", b"red", b" red"]
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(tokens)]
    (tmp_path / "small.tiktoken").write_bytes(b"\n".join(lines))
    texts = [*TEXTS, "abc aabc abcbc", " red reda"]
    agrees(tmp_path / "small.tiktoken", Vocabulary.build("a", text_size=263, codebook_size=8), texts)


@pytest.mark.slow
def test_qwen_ranks() -> None:
    """The real file gives the released ids."""
    import dashscope

    (path,) = Path(dashscope.__file__).parent.rglob("qwen.tiktoken")
    theirs = build_tokenizer(path, Vocabulary.preset("emu3"))
    assert theirs.encode("90*90", add_special_tokens=False).ids == [24, 15, 9, 24, 15]
    assert theirs.token_to_id("<|visual token 032767|>") == 184_621
    ours = load_text_tokenizer(path)
    for text in ("UPPER'S snake_case\n\n/path", "e\u0301 decomposed", "一只猫坐在红色的垫子上。"):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_vocabulary_comes_back_from_its_map() -> None:
    for vocabulary in (Vocabulary.preset("emu3"), Vocabulary.build("x", text_size=50, codebook_size=9)):
        names = vocabulary_map(vocabulary)
        assert names["<image>"] == vocabulary.text_size + 3
        assert names["<|extra_204|>"] == vocabulary.eos
        assert "<|extra_0|>" not in names
        assert read_vocabulary(names, name=vocabulary.name) == vocabulary


def test_maps_that_are_not_emu3_are_refused() -> None:
    names = vocabulary_map(Vocabulary.build("x", text_size=50, codebook_size=9))
    with pytest.raises(ConversionError, match="not numbered"):
        read_vocabulary({name: token for name, token in names.items() if name != "<|visual token 000004|>"})
    with pytest.raises(ConversionError, match="image end"):
        read_vocabulary({**names, "<|image end|>": 3})
    with pytest.raises(ConversionError, match="spelled like control"):
        vocabulary_map(Vocabulary.build("x", text_size=50, codebook_size=9), {"<|im_end|>": 1})
