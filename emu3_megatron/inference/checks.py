"""What of a command line can be refused before a model is opened, which takes minutes for a large one."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from emu3_megatron.errors import UserError
from emu3_megatron.inference.bundle import vision_folder
from emu3_megatron.vision.checkpoint import CONFIG_FILE, load_config


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for numbers out of range, of any command that generates; others have no such ones."""
    for name in ("max_rows", "rounds", "given_frames", "frames", "area", "max_new_tokens"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1")
    seconds = getattr(arguments, "seconds", None)
    if seconds is not None and not 0 < seconds < math.inf:
        raise UserError(f"--seconds={seconds} must be positive and finite")
    task = getattr(arguments, "task", None)
    if task in ("video", "continue") or (task == "chat" and arguments.video):
        _check_frames(arguments)


def _check_frames(arguments: argparse.Namespace) -> None:
    """Numbers of frames are multiples of what the vision tokenizer puts into one latent frame."""
    folder = arguments.vision_tokenizer or vision_folder(arguments.checkpoint)
    if folder is None or not (Path(folder) / CONFIG_FILE).is_file():
        return  # opening says what is missing
    factor = load_config(Path(folder)).temporal_downsample_factor
    for name in ("given_frames", "frames"):
        value = getattr(arguments, name, None)
        if value is not None and value % factor:
            raise UserError(
                f"--{name.replace('_', '-')}={value} must be a multiple of {factor}, the vision tokenizer's "
                "temporal factor"
            )


def check_single_process(program: str) -> None:
    """Raise `UserError` where a launcher started several processes: all would write the same results."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UserError(
            f"WORLD_SIZE={world}: {program} runs as one process; start it without torchrun (from Python, "
            "open_bundle(parallel=...) loads a model over several)"
        )
