"""The report: one HTML page with one's own scores beside the published ones, and some of the pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation.published import TABLES
from emu3_megatron.evaluation.scores import SCORES
from emu3_megatron.files import atomic_write

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:2rem auto;padding:0 1rem;color:#1f2328}
h2{margin-top:2.2rem;border-bottom:1px solid #ddd}.wide{overflow-x:auto}
table{border-collapse:collapse}td,th{padding:.25rem .7rem;border-bottom:1px solid #eee;text-align:right}
td:first-child,th:first-child{text-align:left}tr.own{background:#fff8c5;font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:.8rem}
.grid figure{margin:0}.grid img{width:100%;border:1px solid #ddd}figcaption,.note{font-size:12px;color:#555}
"""

_SHOWN_SIDE = 256
"""Longest side, in pixels, of a picture on the page."""


def write_report(path: Path, folders: Sequence[Path]) -> None:
    """Write the page of some evaluations' folders. Raises `UserError` for a folder without scores."""
    parts = []
    for folder in folders:
        file = folder / SCORES
        if not file.is_file():
            raise UserError(f"{file} is missing; run `tools/evaluate.py score --output {folder}` first")
        parts.append(_part(json.loads(file.read_text("utf-8")), folder))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>'
        f"<style>{STYLE}</style><h1>Evaluation</h1>{''.join(parts)}</html>\n"
    )
    with atomic_write(path) as stream:
        stream.write(page.encode())


def _part(record: Mapping[str, Any], folder: Path) -> str:
    """One evaluation."""
    table = TABLES.get(record["suite"])
    own: Mapping[str, float] = record["scores"]
    title = table.title if table else "Sample world"
    columns = dict(table.columns) if table else {}
    columns |= {key: key.replace("_", " ") for key in own if key not in columns}
    rows = [_row(record["name"], own, columns, "own")]
    rows += [_row(name, values, columns) for name, values in (table.rows if table else {}).items()]
    head = "".join(f"<th>{escape(label)}</th>" for label in ("", *columns.values()))
    counts = f"{record['prompts']} prompts, {record['samples']} samples. " if record["samples"] else ""
    note = "Other rows: arXiv 2409.18869. " + table.note if table else ""
    return (
        f"<h2>{escape(title)}</h2>"
        f'<p class="note">{escape(f"{folder}: {counts}{note}")}</p>'
        f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>{_pictures(record, folder)}'
    )


def _row(name: str, values: Mapping[str, float], columns: Mapping[str, str], kind: str = "") -> str:
    cells = "".join(f"<td>{_number(values.get(key))}</td>" for key in columns)
    return f'<tr class="{kind}"><td>{escape(name)}</td>{cells}</tr>'


def _number(value: float | None) -> str:
    """Three digits of a fraction, two of anything larger, as the papers print them."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.2f}"


def _pictures(record: Mapping[str, Any], folder: Path) -> str:
    """The first pictures, small; of clips none: they are files beside the page."""
    figures = []
    for task in record["shown"]:
        path = folder / task["paths"][0]
        if path.suffix == ".png" and path.is_file():
            caption = f"<figcaption>{escape(task['prompt'])}</figcaption>"
            figures.append(f'<figure><img src="{_small(path)}" alt="">{caption}</figure>')
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _small(path: Path) -> str:
    """A picture as a data URL."""
    stream = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        picture.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
