"""Train the trajectory grid and say what moves the path through weight space: `python -m scripts.ablate_trajectories [--seeds 0 1]`.

Momentum x weight decay x learning rate x batch, on as many tokens each and 25 checkpoints evenly spaced; beside it three widths, an
Outlier-Protected network, and Functional-SAM. After each run `python -m analysis trajectory` reads its checkpoints, which are then
deleted (`--keep-checkpoints`). What a run came to is written to --out as soon as it is known, a picture beside it at the end; launched
again, with more seeds say, it carries on.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

from analysis.runs import Run, read_json, read_metrics
from scripts.many_runs import Results, common_corpus, environment_of, run_python

RECIPE = "recipes/trajectory_grid.yaml"
TOKENS = 589_824
INTERVALS = 24
# factor: its levels, lowest first. Momentum is Adam's beta1.
FACTORS: dict[str, list[float]] = {
    "momentum": [0.0, 0.9],
    "weight_decay": [0.0, 1.0],
    "learning_rate": [2e-3, 6e-3],
    "batch": [512, 2048],
}
BOTH = "momentum's effect, with weight decay less without"
MIDDLE = {"momentum": 0.9, "weight_decay": 0.1, "learning_rate": 4e-3, "batch": 1024}
# name: what it is, and what differs from the middle of the grid
BESIDE: dict[str, tuple[str, list[str]]] = {
    "width32": ("width 32", ["model.width=32"]),
    "middle": ("width 64, pre-norm, AdamW", []),
    "width128": ("width 128", ["model.width=128"]),
    "outlier_protected": ("Outlier-Protected", ["model.block=outlier_protected"]),
    "functional_sam": ("Functional-SAM, radius 0.05", ["optimizer.sharpness_aware=functional_sam"]),
}


def settings_of_grid() -> list[dict[str, float]]:
    return [dict(zip(FACTORS, levels, strict=True)) for levels in product(*FACTORS.values())]


def name_of(settings: dict[str, float]) -> str:
    return "grid_" + "_".join(f"{factor}{settings[factor]:g}" for factor in FACTORS)


def overrides_of(settings: dict[str, float]) -> list[str]:
    batch = int(settings["batch"])
    return [
        f"optimizer.betas=[{settings['momentum']:g}, 0.95]",
        f"optimizer.weight_decay={settings['weight_decay']:g}",
        f"optimizer.learning_rate={settings['learning_rate']:g}",
        f"training.tokens_per_step={batch}",
        f"training.micro_batch_size={min(batch // 128, 8)}",
        f"checkpoint.every={TOKENS // batch // INTERVALS}",
        f"logging.every={TOKENS // batch // INTERVALS}",
        f"evaluation.every={TOKENS // batch}",
        f"training.tokens={TOKENS}",
    ]


def train(name: str, overrides: list[str], seed: int, runs: Path, corpus: Path, keep: bool) -> Path:
    """Train a run and analyse it, unless that is done; returns its folder."""
    run = runs / f"{name}_seed{seed}"
    if (run / "report" / "trajectory.json").exists():
        return run
    common = [f"run.seed={seed}", f"run.name={run.name}", f"run.folder={runs}", f"data.prepared={corpus}"]
    run_python(run.name, ["train.py", RECIPE, *overrides, *common], runs / f"{run.name}.log")
    run_python(f"{run.name} trajectory", ["-m", "analysis", "trajectory", str(run)], runs / f"{run.name}.log")
    if not keep:
        shutil.rmtree(run / "checkpoints")
    return run


# what is measured of a run, and its name in a table
MEASURES = {
    "omega": "ω from the origin",
    "omega_relative": "ω from the start",
    "straightness": "straightness",
    "update_angle": "degrees between updates",
    "total_angle": "degrees to the whole displacement",
    "length": "length of the path",
    "displacement": "displacement",
    "norm_growth": "norm, last over first",
    "participation_ratio": "participation ratio",
    "validation_loss": "validation loss",
}


def figures(run: Path) -> dict[str, Any]:
    """What one run came to; by layer and by query, key and value too."""
    result = read_json(run / "report" / "trajectory.json")
    network = result["network"]
    losses = [record["validation_loss"] for record in read_metrics(Run(run, run)) if "validation_loss" in record]
    parts = ("attention query", "attention key", "attention value", "attention output", "mlp")
    return {
        "checkpoints": len(result["steps"]),
        "omega": network["omega"],
        "omega_relative": network["omega_relative"],
        "straightness": network["straightness"],
        "update_angle": statistics.fmean(network["consecutive_update_angles"]),
        "total_angle": statistics.fmean(network["displacement_angles"]),
        "length": network["length"],
        "displacement": network["displacement_norms"][-1],
        "norm_growth": network["weight_norms"][-1] / network["weight_norms"][0],
        "participation_ratio": network["participation_ratio"],
        "validation_loss": losses[-1],
        "layers": {layer: found["omega_relative"] for layer, found in result["layers"].items()},
        "layers_by_kind": {
            layer: {part: {key: kinds[part][key] for key in ("omega_relative", "mean_consecutive_update_angle")} for part in parts}
            for layer, kinds in result["layers_by_kind"].items()
        },
        "relative_map": [[None if x is None else round(x, 3) for x in row] for row in network["relative_map"]],
        "steps": result["steps"],
    }


def differences(grid: list[dict[str, Any]], factor: str, measure: str) -> dict[tuple[float, ...], float]:
    """Of pairs of runs that differ in one factor alone, from its lowest level to its highest, by (the other factors' levels ..., seed)."""

    def at(level: float) -> dict[tuple[float, ...], float]:
        return {
            (*(value for other, value in run["settings"].items() if other != factor), run["seed"]): run["figures"][measure]
            for run in grid
            if run["settings"][factor] == level
        }

    low, high = at(FACTORS[factor][0]), at(FACTORS[factor][-1])
    return {rest: high[rest] - low[rest] for rest in low if rest in high}


def effects(grid: list[dict[str, Any]], measure: str) -> dict[str, dict[str, Any]]:
    """Of each factor: what it does from its lowest level to its highest; and what weight decay changes in what momentum does."""
    found = {factor: list(differences(grid, factor, measure).values()) for factor in FACTORS}
    none, most = FACTORS["weight_decay"][0], FACTORS["weight_decay"][-1]
    of_momentum = differences(grid, "momentum", measure)  # by weight decay and the rest
    both = [(of_momentum.get((most, *rest)), x) for (decay, *rest), x in of_momentum.items() if decay == none]
    found[BOTH] = [with_decay - without for with_decay, without in both if with_decay is not None]
    return {
        factor: {"mean": statistics.fmean(x), "deviation": statistics.pstdev(x), "pairs": len(x), "up": sum(one > 0 for one in x)}
        for factor, x in found.items()
        if x
    }


def summarize(results: Results) -> dict[str, Any]:
    """The effects of the factors, over the runs that are known."""
    grid = [run for run in results.runs.values() if "settings" in run]
    return {"effects": {measure: effects(grid, measure) for measure in MEASURES}}


def tables(summary: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """For the terminal and docs/trajectories.md."""
    head = "| " + " | ".join(["from lowest to highest", *(f"{f} {v[0]:g} → {v[-1]:g}" for f, v in FACTORS.items()), BOTH]) + " |"
    lines = [head, "|---" * (2 + len(FACTORS)) + "|"]
    for measure, label in MEASURES.items():
        cells = [label]
        for factor in (*FACTORS, BOTH):
            one = summary["effects"][measure].get(factor)
            cells.append(f"{one['mean']:+.3g} ± {one['deviation']:.2g} ({one['up']} of {one['pairs']} up)" if one else "–")
        lines.append("| " + " | ".join(cells) + " |")
    shown = ("omega", "omega_relative", "straightness", "update_angle", "norm_growth", "participation_ratio", "validation_loss")
    lines += ["", "| run | " + " | ".join(MEASURES[measure] for measure in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for name, (what, _) in BESIDE.items():
        found = [run["figures"] for run in runs if run.get("name") == name]
        if found:
            lines.append(f"| {what} | " + " | ".join(" / ".join(f"{run[measure]:.3g}" for run in found) for measure in shown) + " |")
    lines += ["", "| ω from the start, by layer | query | key | value | output | MLP |", "|---" * 6 + "|"]
    everything = [run["figures"] for run in runs]
    for layer in everything[0]["layers_by_kind"]:
        parts = everything[0]["layers_by_kind"][layer]
        means = [statistics.fmean(run["layers_by_kind"][layer][part]["omega_relative"] for run in everything) for part in parts]
        lines.append(f"| layer {layer}, mean of all runs | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines)


def draw(grid: list[dict[str, Any]], path: Path) -> None:
    """Maps from the start at the corners of the grid, and each run's straightness and angle by factor."""
    import matplotlib.pyplot as plt

    from analysis.pictures import MAP_COLOURS, RUN_COLOURS

    chosen = [run for run in grid if run["seed"] == grid[0]["seed"] and run["settings"]["batch"] == FACTORS["batch"][-1]]
    figure, axes = plt.subplots(2, max(len(chosen), 4), figsize=(2.3 * max(len(chosen), 4), 5.2), layout="constrained")
    for axis, run in zip(axes[0], chosen, strict=False):
        axis.imshow([[x or 0.0 for x in row] for row in run["figures"]["relative_map"]], cmap=MAP_COLOURS, vmin=0, vmax=1)
        setting = run["settings"]
        title = (
            f"β₁ {setting['momentum']:g}, decay {setting['weight_decay']:g}\nlr {setting['learning_rate']:g}, batch {setting['batch']:g}"
        )
        axis.set_title(f"{title}\nω {run['figures']['omega_relative']:.3f}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[0][len(chosen) :]:
        axis.set_axis_off()
    for axis in axes[1]:
        axis.set_axis_off()
    places = axes[1, 0].get_gridspec()
    half = axes.shape[1] // 2
    for place, measure in ((slice(0, half), "straightness"), (slice(half, None), "update_angle")):
        axis = figure.add_subplot(places[1, place])
        for number, (factor, levels) in enumerate(FACTORS.items()):
            for run in grid:
                level = levels.index(run["settings"][factor])
                x = number + (level - 0.5 * (len(levels) - 1)) * 0.4
                axis.plot(x, run["figures"][measure], "o", ms=4, color=RUN_COLOURS[level], alpha=0.8)
        axis.set_xticks(range(len(FACTORS)), [f"{factor}\n{' → '.join(f'{v:g}' for v in levels)}" for factor, levels in FACTORS.items()])
        axis.set_title(MEASURES[measure], fontsize=9)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/trajectory_grid"), help="folder of the runs")
    parser.add_argument("--keep-checkpoints", action="store_true", help="1.2 GB a seed; default: deleted when they are analysed")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/trajectories_cpu.json"))
    arguments = parser.parse_args()
    runs, results = arguments.runs.resolve(), Results(arguments.out)
    corpus = common_corpus(runs, results, RECIPE, [])
    results.header.update(command="python -m scripts.ablate_trajectories", tokens=TOKENS, factors=FACTORS)
    jobs: list[tuple[str, list[str], dict[str, Any]]] = [
        (name, [*overrides_of(MIDDLE), *overrides], {"name": name, "what": what}) for name, (what, overrides) in BESIDE.items()
    ]
    jobs += [(name_of(settings), overrides_of(settings), {"settings": settings}) for settings in settings_of_grid()]
    for seed in arguments.seeds:
        for name, overrides, kind in jobs:
            if f"{name}_seed{seed}" not in results.runs:
                run = train(name, overrides, seed, runs, corpus, arguments.keep_checkpoints)
                results.header["null_values"] = read_json(run / "report" / "trajectory.json")["null_values"]
                results.header["environment"] = environment_of(run)
                found = figures(run)
                if found["checkpoints"] != INTERVALS + 1:
                    raise SystemExit(f"{run}: {found['checkpoints']} of {INTERVALS + 1} checkpoints: delete the folder, and launch again")
                if kind.get("settings", {}).get("batch") != FACTORS["batch"][-1]:
                    del found["relative_map"]  # not in the picture
                results.set(run.name, **kind, seed=seed, figures=found)
    summary = summarize(results)
    results.write(**{**results.header, **summary})
    draw([run for run in results.runs.values() if "settings" in run], arguments.out.with_suffix(".png"))
    print(tables(summary, list(results.runs.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
