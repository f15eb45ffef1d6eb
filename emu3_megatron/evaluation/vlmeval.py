"""VLMEvalKit (github.com/open-compass/VLMEvalKit): answers to its datasets, its configuration, its results.

A dataset is a TSV with ``index``, ``image`` (base64, a list of such, or the index of the row that has it), a
``question`` and maybe ``hint`` and options ``A``, ``B``, ...; predictions are the same table with
``prediction`` instead of ``image``, named ``MODEL_DATASET.tsv`` (docs/en/Development.md, vlmeval/inference.py
and vlmeval/smp/file.py for ``PRED_FORMAT=tsv``).
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import json
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write

_LONGEST_REFERENCE = 64
"""Characters: a shorter ``image`` is the index of another row."""


COLUMNS = {
    "seed": "SEEDBench_IMG", "ocrbench": "OCRBench", "mmvet": "MMVet", "pope": "POPE",
    "gqa": "GQA_TestDev_Balanced", "sqa": "ScienceQA_TEST", "textvqa": "TextVQA_VAL",
    "chartqa": "ChartQA_TEST", "docvqa": "DocVQA_VAL", "infovqa": "InfoVQA_VAL", "ai2d": "AI2D_TEST",
    "rwqa": "RealWorldQA", "mmmu": "MMMU_DEV_VAL", "mmb": "MMBench_DEV_EN",
}  # fmt: skip
"""Columns of the paper's table, and the datasets of VLMEvalKit that they name (VQAv2 has none)."""


@dataclass(frozen=True)
class Question:
    """One row of a dataset."""

    row: dict[str, str]
    """As in the file, without ``image``."""
    images: tuple[bytes, ...]
    """Files."""
    text: str
    """What the model is asked: VLMEvalKit's own wording."""


def read_dataset(path: Path) -> list[Question]:
    """The questions of a dataset's TSV. Raises `UserError` for another kind of file."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    if not rows or not {"index", "image", "question"} <= rows[0].keys():
        raise UserError(f"{path} is no dataset of VLMEvalKit: a TSV with index, image and question")
    by_index = {row["index"]: row["image"] for row in rows}
    questions = []
    for row in rows:
        held = row["image"]
        if len(held) <= _LONGEST_REFERENCE:
            held = by_index.get(held, "")
        try:
            parts = ast.literal_eval(held) if held.startswith("[") else [held]
            images = tuple(base64.b64decode(part, validate=True) for part in parts)
        except (ValueError, SyntaxError, binascii.Error) as error:
            raise UserError(f"{path}, index {row['index']}: its image is not base64 ({error})") from error
        if not all(images):
            raise UserError(f"{path}, index {row['index']}: no image")
        shown = {key: row[key] for key in row if key != "image"}
        questions.append(Question(shown, images, wording(row, path.stem)))
    return questions


def wording(row: dict[str, str], dataset: str) -> str:
    """The text of a question: hint, question and options, as VLMEvalKit puts them to every model."""
    if _class_of(dataset) == "ImageVQADataset":
        return f"{row['question']}\nAnswer the question using a single word or phrase."
    options = [f"{letter}. {row[letter]}" for letter in string.ascii_uppercase if row.get(letter)]
    if not options:
        return row["question"]
    lines = [f"Hint: {row['hint']}"] if row.get("hint") else []
    lines += [f"Question: {row['question']}", "Options:", *options]
    return "\n".join([*lines, "Please select the correct answer from the options above. \n"])


def answer_dataset(
    path: Path, name: str, folder: Path, answer: Callable[[Sequence[Question]], list[str]], *, batch: int = 32
) -> Path:
    """Answer a dataset; questions that the file of predictions already answers are not asked again.

    Args:
        path: The dataset's TSV; its name is the dataset's.
        name: The model's, in the name of the result.
        folder: Where ``NAME/NAME_DATASET.tsv`` goes.
        answer: Answers questions.
        batch: Questions at a time; each batch is kept.

    Returns:
        The file of predictions.
    """
    questions = read_dataset(path)
    target = folder / name / f"{name}_{path.stem}.tsv"
    done: dict[str, str] = {}
    if target.is_file():
        with open(target, encoding="utf-8", newline="") as stream:
            done = {row["index"]: row["prediction"] for row in csv.DictReader(stream, delimiter="\t")}
    open_questions = [question for question in questions if question.row["index"] not in done]
    for first in range(0, len(open_questions), batch):
        part = open_questions[first : first + batch]
        for question, text in zip(part, answer(part), strict=True):
            done[question.row["index"]] = text
        _write_predictions(target, questions, done)
    return target


def _write_predictions(path: Path, questions: Sequence[Question], done: dict[str, str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*questions[0].row, "prediction"], delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n"
    )
    writer.writeheader()
    for question in questions:
        if (index := question.row["index"]) in done:
            writer.writerow({**question.row, "prediction": done[index]})
    with atomic_write(path) as stream:
        stream.write(text.getvalue().encode())


def write_configuration(path: Path, name: str, address: str, datasets: Sequence[str], tokens: int) -> None:
    """The JSON for ``run.py --config``: VLMEvalKit asks our server (`tools/serve.py`) as it does OpenAI's."""
    model = {
        "class": "GPT4V", "model": name, "api_base": f"{address.rstrip('/')}/v1/chat/completions",
        "key": "sk-none", "temperature": 0, "max_tokens": tokens, "img_size": -1, "retry": 3,
    }  # fmt: skip
    data = {dataset: {"class": _class_of(dataset), "dataset": dataset} for dataset in datasets}
    with atomic_write(path) as stream:
        stream.write(json.dumps({"model": {name: model}, "data": data}, indent=2).encode())


def read_results(files: Sequence[Path]) -> dict[str, float]:
    """Scores by dataset from VLMEvalKit's result files, in percent (OCRBench in points).

    It writes ``MODEL_DATASET_acc.csv`` (``Overall``; of choices a fraction, else percent), ``..._score.csv``
    (``Overall`` or ``acc``, percent) and ``..._score.json`` (``Final Score``).

    Raises:
        UserError: a file without a known dataset or score.
    """
    scores: dict[str, float] = {}
    for path in files:
        known = [name for name in COLUMNS.values() if f"_{name}_" in path.name]
        if not known:
            raise UserError(f"{path}: its name holds none of {', '.join(sorted(COLUMNS.values()))}")
        dataset = max(known, key=len)
        scores[dataset] = _score_of(path)
        if _class_of(dataset) in ("ImageMCQDataset", "MMMUDataset"):
            scores[dataset] *= 100
    return scores


def _score_of(path: Path) -> float:
    """The overall score that a result file states."""
    try:
        if path.suffix == ".json":
            return float(json.loads(path.read_text("utf-8"))["Final Score"])
        with open(path, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        for row in rows:
            if row.get("Category") == "Overall":
                return float(row["acc"])
        validation = [row for row in rows if row.get("split") in ("validation", "Overall")]
        return float((validation or rows)[0]["Overall"])
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} states no overall score ({error!r})") from error


def _class_of(dataset: str) -> str:
    """VLMEvalKit's class for a dataset."""
    classes = {
        "OCRBench": "OCRBench", "MMVet": "MMVet", "POPE": "ImageYORNDataset", "MMMU_DEV_VAL": "MMMUDataset",
    }  # fmt: skip
    words = ("GQA_TestDev_Balanced", "TextVQA_VAL", "ChartQA_TEST", "DocVQA_VAL", "InfoVQA_VAL")
    return "ImageVQADataset" if dataset in words else classes.get(dataset, "ImageMCQDataset")
