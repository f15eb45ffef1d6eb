"""The vision tokenizer: model, losses, training, checkpoints and reconstruction metrics."""

from emu3_megatron.vision.config import VisionTokenizerConfig
from emu3_megatron.vision.model import VisionTokenizer

__all__ = ["VisionTokenizer", "VisionTokenizerConfig"]
