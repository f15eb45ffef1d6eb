"""Generate images, videos and captions from a training run or a Hugging Face folder."""

from __future__ import annotations

from emu3_megatron.errors import run_main
from emu3_megatron.inference.command_line import main

if __name__ == "__main__":
    run_main(main)
