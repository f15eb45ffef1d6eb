"""The evaluation program. ``tools/evaluate.py`` is its main."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation import scores, vlmeval
from emu3_megatron.evaluation.generation import SETTINGS, Drawing, draw
from emu3_megatron.evaluation.models import Clip, Detector
from emu3_megatron.evaluation.report import write_report
from emu3_megatron.evaluation.tasks import READERS, TASKS, load_tasks
from emu3_megatron.inference.checks import check_arguments, check_single_process
from emu3_megatron.inference.command_line import (
    add_model,
    add_sampling,
    add_size,
    open_generator,
    read_sampling,
    read_size,
)
from emu3_megatron.inference.dialogue import UNDERSTANDING_AREA, MediaReader, Message, answer, chat_template
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.media import MediaError

RESULTS = {"geneval": scores.read_geneval, "dpg": scores.read_dpg, "vbench": scores.read_vbench}
"""Readers of what the benchmarks' own tools wrote."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Run benchmarks and collect their scores.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="draw what a benchmark asks for", allow_abbrev=False)
    answering = commands.add_parser("answer", help="answer datasets of VLMEvalKit", allow_abbrev=False)
    configure = commands.add_parser("configure", help="let VLMEvalKit ask our server", allow_abbrev=False)
    score = commands.add_parser("score", help="score, or read a benchmark's results", allow_abbrev=False)
    report = commands.add_parser("report", help="a page with the paper's tables beside", allow_abbrev=False)
    _add_generate(generate)
    add_model(answering)
    answering.add_argument("--data", type=Path, nargs="+", required=True, help="datasets, DATASET.tsv")
    answering.add_argument("--template", default="emu3-chat", help="see tools/generate.py chat")
    answering.add_argument("--area", type=int, default=UNDERSTANDING_AREA, help="pixels of a picture")
    for command in (answering, configure):
        command.add_argument("--name", default="emu3", help="of the model, in VLMEvalKit's file names")
        command.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: 128)")
    configure.add_argument("--address", default="http://localhost:8000", help="of tools/serve.py")
    configure.add_argument("--datasets", nargs="+", default=list(vlmeval.COLUMNS.values()), help="by name")
    score.add_argument("--suite", choices=[*READERS, "vlmeval"], help="default: what was generated")
    score.add_argument("--name", default="this model", help="in the report")
    score.add_argument("--clip", type=Path, help="folder of a CLIP model: CLIP score, colours of GenEval")
    score.add_argument("--detector", type=Path, help="folder of a detector: objects of GenEval")
    score.add_argument("--device", default="cpu", help="of both (default: cpu)")
    score.add_argument("--world", default="full", help="of the sample world (default: full)")
    score.add_argument("--results", type=Path, nargs="+", help="files that the benchmark's own tool wrote")
    report.add_argument("folders", type=Path, nargs="+", help="evaluations with scores")
    for command in (generate, answering, score):
        command.add_argument("--output", type=Path, required=True, help="folder of this evaluation")
    for command, kind in ((configure, "JSON"), (report, "HTML")):
        command.add_argument("--output", type=Path, required=True, help=f"{kind} file")
    return parser


def _add_generate(generate: argparse.ArgumentParser) -> None:
    add_model(generate)
    add_sampling(generate, spans=True)
    add_size(generate)
    generate.add_argument("--suite", choices=READERS, required=True)
    generate.add_argument(
        "--prompts", type=Path, required=True, help="the benchmark's file or folder of prompts"
    )
    generate.add_argument("--samples", type=int, help="per prompt; default: the benchmark's own")
    generate.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    generate.add_argument("--suffix", default="", help="added to every prompt")
    generate.add_argument("--frames", type=int, default=48, help="of a clip (default: 48)")
    generate.add_argument("--fps", type=float, default=24.0, help="of a clip (default: 24)")
    generate.add_argument("--batch", type=int, default=32, help="samples at a time (default: 32)")


