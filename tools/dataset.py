"""Look into datasets: what one holds, whether every byte is sound, documents, packed windows, steps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emu3_megatron.data import Mixture, Plan, Source
from emu3_megatron.data.lint import lint
from emu3_megatron.data.verify import describe, show, verify
from emu3_megatron.errors import UserError, run_main
from emu3_megatron.files import atomic_write
from emu3_megatron.vocabulary import Vocabulary

if TYPE_CHECKING:
    from emu3_megatron.training.config import TrainerConfig
    from emu3_megatron.training.token_losses import WindowLosses


def main() -> None:
    """Parse the command line and run one subcommand; its exit code is the program's."""
    arguments = _parser().parse_args()
    run: Callable[[argparse.Namespace], int] = arguments.run
    sys.exit(run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def dataset(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added.add_argument("dataset", help="folder with manifest.json")
        return added

    dataset(command("info", _info, "counts, sizes, fingerprints, lengths, provenance"))
    dataset(command("verify", _verify, "read every byte; exit code 1 if anything is damaged"))
    added = dataset(command("show", _show, "print a document's name and segments"))
    added.add_argument("document", help="number from 0, or sample id")
    added.add_argument("--limit", type=int, default=16, help="ids shown of each end of a segment")
    added = dataset(command("lint", _lint, "find what will hurt training; exit code 1 if there is any"))
    added.add_argument("--context-length", type=int, help="also find what fits no window of so many tokens")
    added.add_argument("--vocabulary", help="preset (emu3, emu3.5, tiny) that the dataset should have")
    added = dataset(command("view", _view, "write packed windows as a page to look at"))
    added.add_argument("--context-length", type=int, default=5120, help="tokens of a window")
    added.add_argument("--windows", type=int, default=8, help="number of windows")
    added.add_argument("--first", type=int, default=0, help="the first of them")
    _add_page(added)
    added = command("replay", _replay, "rebuild the batch of a training step as a page to look at")
    added.add_argument("--plan", required=True, help="folder of the run, or its config.yaml")
    which = added.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="number of the step, from 1, as in the log")
    which.add_argument("--window", type=int, help="number of one window, from 0")
    added.add_argument("--checkpoint", help="run or checkpoint whose loss on every token is shown")
    added.add_argument("--platform", default="auto", choices=["auto", "cuda", "cpu"], help="of --checkpoint")
    _add_page(added)
    added = dataset(command("convert", _convert, "write a dataset's spans in another dialect"))
    added.add_argument("target", help="folder of the new dataset")
    added.add_argument("--dialect", required=True, help="emu3, emu3-frames or emu3.5")
    added.add_argument("--text-tokenizer", required=True, help="the dataset's")
    return parser


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="HTML file to write")
    parser.add_argument("--text-tokenizer", help="file; without it ids are shown")
    parser.add_argument("--vision-tokenizer", help="folder; without it pictures are not decoded")


def _info(arguments: argparse.Namespace) -> int:
    for line in describe(arguments.dataset):
        print(line)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    for line in show(arguments.dataset, arguments.document, arguments.limit):
        print(line)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    folder = arguments.dataset
    faults = verify(folder, progress=lambda shard: print(f"reading {shard}", file=sys.stderr))
    for fault in faults:
        print(fault)
    print(f"{folder}: {len(faults)} faults" if faults else f"{folder}: sound")
    return 1 if faults else 0


def _lint(arguments: argparse.Namespace) -> int:
    count = 0
    vocabulary = None if arguments.vocabulary is None else Vocabulary.preset(arguments.vocabulary)
    for finding in lint(arguments.dataset, context_length=arguments.context_length, vocabulary=vocabulary):
        print(finding)
        count += 1
    print(f"{arguments.dataset}: {count} findings" if count else f"{arguments.dataset}: nothing found")
    return 1 if count else 0


def _view(arguments: argparse.Namespace) -> int:
    if arguments.first < 0 or arguments.windows < 1:
        raise UserError(
            f"--first {arguments.first}, --windows {arguments.windows}: windows count from 0, and at least 1 "
            "is shown"
        )
    plan = Plan(Mixture([Source(path=arguments.dataset)]), seed=0, context_length=arguments.context_length)
    windows = list(range(arguments.first, arguments.first + arguments.windows))
    _write_page(plan, windows, arguments, f"{arguments.dataset}, windows of {plan.context_length} tokens")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    # The trainer's configuration brings torch along, which nothing else here needs.
    from emu3_megatron.posttraining.runs import describe_run

    given = Path(arguments.plan)
    path = given / "config.yaml" if given.is_dir() else given
    if not path.is_file():
        raise UserError(f"{path}: no such file; --plan takes the folder of a run, or its config.yaml")
    run = describe_run(["--config", str(path)])
    config = run.config
    windows, title = _windows_to_replay(arguments, config.trainer)
    plan = run.open_plan()
    losses = None
    if arguments.checkpoint is not None:
        from emu3_megatron.training.token_losses import open_token_losses

        losses = open_token_losses(
            Path(arguments.checkpoint),
            plan.mixture.vocabulary,
            attention=config.data.attention,
            platform_name=arguments.platform,
        )
        title += f", losses of {arguments.checkpoint}"
    weights = [(source.loss or config.loss).by_class() for source in config.data.sources.values()]
    _write_page(plan, windows, arguments, title, weights=weights, losses=losses)
    return 0


def _windows_to_replay(arguments: argparse.Namespace, trainer: TrainerConfig) -> tuple[list[int], str]:
    """Numbers of the windows of a step, or the one that is asked for, and a heading."""
    from emu3_megatron.training.consumed import ConsumedWindows

    given = Path(arguments.plan)
    consumed = ConsumedWindows(given if given.is_dir() else given.parent, trainer)
    if arguments.window is not None:
        last = consumed.up_to(consumed.last_step) - 1
        if not 0 <= arguments.window <= last:
            raise UserError(
                f"--window {arguments.window}: windows count from 0, and the run ends with {last}"
            )
        return [arguments.window], f"window {arguments.window} of {arguments.plan}"
    windows = list(consumed.of_step(arguments.step))
    title = f"step {arguments.step} of {arguments.plan}: windows {windows[0]} to {windows[-1]}"
    return windows, title


def _write_page(
    plan: Plan,
    windows: list[int],
    arguments: argparse.Namespace,
    title: str,
    *,
    weights: list[list[float]] | None = None,
    losses: WindowLosses | None = None,
) -> None:
    from emu3_megatron.tokenization.view import Decoder, windows_page

    manifests = [source.dataset.manifest for source in plan.mixture.sources]
    # Plain text names no dialect; a mixture has one tokenizer of each kind, so any other source will do.
    manifest = next((each for each in manifests if each.dialect_name), manifests[0])
    decoder = Decoder.open(manifest, arguments.text_tokenizer, arguments.vision_tokenizer)
    page = windows_page(plan, windows, decoder, weights=weights, losses=losses, title=title)
    with atomic_write(arguments.output) as stream:
        stream.write(page.encode())
    print(f"{title}: written to {arguments.output}")


def _convert(arguments: argparse.Namespace) -> int:
    from emu3_megatron.tokenization.convert import convert

    manifest = convert(
        arguments.dataset,
        arguments.target,
        arguments.dialect,
        arguments.text_tokenizer,
        progress=lambda shard: print(f"writing {shard}", file=sys.stderr),
    )
    print(f"{arguments.target}: {manifest.num_documents:,} documents in dialect {manifest.dialect_name}")
    return 0


if __name__ == "__main__":
    run_main(main)
