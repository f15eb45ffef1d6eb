"""Serve a model on this machine: a web page, and OpenAI's interface for images and chat."""

from __future__ import annotations

from emu3_megatron.errors import run_main
from emu3_megatron.inference.server.command_line import main

if __name__ == "__main__":
    run_main(main)
