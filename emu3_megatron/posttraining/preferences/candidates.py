"""Candidates: several images of each prompt, with their tokens, from which people or a scorer choose.

::

    FOLDER/settings.json             how they were drawn, of which prompts, and what their ids mean
    FOLDER/candidates/000000.npz     token ids of the prompt and of each candidate's span, and seeds
    FOLDER/images/000000-0.png       the same, to look at
    FOLDER/scores.jsonl              judgements of programs, a line each, see `scores`
    FOLDER/votes.jsonl               judgements of people, see `voting`

A prompt's ``.npz`` is written last, so a folder can be filled by several processes, killed and filled on.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write, write_json_atomic
from emu3_megatron.media import write_png
from emu3_megatron.vocabulary import Vocabulary

SETTINGS = "settings.json"
SCORES, VOTES = "scores.jsonl", "votes.jsonl"

IDENTITY = (
    "dialect_name",
    "dialect_fingerprint",
    "text_tokenizer_fingerprint",
    "vision_tokenizer_fingerprint",
)
"""What a dataset's manifest states of its ids, besides the vocabulary."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of one prompt."""

    prompt_ids: npt.NDArray[np.int32]
    """The prompt, without BOS."""
    spans: list[npt.NDArray[np.int32]]
    """Each candidate's span, complete with its control tokens: as it was sampled."""
    seeds: list[int]
    """Of each."""


class CandidateFolder:
    """A folder of candidates.

    Args:
        path: The folder; `create` makes it.

    Raises:
        UserError: there are no candidates in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.settings: dict[str, Any] = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: no folder of candidates ({error}); make one with tools/make_preferences.py sample"
            ) from error

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        prompts: Sequence[str],
        vocabulary: Vocabulary,
        identity: Mapping[str, str],
        drawing: Mapping[str, Any],
    ) -> CandidateFolder:
        """Make a folder, or open the one that was made with the same settings.

        Args:
            path: The folder.
            prompts: All prompts, in order.
            vocabulary: Of the ids.
            identity: By the names of `IDENTITY`.
            drawing: Everything that determines what is drawn, as JSON values.

        Raises:
            UserError: the folder was made with other settings; names them.
        """
        settings = {
            "vocabulary": vocabulary.to_dict(),
            "identity": dict(identity),
            "drawing": dict(drawing),
            "prompts": list(prompts),
        }
        if (path / SETTINGS).is_file():
            known = cls(path).settings
            old, new = ({**s, **s["drawing"]} for s in (known, json.loads(json.dumps(settings))))
            changed = sorted(key for key in new.keys() | old.keys() if old.get(key) != new.get(key))
            if changed:
                raise UserError(
                    f"{path} was begun with other settings ({', '.join(changed)}); set them back, or choose "
                    "another folder"
                )
        else:
            write_json_atomic(path / SETTINGS, settings)
        return cls(path)

    @property
    def prompts(self) -> list[str]:
        """All prompts, in order."""
        return list(self.settings["prompts"])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of the ids."""
        return Vocabulary(**self.settings["vocabulary"])

    def finished(self) -> list[int]:
        """Numbers of the prompts whose candidates are all there, ascending."""
        return [number for number in range(len(self.settings["prompts"])) if self._file(number).is_file()]

    def image(self, number: int, candidate: int) -> Path:
        """The picture of a candidate."""
        return self.path / "images" / f"{number:06d}-{candidate}.png"

    def add(self, number: int, candidates: Candidates, pictures: Iterable[npt.NDArray[np.uint8]]) -> None:
        """Write the candidates of a prompt; the tokens last."""
        for candidate, picture in enumerate(pictures):
            write_png(self.image(number, candidate), picture)
        arrays: dict[str, npt.NDArray[Any]] = {
            "prompt": candidates.prompt_ids,
            "seeds": np.array(candidates.seeds),
            **{f"span-{place}": span for place, span in enumerate(candidates.spans)},
        }
        with atomic_write(self._file(number)) as stream:
            np.savez(stream, allow_pickle=False, **arrays)

    def read(self, number: int) -> Candidates:
        """The candidates of a finished prompt.

        Raises:
            UserError: the file is damaged.
        """
        path = self._file(number)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                seeds = arrays["seeds"].tolist()
                spans = [arrays[f"span-{place}"] for place in range(len(seeds))]
                return Candidates(arrays["prompt"], spans, seeds)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it and sample again") from error

    def count(self, number: int) -> int:
        """Number of candidates of a finished prompt."""
        return len(self.read(number).seeds)

    def _file(self, number: int) -> Path:
        return self.path / "candidates" / f"{number:06d}.npz"
