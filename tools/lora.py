"""Adapters (LoRA) of a training run.

merge     add them to the weights: a run of plain weights, to generate with, convert or train on
export    write them as a folder that the PEFT library loads beside the model they were trained from
"""

from __future__ import annotations

import argparse
from pathlib import Path

from emu3_megatron.errors import run_main


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--platform", choices=("auto", "cuda", "cpu"), default="cpu", help="default: cpu")
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="a run of plain weights")
    export = commands.add_parser("export", help="a folder for PEFT")
    for command in (merge, export):
        command.add_argument("--source", required=True, type=Path, help="run, or checkpoint folder in it")
        command.add_argument("--output", required=True, type=Path, help="folder to write")
        command.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    export.add_argument(
        "--layout",
        choices=("transformers-5", "emu3"),
        default="transformers-5",
        help="names of Emu3ForConditionalGeneration (default), or of Emu3ForCausalLM",
    )
    export.add_argument(
        "--base-model", default="", help="path or name of the model, to be kept in the folder"
    )
    arguments = parser.parse_args()

    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install(arguments.platform), seed=0)
    from emu3_megatron.conversion.lora import export_adapters, merge_run

    common = {"overwrite": arguments.overwrite}
    if arguments.command == "merge":
        print(f"merged into {merge_run(arguments.source, arguments.output, **common)}")
    else:
        folder = export_adapters(
            arguments.source,
            arguments.output,
            layout=arguments.layout,
            base_model=arguments.base_model,
            **common,
        )
        print(f"exported to {folder}")


if __name__ == "__main__":
    run_main(main)
