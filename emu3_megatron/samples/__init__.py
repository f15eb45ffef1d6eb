"""The built-in sample corpus: a small captioned world, drawn into real files and read back by a checker."""

from emu3_megatron.samples.captions import LANGUAGES, WORDINGS, caption, parse_caption, text_document
from emu3_megatron.samples.checker import Checker, Reading
from emu3_megatron.samples.corpus import CorpusConfig, encode_mp4, encode_png, read_manifest, write_corpus
from emu3_megatron.samples.world import Scene, World, WorldConfig

__all__ = [
    "LANGUAGES",
    "WORDINGS",
    "Checker",
    "CorpusConfig",
    "Reading",
    "Scene",
    "World",
    "WorldConfig",
    "caption",
    "encode_mp4",
    "encode_png",
    "parse_caption",
    "read_manifest",
    "text_document",
    "write_corpus",
]
