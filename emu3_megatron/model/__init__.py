"""The megatron-core GPT: presets, build, attention and loss."""
