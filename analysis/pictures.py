"""What the PNG pictures beside the numbers share: their style, axes, and how they are saved."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from analysis.output import short, write_whole

RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by everyone
MAP_COLOURS = "viridis"

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 160,
}


def say(axis: Axes, reason: str) -> None:
    """Write into a panel why it is empty."""
    text = "\n".join("\n".join(textwrap.wrap(line, 44)) for line in reason.splitlines())
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=8, color="#555555").set_in_layout(False)
    axis.tick_params(colors="none")  # not taken away, or panels beside it grow out of the picture
    axis.xaxis.label.set_color("none")
    axis.grid(visible=False)


def step_axis(axis: Axes) -> None:
    axis.set_xlabel(axis.get_xlabel() or "step")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def log_axis(axis: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))


def floats(values: list[Any]) -> np.ndarray:
    """None becomes nan, which is not drawn."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def number_text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def save_figure(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return write_whole(path, buffer.getvalue())
