"""The pictures of what is not one run: networks before training, sweeps, benchmarks, and the lines between checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from analysis.charts import layer_colour
from analysis.pictures import RUN_COLOURS, STYLE, floats, log_axis, number_text, save_figure, say


def covariance_picture(result: dict[str, Any], path: Path) -> Path:
    """Mean correlation over depth of three networks and the SDE, and where networks and SDE end, as densities."""
    setting, statistics = result["setting"], result["statistics"]
    names = {"shaped": "shaped", "softmax": "softmax, same skip", "pre_norm": "pre-norm"}
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
        figure.suptitle(
            f"Covariance of {setting['tokens']} tokens, {setting['mask']}{', MLP' if setting['slopes'] else ''}: "
            f"{setting['samples']} networks of width {setting['width']}, and the SDE, τ₀ = {setting['temperature']:g}, "
            f"g = {setting['gain']:.3g}",
            x=0.01,
            ha="left",
            fontsize=12,
        )
        for colour, (name, label) in zip(RUN_COLOURS, names.items(), strict=False):
            found = result["paths"][name]
            axes[0].plot(found["layers"], found["mean"], color=colour, label=label)
            axes[0].fill_between(found["layers"], found["low"], found["high"], color=colour, alpha=0.15, lw=0)
        limit = result["covariance_sde"]
        axes[0].plot(limit["layers"], limit["mean"], "--", color="black", label="SDE of the shaped")
        axes[0].set(title="Mean correlation between tokens (band: 10 to 90%)", xlabel="layer")
        axes[0].legend(fontsize=8)
        for axis, name in zip(axes[1:], ("covariance", "correlation"), strict=True):
            if statistics is None:
                axis.set(title=f"{name.capitalize()} of the last two tokens at layer {setting['depth']}")
                say(axis, "too few samples of the networks or of the SDE have not blown up")
                continue
            found = statistics[name]
            edges = np.asarray(found["edges"])
            for key, colour, label in (("network", RUN_COLOURS[0], "networks"), ("sde", "black", "SDE")):
                counts = np.asarray(found[key]["counts"])
                density = (1 - found[key]["outside"]) * counts / max(1, counts.sum()) / np.diff(edges)
                axis.stairs(density, edges, color=colour, fill=key == "network", alpha=0.45 if key == "network" else 1, label=label)
            axis.set(
                title=f"{name.capitalize()} of the last two tokens at layer {setting['depth']}",
                xlabel=f"Kolmogorov-Smirnov {found['ks_statistic']:.3f}   (5% critical: {statistics['ks_critical']:.3f})",
                ylabel="density",
            )
            axis.legend(fontsize=8)
        return save_figure(figure, path)


def signal_picture(result: dict[str, Any], path: Path) -> Path:
    """By layer, a line a network: token cosine, both ranks, activation and gradient RMS, and queries' and keys' gradients to values'."""
    networks, threshold = result["networks"], result["thresholds"]["token_cosine"]
    panels = {
        "token_cosine": f"Cosine between tokens (dotted: collapse, {threshold:g})",
        "stable_rank": "Stable rank",
        "entropy_rank": "Entropy rank",
        "activation_rms": "Activation RMS",
        "gradient_rms": "Gradient RMS of the residual stream",
    }
    colours = list(RUN_COLOURS[: len(networks)])
    if len(networks) > len(colours):
        colours = [layer_colour(i / (len(networks) - 1)) for i in range(len(networks))]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(13.5, 7.6), layout="constrained")
        figure.suptitle("How the signal gets through the layers (dots: after the final norm)", x=0.01, ha="left", fontsize=12)
        for axis, (measure, title) in zip(axes.flat, panels.items(), strict=False):
            for colour, network in zip(colours, networks, strict=True):
                *stream, after = [place[measure] for place in network["places"].values()]
                axis.plot(stream, color=colour, label=network["name"])
                axis.plot(len(stream) - 1, after, "o", ms=4, color=colour)
            axis.set(title=title, xlabel="layers passed")
            if measure != "token_cosine":
                log_axis(axis)
        axes[0, 0].axhline(threshold, color="#888888", lw=1, ls=":")
        figure.legend(handles=axes[0, 0].lines[0:-1:2], loc="outside lower left", fontsize=8)  # names may hold many overrides
        ratios = axes[1, 2]
        for colour, network in zip(colours, networks, strict=True):
            for kind, style in (("query", "-"), ("key", "--")):
                values = floats([layer[f"{kind}_value_ratio"] or None for layer in network["layers"]])
                if np.isfinite(values).any():
                    alone = np.isfinite(values).sum() == 1
                    ratios.plot(values, style, marker="o" if alone else None, ms=4, color=colour)
        ratios.set(title="Gradient of queries over values' (dashed: keys')", xlabel="layer")
        if ratios.lines:
            log_axis(ratios)
        else:
            say(ratios, "no layer has gradients of queries or keys, and of values")
        return save_figure(figure, path)


