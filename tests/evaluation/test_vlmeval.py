"""VLMEvalKit's files: datasets in, predictions out, results back."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation.vlmeval import (
    Question,
    answer_dataset,
    read_dataset,
    read_results,
    write_configuration,
)

PICTURES = [bytes([number]) * 90 for number in range(3)]
ENCODED = [base64.b64encode(picture).decode() for picture in PICTURES]


def dataset(path: Path, *rows: dict[str, str]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def choices(index: int, image: str, **more: str) -> dict[str, str]:
    options = {"A": "one", "B": 'a "quoted"\ttab', "C": ""}
    return {"index": str(index), "image": image, "question": "how many?", "hint": "", **options, **more}


def test_questions_have_the_wording_and_pictures_of_the_toolkit(tmp_path: Path) -> None:
    """Options and hint as the toolkit puts them; a picture may stand in another row, or be several."""
    rows = [choices(7, ENCODED[0]), choices(8, "7", hint="look"), choices(9, str([ENCODED[1], ENCODED[2]]))]
    first, second, third = read_dataset(dataset(tmp_path / "MMBench_DEV_EN.tsv", *rows))
    assert first.text == (
        'Question: how many?\nOptions:\nA. one\nB. a "quoted"\ttab\n'
        "Please select the correct answer from the options above. \n"
    )
    assert second.text == f"Hint: look\n{first.text}"
    assert (first.images, second.images, third.images) == (
        (PICTURES[0],),
        (PICTURES[0],),
        tuple(PICTURES[1:]),
    )
    (plain,) = read_dataset(
        dataset(tmp_path / "POPE.tsv", {"index": "1", "image": ENCODED[0], "question": "a?"})
    )
    assert plain.text == "a?"
    (short,) = read_dataset(
        dataset(tmp_path / "DocVQA_VAL.tsv", {"index": "1", "image": ENCODED[0], "question": "a?"})
    )
    assert short.text == "a?\nAnswer the question using a single word or phrase."


def test_answers_go_on_where_they_stopped(tmp_path: Path) -> None:
    """The predictions are the dataset without its pictures; an interrupted run asks the rest only."""
    path = dataset(tmp_path / "MMStar.tsv", *(choices(index, ENCODED[0]) for index in range(5)))
    asked: list[str] = []

    def answer(questions: Sequence[Question]) -> list[str]:
        asked.extend(question.row["index"] for question in questions)
        if asked[-1] == "4" and len(asked) == 5:
            raise KeyboardInterrupt
        return [f"B\n{question.row['index']}" for question in questions]

    with pytest.raises(KeyboardInterrupt):
        answer_dataset(path, "emu", tmp_path, answer, batch=2)
    target = answer_dataset(path, "emu", tmp_path, answer, batch=2)
    assert asked == ["0", "1", "2", "3", "4", "4"]
    assert target == tmp_path / "emu" / "emu_MMStar.tsv"
    with open(target, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["prediction"] for row in rows] == [f"B\n{index}" for index in range(5)]
    assert "image" not in rows[0]
    assert rows[0]["B"] == 'a "quoted"\ttab'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"index": "1", "question": "a"}, "no dataset"),
        ({"index": "1", "image": "1", "question": "a"}, "not base64|no image"),
        ({"index": "1", "image": "@" * 80, "question": "a"}, "not base64"),
        ({"index": "1", "image": "[" * 80, "question": "a"}, "not base64"),
        ({"index": "1", "image": "5", "question": "a"}, "no image"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, row: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_dataset(dataset(tmp_path / "x.tsv", row))


def test_results_come_back_in_percent(tmp_path: Path) -> None:
    """As the toolkit writes them: fractions for choices, percent for the others, points for OCRBench."""
    files = {
        "emu_MMBench_DEV_EN_acc.csv": '"split","Overall","AR"\n"dev","0.585","0.5"\n',
        "emu_MMMU_DEV_VAL_acc.csv": '"split","Overall"\n"dev","0.25"\n"validation","0.316"\n',
        "emu_ChartQA_TEST_acc.csv": '"test_human","Overall"\n"60.0","68.6"\n',
        "emu_POPE_score.csv": '"split","Overall","acc"\n"random","86.0","1"\n"Overall","85.2","2"\n',
        "emu_MMVet_gpt-4-turbo_score.csv": '"Category","tot","acc"\n"rec","5","30"\n"Overall","9","37.2"\n',
        "emu_OCRBench_score.json": json.dumps({"Final Score": 687, "Final Score Norm": 68.7}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    scores = read_results([tmp_path / name for name in files])
    assert scores == pytest.approx(
        {
            "MMBench_DEV_EN": 58.5, "MMMU_DEV_VAL": 31.6, "ChartQA_TEST": 68.6, "POPE": 85.2, "MMVet": 37.2,
            "OCRBench": 687,
        }
    )  # fmt: skip
    (tmp_path / "other_acc.csv").write_text("a\n1\n")
    (tmp_path / "emu_POPE_acc.csv").write_text("a\n1\n")
    for name, reason in (("other_acc.csv", "its name"), ("emu_POPE_acc.csv", "no overall")):
        with pytest.raises(UserError, match=reason):
            read_results([tmp_path / name])


def test_the_configuration_names_our_server(tmp_path: Path) -> None:
    write_configuration(tmp_path / "c.json", "emu", "http://host:8000/", ["POPE", "MMStar"], 64)
    config = json.loads((tmp_path / "c.json").read_text())
    assert config["model"]["emu"]["api_base"] == "http://host:8000/v1/chat/completions"
    assert config["data"]["POPE"] == {"class": "ImageYORNDataset", "dataset": "POPE"}
    assert config["data"]["MMStar"]["class"] == "ImageMCQDataset"
