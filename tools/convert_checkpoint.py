"""Convert checkpoints to and from Hugging Face, and compare them.

export    a training run or checkpoint -> a folder that transformers loads
import    a Hugging Face folder -> a run folder with one checkpoint
extend    a text-only Llama, Qwen2 or Qwen3 folder -> the same, with rows for control and vision ids
verify    compare two of them, tensor by tensor; exit code 0 only if all are equal bit by bit

The folder of a vision tokenizer alone is converted by export and import as well. Started under torchrun, all
processes divide the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3_megatron.errors import run_main

if TYPE_CHECKING:
    from emu3_megatron.parallel.config import ParallelConfig


def main() -> None:
    """Parse the command line and convert."""
    arguments = _parser().parse_args()
    if arguments.command != "verify":
        _start()
    {"export": _export, "import": _import, "extend": _extend, "verify": _verify}[arguments.command](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="training checkpoint to Hugging Face", allow_abbrev=False)
    export.add_argument(
        "--source", "--checkpoint", required=True, type=Path, help="run, or checkpoint folder in it"
    )
    export.add_argument("--output", required=True, type=Path, help="folder to write")
    export.add_argument(
        "--layout", choices=("transformers", "transformers-5", "emu3"), default="transformers"
    )
    export.add_argument(
        "--vision-tokenizer", type=Path, help="its folder; needed but for --layout emu3 and imported runs"
    )
    export.add_argument(
        "--text-tokenizer", type=Path, help="its file; default: what the run was imported with, or none"
    )
    export.add_argument("--dialect", help="name to keep in the folder; default: of the run's datasets")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the model; default: as it is")
    export.add_argument("--plain-weights", action="store_true", help="not the averaged ones")
    export.add_argument(
        "--image-pixels", nargs=2, type=int, metavar=("MIN", "MAX"), help="of the image processor"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    _add_import(commands.add_parser("import", help="Hugging Face to training checkpoint", allow_abbrev=False))
    extend = commands.add_parser(
        "extend", help="text-only Hugging Face folder to training checkpoint", allow_abbrev=False
    )
    _add_import(extend)
    extend.add_argument("--seed", type=int, default=0, help="of the new rows")
    verify = commands.add_parser("verify", help="exit code 0 only if all tensors are equal bit by bit")
    verify.add_argument("first", type=Path)
    verify.add_argument("second", type=Path)
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    """What both ways into a run take."""
    parser.add_argument("--source", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--output", required=True, type=Path, help="run folder to write")
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        type=Path,
        help="one to train on, named in train.yaml; may be repeated; `extend` takes its vocabulary",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: every number as it is")
    for name, what in (("tensor", "tensor-parallel"), ("pipeline", "pipeline-parallel")):
        parser.add_argument(
            f"--{name}-parallel",
            type=int,
            default=1,
            metavar="N",
            help=f"cut files for N {what} ranks; any layout can load them all the same",
        )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read .bin weights, by torch's weights-only loader"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def _start() -> None:
    from emu3_megatron.conversion.processes import start

    start()


def _report(message: str) -> None:
    """Say it once, however many processes there are."""
    from emu3_megatron.conversion.processes import rank

    if rank() == 0:
        print(message)


def _is_vision_tokenizer(folder: Path) -> bool:
    from emu3_megatron.conversion.companions import read_json
    from emu3_megatron.conversion.vision_files import is_vision_tokenizer

    return (folder / "config.json").is_file() and is_vision_tokenizer(read_json(folder / "config.json"))


def _convert_vision(arguments: argparse.Namespace, layout: str) -> None:
    from emu3_megatron.conversion.vision_files import convert_vision_tokenizer

    folder = convert_vision_tokenizer(
        arguments.source,
        arguments.output,
        layout="emu3" if layout == "emu3" else "transformers",
        overwrite=arguments.overwrite,
    )
    _report(f"wrote the vision tokenizer of {arguments.source} to {folder}")


def _export(arguments: argparse.Namespace) -> None:
    from emu3_megatron.conversion.checkpoints import export_checkpoint
    from emu3_megatron.conversion.hugging_face import DTYPES

    if _is_vision_tokenizer(arguments.source):
        _convert_vision(arguments, arguments.layout)
        return
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
    _report(f"exported {arguments.source} to {folder}")


def _import(arguments: argparse.Namespace) -> None:
    from emu3_megatron.conversion.checkpoints import import_checkpoint

    if _is_vision_tokenizer(arguments.source):
        _convert_vision(arguments, "transformers")
        return
    folder = import_checkpoint(arguments.source, arguments.output, **_import_options(arguments))
    _report(f"imported {arguments.source} as {folder}")


def _extend(arguments: argparse.Namespace) -> None:
    from emu3_megatron.conversion.text_models import import_text_model
    from emu3_megatron.data import Manifest
    from emu3_megatron.errors import UserError

    if not arguments.dataset:
        raise UserError("extend needs --dataset: rows are added for the ids of its vocabulary")
    folder = import_text_model(
        arguments.source,
        arguments.output,
        Manifest.load(arguments.dataset[0]).vocabulary,
        seed=arguments.seed,
        **_import_options(arguments),
    )
    _report(f"extended {arguments.source} as {folder}")


def _import_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "precision": arguments.dtype,
        "parallel": _layout(arguments),
        "datasets": arguments.dataset,
        "allow_pickle": arguments.allow_pickle,
        "overwrite": arguments.overwrite,
    }


def _layout(arguments: argparse.Namespace) -> ParallelConfig:
    from emu3_megatron.parallel.config import ParallelConfig

    return ParallelConfig(
        tensor_model_parallel_size=arguments.tensor_parallel,
        pipeline_model_parallel_size=arguments.pipeline_parallel,
    )


def _verify(arguments: argparse.Namespace) -> None:
    from emu3_megatron.conversion.compare import compare

    found = compare(arguments.first, arguments.second)
    vision = "" if found.is_vision_compared else "; the vision tokenizer is not in both and was not compared"
    print(f"equal: {found.tensors} tensors, {found.numbers} numbers, SHA-256 {found.checksum}{vision}")


if __name__ == "__main__":
    run_main(main)
