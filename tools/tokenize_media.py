"""Tokenize images, videos and texts into the shards of a dataset.

Reads JSON Lines manifests or WebDataset tar files. Run it once, or as several workers (--worker i
--num-workers n) that share the output folder; run it again after any interruption: finished shards are
kept. Entries that cannot be used are listed in OUTPUT/quarantine.jsonl.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from emu3_megatron.errors import run_main
from emu3_megatron.tokenization import Inputs, TokenizationConfig, tokenize

HELP = {
    "manifest": "JSON Lines manifests and WebDataset .tar files, in order",
    "output": "folder of the dataset; made if missing",
    "text_tokenizer": "*.tiktoken (Qwen), *.model (SentencePiece) or tokenizer.json (Hugging Face)",
    "vision_tokenizer": "folder of the vision tokenizer; not needed for plain text",
    "dialect": "how spans are written: emu3, emu3-frames or emu3.5",
    "vocabulary": "emu3, emu3.5, tiny, or auto: as large as the two tokenizers",
    "name": "first part of the shards' file names; the output folder's name where empty",
    "split": "take only entries whose key 'split' has this value",
    "num_shards": "shards of the dataset: the unit of work and of resumption",
    "worker": "this worker's number, from 0",
    "num_workers": "workers that share the job",
    "image_area": "pixels of an image after resizing, about; both sides become whole tokens",
    "video_area": "the same for a video's frames; as for images where not given",
    "max_aspect_ratio": "more elongated pictures are set aside",
    "video_frames": "frames of a clip; a multiple of the vision tokenizer's temporal factor",
    "video_fps": "frames per second of a clip; the video's own frames where not given",
    "video_position": "where a clip is taken from: start or centre",
    "frame_source": "what decodes video: auto, dali or pyav",
    "media_device": "where video is decoded and pictures are resized: cpu or gpu",
    "device": "where the vision tokenizer runs: cpu, cuda, cuda:1...",
    "precision": "arithmetic of the encoder: fp32 or bf16",
    "encode_pixels": "pixels times frames in one batch of the encoder; by device where not given",
    "quarantine_budget": "share of entries that may be set aside before the job fails",
    "decode_threads": "threads that decode ahead while the encoder runs",
}
"""One line for each setting; the units and sources are in `TokenizationConfig`."""

TYPES: dict[str, Any] = {
    "manifest": Path, "output": Path, "text_tokenizer": Path, "vision_tokenizer": Path,
    "num_shards": int, "worker": int, "num_workers": int, "image_area": int, "video_area": int,
    "max_aspect_ratio": float, "video_frames": int, "video_fps": float, "encode_pixels": int,
    "quarantine_budget": float, "decode_threads": int,
}  # fmt: skip
"""Types of the settings that are not strings."""


ALIASES = {"worker": ("--worker-index",), "quarantine_budget": ("--max-bad-fraction",)}
"""Other names of options."""


def make_parser() -> argparse.ArgumentParser:
    """One option for each setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in fields(TokenizationConfig):
        if field.name not in HELP:
            continue
        required = field.default is MISSING
        parser.add_argument(
            *ALIASES.get(field.name, ()),
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            type=TYPES.get(field.name, str),
            required=required,
            default=None if required else field.default,
            nargs="+" if field.name == "manifest" else None,
            help=HELP[field.name],
        )
    parser.add_argument(
        "--samples-per-shard", type=int, help="instead of --num-shards: entries of a shard, at most"
    )
    parser.add_argument(
        "--finalize", action="store_true", help="only check the shards and write the manifest"
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    return parser


def main() -> None:
    """Parse the command line and run one worker."""
    arguments = vars(make_parser().parse_args())
    if (samples := arguments.pop("samples_per_shard")) is not None:
        arguments["num_shards"] = Inputs(arguments["manifest"]).shards_of(samples)
    config = TokenizationConfig(**{**arguments, "manifest": tuple(arguments["manifest"])})
    if tokenize(config):
        print(f"dataset complete: {config.output / 'manifest.json'}")
    else:
        print("this worker's shards are finished; other workers' are not")


if __name__ == "__main__":
    run_main(main)
