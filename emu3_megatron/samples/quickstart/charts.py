"""Line charts as inline SVG, so that the report is one file without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 32
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700")


def _smooth(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Exponential moving average with bias correction."""
    out: list[float] = []
    total = weight = 0.0
    for value in values:
        total = share * total + (1 - share) * value
        weight = share * weight + (1 - share)
        out.append(total / weight)
    return out


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover low..high."""
    raw = (high - low) / count or 1.0
    magnitude = 10 ** math.floor(math.log10(raw))
    step = min((m * magnitude for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str) -> str:
    """An SVG line chart, each series smoothed, with the raw values faint behind it.

    Args:
        series: name to (x, y) points, x ascending; points with a y that is not finite are left out.
        x_label: text below the x axis.
    """
    clean = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    clean = {name: points for name, points in clean.items() if points}
    if not clean:
        return "<p>No values were recorded.</p>"
    xs = [x for points in clean.values() for x, _ in points]
    ys = [y for points in clean.values() for _, y in points]
    low, high = min(0.0, min(ys)), max(ys) or 1.0
    right_x = max(xs) or 1.0

    def px(x: float) -> float:
        return LEFT + (x / right_x) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(points: Sequence[tuple[float, float]], colour: str, style: str) -> str:
        text = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        return f'<polyline points="{text}" fill="none" stroke="{colour}" {style}/>'

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">']
    for y in _ticks(low, high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _ticks(0, right_x):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>')
    for points, colour in zip(clean.values(), COLOURS, strict=False):
        parts.append(path(points, colour, 'stroke-width="1" opacity="0.25"'))
        smooth = _smooth([y for _, y in points])
        parts.append(
            path([(x, y) for (x, _), y in zip(points, smooth, strict=True)], colour, 'stroke-width="2"')
        )
    for row, (name, colour) in enumerate(zip(clean, COLOURS, strict=False)):
        y = TOP + 14 + 18 * row
        parts.append(f'<rect x="{WIDTH - 150}" y="{y - 9}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - 130}" y="{y}">{escape(name)}</text>')
    parts.append("</svg>")
    return "".join(parts)
