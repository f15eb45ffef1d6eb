"""The document language: how text, images and video become one token sequence and back."""

from emu3_megatron.grammar.automaton import Allowed, Automaton, Phase, State, Unit
from emu3_megatron.grammar.dialect import Dialect, Encoded
from emu3_megatron.grammar.document import Document, Image, Modality, Segment, Text, Video
from emu3_megatron.grammar.errors import GrammarError
from emu3_megatron.grammar.modality import span_classes, span_modality, text_modality
from emu3_megatron.grammar.protocol import TextTokenizer
from emu3_megatron.grammar.rules import DIALECTS, DialectRules, Field, RowBreak, SpanRule

__all__ = [
    "DIALECTS",
    "Allowed",
    "Automaton",
    "Dialect",
    "DialectRules",
    "Document",
    "Encoded",
    "Field",
    "GrammarError",
    "Image",
    "Modality",
    "Phase",
    "RowBreak",
    "Segment",
    "SpanRule",
    "State",
    "Text",
    "TextTokenizer",
    "Unit",
    "Video",
    "span_classes",
    "span_modality",
    "text_modality",
]
