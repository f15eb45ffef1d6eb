"""What benchmarks ask for, read from files in their own formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation.tasks import READERS, Task, load_tasks, write_tasks


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


GENEVAL = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}


def test_prompts_from_text_and_json_lines(tmp_path: Path) -> None:
    read = READERS["prompts"]
    text = read(written(tmp_path / "p.txt", "a cat\n\n a dog \n"), None)
    assert [(task.prompt, task.paths) for task in text] == [
        ("a cat", ("images/00000-0.png",)),
        ("a dog", ("images/00001-0.png",)),
    ]
    (task,) = read(written(tmp_path / "p.jsonl", lines({"caption": "a cow", "id": 7})), 2)
    assert (task.prompt, task.paths, task.about["id"]) == (
        "a cow",
        ("images/00000-0.png", "images/00000-1.png"),
        7,
    )


def test_geneval_has_a_folder_a_prompt(tmp_path: Path) -> None:
    """The names that GenEval's evaluator looks for: digits, ``samples``, digits and ``.png``."""
    tasks = READERS["geneval"](written(tmp_path / "e.jsonl", lines(GENEVAL, GENEVAL)), None)
    assert tasks[1].paths == tuple(f"00001/samples/000{number}.png" for number in range(4))
    assert {key: tasks[0].about[key] for key in GENEVAL} == GENEVAL


def test_dpg_has_one_sheet_a_prompt(tmp_path: Path) -> None:
    written(tmp_path / "b7.txt", "a long prompt\n")
    written(tmp_path / "a1.txt", "another")
    first, second = READERS["dpg"](tmp_path, None)
    assert (first.paths, second.paths, second.prompt) == (
        ("images/a1.png",),
        ("images/b7.png",),
        "a long prompt",
    )
    assert first.grid
    assert first.samples == 4


def test_vbench_names_clips_by_prompt(tmp_path: Path) -> None:
    """Five clips, 25 for temporal flickering; a prompt of several entries is drawn once."""
    entries = [
        {"prompt_en": "a cat, running", "dimension": ["object_class"]},
        {"prompt_en": "a lake", "dimension": ["scene"]},
        {"prompt_en": "a lake", "dimension": ["temporal_flickering"]},
    ]
    cat, lake = READERS["vbench"](written(tmp_path / "info.json", json.dumps(entries)), None)
    assert cat.paths == tuple(f"videos/a cat, running-{number}.mp4" for number in range(5))
    assert cat.video
    assert lake.samples == len(lake.paths) == 25
    assert lake.about["dimension"] == ["scene", "temporal_flickering"]


def test_the_sample_world_has_stills_and_clips(tmp_path: Path) -> None:
    rows = [
        {"caption": "a", "image": "x.png", "attributes": {"colour": "red"}},
        {"caption": "b", "video": "x.mp4", "attributes": {"colour": "red"}},
    ]
    still, clip = READERS["sample-world"](written(tmp_path / "m.jsonl", lines(*rows)), None)
    assert (still.video, still.paths) == (False, ("images/00000-0.png",))
    assert (clip.video, clip.paths) == (True, ("clips/00001-0.mp4",))


def test_tasks_come_back_as_they_were(tmp_path: Path) -> None:
    tasks = [
        Task("a", ("x.png",), 4, grid=True),
        Task("ü", ("1.mp4", "2.mp4"), 2, video=True, about={"tag": "x"}),
    ]
    write_tasks(tmp_path, tasks)
    assert load_tasks(tmp_path) == tasks


@pytest.mark.parametrize(
    ("suite", "name", "text", "reason"),
    [
        ("prompts", "p.txt", "\n", "no prompts"),
        ("prompts", "p.jsonl", "[1]\n", "one object a line"),
        ("prompts", "p.jsonl", '{"text": "a"}\n', "no prompt"),
        ("geneval", "p.jsonl", '{"prompt": "a"}\n', "evaluation_metadata"),
        ("sample-world", "p.jsonl", '{"prompt": "a"}\n', "no attributes"),
        ("vbench", "p.json", "{}", "holds no prompts"),
        ("vbench", "p.json", "[1]", "VBench_full_info"),
        ("vbench", "p.json", '[{"prompt_en": "a/b", "dimension": ["scene"]}]', "file name"),
        ("vbench", "p.json", json.dumps([{"prompt_en": "a" * 300, "dimension": []}]), "file name"),
        ("dpg", "p.txt", "a", "no folder"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, suite: str, name: str, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        READERS[suite](written(tmp_path / name, text), None)


def test_a_number_of_samples_that_no_sheet_has_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "a")
    with pytest.raises(UserError, match="1 or 4"):
        READERS["dpg"](tmp_path, 3)
    with pytest.raises(UserError, match="generate"):
        load_tasks(tmp_path)
