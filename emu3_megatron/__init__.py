"""emu3-megatron: pre-train Emu3 by next-token prediction over text, images and video, on megatron-core."""

__version__ = "0.1.0"
