"""The weights that the example configurations give to the classes of tokens."""

from emu3_megatron.training.config import LossConfig

PRETRAINING = LossConfig()
CODES_ONLY = LossConfig(
    text_weight=0.0, vision_weight=1.0, meta_weight=0.0, break_weight=0.0, control_weight=0.0
)
TEXT_ONLY = LossConfig(
    vision_weight=0.0, meta_weight=0.0, break_weight=0.0, control_weight=0.0, end_weight=1.0
)
"""Both stages of understanding: of a conversation, text is its answers."""
