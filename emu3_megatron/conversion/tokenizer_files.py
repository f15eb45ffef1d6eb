"""Text tokenizers as ``tokenizer.json``: Qwen ranks, SentencePiece and Hugging Face files, with Emu3's
tokens.

The written tokenizer gives the same ids as ours for ordinary text (checked on `PROBES` before it is written).
Unlike ours it reads the spelling of a control token as that token: prompts of transformers are strings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from emu3_megatron.conversion.configuration import CHAT_TEMPLATE
from emu3_megatron.conversion.names import IMAGE_PLACEHOLDER, special_names
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.files import write_json_atomic
from emu3_megatron.text import load_text_tokenizer
from emu3_megatron.text.qwen import PATTERN
from emu3_megatron.vocabulary import Vocabulary

PROBES = (
    "A small red circle, top left.",
    "90*90  two spaces\n\nand\tcontrol",
    "UPPER'S snake_case /path/x.y 3.14159",
    "一个大的蓝色正方形在右下角。",
    "Ünïcödé — naïve café 😀",
    " leading and trailing ",
)
"""Texts on which the written tokenizer must agree with ours."""

SPACE = "▁"
"""How SentencePiece writes a space."""

Description = dict[str, Any]


def build_tokenizer(path: str | os.PathLike[str], vocabulary: Vocabulary) -> Tokenizer:
    """The text tokenizer of a file as one of the `tokenizers` library, control and vision tokens included.

    Raises `ConversionError` when the file's kind is unknown, when it has more ids than the vocabulary has for
    text, or when the result would not encode text as ours does.
    """
    file = Path(path)
    ours = load_text_tokenizer(file)
    if ours.size > vocabulary.text_size:
        raise ConversionError(
            f"{file} has {ours.size} ids, more than the {vocabulary.text_size} text ids of the vocabulary; "
            "is it the tokenizer the model was trained with?"
        )
    readers = {".tiktoken": _qwen, ".model": _sentencepiece, ".json": _hugging_face}
    description = readers[file.suffix](file)
    _fill_gaps(description["model"], vocabulary.text_size)
    tokenizer = Tokenizer.from_str(json.dumps(description))
    for text in PROBES:
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        if theirs != ours.encode(text):
            raise ConversionError(
                f"{file} cannot be written as tokenizer.json: {text!r} would become {theirs}, "
                f"not {ours.encode(text)}"
            )
    names = special_names(vocabulary)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    wrong = [name for name, token in names.items() if tokenizer.token_to_id(name) != token]
    if wrong:
        raise ConversionError(f"{file}: text pieces are spelled like control tokens: {wrong[:3]}")
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, model_max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for transformers' Emu3 processor."""
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {
        "image_token": IMAGE_PLACEHOLDER,
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }
    write_json_atomic(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Emu3Processor",
            "bos_token": "<|extra_203|>",
            "eos_token": "<|extra_204|>",
            "pad_token": "<|endoftext|>",
            **own,
            "extra_special_tokens": own,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _qwen(path: Path) -> Description:
    """Byte-level BPE from a tiktoken ranks file."""
    import tiktoken.load

    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[left], spelled[right])
        for token in sorted(ranks, key=lambda token: ranks[token])
        for left, right in _splits(token, ranks)
    ]
    return _description(
        normalizer={"type": "NFC"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        decoder={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        model=_bpe({spelled[token]: rank for token, rank in ranks.items()}, merges),
    )


def _sentencepiece(path: Path) -> Description:
    """BPE or unigram model of a SentencePiece file, with its normalisation."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    kinds = sentencepiece_model_pb2.TrainerSpec
    pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    if proto.trainer_spec.model_type == kinds.UNIGRAM:
        model: Description = {
            "type": "Unigram",
            "unk_id": proto.trainer_spec.unk_id,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        }
    elif proto.trainer_spec.model_type == kinds.BPE:
        normal = {piece.piece: -piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
        merges = [
            pair
            for piece in sorted(normal, key=lambda piece: normal[piece])
            for pair in _splits(piece, normal)
        ]
        unknown = proto.pieces[proto.trainer_spec.unk_id].piece
        model = _bpe(pieces, merges, unknown=unknown, byte_fallback=proto.trainer_spec.byte_fallback)
    else:
        raise ConversionError(f"{path}: only BPE and unigram SentencePiece models can become tokenizer.json")
    return _description(
        normalizer={"type": "Sequence", "normalizers": _sentencepiece_normalizers(proto.normalizer_spec)},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": _sentencepiece_decoders(proto.normalizer_spec)},
        model=model,
    )


def _sentencepiece_normalizers(spec: Any) -> list[Description]:
    """What SentencePiece does to a text before it looks for pieces."""
    import base64

    steps: list[Description] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _sentencepiece_decoders(spec: Any) -> list[Description]:
    """Pieces back to text."""
    steps: list[Description] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _hugging_face(path: Path) -> Description:
    """A tokenizer.json without its added tokens: text never becomes a token of another model."""
    description: Description = json.loads(path.read_text(encoding="utf-8"))
    description.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return description


def _description(**parts: Any) -> Description:
    """The frame of a tokenizer.json."""
    frame: Description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
    }
    return {**frame, **parts}


def _bpe(
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    *,
    unknown: str | None = None,
    byte_fallback: bool = False,
) -> Description:
    """A BPE model."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "vocab": dict(vocab),
        "merges": merges,
    }


def _splits(token: Any, ranks: Mapping[Any, float]) -> Iterable[tuple[Any, Any]]:
    """Every way to merge two known tokens into `token`, the earlier known first.

    tiktoken and SentencePiece merge whatever pair gives a known token; a BPE of `tokenizers` merges listed
    pairs only.
    """
    pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _fill_gaps(model: Description, size: int) -> None:
    """Give every text id without a piece one that no text contains, so that control ids come out right."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        vocab += [[f"\ufdd0unused {index}", -1e6] for index in range(len(vocab), size)]
        return
    taken = set(vocab.values())
    vocab.update({f"\ufdd0unused {index}": index for index in range(size) if index not in taken})


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    letters = dict(zip(printable, map(chr, printable), strict=True))
    letters.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return [letters[byte] for byte in range(256)]
