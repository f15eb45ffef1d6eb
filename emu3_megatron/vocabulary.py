"""One vocabulary for text, control and vision tokens.

Ids are laid out in three runs: text ids ``0 .. text_size-1``, control ids, then vision ids from
``vision_offset``. Vision code ``v`` is token ``vision_offset + v``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

PADDING_MULTIPLE = 1024
"""The vocabulary is padded to a multiple of this whatever the tensor-parallel degree, so that neither a
checkpoint nor a loss depends on the layout."""

EMU3_CONTROL_COUNT = 211
"""Control ids between the text ids and the vision ids: 3 of Qwen, 205 extra, 3 for images."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Token ids of one model family.

    Raises `ValueError` on construction when the control ids do not lie between the text and vision runs,
    or are not distinct.
    """

    name: str
    """Preset or user-chosen name; part of the fingerprint."""
    text_size: int
    """Number of text (BPE) ids; they start at 0."""
    pad: int
    """Padding, and Qwen's end of document."""
    eol: int
    """End of a row of vision tokens."""
    eof: int
    """End of a frame of vision tokens."""
    bos: int
    """Begin of a document."""
    eos: int
    """End of a document."""
    img: int
    """Start of the vision tokens, after the meta text (SOT of the paper)."""
    boi: int
    """Start of a span (SOV of the paper)."""
    eoi: int
    """End of a span (EOV of the paper)."""
    vision_offset: int
    """Id of vision code 0."""
    codebook_size: int
    """Number of vision codes."""

    def __post_init__(self) -> None:
        """Check the layout."""
        controls = self.control_ids
        if len(set(controls.values())) != len(controls):
            raise ValueError(f"vocabulary {self.name!r}: control ids must be distinct, got {controls}")
        for name, token in controls.items():
            if not self.text_size <= token < self.vision_offset:
                raise ValueError(
                    f"vocabulary {self.name!r}: control id {name}={token} must lie in "
                    f"[text_size={self.text_size}, vision_offset={self.vision_offset})"
                )
        if self.codebook_size < 1:
            raise ValueError(
                f"vocabulary {self.name!r}: codebook_size={self.codebook_size} must be at least 1"
            )

    @property
    def control_ids(self) -> dict[str, int]:
        """The named control ids."""
        names = ("pad", "eol", "eof", "bos", "eos", "img", "boi", "eoi")
        return {name: getattr(self, name) for name in names}

    @property
    def size(self) -> int:
        """Number of ids in use, 184,622 for Emu3."""
        return self.vision_offset + self.codebook_size

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and output layers: `size` rounded up to a multiple of 1,024."""
        return -(-self.size // PADDING_MULTIPLE) * PADDING_MULTIPLE

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the ids; stored in every dataset manifest and checkpoint."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """Plain fields, for manifests; the inverse is ``Vocabulary(**fields)``."""
        return asdict(self)

    @classmethod
    def build(cls, name: str, *, text_size: int, codebook_size: int) -> Vocabulary:
        """Lay out a vocabulary with Emu3's control block after `text_size` text ids.

        With ``text_size=151643`` this gives the released ids.
        """
        first = text_size
        return cls(
            name=name,
            text_size=text_size,
            pad=first,
            eol=first + 203,
            eof=first + 204,
            bos=first + 206,
            eos=first + 207,
            img=first + 208,
            boi=first + 209,
            eoi=first + 210,
            vision_offset=first + EMU3_CONTROL_COUNT,
            codebook_size=codebook_size,
        )

    @classmethod
    def preset(cls, name: str) -> Vocabulary:
        """``emu3`` (184,622 ids), ``emu3.5`` (282,926) or ``tiny`` (256 text ids, 512 codes: 979)."""
        sizes = {"emu3": (151_643, 32_768), "emu3.5": (151_643, 131_072), "tiny": (256, 512)}
        if name not in sizes:
            raise ValueError(f"unknown vocabulary preset {name!r}; known presets: {', '.join(sizes)}")
        text_size, codebook_size = sizes[name]
        return cls.build(name, text_size=text_size, codebook_size=codebook_size)
