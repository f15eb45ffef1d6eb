"""Judgements of candidates by people or a scorer, and the pairs that follow from them.

A judgement is one line of JSON::

    {"prompt": 0, "candidate": 3, "voter": "ada", "appeal": 4, "alignment": 5}

Every further key with a number is a criterion. A voter's later line about the same candidate replaces the one
before. A candidate's score is the mean over voters of the weighted mean over criteria; of each prompt the
best candidate becomes chosen and the worst rejected, as the Emu3 paper does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emu3_megatron.data import DatasetWriter
from emu3_megatron.data.format import MANIFEST_NAME, SPAN_MODE, TEXT_MODE
from emu3_megatron.errors import UserError
from emu3_megatron.posttraining.preferences.candidates import SCORES, VOTES, CandidateFolder
from emu3_megatron.posttraining.preferences.pairs import PAIR_TASK, pair_segments

KEYS = ("prompt", "candidate", "voter")


@dataclass(frozen=True)
class Judgement:
    """What one voter says of one candidate."""

    prompt: int
    """Number of the prompt."""
    candidate: int
    """Number of the candidate."""
    voter: str
    """Who says it."""
    criteria: dict[str, float]
    """By name; more is better."""

    @classmethod
    def parse(cls, line: str) -> Judgement:
        """Read a line.

        Raises:
            ValueError: it is not a judgement; says why.
        """
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("a JSON object is expected")
        for key, kind in zip(KEYS, (int, int, str), strict=True):
            if not isinstance(fields.get(key), kind) or isinstance(fields[key], bool):
                raise ValueError(f"{key!r} must be there and of type {kind.__name__}")
        criteria = {key: value for key, value in fields.items() if key not in KEYS}
        for name, value in criteria.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not abs(value) <= sys.float_info.max:
                raise ValueError(f"{name!r} must be a finite number")
        if not criteria:
            raise ValueError("no criterion: at least one key with a number is needed")
        return cls(fields["prompt"], fields["candidate"], fields["voter"], criteria)

    def to_line(self) -> str:
        """The line, with its end."""
        fields = {"prompt": self.prompt, "candidate": self.candidate, "voter": self.voter, **self.criteria}
        return json.dumps(fields, ensure_ascii=False) + "\n"


def read_judgements(path: Path) -> tuple[list[Judgement], list[str]]:
    """The judgements of a file, and a message for every line that is none; those are left out.

    Raises:
        UserError: the file cannot be read.
    """
    judgements, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a file with a judgement a line") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                judgements.append(Judgement.parse(line))
            except ValueError as error:
                problems.append(f"{path}, line {number}: {error}")
    return judgements, problems


def read_folder(
    folder: CandidateFolder, paths: Sequence[Path] | None = None
) -> tuple[list[Judgement], list[str]]:
    """The judgements of some files, or of those in the folder; as `read_judgements`.

    Raises:
        UserError: the folder has none, or a file cannot be read.
    """
    found = paths or [folder.path / name for name in (SCORES, VOTES) if (folder.path / name).is_file()]
    if not found:
        raise UserError(
            f"{folder.path}: no judgements yet; vote with tools/vote.py, score, or give files with --scores"
        )
    parts = [read_judgements(path) for path in found]
    return [each for part, _ in parts for each in part], [each for _, part in parts for each in part]


def mean_scores(
    judgements: Iterable[Judgement], weights: Mapping[str, float] | None = None
) -> dict[tuple[int, int], float]:
    """Score of every judged candidate by (prompt, candidate).

    Args:
        judgements: In the order they were given.
        weights: Of the criteria; None: all 1. A criterion that it does not name counts for nothing.
    """
    latest = {(each.prompt, each.candidate, each.voter): each for each in judgements}
    by_candidate: dict[tuple[int, int], list[float]] = {}
    for (prompt, candidate, _), judgement in latest.items():
        criteria = judgement.criteria
        share = {name: 1.0 if weights is None else weights.get(name, 0.0) for name in criteria}
        if total := sum(share.values()):
            mean = sum(share[name] * value for name, value in criteria.items()) / total
            by_candidate.setdefault((prompt, candidate), []).append(mean)
    return {key: sum(values) / len(values) for key, values in by_candidate.items()}


@dataclass
class PairReport:
    """What became of the prompts."""

    pairs: int = 0
    """Written for training."""
    held_out: int = 0
    """Written for validation."""
    unjudged: int = 0
    """Fewer than two of their candidates have a score."""
    undecided: int = 0
    """Best and worst are closer than `minimum_margin`, or the same tokens."""


def choose(
    folder: CandidateFolder, scores: Mapping[tuple[int, int], float], *, minimum_margin: float
) -> Iterator[tuple[int, int, int] | str]:
    """For each finished prompt ``(prompt, best, worst)``, or the field of `PairReport` that counts it.

    Of equal candidates the one with the lower number is taken.
    """
    for number in folder.finished():
        own = {c: scores[number, c] for c in range(folder.count(number)) if (number, c) in scores}
        if len(own) < 2:
            yield "unjudged"
            continue
        best = max(own, key=lambda c: (own[c], -c))
        worst = min(own, key=lambda c: (own[c], c))
        if best == worst or own[best] - own[worst] < minimum_margin:
            yield "undecided"
        else:
            yield number, best, worst


@dataclass(frozen=True)
class HeldOut:
    """Pairs for validation. Raises `UserError` for a share out of range."""

    output: Path
    """Their dataset's folder."""
    share: float = 0.02
    """Of the prompts with a pair; at least one."""

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 < self.share < 1:
            raise UserError(f"the share of pairs held out, {self.share}, must lie between 0 and 1")


