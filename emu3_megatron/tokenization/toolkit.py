"""The tokenizers of a job, checked against one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect
from emu3_megatron.media import frame_source
from emu3_megatron.text import TextTokenizer, load_text_tokenizer
from emu3_megatron.tokenization.config import TokenizationConfig
from emu3_megatron.tokenization.encode import BucketEncoder
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vocabulary import Vocabulary

PRESETS = ("emu3", "emu3.5", "tiny")
"""Vocabularies that ``auto`` recognises by their sizes."""


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """Tokenizers and dialect of a job."""

    dialect: Dialect
    """Text and spans to ids."""
    vision: VisionTokenizer | None
    """Pixels to codes; None in a job of plain text."""
    vision_fingerprint: str
    """Of the vision tokenizer; empty where there is none."""
    source_name: str
    """What decodes video, with versions."""

    @classmethod
    def load(cls, config: TokenizationConfig) -> Toolkit:
        """Load what `config` names.

        Raises:
            UserError: a tokenizer does not fit the vocabulary or the clips.
            ValueError: a file cannot be read as what it should be.
        """
        text = load_text_tokenizer(config.text_tokenizer)
        vision = _load_vision(config)
        vocabulary = choose_vocabulary(config.vocabulary, text, vision)
        fingerprint = vision.fingerprint if vision else ""  # of the weights as they lie in the file
        if vision:
            vision.for_inference(dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
        return cls(
            dialect=Dialect.preset(config.dialect, vocabulary, text),
            vision=vision,
            vision_fingerprint=fingerprint,
            source_name=frame_source(config.frame_source, device=config.media_device).name,
        )

    @property
    def spatial_factor(self) -> int:
        """Pixels along the side of a token."""
        return self.vision.spatial_factor if self.vision else 8

    def encoder(self, config: TokenizationConfig) -> BucketEncoder | None:
        """An encoder of batches, where there is a vision tokenizer."""
        if self.vision is None:
            return None
        return BucketEncoder(self.vision, max_pixels=config.batch_pixels)

    def identity(self) -> dict[str, Any]:
        """Fingerprints of all that decides the ids, as JSON."""
        return {
            "vocabulary": self.dialect.vocabulary.fingerprint,
            "dialect": self.dialect.fingerprint,
            "text_tokenizer": self.dialect.text_tokenizer.fingerprint,
            "vision_tokenizer": self.vision_fingerprint,
            "frame_source": self.source_name,
        }


def _load_vision(config: TokenizationConfig) -> VisionTokenizer | None:
    """Load the vision tokenizer, if there is one, onto its device."""
    if config.vision_tokenizer is None:
        return None
    vision = VisionTokenizer.from_pretrained(config.vision_tokenizer)
    if config.video_frames % vision.temporal_factor:
        raise UserError(
            f"video_frames={config.video_frames} must be a multiple of {vision.temporal_factor}, the vision "
            "tokenizer's temporal factor"
        )
    try:
        return vision.to(torch.device(config.device)).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {config.device!r} cannot be used: {reason}") from error


def choose_vocabulary(name: str, text: TextTokenizer, vision: VisionTokenizer | None) -> Vocabulary:
    """The vocabulary called `name`, or with ``auto`` the one that both tokenizers fill.

    Raises:
        UserError: a tokenizer has more ids than the vocabulary, or ``auto`` without a vision tokenizer.
    """
    codebook = vision.config.codebook_size if vision else None
    if name != "auto":
        vocabulary = Vocabulary.preset(name)
        if codebook is not None and codebook > vocabulary.codebook_size:
            raise UserError(
                f"the vision tokenizer has {codebook} codes, vocabulary {name!r} only "
                f"{vocabulary.codebook_size}; use --vocabulary auto"
            )
        return vocabulary
    if codebook is None:
        raise UserError(
            "--vocabulary auto needs a vision tokenizer to know the codebook's size, for plain text too; "
            "give --vision-tokenizer, or the name of a vocabulary"
        )
    for preset in map(Vocabulary.preset, PRESETS):
        if (preset.text_size, preset.codebook_size) == (text.size, codebook):
            return preset
    return Vocabulary.build("custom", text_size=text.size, codebook_size=codebook)
