"""Recipes side by side, by what they reach: `python -m scripts.compare_recipes recipes/blocks_*.yaml [--seeds 0 1] [--out FILE.json]`.

Every recipe is trained once for each seed, in turn, all on one prepared corpus; a run whose result --out already has is not trained
again. Validation loss, tokens a second and the largest kurtosis of a layer, with their spread over seeds; curves beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from analysis.pictures import RUN_COLOURS
from analysis.runs import find_run, read_metrics
from training.data import prepare
from training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value", help="for all of them")
    parser.add_argument("--runs", type=Path, default=Path("runs/compared"), help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}
    corpus = arguments.runs / "corpus"  # says where it is, so that later seeds read the same text, whatever is installed by then
    if not corpus.exists():
        folder = prepare(load_recipe(arguments.recipes[0], arguments.overrides).recipe.data).folder.resolve()
        arguments.runs.mkdir(parents=True, exist_ok=True)
        corpus.write_text(str(folder))
    content = json.loads((Path(corpus.read_text()) / "manifest.json").read_text())["content_hash"]
    if result.setdefault("content_hash", content) != content:
        raise SystemExit(f"{arguments.out}: its runs read another text than {corpus.read_text()}; give another --out")
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            name = f"{recipe.stem}_seed{seed}"
            if name in result["runs"]:
                continue
            print(f"{name} ...", flush=True)
            places = [f"run.name={name}", f"run.folder={arguments.runs}", f"run.seed={seed}", f"data.prepared={corpus.read_text()}"]
            train([str(recipe), *arguments.overrides, *places])
            result["runs"][name] = {"recipe": recipe.stem, "seed": seed, **figures(arguments.runs / name)}
            environment = json.loads((arguments.runs / name / "environment.json").read_text())
            result["environment"] = {key: value for key, value in environment.items() if key != "command"}
            result["command"] = "python -m scripts.compare_recipes " + " ".join(sys.argv[1:])
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["runs"], arguments.out.with_suffix(".png"))
    print(table(result["runs"]))
    return 0


def train(arguments: list[str]) -> None:
    """One run in a process and a thread of its own; what it says is shown when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]}: failed with exit code {done.returncode}\n{done.stdout[-2000:]}")


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
