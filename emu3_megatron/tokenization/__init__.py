"""From raw media to token shards: manifests in, datasets out."""

from emu3_megatron.tokenization.config import TokenizationConfig
from emu3_megatron.tokenization.entries import BadEntry, Entry
from emu3_megatron.tokenization.inputs import Inputs
from emu3_megatron.tokenization.job import TokenizationJob, tokenize
from emu3_megatron.tokenization.toolkit import choose_vocabulary

__all__ = [
    "BadEntry",
    "Entry",
    "Inputs",
    "TokenizationConfig",
    "TokenizationJob",
    "choose_vocabulary",
    "tokenize",
]
