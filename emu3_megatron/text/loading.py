"""The tokenizer of a file, whatever its kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from emu3_megatron.grammar.protocol import TextTokenizer
from emu3_megatron.text.huggingface import HuggingFaceTokenizer
from emu3_megatron.text.qwen import QwenTokenizer
from emu3_megatron.text.sentence_piece import SentencePieceTokenizer

_BY_SUFFIX: dict[str, Callable[[Path], TextTokenizer]] = {
    ".tiktoken": QwenTokenizer,
    ".model": SentencePieceTokenizer,
    ".json": HuggingFaceTokenizer,
}


def load_text_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Load a text tokenizer: ``*.tiktoken`` (Qwen), ``*.model`` (SentencePiece) or ``tokenizer.json``.

    Raises `ValueError` for another name, a missing file, and a file that is not what its name says.
    """
    file = Path(path)
    if file.suffix not in _BY_SUFFIX:
        raise ValueError(
            f"{path}: unknown kind of text tokenizer; "
            "known: *.tiktoken (Qwen), *.model (SentencePiece), tokenizer.json (Hugging Face)"
        )
    if not file.is_file():
        raise ValueError(f"{path}: there is no such file; give the path of a text tokenizer")
    return _BY_SUFFIX[file.suffix](file)
