"""Scores of candidates by a program, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write
from emu3_megatron.posttraining.preferences.candidates import SCORES, CandidateFolder
from emu3_megatron.posttraining.preferences.scores import Judgement, read_judgements

Scorer = Callable[[str, npt.NDArray[np.uint8]], Mapping[str, float]]
"""Prompt and picture (uint8 RGB ``[H, W, 3]``) to criteria by name; more is better."""


def score_candidates(
    folder: CandidateFolder,
    scorer: Scorer,
    name: str,
    *,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Append the judgements of `scorer` to the folder's scores, for prompts that it has not judged yet.

    A prompt's lines are added in one write; what a kill cut short is taken out first and judged again.

    Args:
        folder: The candidates.
        scorer: The program.
        name: The voter it stands for.
        progress: Called with the number of prompts just finished.

    Returns:
        Number of prompts judged.
    """
    path = folder.path / SCORES
    judged = _mend(path, name)
    count = 0
    with open(path, "a", encoding="utf-8") as stream:
        for number in folder.finished():
            places = range(folder.count(number))
            if not {(number, place) for place in places} <= judged:
                lines = [_judge(folder, scorer, name, number, place).to_line() for place in places]
                stream.write("".join(lines))
                stream.flush()
                count += 1
            if progress is not None:
                progress(1)
    return count


def _judge(folder: CandidateFolder, scorer: Scorer, name: str, number: int, place: int) -> Judgement:
    path = folder.image(number, place)
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete the prompt's .npz, sample again"
        ) from error
    prompt = folder.prompts[number]
    return Judgement(number, place, name, {key: float(v) for key, v in scorer(prompt, pixels).items()})


def _mend(path: Path, name: str) -> set[tuple[int, int]]:
    """What `name` has judged; a last line without its end is cut off."""
    if not path.is_file():
        return set()
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with atomic_write(path) as stream:
            stream.write(data[: data.rfind(b"\n") + 1])
    return {(each.prompt, each.candidate) for each in read_judgements(path)[0] if each.voter == name}
