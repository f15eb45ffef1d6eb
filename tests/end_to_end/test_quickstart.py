"""The quickstart, scaled down: one command from nothing to the summary and the report."""

from __future__ import annotations

import json
import re

import pytest

from tests.end_to_end.conftest import Quickstart
from tests.programs import start

pytestmark = pytest.mark.slow

SCORES = {"colour", "shape", "position", "caption_colour", "caption_shape", "motion"}
STAGES = [
    "corpus",
    "vision_tokenizer",
    "text_tokenizer",
    "tokenize_images",
    "tokenize_videos",
    "tokenize_texts",
    "training",
    "evaluation",
    "export",
    "compare_export",
]
SECTIONS = (
    "What it learned",
    "Loss per modality",
    "Original and reconstruction",
    "Text to image",
    "Text to video",
    "Continued clips",
    "Captions of unseen images",
)


def ran(out: str) -> list[str]:
    """Stages that did work, in order."""
    return re.findall(r"^== (\w+)$", out, re.MULTILINE)


def test_one_command_goes_the_whole_path(quickstart: Quickstart) -> None:
    assert ran(quickstart.ended.out) == STAGES
    summary = json.loads((quickstart.run / "summary.json").read_text())
    assert set(summary["accuracy"]) == set(summary["chance"]) == set(summary["interval_95"]) == SCORES
    assert {"colour", "shape", "position", "motion"} <= set(summary["reconstruction_accuracy"])
    for name, value in summary["accuracy"].items():
        low, high = summary["interval_95"][name]
        assert 0 <= low <= value <= high <= 1
        assert 0 < summary["chance"][name] < 1
    assert summary["original_accuracy"] >= 0.99
    assert summary["prompts"] == 4
    assert summary["export_max_abs_logit_difference"] < 1e-4
    assert set(summary["seconds"]) == {"total", *STAGES}
    assert {"python", "torch", "megatron-core"} <= set(summary["versions"])


def test_the_report_has_its_sections_and_pictures(quickstart: Quickstart) -> None:
    page = (quickstart.run / "report.html").read_text()
    assert "<h1>Scaled &lt;down&gt;</h1>" in page
    for section, following in zip(SECTIONS, (*SECTIONS[1:], "</html>"), strict=True):
        content = page.partition(f"<h2>{section}")[2].partition(f"<h2>{following}")[0]
        assert "<table" in content or "<svg" in content or "<img" in content, section
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", page)  # it stands alone


def test_the_console_shows_no_noise(quickstart: Quickstart) -> None:
    shown = quickstart.ended.out + quickstart.ended.err
    assert not [
        line for line in shown.splitlines() if re.search("warning|deprecat|traceback", line, re.IGNORECASE)
    ]


def test_a_rerun_skips_every_stage_and_a_changed_training_runs_with_what_follows(
    quickstart: Quickstart,
) -> None:
    before = json.loads((quickstart.run / "summary.json").read_text())["seconds"]
    again = start("tools/quickstart.py", "--config", quickstart.config)
    assert again.code == 0, again.err
    assert ran(again.out) == []
    after = json.loads((quickstart.run / "summary.json").read_text())["seconds"]
    assert {name: after[name] for name in STAGES} == {name: before[name] for name in STAGES}

    config = json.loads(quickstart.training.read_text())
    config["model"]["num_layers"] = 1  # a run of the earlier model cannot be resumed
    config["trainer"]["steps"] = 3
    quickstart.training.write_text(json.dumps(config))
    changed = start("tools/quickstart.py", "--config", quickstart.config)
    assert changed.code == 0, changed.err[-4000:]
    assert ran(changed.out) == STAGES[STAGES.index("training") :]
    lines = (quickstart.run / "training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
