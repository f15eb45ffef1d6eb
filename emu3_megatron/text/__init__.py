"""Text tokenizers behind one protocol."""

from emu3_megatron.grammar.protocol import TextTokenizer
from emu3_megatron.text.bytes import ByteTokenizer
from emu3_megatron.text.chat import CHAT_TEMPLATES, ChatTemplate
from emu3_megatron.text.huggingface import HuggingFaceTokenizer
from emu3_megatron.text.loading import load_text_tokenizer
from emu3_megatron.text.qwen import QwenTokenizer
from emu3_megatron.text.sentence_piece import SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "CHAT_TEMPLATES",
    "ByteTokenizer",
    "ChatTemplate",
    "HuggingFaceTokenizer",
    "QwenTokenizer",
    "SentencePieceTokenizer",
    "TextTokenizer",
    "load_text_tokenizer",
    "train_sentencepiece",
]
