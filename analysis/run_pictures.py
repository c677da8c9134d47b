"""The pictures of runs and their checkpoints: one a verb, and overview.png for several runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.charts import layer_colour
from analysis.output import short
from analysis.pictures import MAP_COLOURS, RUN_COLOURS, STYLE, floats, log_axis, number_text, save_figure, say, step_axis


def trajectory_picture(result: dict[str, Any], path: Path) -> Path:
    """Both maps, the path's principal components, angles and lengths along the run, and directional similarity by layer and kind."""
    network, steps = result["network"], result["steps"]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(2, 4, figsize=(17.5, 7.6), layout="constrained")
        figure.suptitle(f"{result['run']}: trajectory through weight space, {len(steps)} checkpoints", x=0.01, ha="left", fontsize=12)
        _heat_map(axes[0, 0], network["trajectory_map"], steps, f"From the origin, ω = {number_text(network['omega'])}")
        walk = result["null_values"]["random_walk"]["omega_relative"]
        _heat_map(
            axes[0, 1],
            network["relative_map"],
            steps[1:],
            f"From the start, ω = {number_text(network['omega_relative'])} (random walk {walk:.2f})",
        )
        _groups(axes[0, 2], result)

        angles = axes[1, 0]
        angles.plot(steps[1:-1], floats(network["consecutive_update_angles"]), "o-", ms=3, color=RUN_COLOURS[0], label="previous update")
        angles.plot(steps[:-1], floats(network["displacement_angles"]), "s-", ms=3, color=RUN_COLOURS[1], label="whole displacement")
        angles.axhline(90, color="#888888", lw=1, ls=":")
        angles.set(title="Angle of an update to …", ylabel="degrees", xlabel="step at which the update begins")
        angles.legend()
        norms = axes[1, 1]
        norms.plot(steps, network["weight_norms"], "o-", ms=3, color=RUN_COLOURS[0], label="weights |θ|")
        norms.plot(steps, network["displacement_norms"], "s-", ms=3, color=RUN_COLOURS[1], label="displacement |θ − θ₀|")
        norms.set(title="Lengths", xlabel="step", ylim=(0, None))
        norms.legend()
        updates = axes[1, 2]
        updates.plot(steps[1:], network["update_norms"], "o-", ms=3, color=RUN_COLOURS[2])
        updates.set(
            title="Length of each update",
            xlabel=f"step   (straightness of the path {number_text(network['straightness'])})",
            ylim=(0, None),
        )
        for axis in (angles, norms, updates):
            step_axis(axis)
        _path(axes[0, 3], network["principal_components"], steps)
        _shares(axes[1, 3], network, result["null_values"])
        return save_figure(figure, path)


def outliers_picture(result: dict[str, Any], path: Path) -> Path:
    """By layer at the last checkpoint: kurtosis and the neurons that carry most; below it, over training where there is more than one."""
    several = len(result["steps"]) > 1
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1 + several, 2, figsize=(12, 4.2 * (1 + several)), layout="constrained", squeeze=False)
        figure.suptitle(
            f"{result['run']}: outlier features in the residual stream, {result['tokens']:,} tokens", x=0.01, ha="left", fontsize=12
        )
        _kurtosis_across_layers(axes[0, 0], result)
        _neurons_across_layers(axes[0, 1], result)
        if several:
            _by_layer(axes[1, 0], result, "kurtosis_minus_one")
            axes[1, 0].set(title=f"Kurtosis − 1 of channel RMS over training (0 to {result['width'] - 1})")
            _by_layer(axes[1, 1], result, "max_median_ratio_mean")
            axes[1, 1].set(title="Largest over median activation, mean over positions")
            axes[1, 1].legend(fontsize=8, ncols=2)
        return save_figure(figure, path)


