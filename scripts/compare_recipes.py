"""Recipes side by side, by what they reach: `python -m scripts.compare_recipes recipes/blocks_*.yaml [--seeds 0 1] [--out FILE.json]`.

Every recipe is trained once for each seed, in turn, all on one prepared corpus; a run whose result --out already has is not trained
again, and an --out of runs under other --overrides is refused. Validation loss, tokens a second and the largest kurtosis of a layer,
with their spread over seeds; curves beside the JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from analysis.pictures import RUN_COLOURS
from analysis.runs import find_run, read_metrics
from scripts.many_runs import Results, common_corpus, environment_of, run_python
from training.distributed import one_clear_line
from training.recipe_file import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value", help="for all of them")
    parser.add_argument("--runs", type=Path, default=Path("runs/compared"), help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with one_clear_line():
        compare(arguments)
    return 0


def compare(arguments: argparse.Namespace) -> None:
    results = Results(arguments.out)
    if results.runs:
        results.header.setdefault("overrides", [])  # of a file from before they were kept
    results.belong_to(overrides=arguments.overrides)
    for recipe in arguments.recipes:  # every one is checked first, so that nothing is refused after hours
        load_recipe(recipe, arguments.overrides)
    corpus = common_corpus(arguments.runs, results, arguments.recipes[0], arguments.overrides)
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            name = f"{recipe.stem}_seed{seed}"
            if name in results.runs:
                continue
            places = [f"run.name={name}", f"run.folder={arguments.runs.resolve()}", f"run.seed={seed}", f"data.prepared={corpus}"]
            run_python(name, ["train.py", str(recipe.resolve()), *arguments.overrides, *places])
            results.header["environment"] = environment_of(arguments.runs / name)
            results.header["command"] = "python -m scripts.compare_recipes " + " ".join(sys.argv[1:])
            results.set(name, recipe=recipe.stem, seed=seed, **figures(arguments.runs / name))
    draw(results.runs, arguments.out.with_suffix(".png"))
    print(table(results.runs))


def figures(run: Path) -> dict[str, Any]:
    records = read_metrics(find_run(run))
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    places = [m for r in records if "activations" in r for place, m in r["activations"].items() if place != "unembedding"]
    return {
        "validation_loss": validation[-1][1],
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in records if "tokens_per_second" in r),
        "peak_kurtosis": max(m["kurtosis"] for m in places),
        "validation": validation,
    }


def over_seeds(runs: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """recipe -> figure -> its value for each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs.values():
        for key in ("validation_loss", "tokens_per_second", "peak_kurtosis"):
            found.setdefault(run["recipe"], {}).setdefault(key, []).append(run[key])
    return found


def table(runs: dict[str, Any]) -> str:
    """For the terminal and the docs."""
    lines = ["| recipe | seeds | validation loss | tokens a second | kurtosis, peak |", "|---|---|---|---|---|"]
    for recipe, found in over_seeds(runs).items():
        cells = []
        for key, form in (("validation_loss", ".3f"), ("tokens_per_second", ",.0f"), ("peak_kurtosis", ".2f")):
            spread = f" ± {format(statistics.stdev(found[key]), form)}" if len(found[key]) > 1 else ""
            cells.append(format(statistics.mean(found[key]), form) + spread)
        lines.append(f"| `{recipe}` | {len(found['validation_loss'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, Any], path: Path) -> None:
    """Validation loss over steps, one colour a recipe and one line a seed."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    recipes = list(over_seeds(runs))
    labelled: set[str] = set()
    for run in runs.values():
        colour = RUN_COLOURS[recipes.index(run["recipe"]) % len(RUN_COLOURS)]
        label = None if run["recipe"] in labelled else run["recipe"]
        labelled.add(run["recipe"])
        panel.plot(*zip(*run["validation"], strict=True), "o-", ms=3, lw=1.4, color=colour, label=label)
    panel.set(title="Validation loss, nats a token", xlabel="step")
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
