"""Convert checkpoints to and from Hugging Face, and compare them.

export    a training run or checkpoint -> a folder that transformers loads
import    a Hugging Face folder -> a run folder with one checkpoint
extend    a text-only Llama or Qwen3 folder -> the same, with rows for control and vision ids
verify    compare two of them, tensor by tensor
"""

from __future__ import annotations

import argparse
from pathlib import Path

from emu3_megatron.errors import UserError, run_main


def main() -> None:
    """Parse the command line and convert."""
    arguments = _parser().parse_args()
    _start_single_process(arguments.platform)
    {"export": _export, "import": _import, "extend": _extend, "verify": _verify}[arguments.command](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--platform", choices=("auto", "cuda", "cpu"), default="cpu", help="default: cpu")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="training checkpoint to Hugging Face")
    export.add_argument(
        "--source", "--checkpoint", required=True, type=Path, help="run, or checkpoint folder in it"
    )
    export.add_argument("--output", required=True, type=Path, help="folder to write")
    export.add_argument(
        "--layout", choices=("transformers", "transformers-5", "emu3"), default="transformers"
    )
    export.add_argument("--vision-tokenizer", type=Path, help="its folder; needed but for --layout emu3")
    export.add_argument("--text-tokenizer", type=Path, help="its file; without it no tokenizer is written")
    export.add_argument("--dialect", help="name to keep in the folder; default: of the run's datasets")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the model; default: as it is")
    export.add_argument("--plain-weights", action="store_true", help="not the averaged ones")
    export.add_argument(
        "--image-pixels", nargs=2, type=int, metavar=("MIN", "MAX"), help="of the image processor"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    imports = commands.add_parser("import", help="Hugging Face to training checkpoint")
    imports.add_argument("--source", required=True, type=Path, help="Hugging Face folder")
    imports.add_argument("--output", required=True, type=Path, help="run folder to write")
    imports.add_argument("--dtype", choices=("fp32", "bf16"), help="default: as in the folder")
    imports.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    extend = commands.add_parser("extend", help="text-only Hugging Face folder to training checkpoint")
    extend.add_argument("--source", required=True, type=Path, help="folder of a Llama or Qwen3")
    extend.add_argument("--output", required=True, type=Path, help="run folder to write")
    extend.add_argument("--dataset", required=True, type=Path, help="one to train on: its vocabulary")
    extend.add_argument("--seed", type=int, default=0, help="of the new rows")
    extend.add_argument("--dtype", choices=("fp32", "bf16"), help="default: as in the folder")
    extend.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    verify = commands.add_parser("verify", help="exit code 0 only if all tensors are equal bit by bit")
    verify.add_argument("first", type=Path)
    verify.add_argument("second", type=Path)
    return parser


def _start_single_process(name: str) -> None:
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install(name), seed=0)  # type: ignore[arg-type]


def _export(arguments: argparse.Namespace) -> None:
    from emu3_megatron.conversion.checkpoints import export_checkpoint
    from emu3_megatron.conversion.hugging_face import DTYPES

    folder = export_checkpoint(
        arguments.source,
        arguments.output,
        vision_tokenizer=arguments.vision_tokenizer,
        text_tokenizer=arguments.text_tokenizer,
        layout=arguments.layout,
        dtype=DTYPES.get(arguments.dtype),
        averaged=False if arguments.plain_weights else None,
        dialect=arguments.dialect,
        image_pixels=tuple(arguments.image_pixels) if arguments.image_pixels else None,
        overwrite=arguments.overwrite,
    )
    print(f"exported {arguments.source} to {folder}")


def _import(arguments: argparse.Namespace) -> None:
    from emu3_megatron.conversion.checkpoints import import_checkpoint

    folder = import_checkpoint(
        arguments.source, arguments.output, precision=arguments.dtype, overwrite=arguments.overwrite
    )
    print(f"imported {arguments.source} as {folder}")


def _extend(arguments: argparse.Namespace) -> None:
    from emu3_megatron.conversion.text_models import import_text_model
    from emu3_megatron.data import Manifest

    folder = import_text_model(
        arguments.source,
        arguments.output,
        Manifest.load(arguments.dataset).vocabulary,
        seed=arguments.seed,
        precision=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    print(f"extended {arguments.source} as {folder}")


def _verify(arguments: argparse.Namespace) -> None:
    from emu3_megatron.conversion.checkpoints import first_difference, read_weights

    first = read_weights(arguments.first)
    difference = first_difference(first, read_weights(arguments.second))
    if difference is not None:
        raise UserError(f"{arguments.first} and {arguments.second} differ: {difference}")
    print(f"equal: {len(first)} tensors, {sum(tensor.numel() for tensor in first.values())} numbers")


if __name__ == "__main__":
    run_main(main)