def overview_picture(runs: list[dict[str, Any]], path: Path) -> Path:
    """Loss curves, kurtosis over training, and a trajectory map each, in one picture.

    Args:
        runs: as `report.gather` returns them.
    """
    maps = [run for run in runs if run["trajectory"]][:3]
    with mpl.rc_context(STYLE):
        columns = 2 + max(1, len(maps))
        figure, axes = plt.subplots(
            1, columns, figsize=(3.6 * columns, 3.4), layout="constrained", width_ratios=[1.25, 1.25] + [1] * (columns - 2)
        )
        _losses(axes[0], runs)
        kurtosis = axes[1]
        for i, run in enumerate(runs):
            if run["outliers"]:
                places = [p for p in run["outliers"]["places"] if p != "unembedding"]
                peak = [max((c["places"][p]["kurtosis_minus_one"] or np.nan) for p in places) for c in run["outliers"]["checkpoints"]]
                kurtosis.plot(run["outliers"]["steps"], peak, "o-", ms=3, color=RUN_COLOURS[i % len(RUN_COLOURS)], label=run["name"])
        kurtosis.set(title="Kurtosis − 1, worst layer")
        step_axis(kurtosis)
        if kurtosis.lines:
            log_axis(kurtosis)
        else:
            say(kurtosis, _why(runs, "outliers"))
        for axis, run in zip(axes[2:], maps, strict=False):
            result = run["trajectory"]
            title = f"{run['name']}\npath from the start, ω = {number_text(result['network']['omega_relative'])}"
            _heat_map(axis, result["network"]["relative_map"], result["steps"][1:], title, bar=run is maps[-1])
        if not maps:
            axes[2].set(title="Path from the start")
            say(axes[2], _why(runs, "trajectory"))
        return save_figure(figure, path)


def quantization_picture(result: dict[str, Any], path: Path) -> Path:
    """What each recipe adds to the perplexity, one group of bars a checkpoint."""
    checkpoints, recipes = result["checkpoints"], result["options"]["recipes"]
    with mpl.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(max(6.5, 1.5 + 1.9 * len(checkpoints)), 4.4), layout="constrained")
        width = 0.8 / len(recipes)
        for i, recipe in enumerate(recipes):
            found = [checkpoint["recipes"][recipe] for checkpoint in checkpoints]
            heights = floats([one.get("perplexity_increase") for one in found])
            spreads = np.nan_to_num(floats([one.get("spread") for one in found]))
            at = np.arange(len(checkpoints)) + (i - (len(recipes) - 1) / 2) * width
            colour = RUN_COLOURS[i % len(RUN_COLOURS)]
            axis.bar(at, heights, 0.9 * width, yerr=spreads if spreads.any() else None, color=colour, label=recipe, capsize=2)
            for x, height, spread in zip(at, heights, spreads, strict=True):
                text = "-" if np.isnan(height) else f"{height:+.2g}" if abs(height) < 100 else f"+{short(height)}"
                place = 0.0 if np.isnan(height) else max(height + spread, 0.0)
                axis.annotate(text, (x, place), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7)
        axis.axhline(0, color="#444444", lw=1)
        axis.set_yscale("symlog", linthresh=0.1)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
        labels = []
        for checkpoint in checkpoints:
            before = checkpoint["before"]
            labels.append(
                f"{checkpoint['name']}\nperplexity {before['perplexity']:.4g}, kurtosis {number_text(before['kurtosis']['largest_layer'])}"
            )
        axis.set_xticks(range(len(checkpoints)), labels)
        axis.grid(axis="x", visible=False)
        axis.set(title="What quantisation adds to the perplexity", ylabel="perplexity after − before   (linear below 0.1)")
        axis.margins(y=0.12)
        axis.legend(ncols=2, fontsize=8)
        return save_figure(figure, path)


def _losses(axis: Axes, runs: list[dict[str, Any]]) -> None:
    for i, run in enumerate(runs):
        colour = RUN_COLOURS[i % len(RUN_COLOURS)]
        training = [(r["tokens"], r["loss"]) for r in run["metrics"] if "loss" in r and "tokens" in r]
        validation = [(r["tokens"], r["validation_loss"]) for r in run["metrics"] if "validation_loss" in r and "tokens" in r]
        if training:
            axis.plot(*zip(*training, strict=True), color=colour, alpha=0.45, lw=1)
        if validation:
            axis.plot(*zip(*validation, strict=True), "o-", ms=3.5, color=colour, label=run["name"])
    unigrams = {run["unigram_loss"] for run in runs if run["unigram_loss"] is not None}
    for loss in unigrams:
        axis.axhline(loss, color="#555555", lw=1, ls="--")
        axis.annotate("unigram model", (1, loss), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="#555555")
    axis.set(title="Loss, nats a token", xlabel="tokens   (thin: training, dots: validation)")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    if not axis.lines:
        say(axis, "no metrics.jsonl that says a loss")


def _why(runs: list[dict[str, Any]], verb: str) -> str:
    """Why no run has the results of a verb, as the notes of `report.gather` say."""
    return "\n".join(dict.fromkeys(f"no {note}" for run in runs for note in run["notes"] if note.startswith(f"{verb}:"))) or f"no {verb}"


