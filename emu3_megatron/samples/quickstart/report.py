"""The report: one HTML file with curves, reconstructions, generated images and clips, and captions.

It reads only what the other stages left in the run folder, so it can be made again at any time.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from emu3_megatron.files import atomic_write
from emu3_megatron.samples.quickstart.charts import line_chart

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1f2328}
h1{margin-bottom:0}h2{margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #eee;text-align:right}
td:first-child,th:first-child{text-align:left}
svg text{font-size:11px;fill:#555}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(118px,1fr));gap:.8rem}
.grid figure{margin:0}.grid img{width:100%;image-rendering:pixelated;border:1px solid #ddd}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:2px}
figcaption{font-size:12px;line-height:1.3;color:#555}.right{color:#1a7f37}.wrong{color:#d1242f}
"""


def _picture(path: Path) -> str:
    """An <img> with the file inside."""
    kind = {".png": "image/png", ".gif": "image/gif"}[path.suffix]
    return f'<img src="data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" alt="">'


def _marks(expected: Mapping[str, str], read: Mapping[str, str]) -> str:
    """What the checker read, green where it is what was asked for."""
    spans = []
    for name, value in expected.items():
        seen = read.get(name) or "nothing"
        spans.append(f'<span class="{"right" if seen == value else "wrong"}">{escape(seen)}</span>')
    return " · ".join(spans)


def _accuracy_table(summary: Mapping[str, Any]) -> str:
    """Accuracies with interval, chance, and the tokenizer's ceiling."""
    rows = [
        "<tr><th>read by the checker</th><th>accuracy</th><th>95% interval</th><th>chance</th>"
        "<th>ceiling</th></tr>"
    ]
    for name, value in summary["accuracy"].items():
        low, high = summary["interval_95"][name]
        ceiling = summary["reconstruction_accuracy"].get(name)
        shown = "–" if ceiling is None else f"{ceiling:.1%}"
        rows.append(
            f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{value:.1%}</td>"
            f"<td>{low:.1%} to {high:.1%}</td><td>{summary['chance'][name]:.1%}</td><td>{shown}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _grid(
    items: Iterable[Mapping[str, Any]], folder: Path, figure: Callable[[Mapping[str, Any], Path], str]
) -> str:
    """Figures in a grid."""
    return f'<div class="grid">{"".join(figure(item, folder) for item in items)}</div>'


def _generated(item: Mapping[str, Any], folder: Path) -> str:
    return _figure(item, folder, item["prompt"])


def _compared(item: Mapping[str, Any], folder: Path) -> str:
    pair = _picture(folder / item["original"]) + _picture(folder / item["other"])
    note = escape(item.get("note", ""))
    if "expected" in item:
        note += "<br>" + _marks(item["expected"], item["read"])
    return f'<figure><div class="pair">{pair}</div><figcaption>{note}</figcaption></figure>'


def _captioned(item: Mapping[str, Any], folder: Path) -> str:
    return _figure(item, folder, item["caption"])


def _figure(item: Mapping[str, Any], folder: Path, text: str) -> str:
    """A picture, its text, and what the checker reads in it."""
    marks = _marks(item["expected"], item["read"])
    picture = _picture(folder / item["file"])
    return f"<figure>{picture}<figcaption>{escape(text)}<br>{marks}</figcaption></figure>"


def _curves(metrics: Path) -> str:
    """Loss per modality over the steps."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line]
    names = ("loss_text", "loss_vision")
    series = {
        name.replace("loss_", ""): [
            (line["step"], line[name]) for line in lines if line.get(name) is not None
        ]
        for name in names
    }
    return line_chart(series, "optimizer step")


def write_report(run: Path, metrics: Path, title: str) -> Path:
    """Write ``report.html`` into `run` from ``summary.json`` and ``evaluation/results.json``.

    Args:
        run: the quickstart's folder.
        metrics: the training run's metrics.jsonl.
        title: heading of the page.

    Returns:
        Path of the report.
    """
    summary = json.loads((run / "summary.json").read_text())
    folder = run / "evaluation"
    results = json.loads((folder / "results.json").read_text())
    total = summary["seconds"]["total"] / 60
    stages = ", ".join(f"{escape(k)} {v:.0f} s" for k, v in summary["seconds"].items() if k != "total")
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    sections = [
        f"<h1>{escape(title)}</h1><p>{summary['prompts']} prompts of combinations that training never "
        f"showed. {total:.1f} minutes in all ({stages}).</p>",
        "<h2>What it learned</h2>" + _accuracy_table(summary),
        "<p>Ceiling: the same checker on the vision tokenizer's plain reconstructions.</p>",
        "<h2>Loss per modality</h2>" + _curves(metrics),
        "<h2>Original and reconstruction</h2>" + _grid(results["reconstructions"], folder, _compared),
        "<h2>Text to image</h2>" + _grid(results["images"][:48], folder, _generated),
        "<h2>Text to video</h2>" + _grid(results["clips"], folder, _generated),
        "<h2>Continued clips: original, and the model's second half</h2>"
        + _grid(results["continuations"][:24], folder, _compared),
        "<h2>Captions of unseen images</h2>" + _grid(results["captions"][:48], folder, _captioned),
        f"<p>Text-only document written by the model: <q>{escape(results['text'])}</q></p>",
        "<p>Exported to Hugging Face: largest logit difference "
        f"{summary['export_max_abs_logit_difference']:.2g}. Versions: {escape(versions)}.</p>",
    ]
    page = "<!doctype html><html lang=en><meta charset=utf-8>"
    page += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    path = run / "report.html"
    with atomic_write(path) as file:
        file.write((page + "\n".join(sections) + "</html>\n").encode())
    return path
