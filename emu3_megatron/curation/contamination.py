"""Training data that holds evaluation data: shared runs of words, and pictures that look the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emu3_megatron.curation.config import ContaminationConfig
from emu3_megatron.curation.duplicates import CLIP_HASHES, HashIndex, picture_hash
from emu3_megatron.curation.frames import pictures_of
from emu3_megatron.curation.text_filters import is_spaceless, shingles, tokens_of
from emu3_megatron.curation.units import Comparer, ComparingStage, Decision, Score, Unit
from emu3_megatron.errors import UserError
from emu3_megatron.files import parse_json
from emu3_megatron.media import MediaError, decode_image

PROMPT_KEYS = ("prompt", "text", "caption", "question")
"""Keys of a JSON Lines file of evaluation prompts, the first present; beside it, all ``captions``."""

SHORTEST_RUN = 4
"""A prompt of fewer tokens is found only where it is the whole text."""

CONTAMINATED = "in the evaluation data"
"""Mark, and reason."""


class ContaminationStage(ComparingStage):
    """Reports (or drops) what shares text or looks with evaluation data."""

    name = "contamination"

    def __init__(self, config: ContaminationConfig) -> None:
        """`config` has the evaluation data. Raises `UserError` where it cannot be read."""
        self._config = config
        self._prompts = [prompt for path in config.prompts for prompt in read_prompts(path)]
        self._pictures = [(path, _evaluation_hash(path)) for path in _image_files(config.images)]

    def score(self, unit: Unit) -> Score:
        """Perceptual hashes; nothing for text, which is in the manifest."""
        if unit.kind == "text" or not self._pictures:
            return {"hashes": []}
        return {"hashes": [f"{picture_hash(picture):016x}" for picture in pictures_of(unit, CLIP_HASHES)]}

    def settings(self) -> Mapping[str, Any]:
        """Whether pictures are hashed."""
        return {"pictures": bool(self._pictures), "frames": CLIP_HASHES}

    def summary(self, score: Score) -> Score:
        """Nothing; the decision tells."""
        return {}

    def comparer(self) -> Comparer:
        """An index of the evaluation data."""
        return _EvaluationIndex(self._prompts, self._pictures, self._config)


class _EvaluationIndex(Comparer):
    """Runs of tokens of the prompts by their length, and hashes of the pictures."""

    def __init__(
        self, prompts: Sequence[str], pictures: Sequence[tuple[Path, int]], config: ContaminationConfig
    ) -> None:
        self._drop = config.drop
        self._runs: dict[int, dict[tuple[str, ...], str]] = defaultdict(dict)
        self._whole: dict[tuple[str, ...], str] = {}
        for prompt in prompts:
            tokens = tokens_of(prompt)
            length = config.characters if is_spaceless(tokens) else config.words
            self._whole.setdefault(tuple(tokens), prompt)
            if len(tokens) >= SHORTEST_RUN:
                for run in shingles(tokens, length):
                    self._runs[len(run)].setdefault(run, prompt)
        self._pictures = HashIndex(config.max_distance)
        for path, value in pictures:
            self._pictures.add(value, path.name)

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Look the unit's texts and pictures up."""
        found = next(filter(None, map(self._text, unit.texts)), "") or self._picture(score)
        if not found:
            return Decision()
        if self._drop:
            return Decision(keep=False, reason=CONTAMINATED, detail=found)
        return Decision(reason=CONTAMINATED, detail=found)

    def _text(self, text: str) -> str:
        """What a text shares with a prompt; empty for nothing."""
        tokens = tokens_of(text)
        if not tokens:
            return ""
        if prompt := self._whole.get(tuple(tokens)):
            return f"is the prompt {prompt!r}"
        for length, runs in sorted(self._runs.items(), reverse=True):
            for run in shingles(tokens, length) if len(tokens) >= length else ():
                if run in runs:
                    shared = ("" if is_spaceless(run) else " ").join(run)
                    return f"shares {shared!r} with the prompt {runs[run]!r}"
        return ""

    def _picture(self, score: Score) -> str:
        """The evaluation image that a unit looks like; empty for none."""
        for value in score["hashes"]:
            for distance, name in self._pictures.near(int(value, 16)):
                return f"looks like the image {name} ({distance} of 64 bits differ)"
        return ""


def read_prompts(path: Path) -> Iterator[str]:
    """Prompts of a text file, one a line, or of a JSON Lines file.

    Raises:
        UserError: the file cannot be read, or a line has no prompt.
    """
    try:
        # Lines of the file: text may hold what else ends a line, as U+2028.
        lines = [line.decode() for line in path.read_bytes().split(b"\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the evaluation prompts ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json"):
            yield line.strip()
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not valid JSON ({error})") from error
        known = record if isinstance(record, dict) else {}
        values = [known[key] for key in PROMPT_KEYS if isinstance(known.get(key), str)][:1]
        if isinstance(several := known.get("captions"), list):
            values += [value for value in several if isinstance(value, str)]
        if not values:
            raise UserError(f"{path}:{number}: has none of the keys {', '.join(PROMPT_KEYS)}, captions")
        yield from values


def _image_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Image files, and those in folders, in order."""
    for path in paths:
        if path.is_dir():
            yield from sorted(
                part for part in path.rglob("*") if part.is_file() and not part.name.startswith(".")
            )
        else:
            yield path


def _evaluation_hash(path: Path) -> int:
    """Hash of one evaluation image."""
    try:
        return picture_hash(decode_image(path))
    except MediaError as error:
        raise UserError(f"{path}: the evaluation image {error}") from error