def _by_layer(axis: Axes, result: dict[str, Any], measure: str) -> None:
    places = result["places"]
    for i, place in enumerate(places):
        colour = "#777777" if place == "unembedding" else layer_colour(i / max(1, len(places) - 2))
        values = floats([checkpoint["places"][place][measure] for checkpoint in result["checkpoints"]])
        axis.plot(result["steps"], values, "--" if place == "unembedding" else "-", marker="o", ms=2.5, color=colour, label=place)
    step_axis(axis)
    log_axis(axis)


def _place_axis(axis: Axes, places: list[str]) -> None:
    """Places from left to right: layers by number, then the unembedding's input."""
    shown = [i for i in range(len(places)) if i % max(1, len(places) // 12) == 0 and i < len(places) - 1] + [len(places) - 1]
    axis.set_xticks(shown, [places[i].removeprefix("layer ").replace("unembedding", "out") for i in shown])
    axis.set_xlabel("layer whose input it is   (out: the unembedding's)")


def _kurtosis_across_layers(axis: Axes, result: dict[str, Any]) -> None:
    """Kurtosis - 1 at each place, at the last checkpoint and, thin, at up to four before it."""
    places, checkpoints = result["places"], result["checkpoints"]
    chosen = sorted({round(i * (len(checkpoints) - 1) / 4) for i in range(5)})
    for i in chosen:
        values = floats([checkpoints[i]["places"][place]["kurtosis_minus_one"] for place in places])
        last = i == len(checkpoints) - 1
        colour = RUN_COLOURS[0] if last else layer_colour(i / max(1, len(checkpoints) - 1))
        label = f"step {result['steps'][i]}" if len(checkpoints) > 1 else None
        axis.plot(range(len(places)), values, "o-" if last else "-", ms=4, lw=1.6 if last else 0.9, color=colour, label=label)
    axis.set(title=f"Kurtosis − 1 of channel RMS (0 to {result['width'] - 1})")
    log_axis(axis)
    _place_axis(axis, places)
    if len(checkpoints) > 1:
        axis.legend(fontsize=8)


def _neurons_across_layers(axis: Axes, result: dict[str, Any]) -> None:
    """The top neurons' share of each place's energy at the last checkpoint; the largest few named."""
    places, neurons = result["places"], result["checkpoints"][-1]["neurons"]
    points = [(i, neuron) for i, place in enumerate(places) for neuron in neurons[place]]
    often = Counter(neuron["neuron"] for _, neuron in points).most_common(len(RUN_COLOURS))
    for colour, (number, times) in zip(RUN_COLOURS, often, strict=False):
        own = [(i, neuron["share"]) for i, neuron in points if neuron["neuron"] == number]
        axis.plot(*zip(*own, strict=True), "o", ms=5, color=colour, label=f"neuron {number}, in {times}", zorder=3)
    others = [(i, neuron["share"]) for i, neuron in points if neuron["neuron"] not in dict(often)]
    if others:
        axis.plot(*zip(*others, strict=True), "o", ms=3, color="#bbbbbb", label="others")
    axis.axhline(1 / result["width"], color="#888888", lw=1, ls=":")
    axis.set(title="Share of the energy of the largest neurons (dotted: all alike)")
    log_axis(axis)
    _place_axis(axis, places)
    if points:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _groups(axis: Axes, result: dict[str, Any]) -> None:
    groups = [("network", result["network"])]
    groups += [(f"layer {layer}", summary) for layer, summary in result["layers"].items()] if len(result["layers"]) <= 12 else []
    groups += list(result["kinds"].items())
    values = floats([summary["omega_relative"] for _, summary in groups])
    places = np.arange(len(groups))[::-1]
    axis.barh(
        places, values, height=0.62, color=["#444444"] + [RUN_COLOURS[0 if name.startswith("layer ") else 2] for name, _ in groups[1:]]
    )
    axis.set_yticks(places, [name for name, _ in groups])
    axis.axvline(result["null_values"]["random_walk"]["omega_relative"], color="#d55e00", lw=1, ls=":")
    axis.axvline(1.0, color="#888888", lw=1, ls=":")
    axis.set(
        title="ω from the start, by part",
        xlabel="dotted: random walk, straight line",
        xlim=(min(0.0, float(np.nanmin(values, initial=0.0))), 1.02),
    )
    axis.grid(axis="y", visible=False)


def _heat_map(axis: Axes, values: list[list[float | None]], steps: list[int], title: str, bar: bool = True) -> None:
    """Cosines, on the same colour scale for every run: 0 to 1, or -1 to 1 when some are clearly negative."""
    array = np.array([floats(row) for row in values])
    image = axis.imshow(array, cmap=MAP_COLOURS, vmin=map_floor(values), vmax=1.0, interpolation="nearest")
    ticks = list(range(0, len(steps), max(1, -(-len(steps) // 5))))
    labels = [short(steps[t]) for t in ticks]
    axis.set_xticks(ticks, labels)
    axis.set_yticks(ticks, labels)
    axis.set(title=title, xlabel="step", ylabel="step")
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if bar:
        axis.figure.colorbar(image, ax=axis, shrink=0.8, label="cosine")


def map_floor(values: list[list[float | None]]) -> float:
    """Where the colour scale of a map of cosines begins."""
    return -1.0 if any(x is not None and x < -0.05 for row in values for x in row) else 0.0


def curvature_picture(result: dict[str, Any], path: Path) -> Path:
    """The density of the Hessian's eigenvalues, of the whole and of each part, and the largest eigenvalue of each part."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(15.5, 4.2), layout="constrained")
        figure.suptitle(f"{result['run']}: curvature at step {result['step']}, {result['tokens']:,} tokens", x=0.01, ha="left", fontsize=12)
        nodes = np.asarray(result["density"]["nodes"])
        low, high = nodes.min(), max(nodes.max(), result["hessian"]["top"][0])
        grid, width = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 600), 0.01 * (high - low) or 1.0

        def smoothed(found: dict[str, Any]) -> np.ndarray:
            bumps = np.exp(-0.5 * ((grid[:, None] - np.asarray(found["nodes"])) / width) ** 2) / (width * np.sqrt(2 * np.pi))
            return bumps @ np.asarray(found["weights"])

        density = smoothed(result["density"])
        axes[0].semilogy(grid, np.maximum(density, density.max() * 1e-9), color=RUN_COLOURS[0])
        axes[0].axvline(result["gauss_newton"]["top"][0], color=RUN_COLOURS[1], lw=1, ls=":")
        axes[0].set(title="Density of the Hessian's eigenvalues", xlabel="eigenvalue   (dotted: largest of Gauss-Newton)")
        names = list(result["parts"])
        places = np.arange(len(names))[::-1]
        for shift, (matrix, label) in enumerate((("hessian", "Hessian"), ("gauss_newton", "Gauss-Newton"))):
            values = [result["parts"][name][matrix] for name in names]
            axes[1].barh(places + 0.18 - 0.36 * shift, values, height=0.34, color=RUN_COLOURS[shift], label=label)
        axes[1].set_yticks(places, names)
        axes[1].set(title="Largest eigenvalue of each part alone")
        axes[1].legend(fontsize=8)
        axes[1].grid(axis="y", visible=False)
        strips = np.stack([smoothed(result["parts"][name]["density"]) for name in reversed(names)])
        strips = np.log10(np.maximum(strips, strips.max() * 1e-6))
        axes[2].imshow(
            strips,
            aspect="auto",
            origin="lower",
            extent=(grid[0], grid[-1], -0.5, len(names) - 0.5),
            cmap=MAP_COLOURS,
            interpolation="nearest",
        )
        axes[2].set_yticks(places, names)
        axes[2].set(title="Density of each part's eigenvalues (Hessian, log)", xlabel="eigenvalue")
        axes[2].grid(visible=False)
        return save_figure(figure, path)


def _path(axis: Axes, components: dict[str, Any] | None, steps: list[int]) -> None:
    """The checkpoints in the plane of their first two principal components, first to last."""
    axis.set(title="Path along its principal components")
    if components is None:
        say(axis, "the weights did not move")
        return
    points = np.array([[*point, 0.0][:2] for point in components["coordinates"]])
    axis.plot(*points.T, "-", color="#bbbbbb", lw=1)
    axis.scatter(*points.T, c=range(len(steps)), cmap=MAP_COLOURS, s=22, zorder=3)
    for i in (0, len(steps) - 1):
        axis.annotate(f"step {short(steps[i])}", points[i], (4, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel=f"first   ({components['shares'][0]:.0%} of the variance)", ylabel="second")
    axis.margins(0.12)


def _shares(axis: Axes, network: dict[str, Any], nulls: dict[str, dict[str, float]]) -> None:
    """How much of the path's variance each principal component has."""
    axis.set(title="Variance by component")
    if network["principal_components"] is None:
        say(axis, "the weights did not move")
        return
    shares = network["principal_components"]["shares"]
    axis.bar(range(1, len(shares) + 1), shares, color=RUN_COLOURS[0])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    walk = nulls["random_walk"]["participation_ratio"]
    axis.set(
        xlabel=f"component   participation ratio {number_text(network['participation_ratio'])}\n(straight line 1, random walk {walk:.2f})"
    )


_TAIL = "none: the exponent is of the largest tenth of the eigenvalues, at least 10, so of matrices of 100 to 4096 on the shorter side"


def weights_picture(result: dict[str, Any], path: Path) -> Path:
    """Singular values of every matrix, and its ranks by layer and kind."""
    matrices = {name: found for name, found in result["tensors"].items() if found.get("spectrum")}
    layers = sorted({found["layer"] for found in matrices.values() if found["layer"] is not None})
    kinds = list(dict.fromkeys(found["kind"] for found in matrices.values() if found["layer"] is not None))
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
        figure.suptitle(f"{result['run']}: spectra of the weights at step {result['step']}", x=0.01, ha="left", fontsize=12)
        for found in matrices.values():
            inner = found["layer"] is not None
            colour = layer_colour(layers.index(found["layer"]) / max(1, len(layers) - 1)) if inner else "#777777"
            axes[0].plot(range(1, len(found["spectrum"]) + 1), found["spectrum"], "-" if inner else "--", color=colour, lw=1)
        axes[0].set(title="Singular values", xlabel="number   (violet first layer, orange last; dashed: embeddings)", yscale="log")
        if not matrices:
            say(axes[0], "no matrices")
        for axis, measure, title in ((axes[1], "stable_rank", "Stable rank"), (axes[2], "tail_exponent", "Tail exponent")):
            for i, kind in enumerate(kinds):
                of_kind = [(found["layer"], found[measure]) for found in matrices.values() if found["kind"] == kind]
                points = sorted((layer, value) for layer, value in of_kind if layer is not None and value is not None)
                if points:
                    axis.plot(*zip(*points, strict=True), "o", ms=4, color=RUN_COLOURS[i % len(RUN_COLOURS)], label=kind)
            axis.set(title=f"{title} by layer", xlabel="layer")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if not axis.lines:
                say(axis, _TAIL if measure == "tail_exponent" and kinds else "no matrices in layers")
        if axes[1].lines:
            axes[1].legend(fontsize=8)
        return save_figure(figure, path)


def step_picture(result: dict[str, Any], path: Path) -> Path:
    """The last step by layer and kind: its length, its angle to the weights, sign-like coordinates, and the spread of curvature."""
    groups = [("network", result["network"])]
    groups += [(f"layer {layer}", found) for layer, found in result["layers"].items()] if len(result["layers"]) <= 12 else []
    groups += list(result["kinds"].items())
    places = np.arange(len(groups))[::-1]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(16, 1.6 + 0.28 * len(groups)), layout="constrained", sharey=True)
        figure.suptitle(f"{result['run']}: the step that ended at {result['step']}, from Adam's moments", x=0.01, ha="left", fontsize=12)
        for axis, measure, title in (
            (axes[0], "relative_update", "|u| / |θ|"),
            (axes[1], "angle_to_weights", "Degrees between u and the weights"),
            (axes[2], "sign_like", "Share of sign-like coordinates"),
        ):
            axis.barh(places, floats([found[measure] for _, found in groups]), height=0.62, color=RUN_COLOURS[0])
            axis.set(title=title)
            axis.grid(axis="y", visible=False)
        axes[0].set_yticks(places, [name for name, _ in groups])
        axes[1].axvline(90, color="#888888", lw=1, ls=":")
        for place, (_, found) in zip(places, groups, strict=True):
            low, tenth, median, ninetieth, high = found["curvature_percentiles"]
            axes[3].plot([low, high], [place, place], color="#bbbbbb", lw=2)
            axes[3].plot([tenth, ninetieth], [place, place], color=RUN_COLOURS[2], lw=5)
            axes[3].plot(median, place, "o", ms=4, color="#222222")
        axes[3].set(title="log₁₀ of squared gradients", xlabel="1, 10, 50, 90, 99 percent of the coordinates")
        return save_figure(figure, path)
