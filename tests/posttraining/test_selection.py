"""Data is chosen by the average of several scores, whatever their scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu3_megatron.curation.manifest import parse_line
from emu3_megatron.data.takedown import read_takedown
from emu3_megatron.errors import UserError
from emu3_megatron.posttraining.conversation_files import ConversationInputs
from emu3_megatron.posttraining.selection import SelectionConfig, averaged, select
from emu3_megatron.tokenization.inputs import JsonLinesInput
from emu3_megatron.tokenization.text_inputs import LinePart

SCORES = np.array([[0.20, 5.0], [0.30, 1.0], [0.25, 9.0], [0.22, 4.0]])


def write(path: Path, entries: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def manifest(folder: Path) -> Path:
    return write(
        folder / "raw" / "m.jsonl",
        [
            {"id": f"s{n}", "image": f"{n}.png", "caption": "a", "scores": {"hps": a, "mps": b}}
            for n, (a, b) in enumerate(SCORES.tolist())
        ],
    )


def run(folder: Path, **options: Any) -> list[dict[str, Any]]:
    settings = {"manifest": (manifest(folder),), "output": folder / "chosen.jsonl", "scores": ("hps", "mps")}
    select(SelectionConfig(**{**settings, **options}))
    return [json.loads(line) for line in (folder / "chosen.jsonl").read_text().splitlines()]


def test_the_average_does_not_depend_on_units() -> None:
    scaled = SCORES * [100.0, 0.5] + [3.0, -7.0]
    for scale in ("deviation", "rank"):
        np.testing.assert_allclose(averaged(SCORES, scale), averaged(scaled, scale), atol=1e-12)
    np.testing.assert_allclose(averaged(SCORES, "none"), SCORES.mean(axis=1))


def test_ranks_count_equal_scores_alike() -> None:
    ranks = averaged(np.array([[1.0], [2.0], [2.0], [9.0]]), "rank")
    np.testing.assert_allclose(ranks, [0.125, 0.5, 0.5, 0.875])


def test_the_best_share_is_kept_in_order_and_paths_still_lead_to_the_files(tmp_path: Path) -> None:
    kept = run(tmp_path, share=0.5)
    expected = sorted(np.argsort(-averaged(SCORES, "deviation"))[:2].tolist())
    assert [entry["id"] for entry in kept] == [f"s{n}" for n in expected]
    assert [entry["image"] for entry in kept] == [f"raw/{n}.png" for n in expected]
    assert kept[0]["scores"]["preference"] == pytest.approx(
        averaged(SCORES, "deviation")[expected[0]], abs=1e-5
    )


@pytest.mark.parametrize("broken", ["Infinity", "-Infinity", "NaN", "1" * 400, "true", "null"])
@pytest.mark.parametrize("scale", ["deviation", "rank", "none"])
def test_a_score_that_is_no_finite_number_costs_its_entry(tmp_path: Path, broken: str, scale: str) -> None:
    entries = [{"id": str(n), "image": f"{n}.png", "caption": "a", "scores": {"hps": n}} for n in range(10)]
    path = write(tmp_path / "m.jsonl", entries)
    path.write_text(path.read_text().replace('"hps": 3', f'"hps": {broken}'))
    options: dict[str, Any] = {"manifest": (path,), "scores": ("hps",), "scale": scale, "share": 0.5}
    with pytest.raises(UserError, match=r"m\.jsonl:4 lacks a finite hps"):
        run(tmp_path, **options)
    kept = run(tmp_path, **options, skip_unscored=True)
    assert [entry["id"] for entry in kept] == ["5", "6", "7", "8", "9"]


def test_a_bound_keeps_what_reaches_it_and_names_the_rest(tmp_path: Path) -> None:
    kept = run(tmp_path, least=2.6, scale="none", left_out=tmp_path / "rest.txt")
    assert [entry["id"] for entry in kept] == ["s0", "s2"]
    assert (tmp_path / "rest.txt").read_text() == "s1\ns3\n"


def test_what_is_left_out_is_named_as_every_other_program_names_it(tmp_path: Path) -> None:
    """0 is an id; without one an entry is called by its file and line."""
    ids: list[Any] = [0, "0a", 7, "", None, False, "\ud800", 1.5, [], "übung"]
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = write(
        tmp_path / "m.jsonl",
        [{"id": name, "text": "t", "scores": {"hps": 1}, "conversations": said} for name in ids],
    )
    select(
        SelectionConfig(
            manifest=(path,),
            output=tmp_path / "o.jsonl",
            scores=("hps",),
            least=2,
            scale="none",
            left_out=tmp_path / "rest.txt",
        )
    )
    left = (tmp_path / "rest.txt").read_text(encoding="utf-8").splitlines()
    assert left[0] == "0"
    assert [left[n] for n in (3, 4, 7, 8)] == ["m.jsonl:4", "m.jsonl:5", "m.jsonl:8", "m.jsonl:9"]
    assert [entry.id for entry in JsonLinesInput(path).entries(0, len(ids))] == left
    texts = [document.name for document in LinePart(path, 0, None).documents("text")]
    assert [texts[n] for n in (0, 1, 2, 5, 6, 9)] == [left[n] for n in (0, 1, 2, 5, 6, 9)]  # others: by byte
    inputs = ConversationInputs((path,), None)
    assert [each.id for each in inputs.entries(0, len(ids))] == left
    lines = path.read_bytes().splitlines()
    raw = [parse_line(line, f"m.jsonl:{n}", tmp_path) for n, line in enumerate(lines, 1)]
    assert [unit.id for unit in raw] == left
    assert set(read_takedown(tmp_path / "rest.txt")) == set(left)


@pytest.mark.parametrize("name", ["#1", " a", "a\u2028b", "a\nb", " "])
def test_a_name_that_a_takedown_list_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m.jsonl", [{"id": name, "text": "t", "scores": {"hps": 1}}])
    settings: dict[str, Any] = {"manifest": (path,), "output": tmp_path / "o.jsonl", "scores": ("hps",)}
    with pytest.raises(UserError, match="cannot be named in left_out") as caught:
        select(SelectionConfig(**settings, least=2, scale="none", left_out=tmp_path / "rest.txt"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o.jsonl").exists()
    select(SelectionConfig(**settings, least=1, scale="none", left_out=tmp_path / "rest.txt"))


def test_entries_without_scores_are_named_or_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{"id": "a", "scores": {"hps": 1}}, {"id": "b", "scores": {"mps": 2}}])
    settings: dict[str, Any] = {"manifest": (path,), "output": tmp_path / "o.jsonl", "scores": ("hps",)}
    with pytest.raises(UserError, match=r"m\.jsonl:2 lacks a finite hps"):
        select(SelectionConfig(**settings, share=1.0))
    result = select(SelectionConfig(**settings, share=1.0, skip_unscored=True))
    assert (result.entries, result.chosen, result.unscored) == (2, 1, 1)


@pytest.mark.parametrize("options", [{}, {"share": 0.5, "least": 1.0}, {"share": 0.0}, {"share": 1.5}])
def test_options_must_make_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="share"):
        SelectionConfig(manifest=(tmp_path,), output=tmp_path, **options)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "a", "scores": {"hps": 1}}\n{broken\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2: is not valid JSON"):
        select(SelectionConfig(manifest=(path,), output=tmp_path / "o", scores=("hps",), share=1.0))
