"""The vision tokenizer: model, losses, training, checkpoints and reconstruction metrics."""

from emu3_megatron.vision.batches import decode_list, encode_list
from emu3_megatron.vision.config import VisionTokenizerConfig
from emu3_megatron.vision.model import VisionTokenizer
from emu3_megatron.vision.stripes import decode_in_stripes, encode_in_stripes
from emu3_megatron.vision.tiles import decode_in_tiles, encode_in_tiles

__all__ = [
    "VisionTokenizer",
    "VisionTokenizerConfig",
    "decode_in_stripes",
    "decode_in_tiles",
    "decode_list",
    "encode_in_stripes",
    "encode_in_tiles",
    "encode_list",
]
