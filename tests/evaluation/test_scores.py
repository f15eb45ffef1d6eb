"""Scores from the results of the benchmarks' own tools, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation.published import TABLES
from emu3_megatron.evaluation.report import write_report
from emu3_megatron.evaluation.scores import (
    VBENCH_RANGES,
    read_dpg,
    read_geneval,
    read_vbench,
    write_scores,
)


def test_geneval(tmp_path: Path) -> None:
    rows = [{"tag": "single_object", "correct": True}, {"tag": "position", "correct": False}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_geneval([tmp_path / "r.jsonl"]) == {"overall": 0.5, "single_object": 1.0, "position": 0.0}
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="GenEval's results"):
        read_geneval([tmp_path / "bad.jsonl"])


def test_dpg(tmp_path: Path) -> None:
    """The end of the file that compute_dpg_bench.py writes, after its line a picture."""
    path = tmp_path / "dpg-bench_x_results.txt"
    path.write_text(
        "images/a.png, 1.0, 1.0\nModel: emu\nL1 category scores:\n\tentity: 86.5\n\tglobal: 85.25\n"
        "L2 category scores:\n\tentity - whole: 90.0\nImage path: x\nSave results to: y\n"
        "DPG-Bench score: 80.6\n"
    )
    assert read_dpg([path]) == {"overall": 80.6, "entity": 86.5, "global": 85.25}
    path.write_text("images/a.png, 1.0\n")
    with pytest.raises(UserError, match="DPG-Bench score"):
        read_dpg([path])


def test_vbench(tmp_path: Path) -> None:
    """A file a dimension or all in one; totals only of the whole. The best values of all give 100."""
    whole = {name: [high, []] for name, (_, high) in VBENCH_RANGES.items()}
    (tmp_path / "all.json").write_text(json.dumps(whole))
    (tmp_path / "one.json").write_text(json.dumps({"scene": [0.3711, [{"video_path": "a"}]]}))
    scores = read_vbench([tmp_path / "all.json"])
    assert [scores[key] for key in ("quality", "semantic", "total")] == pytest.approx([100, 100, 100])
    assert read_vbench([tmp_path / "one.json"]) == pytest.approx({"scene": 37.11})
    dull = {**whole, "dynamic_degree": [0.0, []], "scene": [0.0, []]}
    (tmp_path / "dull.json").write_text(json.dumps(dull))
    scores = read_vbench([tmp_path / "dull.json"])
    assert scores["quality"] == pytest.approx(100 * 6 / 6.5)
    assert scores["semantic"] == pytest.approx(100 * 8 / 9)
    assert scores["total"] == pytest.approx((4 * scores["quality"] + scores["semantic"]) / 5)
    for text in ("[]", '{"scene": 1}', '{"other": [1]}', "x"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="VBench"):
            read_vbench([tmp_path / "bad.json"])


def test_published_rows_have_known_columns() -> None:
    for table in TABLES.values():
        assert table.rows["Emu3"].keys() == table.columns.keys()
        assert all(row.keys() <= table.columns.keys() for row in table.rows.values())


def test_the_report_puts_scores_beside_published_ones(tmp_path: Path) -> None:
    """Every suite, scores that the paper does not have, and markup in names."""
    for suite, table in TABLES.items():
        first = next(iter(table.columns))
        write_scores(tmp_path / suite, suite, "<mine>", {first: 0.123, "extra_score": 45.678}, [])
        write_scores(tmp_path / suite, suite, "<mine>", {"later": 1.5}, [])
    write_scores(tmp_path / "world", "sample-world", "mine", {"colour": 0.934}, [])
    folders = [tmp_path / name for name in (*TABLES, "world")]
    write_report(tmp_path / "report.html", folders)
    page = (tmp_path / "report.html").read_text()
    for table in TABLES.values():
        assert table.title in page
        assert all(model in page for model in table.rows)
    assert page.count("&lt;mine&gt;") == len(TABLES)
    assert "<mine>" not in page
    for text in ("<td>0.123</td>", "<td>45.68</td>", "<td>1.50</td>", "<td>0.934</td>", "<td>80.60</td>"):
        assert text in page
    with pytest.raises(UserError, match="score"):
        write_report(tmp_path / "report.html", [tmp_path / "nothing"])
