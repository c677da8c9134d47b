"""Charts as inline SVG for the report: they take the page's colours, light or dark, and carry their values for the page's script.

Colours are CSS: `var(--run-0)` and the like are set by the page. Every text is escaped here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import matplotlib.colors
import numpy as np

from analysis.output import short

LARGEST_MAP = 48  # more checkpoints than this are thinned evenly in the page's maps; the JSON keeps all


@dataclass
class Line:
    """One curve. `points` are (x, y); a y that is None, or not positive on a logarithmic axis, is a gap."""

    label: str
    points: Sequence[tuple[float, float | None]]
    colour: str
    dots: bool = False
    faint: bool = False
    dashed: bool = False
    unnamed: bool = False  # not in the legend


def line_chart(
    lines: Sequence[Line],
    alt: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    level: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Curves over one x axis, with a legend below.

    Args:
        alt: what the chart shows, for those who cannot see it.
        level: a horizontal dashed line and its label.
        y_range: fixes the y axis, so that charts side by side can be compared.
    """
    width, height, left, right, top, bottom = 560, 300, 64, 16, 14, 42
    shown = [(x, y) for line in lines for x, y in line.points if y is not None and math.isfinite(y) and (y > 0 or not log)]
    if not shown:
        return f'<p class="note">{escape(alt)}: nothing to draw.</p>'
    xs = [x for x, _ in shown]
    low, high = y_range or padded_range([y for _, y in shown] + ([level[0]] if level else []), log)
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def up(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return height - bottom - min(max(share, 0.0), 1.0) * (height - top - bottom)

    # what a reader sees when pointing at an x: the label, and (place on the page, x, y) of each point
    series = [
        {
            "label": line.label,
            "colour": line.colour,
            "points": [[round(across(x), 1), round(up(y), 1), _plain(x), _plain(y)] for x, y in points],
        }
        for line in lines
        if (points := [point for run in _unbroken(line.points, log) for point in run])
    ]
    parts = [
        f'<svg class="lines" tabindex="0" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}" '
        f'data-x="{escape(x_label)}" data-series="{escape(json.dumps(series))}">'
    ]
    for tick in log_ticks(low, high) if log else ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 7}" y="{up(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(x_low, x_high):
        parts.append(f'<text class="tick" x="{across(tick):.1f}" y="{height - bottom + 17}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<text class="axis" x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (top + height - bottom) / 2
    parts.append(f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    if level:
        y = up(level[0])
        parts.append(f'<line class="level" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{width - right}" y="{y - 5:.1f}" text-anchor="end">{escape(level[1])}</text>')
    for line in lines:
        style = (
            f"stroke:{line.colour}"
            + (";stroke-dasharray:5 4" if line.dashed else "")
            + (";opacity:.45;stroke-width:1.2" if line.faint else "")
        )
        for run in _unbroken(line.points, log):
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in run)
            parts.append(f'<polyline class="curve" style="{style}" points="{path}"/>')
            if line.dots:
                parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" style="fill:{line.colour}"/>' for x, y in run]
    legend = "".join(
        f'<span><i style="color:{line.colour}"{" class=dashed" if line.dashed else ""}></i>{escape(line.label)}</span>'
        for line in lines
        if not line.faint and not line.unnamed
    )
    return "".join([*parts, "</svg>", f'<div class="legend">{legend}</div>'])


def heat_map(values: Sequence[Sequence[float | None]], steps: Sequence[int], alt: str, floor: float) -> str:
    """A square map of cosines between checkpoints, colours from `floor` to 1."""
    kept = list(range(len(steps)))
    if len(kept) > LARGEST_MAP:
        kept = sorted({round(i) for i in np.linspace(0, len(steps) - 1, LARGEST_MAP)})
    count, size, left, top = len(kept), 250, 52, 8
    cell = size / count
    shown = [[None if (value := values[i][j]) is None else round(value, 5) for j in kept] for i in kept]
    data = {"left": left, "top": top, "size": size, "steps": [steps[i] for i in kept], "values": shown}
    parts = [
        f'<svg class="map" tabindex="0" viewBox="0 0 {left + size + 72} {top + size + 46}" role="img" aria-label="{escape(alt)}" '
        f'data-map="{escape(json.dumps(data))}">'
    ]
    for row in range(count):
        for column in range(count):
            parts.append(
                f'<rect x="{left + column * cell:.2f}" y="{top + row * cell:.2f}" width="{cell + 0.3:.2f}" height="{cell + 0.3:.2f}" '
                f'fill="{_colour(shown[row][column], floor)}"/>'
            )
    for position in range(0, count, max(1, math.ceil(count / 5))):
        centre, label = (position + 0.5) * cell, short(steps[kept[position]])
        parts.append(f'<text class="tick" x="{left - 6}" y="{top + centre + 5:.1f}" text-anchor="end">{label}</text>')
        parts.append(f'<text class="tick" x="{left + centre:.1f}" y="{top + size + 19}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="axis" x="{left + size / 2}" y="{top + size + 40}" text-anchor="middle">step</text>')
    bar_x, bands = left + size + 14, 64
    for band in range(bands):
        colour = _colour(1 - (1 - floor) * (band + 0.5) / bands, floor)
        parts.append(
            f'<rect x="{bar_x}" y="{top + size * band / bands:.2f}" width="11" height="{size / bands + 0.4:.2f}" fill="{colour}"/>'
        )
    for tick in np.linspace(floor, 1, 5):
        parts.append(f'<text class="tick" x="{bar_x + 16}" y="{top + size * (1 - (tick - floor) / (1 - floor)) + 5:.1f}">{tick:.2g}</text>')
    return "".join([*parts, "</svg>"])


def layer_colour(share: float) -> str:
    """A colour for a layer, from violet (first, share 0) to orange (last, 1): told apart on a light and on a dark page."""
    return matplotlib.colors.to_hex(matplotlib.colormaps["plasma"](0.28 + 0.52 * share))


def padded_range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The range an axis needs to show these values with a little room around them."""
    low, high = min(values), max(values)
    if log:
        return low / 1.3, high * 1.3
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within a range."""
    spread = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(spread))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= spread)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within a range, with 2 and 5 between where there are few."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]


def _unbroken(points: Sequence[tuple[float, float | None]], log: bool) -> list[list[tuple[float, float]]]:
    """The runs of drawable points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None and math.isfinite(y) and (y > 0 or not log):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _plain(value: float) -> float:
    """A number in five digits, which is what a label shows."""
    return float(f"{value:.5g}")


def _colour(value: float | None, floor: float) -> str:
    return (
        "#9a9a9a" if value is None else matplotlib.colors.to_hex(matplotlib.colormaps["viridis"]((max(value, floor) - floor) / (1 - floor)))
    )
