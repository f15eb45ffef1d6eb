"""SentencePiece models: loading any, and training a small one on captions."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from emu3_megatron.files import atomic_write
from emu3_megatron.grammar.meta import CHARACTERS
from emu3_megatron.text.common import check_ids, fingerprint, replace_surrogates, settle

SPACE = "▁"
"""How SentencePiece writes a space."""

RESERVED_PIECES = 1 + 256
"""The unknown piece, and the bytes that spell every character without a piece of its own."""


class SentencePieceTokenizer:
    """Any SentencePiece model file.

    Control pieces (``<s>``) are never produced by a text: their spelling is ordinary text. A model without
    byte fallback has an unknown piece for foreign characters; such text is not canonical (it decodes to ⁇).

    Args:
        path: The model file.

    Raises:
        ValueError: if the file is not a SentencePiece model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        content = Path(path).read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(content) and self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from error
        if not loaded:
            raise ValueError(f"{path}: not a SentencePiece model: the file is empty or cannot be parsed")
        self.size: int = self._processor.get_piece_size()
        """Number of ids, control pieces included."""
        self.fingerprint = fingerprint("sentencepiece", content)
        """SHA-256 (hex) of the file."""

    def normalize(self, text: str) -> str:
        """What is left of `text` after encoding and decoding: the model's own rules decide."""
        return settle(self, text)

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return list(self._processor.encode(replace_surrogates(text)))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Ids of each text, int32."""
        clean = [replace_surrogates(text) for text in texts]
        # As arrays: lists of Python's integers would take a fifth of the time.
        return list(self._processor.encode(clean, return_type="numpy", num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control pieces have none."""
        return str(self._processor.decode(check_ids(ids, self.size)))


def train_sentencepiece(
    texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int
) -> SentencePieceTokenizer:
    """Train a byte-pair model on `texts`, and write it to `path`, whole or not at all.

    The same texts in the same order give the same bytes. The model changes no text (no normalisation, no
    added space): what it decodes is what was encoded, but for the character ▁, which is SentencePiece's
    space. Digits are single pieces, and every character without a piece is spelled in bytes: nothing is
    unknown.

    Args:
        texts: The corpus, kept in memory; one text may hold many lines.
        path: Where the model file goes.
        vocab_size: Upper bound of the number of ids, at least 272; a small corpus gives fewer. Where it has
            no room for all characters of the corpus, the rarest are spelled in bytes.

    Raises:
        ValueError: if there is no text, or `vocab_size` is too small.
    """
    required = SPACE + CHARACTERS
    least = RESERVED_PIECES + len(required) + 2
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {least}: {RESERVED_PIECES} reserved pieces, "
            f"and {len(required)} characters that spans need; use the ByteTokenizer for fewer"
        )
    lines = [line for text in texts for line in replace_surrogates(text).splitlines() if line.strip()]
    if not lines:
        raise ValueError("no text to train a tokenizer on: every text is empty")
    lines = _cut_rare_characters(lines, vocab_size - least, required)
    if set("".join(lines)) <= set(required + " "):
        lines.append("a")  # SentencePiece adds the required characters only to a corpus that has others
    model = _trained(lines, vocab_size, required)
    with atomic_write(path) as stream:
        stream.write(model)
    return SentencePieceTokenizer(path)


def _trained(lines: list[str], vocab_size: int, required: str) -> bytes:
    """The model file of byte pairs trained on `lines`; raises `ValueError` where SentencePiece cannot."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars=required,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=max(4192, *(len(line.encode()) + 1 for line in lines)),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"SentencePiece cannot train on these {len(lines)} lines: {error}") from error
    return model.getvalue()


def _cut_rare_characters(lines: list[str], room: int, required: str) -> list[str]:
    """`lines` cut at all but their `room` most frequent characters, so that those have pieces and others not.

    SentencePiece can leave out rare characters itself, but no more than one in fifty.
    """
    counts = Counter("".join(lines).replace(" ", SPACE))
    by_frequency = sorted(set(counts) - set(required), key=lambda character: (-counts[character], character))
    if len(by_frequency) <= room:
        return lines
    cut = str.maketrans(dict.fromkeys(by_frequency[room:], "\n"))
    return [part for line in lines for part in line.translate(cut).split("\n") if part.strip()]