def write_pairs(
    folder: CandidateFolder,
    output: Path,
    scores: Mapping[tuple[int, int], float],
    *,
    minimum_margin: float = 1e-6,
    num_shards: int = 1,
    held_out: HeldOut | None = None,
) -> PairReport:
    """Write the pairs as a dataset, or two; the same candidates and scores give the same bytes.

    Args:
        folder: The candidates.
        output: The dataset's folder.
        scores: See `mean_scores`.
        minimum_margin: Least difference of the two scores.
        num_shards: Shards of the dataset.
        held_out: The pairs to keep from training, and their folder.

    Raises:
        UserError: a folder is a dataset already, a score is of a candidate that does not exist, or no pair
            comes about, or only one where some are to be held out.
    """
    # Where `output` has begun and not ended, what is held out is this job's own, of before it was killed.
    begun = output.is_dir()
    for folder_of_pairs in (output, *([held_out.output] if held_out and not begun else [])):
        if (folder_of_pairs / MANIFEST_NAME).exists():
            raise UserError(f"{folder_of_pairs} is a dataset already; choose another folder or remove it")
    _check_known(folder, scores)
    report = PairReport()
    chosen = []
    for decided in choose(folder, scores, minimum_margin=minimum_margin):
        if isinstance(decided, str):
            setattr(report, decided, getattr(report, decided) + 1)
            continue
        number, best, worst = decided
        candidates = folder.read(number)
        if np.array_equal(candidates.spans[best], candidates.spans[worst]):
            report.undecided += 1
        else:
            chosen.append(decided)
    if not chosen:
        raise UserError(
            f"{folder.path}: no pair: {report.unjudged} prompts have fewer than two judged candidates, "
            f"{report.undecided} no difference of at least {minimum_margin:g}; judge more"
        )
    if held_out is not None:
        kept_back, chosen = _parted(folder, chosen, held_out.share)
        report.held_out = len(kept_back)
        output.mkdir(parents=True, exist_ok=True)
        _write_dataset(folder, held_out.output, kept_back, num_shards)
    report.pairs = len(chosen)
    _write_dataset(folder, output, chosen, num_shards)
    return report


def _parted(
    folder: CandidateFolder, chosen: Sequence[tuple[int, int, int]], share: float
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Pairs that are held out, at least one, and the others; equal prompts are on one side.

    Raises:
        UserError: none would be left.
    """
    prompts = folder.prompts
    by_digest = sorted(
        {prompts[number] for number, _, _ in chosen},
        key=lambda prompt: (hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest(), prompt),
    )
    apart = set(by_digest[: max(1, round(share * len(by_digest)))])
    sides = ([each for each in chosen if (prompts[each[0]] in apart) == wanted] for wanted in (True, False))
    kept_back, others = sides
    if not others:
        raise UserError(
            f"{folder.path}: pairs of {len(by_digest)} prompts, of which {len(apart)} would be held out: "
            "none is left to train on; judge more, or hold out fewer"
        )
    return kept_back, others


def _write_dataset(
    folder: CandidateFolder, output: Path, chosen: Sequence[tuple[int, int, int]], num_shards: int
) -> None:
    """Write ``(prompt, best, worst)`` as a dataset of pairs."""
    manifest: dict[str, Any] = {
        **folder.settings["identity"],
        "provenance": {"drawing": folder.settings["drawing"]},
    }
    vocabulary = folder.vocabulary
    with DatasetWriter(output, "pairs", vocabulary=vocabulary, num_shards=num_shards, **manifest) as writer:
        for number, best, worst in chosen:
            candidates = folder.read(number)
            prompt = [(candidates.prompt_ids, TEXT_MODE)] if len(candidates.prompt_ids) else []
            answers = ((candidates.spans[place], SPAN_MODE) for place in (best, worst))
            writer.add_document(pair_segments(prompt, *answers), f"prompt-{number:06d}", PAIR_TASK)


def _check_known(folder: CandidateFolder, scores: Mapping[tuple[int, int], float]) -> None:
    counts = {number: folder.count(number) for number in folder.finished()}
    for number, candidate in scores:
        if not 0 <= candidate < counts.get(number, 0):
            raise UserError(
                f"a score is of prompt {number}, candidate {candidate}, but {folder.path} has "
                f"{counts.get(number, 0)} candidates of that prompt: is it another folder's?"
            )
