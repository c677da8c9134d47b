"""The pictures of `python -m analysis context`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from analysis.context_options import METHODS
from analysis.lifetimes import CLASSES
from analysis.pictures import MAP_COLOURS, RUN_COLOURS, STYLE, save_figure

LABELS = {"pruning": "context pruning", "window": "window", "sinks_window": "sinks + window", "tova": "TOVA", "h2o": "H2O"}
LINES = ("-", "--", ":", "-.")  # a checkpoint


def context_picture(result: dict[str, Any], path: Path) -> Path:
    """Perplexity against the share of context kept: a colour a method, a kind of line a checkpoint, dense as a level; needles beside it."""
    checkpoints = result["checkpoints"]
    needles = "needle" in checkpoints[0]["dense"]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 1 + needles, figsize=(7.5 + 6 * needles, 5), layout="constrained", squeeze=False)
        figure.suptitle(f"Perplexity and context kept, texts of {result['options']['length']} tokens", x=0.01, ha="left", fontsize=12)
        axis = axes[0, 0]
        for entry, line in zip(checkpoints, LINES * len(checkpoints), strict=False):
            axis.axhline(entry["dense"]["perplexity"], color="#888888", lw=1.2, ls=line)
            _lines(axis, entry, line, lambda values: values["perplexity"])
        axis.set(title="Perplexity, token by token", xlabel="share of the context's entries that a step reads", yscale="log")
        low, high = axis.get_ylim()  # too near each other for a log axis' own places
        axis.yaxis.set_major_locator(MaxNLocator(8) if high < 3 * low else LogLocator(base=10, subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axis.set_xlim(0, None)
        if needles:
            for entry, line in zip(checkpoints, LINES * len(checkpoints), strict=False):
                axes[0, 1].axhline(entry["dense"]["needle"]["log_probability"], color="#888888", lw=1.2, ls=line)
                _lines(axes[0, 1], entry, line, lambda values: values["needle"]["log_probability"], needle=True)
            axes[0, 1].set(title="Finding a code again: log-probability of its tokens", xlabel="share read, on these texts", ylabel="nats")
            axes[0, 1].set_xlim(0, None)
        methods = [method for method in METHODS if any(values["method"] == method for entry in checkpoints for values in entry["points"])]
        handles = [Line2D([], [], color=RUN_COLOURS[METHODS.index(m)], marker="o", ms=4, label=LABELS[m]) for m in methods]
        handles.append(Line2D([], [], color="#888888", lw=1.2, label="whole context"))
        if len(checkpoints) > 1:
            named = zip(checkpoints, LINES * len(checkpoints), strict=False)
            handles += [Line2D([], [], color="#222222", ls=line, label=entry["name"]) for entry, line in named]
        axis.legend(handles=handles, fontsize=8)
        return save_figure(figure, path)


def _lines(axis: Axes, entry: dict[str, Any], line: str, value: Any, needle: bool = False) -> None:
    for method in METHODS:
        of_method = [values for values in entry["points"] if values["method"] == method]
        points = sorted({((values["needle"] if needle else values)["share"], value(values)) for values in of_method})
        if points:
            axis.plot(*zip(*points, strict=True), "o", ls=line, ms=4, color=RUN_COLOURS[METHODS.index(method)])


def lifetimes_picture(entry: dict[str, Any], path: Path) -> Path:
    """Layers by class of token (dropped within the horizon, median lifetime) and by position (what later tokens still read)."""
    found = entry["lifetimes"]
    layers, horizon = found["layers"], found["horizon"]
    classes = [name for name in CLASSES if found["tokens"][name]]

    def of_classes(measure: str, missing: float) -> list[list[float]]:
        values = [[layer["classes"][name][measure] for name in classes] for layer in layers]
        return [[missing if value is None else value for value in row] for row in values]

    labels = [f"{name}\n{found['tokens'][name]:,}" for name in classes]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(16, 2.4 + 0.16 * len(layers)), layout="constrained")
        figure.suptitle(f"{entry['name']}: which tokens are dropped, layer by layer", x=0.01, ha="left", fontsize=12)
        dropped = np.array(of_classes("dropped_share", np.nan))
        _map(axes[0], dropped, layers, f"Share dropped within {horizon} tokens", (0, 1), labels)
        medians = np.array(of_classes("median_lifetime", horizon))
        _map(axes[1], medians, layers, f"Median lifetime in tokens ({horizon}: or longer)", (0, horizon), labels)
        read = np.array([layer["read_by_later_tokens"] for layer in layers])
        _map(axes[2], read, layers, "Share of the later tokens that still read a token", (0, 1))
        ticks = list(range(0, len(found["positions"]), max(1, len(found["positions"]) // 8)))
        axes[2].set_xticks(ticks, [str(found["positions"][tick]) for tick in ticks])
        axes[2].set(xlabel="its position in the text")
        return save_figure(figure, path)


def _map(
    axis: Axes, values: np.ndarray, layers: list[dict[str, Any]], title: str, limits: tuple[float, float], labels: list[str] | None = None
) -> None:
    image = axis.imshow(values, cmap=MAP_COLOURS, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    ticks = list(range(0, len(layers), max(1, len(layers) // 10)))
    axis.set_yticks(ticks, [str(layers[tick]["layer"]) for tick in ticks])
    if labels is not None:
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.set(title=title, ylabel="layer")
    axis.grid(visible=False)
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