def coordinate_picture(result: dict[str, Any], path: Path) -> Path:
    """A row a parametrisation, a column a module: mean magnitude over size, a line a step."""
    found, sizes = result["parametrizations"], result["sizes"]
    modules = list(next(iter(found.values()))["slopes"])
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(found), len(modules), figsize=(2.9 * len(modules), 2.8 * len(found)), layout="constrained", squeeze=False, sharey="col"
        )
        figure.suptitle(f"Mean magnitude over {result['axis']}, step by step (last step: yellow)", x=0.01, ha="left", fontsize=12)
        for row, (name, one) in zip(axes, found.items(), strict=True):
            for axis, module in zip(row, modules, strict=True):
                slopes = one["slopes"][module]
                for step in range(len(slopes)):
                    values = floats([one["values"][str(size)][module][step] or None for size in sizes])
                    axis.plot(sizes, values, "o-", ms=3, lw=1.2, color=layer_colour(step / max(1, len(slopes) - 1)))
                axis.set(title=f"{name}: {module}", xlabel=f"{result['axis']}   (last slope {number_text(slopes[-1])})")
                log_axis(axis)
                axis.set_xscale("log", base=2)
                axis.set_xticks(sizes, [str(size) for size in sizes])
        return save_figure(figure, path)


def transfer_picture(result: dict[str, Any], path: Path) -> Path:
    """A column a parametrisation: loss over the learning rate, a curve a size; below, where it was followed, sharpness over steps."""
    found, sizes = result["parametrizations"], result["sizes"]
    rows = 1 + any(one["sharpness"] for one in found.values())
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, len(found), figsize=(3.8 * len(found), 3.6 * rows), layout="constrained", squeeze=False, sharey="row"
        )
        for column, (name, one) in zip(axes.T, found.items(), strict=True):
            for i, size in enumerate(sizes):
                colour, own = layer_colour(i / max(1, len(sizes) - 1)), one["sizes"][str(size)]
                exponents = [float(exponent) for exponent in own["losses"]]
                column[0].plot(exponents, floats(list(own["losses"].values())), "o-", ms=3, color=colour, label=f"{result['axis']} {size}")
                if own["best_exponent"] is not None:
                    column[0].plot(own["best_exponent"], own["best_loss"], "*", ms=11, color=colour)
                if str(size) in one["sharpness"]:
                    sharpness = one["sharpness"][str(size)]
                    positive = [value if value > 0 else np.nan for value in sharpness.values()]  # a negative one is no sharpness
                    column[1].plot([int(step) for step in sharpness], positive, ".-", color=colour)
            shift = "-" if one["largest_shift"] is None else f"{one['largest_shift']:+g}"
            column[0].set(title=f"{name}: shift {shift} octaves", xlabel="log2 of the learning rate")
            if rows > 1:
                column[1].axhline(1, color="#888888", lw=1, ls=":")
                column[1].set(title=f"Sharpness over Adam's limit, 2^{result['sharpness_exponent']:g}", xlabel="step")
                log_axis(column[1])
        best = [own["best_loss"] for one in found.values() for own in one["sizes"].values() if own["best_loss"] is not None]
        if best:  # the curves' bottoms are what is compared
            axes[0, 0].set_ylim(min(best) - 0.05 * (max(best) - min(best) + 0.2), max(best) + max(best) - min(best) + 0.3)
        axes[0, 0].set_ylabel("validation loss, nats a token")
        axes[0, 0].legend(fontsize=8)
        return save_figure(figure, path)


def benchmark_picture(result: dict[str, Any], path: Path) -> Path:
    """Tokens per second of each subject of scripts/benchmark.py, over the fastest peer's, with the spread of the rounds."""
    rows, best = result["subjects"], result["best_peer"]
    with mpl.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 0.6 + 0.32 * len(rows)), layout="constrained")
        unit = rows[best]["tokens_per_second"] if best else 1.0
        for place, (name, row) in enumerate(rows.items()):
            peer = name in result["peers"]
            low, high = (value / unit for value in row["spread"])
            share = row["tokens_per_second"] / unit
            axis.barh(place, share, color=RUN_COLOURS[1] if peer else RUN_COLOURS[0], height=0.7)
            axis.plot([low, high], [place, place], color="#333333", linewidth=1.2)
            axis.text(0.01 * share, place, f" {row['tokens_per_second']:,.0f}", va="center", color="white", fontsize=8)
        axis.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(f"tokens per second over those of {best.replace('_', ' ')}" if best else "tokens per second")
        axis.set_title(f"{result['size']}, {result['precision']}, length {result['sequence_length']}: Burnish (blue) and peers (orange)")
        return save_figure(figure, path)


