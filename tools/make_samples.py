"""Write the sample corpus: PNG and MP4 files of a small captioned world, with manifests."""

from __future__ import annotations

import argparse
from pathlib import Path

from emu3_megatron.errors import run_main
from emu3_megatron.samples import CorpusConfig, WorldConfig, write_corpus


def main() -> None:
    """Parse the command line and write the corpus."""
    defaults = CorpusConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--world", default="full", help="quickstart (easier) or full")
    parser.add_argument(
        "--train-images", type=int, default=defaults.train_images, help="PNG files to train on"
    )
    parser.add_argument(
        "--train-videos", type=int, default=defaults.train_videos, help="MP4 files to train on"
    )
    parser.add_argument("--train-texts", type=int, default=defaults.train_texts, help="pure text documents")
    parser.add_argument(
        "--held-out-images",
        type=int,
        default=defaults.held_out_images,
        help="PNG files of held-out combinations",
    )
    parser.add_argument(
        "--held-out-videos",
        type=int,
        default=defaults.held_out_videos,
        help="MP4 files of held-out combinations",
    )
    parser.add_argument(
        "--chinese", type=float, default=defaults.chinese, help="share of Chinese captions, 0 to 1"
    )
    parser.add_argument(
        "--wordings", type=int, default=defaults.wordings, help="wordings a language uses, 1 to 3"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="scenes and captions follow from it")
    parser.add_argument("--processes", type=int, default=1, help="processes that draw and encode")
    arguments = vars(parser.parse_args())
    output, processes = arguments.pop("output"), arguments.pop("processes")
    world = WorldConfig.preset(arguments.pop("world"))
    for name, path in write_corpus(
        output, CorpusConfig(world=world, **arguments), processes=processes
    ).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    run_main(main)
