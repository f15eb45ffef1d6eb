"""Make preference pairs: images of each prompt, judgements, a dataset of chosen and rejected.

sample    draw several images of each prompt; killed and started again, it goes on
score     judge them by a program (people judge them with tools/vote.py)
pairs     write the best and the worst of each prompt as a dataset for DPO
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from emu3_megatron.errors import UserError, run_main


def main() -> None:
    """Parse the command line and do one of the three."""
    arguments = _parser().parse_args()
    {"sample": _sample, "score": _score, "pairs": _pairs}[arguments.command](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="draw candidates", allow_abbrev=False)
    sample.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint, Hugging Face folder")
    sample.add_argument("--text-tokenizer", type=Path, help="its file; a Hugging Face folder has its own")
    sample.add_argument("--vision-tokenizer", type=Path, help="its folder; likewise")
    sample.add_argument("--dialect", help="default: what the run's datasets state, else emu3")
    sample.add_argument("--platform", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto")
    sample.add_argument("--prompts", type=Path, required=True, help="UTF-8 file with a prompt a line")
    sample.add_argument("--output", type=Path, required=True, help="folder of candidates")
    sample.add_argument("--candidates", type=int, default=8, help="images of each prompt (default: 8)")
    sample.add_argument("--height", type=int, default=720, help="pixels (default: 720)")
    sample.add_argument("--width", type=int, default=720, help="pixels (default: 720)")
    sample.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    sample.add_argument("--top-k", type=int, default=2048, help="0 keeps all (default: 2048)")
    sample.add_argument("--top-p", type=float, default=1.0, help="default: 1")
    sample.add_argument("--guidance", type=float, default=3.0, help="1 is off (default: 3)")
    sample.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    sample.add_argument("--seed", type=int, default=0, help="of the first image; the others count up")
    sample.add_argument("--group", type=int, default=16, help="prompts drawn together (default: 16)")
    sample.add_argument("--worker", type=int, default=0, help="this process, of --num-workers")
    sample.add_argument("--num-workers", type=int, default=1, help="processes that share the prompts")
    score = commands.add_parser("score", help="judge candidates by a program", allow_abbrev=False)
    score.add_argument("--candidates", type=Path, required=True, help="their folder")
    score.add_argument(
        "--scorer", required=True, help="module:function of (prompt, pixels) -> {name: number}"
    )
    score.add_argument("--name", help="the voter it stands for (default: the scorer)")
    pairs = commands.add_parser("pairs", help="write a dataset of pairs", allow_abbrev=False)
    pairs.add_argument("--candidates", type=Path, required=True, help="their folder")
    pairs.add_argument("--output", type=Path, required=True, help="the dataset's folder")
    pairs.add_argument(
        "--scores", type=Path, nargs="+", help="files of judgements (default: those in the folder)"
    )
    pairs.add_argument(
        "--weight", action="append", default=[], metavar="CRITERION=NUMBER", help="default: all count as 1"
    )
    pairs.add_argument("--minimum-margin", type=float, default=1e-6, help="between best and worst")
    pairs.add_argument("--num-shards", type=int, default=1, help="default: 1")
    pairs.add_argument("--held-out", type=Path, help="the folder of a second dataset, for validation")
    pairs.add_argument("--held-out-share", type=float, default=0.02, help="of the prompts (default: 0.02)")
    return parser


def _sample(arguments: argparse.Namespace) -> None:
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install(arguments.platform), seed=0)
    from emu3_megatron.inference import Generator, Sampling, open_bundle
    from emu3_megatron.inference.candidates import CandidateSettings, sample_candidates

    try:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{arguments.prompts} is not UTF-8 text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    settings = CandidateSettings(
        candidates=arguments.candidates,
        height=arguments.height,
        width=arguments.width,
        sampling=Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k or None,
            top_p=arguments.top_p,
            guidance=arguments.guidance,
        ),
        negative_prompt=arguments.negative_prompt,
        seed=arguments.seed,
    )
    bundle = open_bundle(
        arguments.checkpoint,
        text_tokenizer=arguments.text_tokenizer,
        vision_tokenizer=arguments.vision_tokenizer,
        dialect=arguments.dialect,
    )
    total = len(range(arguments.worker, len(prompts), arguments.num_workers))
    with tqdm(total=total, unit="prompt", disable=None, file=sys.stderr) as bar:
        sample_candidates(
            Generator(bundle),
            arguments.output,
            prompts,
            settings,
            checkpoint=str(arguments.checkpoint),
            group=arguments.group,
            worker=arguments.worker,
            num_workers=arguments.num_workers,
            progress=bar.update,
        )


def _score(arguments: argparse.Namespace) -> None:
    from emu3_megatron.posttraining.preferences.candidates import CandidateFolder
    from emu3_megatron.posttraining.preferences.scoring import score_candidates
    from emu3_megatron.training.modules import load_by_name

    folder = CandidateFolder(arguments.candidates)
    scorer = load_by_name(arguments.scorer, "--scorer")
    with tqdm(total=len(folder.finished()), unit="prompt", disable=None, file=sys.stderr) as bar:
        count = score_candidates(folder, scorer, arguments.name or arguments.scorer, progress=bar.update)
    print(f"judged {count} prompts")


def _pairs(arguments: argparse.Namespace) -> None:
    from emu3_megatron.posttraining.preferences.candidates import CandidateFolder
    from emu3_megatron.posttraining.preferences.scores import (
        HeldOut,
        mean_scores,
        read_folder,
        write_pairs,
    )

    folder = CandidateFolder(arguments.candidates)
    judgements, problems = read_folder(folder, arguments.scores)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    report = write_pairs(
        folder,
        arguments.output,
        mean_scores(judgements, _weights(arguments.weight)),
        minimum_margin=arguments.minimum_margin,
        num_shards=arguments.num_shards,
        held_out=HeldOut(arguments.held_out, arguments.held_out_share) if arguments.held_out else None,
    )
    held_out = f", {report.held_out} to {arguments.held_out}" if arguments.held_out else ""
    print(
        f"wrote {report.pairs} pairs to {arguments.output}{held_out}; left out: {report.unjudged} prompts "
        f"with fewer than two judged candidates, {report.undecided} undecided"
    )


def _weights(given: list[str]) -> dict[str, float] | None:
    weights = {}
    for each in given:
        name, equals, number = each.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name or not weights.get(name, -1) >= 0:
            raise UserError(f"--weight {each}: give CRITERION=NUMBER with a number of 0 or more")
    return weights or None


if __name__ == "__main__":
    run_main(main)