def connectivity_picture(result: dict[str, Any], path: Path) -> Path:
    """Between two ends the loss along the line, and each part alone; between several a map, and from the last end."""
    draw = _line_and_parts if len(result["ends"]) == 2 else _maps
    with mpl.rc_context(STYLE):
        return save_figure(draw(result), path)


def _line_and_parts(result: dict[str, Any]) -> Figure:
    pair, ends = result["pairs"][0], result["ends"]
    ways = {"as they are": pair} | ({"aligned": pair["aligned"]} if "aligned" in pair else {})
    parts = list(pair["parts"])
    figure, (line, bars) = plt.subplots(1, 2, figsize=(12, max(4.2, 1.4 + 0.26 * len(parts))), layout="constrained")
    figure.suptitle(f"From {ends[0]['name']} to {ends[1]['name']}, {result['tokens']:,} tokens", x=0.01, ha="left", fontsize=12)
    thickness = 0.8 / len(ways)
    for i, (name, found) in enumerate(ways.items()):
        label = f"{name}: excess {number_text(found['excess'])}, cosine {found['cosine']:.3f}"
        line.plot(found["at"], floats(found["losses"]), "o-", ms=3, color=RUN_COLOURS[i], label=label)
        at = np.arange(len(parts)) + (i - (len(ways) - 1) / 2) * thickness
        bars.barh(at, floats([found["parts"][part]["excess"] for part in parts]), height=thickness, color=RUN_COLOURS[i], label=name)
    line.plot([0, 1], [pair["losses"][0], pair["losses"][-1]], ":", color="#888888", lw=1, label="chord")
    line.set(title="Loss along the line, nats a token", xlabel="a, the share of the second")
    low, high = line.get_ylim()
    line.set_ylim(low, high + 0.3 * (high - low))  # room for the legend, wherever the wall stands
    line.legend(fontsize=8, loc="upper left")
    bars.set_yticks(range(len(parts)), parts)
    bars.invert_yaxis()
    bars.axvline(0, color="#888888", lw=1)
    bars.set(title="Highest above the chord, one part moved alone", xlabel="nats a token")
    bars.grid(axis="y", visible=False)
    return figure


def _maps(result: dict[str, Any]) -> Figure:
    maps = {"": result["excess_map"]} | ({", aligned": result["aligned_excess_map"]} if "aligned_excess_map" in result else {})
    names = [end["name"].removeprefix("step ") for end in result["ends"]]
    figure, axes = plt.subplots(1, len(maps) + 1, figsize=(5.6 * (len(maps) + 1), 4.6), layout="constrained")
    figure.suptitle(f"Lines between {len(names)} checkpoints, {result['tokens']:,} tokens", x=0.01, ha="left", fontsize=12)
    places = list(range(0, len(names), max(1, -(-len(names) // 8))))
    for i, (axis, (title, values)) in enumerate(zip(axes, maps.items(), strict=False)):
        array = np.array([floats(row) for row in values])
        extent = max(float(np.nanmax(np.abs(array))), 0.01)
        colours = SymLogNorm(0.01, vmin=-extent, vmax=extent)  # beside the way from random weights all else is small
        image = axis.imshow(array, cmap="RdBu_r", norm=colours, interpolation="nearest")
        axis.set_xticks(places, [names[t] for t in places], rotation=45, ha="right")
        axis.set_yticks(places, [names[t] for t in places])
        axis.set(title=f"Highest above the chord{title}: red a barrier, blue a valley")
        axis.grid(visible=False)
        figure.colorbar(image, ax=axis, shrink=0.8, label="nats a token")
        last = array[-1, :-1]
        axes[-1].plot(range(len(last)), last, "o-", ms=3, color=RUN_COLOURS[i], label=f"to {result['ends'][-1]['name']}{title}")
    axes[-1].set_xticks(places, [names[t] for t in places], rotation=45, ha="right")
    axes[-1].axhline(0, color="#888888", lw=1)
    axes[-1].set(title="The same, to the last one", ylabel="nats a token")
    axes[-1].legend(fontsize=8)
    return figure
