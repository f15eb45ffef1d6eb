"""HTML for looking at what was kept and dropped: an index, and a sheet of thumbnails for every reason."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from emu3_megatron.curation.frames import Picture, pictures_of, resize
from emu3_megatron.curation.pipeline import UNUSABLE
from emu3_megatron.curation.pool import Handler, run_tasks
from emu3_megatron.curation.report import Example, Report
from emu3_megatron.curation.scoring import Announce, Key
from emu3_megatron.curation.units import Score, Unit
from emu3_megatron.files import atomic_write

THUMBNAIL = 168
"""Longer side in pixels."""

CLIP_THUMBNAILS = 3
"""Frames shown of a clip."""

EXCERPT = 400
"""Characters shown of a text."""

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1240px;padding:0 1rem;
 color:#222;background:#fff}
h1{font-size:1.35rem} h2{font-size:1.05rem;margin-top:2rem} a{color:#0a58ca}
table{border-collapse:collapse;margin:.5rem 0}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid #ddd}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.grid{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-start}
figure{margin:0;max-width:540px} figure.text{width:380px;border:1px solid #ddd;border-radius:4px;padding:8px}
figure img{display:inline-block;margin-right:2px;border:1px solid #ddd;vertical-align:top}
figcaption{font-size:12px;color:#555;max-width:360px;overflow-wrap:anywhere}
figcaption b{color:#222;font-weight:600}
figure p{margin:0 0 .4rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}
"""


@dataclass(frozen=True)
class ThumbnailTask:
    """A unit to show small."""

    kind: str
    """``image`` or ``video``."""
    path: Path
    """The media file."""
    frames: tuple[int, int] | None
    """First frame of a clip, and the one after the last."""


class Thumbnailer(Handler):
    """Makes thumbnails. Answers their data addresses: none where there is no picture."""

    def __call__(
        self, task: ThumbnailTask, announce: Announce, failures: Mapping[Key, Score]
    ) -> tuple[str, ...]:
        """Make the thumbnails of one unit."""
        key = ("thumbnail", str(task.path))
        announce(key)
        addresses: tuple[str, ...] = ()
        if key not in failures:
            unit = Unit(id=str(task.path), kind=task.kind, record={}, path=task.path, frames=task.frames)
            try:
                addresses = tuple(map(_thumbnail, pictures_of(unit, CLIP_THUMBNAILS)))
            except Exception:  # whatever it is, the results are not worth less for it
                addresses = ()
        announce(None)
        return addresses


def write_sheets(report: Report, folder: Path, *, processes: int, timeout: float) -> None:
    """Write ``report.html``, and ``sheets/KIND-STAGE-REASON.html`` for every reason with examples.

    Args:
        report: what was kept and dropped.
        folder: where to write.
        processes: how many decode the examples; see `run_tasks`. Unusable files are left alone.
        timeout: seconds that one example may take.
    """
    sheets: dict[tuple[str, str, str], str] = {}
    examples_of = report.examples()
    wanted_pictures = {
        _task(example.unit)
        for (kind, _, reason), examples in examples_of.items()
        if kind != "text" and reason != UNUSABLE
        for example in examples
    }
    tasks = sorted(wanted_pictures, key=lambda task: (task.kind, str(task.path), task.frames or ()))
    pictures = run_tasks(tasks, Thumbnailer, processes=processes, timeout=timeout)
    for key, examples in examples_of.items():
        name = "-".join(re.sub(r"[^a-z0-9]+", "_", part.lower()) for part in key) + ".html"
        sheets[key] = name
        kind, stage, reason = key
        title = f"{kind}: {reason}" + (f" ({stage})" if stage != reason else "")
        body = "\n".join(
            _figure(example, () if kind == "text" else pictures.get(_task(example.unit), ()))
            for example in examples
        )
        back = '<p><a href="../report.html">report</a></p>'
        _write(folder / "sheets" / name, title, f'{back}<div class="grid">\n{body}\n</div>')
    wanted = set(sheets.values())
    for stale in (folder / "sheets").glob("*.html"):
        if stale.name not in wanted:
            stale.unlink()
    _write(folder / "report.html", "Curation", _index(report, sheets))


def _index(report: Report, sheets: dict[tuple[str, str, str], str]) -> str:
    """Tables of counts with links to the sheets."""
    rows = []
    for kind, stage, reason, count, total in report.rows():
        share = f"{count / max(1, total):.1%}"
        rows.append(
            (kind, stage, _link(reason, sheets.get((kind, stage, reason))), str(count), str(total), share)
        )
    kept = [
        (kind, "", _link("kept", sheets.get((kind, "kept", "kept"))), str(count), "", "")
        for kind, count in sorted(report.kept.items())
    ]
    parts = [
        f"<p>Entries: {', '.join(f'{count} {kind}' for kind, count in sorted(report.entries.items()))}.</p>",
        "<h2>Kept and dropped</h2>",
        _table(("kind", "stage", "reason", "units", "of", "share"), [*kept, *rows]),
    ]
    numbers = report.as_json()
    if numbers["video_categories"]:
        body = [
            (html.escape(r["category"]), str(r["clips"]), f"{r['seconds']:.1f}")
            for r in numbers["video_categories"]
        ]
        parts += ["<h2>Video by category</h2>", _table(("category", "clips", "seconds"), body)]
    for title, key in (("Images by type", "image_types"), ("Texts by language", "languages")):
        if numbers[key]:
            named = [(html.escape(str(name)), str(count)) for name, count in numbers[key].items()]
            parts += [f"<h2>{title}</h2>", _table(("name", "kept"), named)]
    contaminated = [
        (html.escape(f["id"]), html.escape(f["kind"]), html.escape(f["found"]))
        for f in report.contamination[:100]
    ]
    parts.append(f"<h2>In the evaluation data: {len(report.contamination)}</h2>")
    parts.append(_table(("id", "kind", "found"), contaminated) if contaminated else "")
    return "\n".join(parts)


def _link(text: str, name: str | None) -> str:
    """A link to a sheet, or plain text."""
    return f'<a href="sheets/{name}">{html.escape(text)}</a>' if name else html.escape(text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are HTML already."""
    lines = ["<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = "".join(
            f"<td{' class=n' if re.fullmatch(r'[0-9.%]+', cell) else ''}>{cell}</td>" for cell in row
        )
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join(lines) + "</table>"


def _task(unit: Unit) -> ThumbnailTask:
    """What to show of a unit that has media."""
    return ThumbnailTask(unit.kind, unit.file, unit.frames)


def _figure(example: Example, pictures: Sequence[str]) -> str:
    """One example, with the data addresses of its pictures."""
    unit = example.unit
    caption = f"<figcaption><b>{html.escape(unit.id)}</b><br>{html.escape(example.text)}</figcaption>"
    if unit.kind == "text":
        text = unit.text[:EXCERPT] + ("…" if len(unit.text) > EXCERPT else "")
        return f'<figure class="text"><p>{html.escape(text)}</p>{caption}</figure>'
    images = "".join(f'<img alt="" src="{address}">' for address in pictures)
    return f"<figure>{images}{caption}</figure>"


def _thumbnail(picture: Picture) -> str:
    """A small JPEG as a data address."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(resize(picture, longer_edge=THUMBNAIL))).save(
        stream, format="JPEG", quality=80
    )
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _write(path: Path, title: str, body: str) -> None:
    """Write one page atomically."""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    with atomic_write(path) as stream:
        stream.write(page.encode("utf-8", "backslashreplace"))