def main() -> None:
    """Parse the command line and run one command."""
    arguments = build_parser().parse_args()
    if arguments.command in ("generate", "answer"):
        check_single_process("evaluate.py")
        from emu3_megatron.parallel import platform
        from emu3_megatron.parallel.config import ParallelConfig
        from emu3_megatron.parallel.groups import initialize_parallel

        initialize_parallel(ParallelConfig(), platform.install(arguments.platform), seed=0)
    evaluate(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    """Run one command; for those with a model, process groups must exist.

    Raises `UserError` for arguments, files or folders that cannot be used.
    """
    commands = {
        "generate": _generate, "answer": _answer, "configure": _configure, "score": _score, "report": _report,
    }  # fmt: skip
    check_arguments(arguments)
    commands[arguments.command](arguments)


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.seed < 0 or arguments.batch < 1 or (arguments.samples or 1) < 1:
        raise UserError("--seed must not be negative, --batch and --samples at least 1")
    tasks = READERS[arguments.suite](arguments.prompts, arguments.samples)
    generator = open_generator(arguments, max_rows=2 * arguments.batch)
    height, width = read_size(generator, arguments)
    drawing = Drawing(
        height=height,
        width=width,
        frames=arguments.frames,
        fps=arguments.fps,
        sampling=read_sampling(arguments),
        seed=arguments.seed,
        negative_prompt=arguments.negative_prompt,
        suffix=arguments.suffix,
        batch=arguments.batch,
    )
    about = {
        "suite": arguments.suite,
        "prompts": str(arguments.prompts),
        "checkpoint": str(arguments.checkpoint),
    }
    drawn = draw(generator, tasks, drawing, arguments.output, about)
    print(f"{len(tasks)} prompts, {drawn} samples drawn: {arguments.output}")


def _answer(arguments: argparse.Namespace) -> None:
    generator = open_generator(arguments, max_rows=32)
    reader = MediaReader(generator, area=arguments.area)
    ask = partial(_ask, generator, reader, arguments)
    for path in arguments.data:
        target = vlmeval.answer_dataset(path, arguments.name, arguments.output, ask)
        print(f"{target}: give it to VLMEvalKit's run.py with PRED_FORMAT=tsv and --reuse")


def _ask(
    generator: Generator,
    reader: MediaReader,
    arguments: argparse.Namespace,
    questions: Sequence[vlmeval.Question],
) -> list[str]:
    """The model's answers, greedy."""
    conversations = []
    for question in questions:
        try:
            media = tuple(reader.image(file) for file in question.images)
        except MediaError as error:
            raise MediaError(f"index {question.row['index']}: its image {error}") from error
        conversations.append([Message("user", question.text, media)])
    answers = answer(
        generator,
        conversations,
        template=chat_template(arguments.template),
        seeds=[0] * len(conversations),
        max_new_tokens=arguments.max_new_tokens,
    )
    return [said.text for said in answers]


def _configure(arguments: argparse.Namespace) -> None:
    vlmeval.write_configuration(
        arguments.output, arguments.name, arguments.address, arguments.datasets, arguments.max_new_tokens
    )
    print(f"{arguments.output}: start tools/serve.py, then VLMEvalKit's run.py --config {arguments.output}")


def _score(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.output
    drawn = (folder / SETTINGS).is_file()
    suite = arguments.suite
    if suite is None:
        if not drawn:
            raise UserError(f"{folder} holds nothing that was generated; name the --suite of --results")
        suite = json.loads((folder / SETTINGS).read_text("utf-8"))["suite"]
    if suite == "vlmeval":
        if not arguments.results:
            raise UserError("give --results: VLMEvalKit's *_acc.csv and *_score files")
        found = vlmeval.read_results(arguments.results)
        own = {key: found[name] for key, name in vlmeval.COLUMNS.items() if name in found}
    elif arguments.results:
        if suite not in RESULTS:
            raise UserError(f"suite {suite} has no results of a tool of its own; leave --results out")
        own = RESULTS[suite](arguments.results)
    else:
        own = _measure(suite, folder, arguments)
    tasks = load_tasks(folder) if (folder / TASKS).is_file() else []
    scores.write_scores(folder, suite, arguments.name, own, tasks)
    print(json.dumps({"suite": suite, "scores": own}))


def _measure(suite: str, folder: Path, arguments: argparse.Namespace) -> scores.Scores:
    """Scores by models of one's own."""
    tasks = load_tasks(folder)
    device = torch.device(arguments.device)
    own: scores.Scores = {}
    if suite == "sample-world":
        own |= scores.sample_world(folder, tasks, arguments.world)
    clip = Clip(arguments.clip, device) if arguments.clip else None
    if suite == "geneval" and arguments.detector and clip:
        own |= scores.geneval(folder, tasks, Detector(arguments.detector, device), clip)
    if clip is not None and suite in ("prompts", "geneval"):
        own |= scores.clip_score(folder, tasks, clip)
    if not own:
        raise UserError(
            f"nothing to score {suite} by: give --results of the benchmark's own tool, or --clip (of GenEval "
            "with --detector)"
        )
    return own


def _report(arguments: argparse.Namespace) -> None:
    write_report(arguments.output, arguments.folders)
    print(arguments.output)
