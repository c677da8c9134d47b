"""Train the outlier ablation and say what int8 costs each network: `python -m scripts.ablate_outliers [--seeds 0 1] [--jobs 2]`.

Every run of ABLATION is trained once for each seed, one process and one core each; then `python -m analysis quantization`
reads the last checkpoints. The figures go to the file --out, and curves to a picture beside it. Launched again it carries on: runs that
are complete are not trained again, so seeds can be added later.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from analysis.output import write_json
from analysis.pictures import RUN_COLOURS
from analysis.runs import find_run, read_metrics
from scripts.many_runs import run_python
from training.data import prepare
from training.recipe_file import load_recipe

# run: what it is, its recipe, and what differs from that
ABLATION: dict[str, tuple[str, str, list[str]]] = {
    "ablation_pre_norm": ("pre-norm, AdamW", "ablation_pre_norm", []),
    "ablation_pre_norm_unscaled": (
        "pre-norm, AdamW, output matrices begin as all others",
        "ablation_pre_norm",
        ["model.scaled_output_init=false"],
    ),
    "ablation_outlier_protected": ("Outlier-Protected, AdamW", "ablation_outlier_protected", []),
    "ablation_pre_norm_epsilon": ("pre-norm, AdamW with epsilon 1e-4", "ablation_pre_norm_epsilon", []),
    "ablation_pre_norm_muon": ("pre-norm, Muon", "ablation_pre_norm_muon", []),
    "ablation_pre_norm_cool": ("pre-norm, AdamW, a third of the learning rate", "ablation_pre_norm", ["optimizer.learning_rate=2e-3"]),
    "ablation_outlier_protected_cool": (
        "Outlier-Protected, AdamW, a third of the learning rate",
        "ablation_outlier_protected",
        ["optimizer.learning_rate=2e-3"],
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one core")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--networks", nargs="+", choices=ABLATION, default=list(ABLATION))
    parser.add_argument("--out", default="docs/evidence/outliers_cpu.json")
    arguments = parser.parse_args()
    jobs = [(name, seed) for seed in arguments.seeds for name in arguments.networks]
    corpus = corpus_of(Path(arguments.runs))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: train(job[0], job[1], arguments.runs, corpus), jobs))
    folders = {f"{name}_seed{seed}": Path(arguments.runs) / f"{name}_seed{seed}" for name, seed in jobs}
    scratch = Path(arguments.runs) / "quantization"
    run_python("quantise", ["-m", "analysis", "quantization", *map(str, folders.values()), "--out", str(scratch)])
    quantized = {entry["name"]: entry for entry in json.loads((scratch / "quantization.json").read_text())["checkpoints"]}
    found = {name: [figures(folders[f"{name}_seed{seed}"], seed, quantized) for seed in arguments.seeds] for name in arguments.networks}
    out = Path(arguments.out)
    environment = json.loads((next(iter(folders.values())) / "environment.json").read_text())
    del environment["command"]  # of that run alone
    result = {
        "command": " ".join(["python -m scripts.ablate_outliers --seeds", *map(str, arguments.seeds), "--networks", *arguments.networks]),
        "environment": environment,
        "networks": {name: {"what": ABLATION[name][0], **summary(seeds), "seeds": seeds} for name, seeds in found.items()},
    }
    write_json(out, result)
    draw(folders, arguments.networks, arguments.seeds, out.with_suffix(".png"))
    print(table(result))
    return 0


def figures(run: Path, seed: int, quantized: dict[str, Any]) -> dict[str, Any]:
    """What one run came to. Kurtosis is the worst layer's, measured while training, the unembedding left out."""
    steps, kurtosis = kurtosis_of(run)
    entry = quantized[run.name]
    return {
        "seed": seed,
        "validation_loss": validation_of(run)[1][-1],
        "peak_kurtosis": max(kurtosis),
        "peak_step": steps[kurtosis.index(max(kurtosis))],
        "final_kurtosis": kurtosis[-1],
        "perplexity": entry["before"]["perplexity"],
        "perplexity_ratio": {recipe: got.get("perplexity_ratio") for recipe, got in entry["recipes"].items()},
        "output_kl": {recipe: got.get("output_kl") for recipe, got in entry["recipes"].items()},
    }


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, and standard deviation over seeds where there are several, of every figure."""

    def over(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.mean(values), **({"deviation": statistics.stdev(values)} if len(values) > 1 else {})}

    found: dict[str, Any] = {key: over([seed[key] for seed in seeds]) for key in ("validation_loss", "peak_kurtosis", "final_kurtosis")}
    for key in ("perplexity_ratio", "output_kl"):
        found[key] = {recipe: over([seed[key][recipe] for seed in seeds]) for recipe in seeds[0][key]}
    return found


def kurtosis_of(run: Path) -> tuple[list[int], list[float]]:
    """Steps, and the largest kurtosis of a layer at each."""
    measured = [record for record in read_metrics(find_run(run)) if "activations" in record]
    worst = [max(m["kurtosis"] for place, m in record["activations"].items() if place != "unembedding") for record in measured]
    return [record["step"] for record in measured], worst


def validation_of(run: Path) -> tuple[list[int], list[float]]:
    """Steps, and the validation loss at each."""
    records = [record for record in read_metrics(find_run(run)) if "validation_loss" in record]
    return [record["step"] for record in records], [record["validation_loss"] for record in records]


def draw(folders: dict[str, Path], networks: list[str], seeds: list[int], path: Path) -> None:
    """Kurtosis - 1 and validation loss over training, one colour a network and one line a seed."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for colour, name in zip(RUN_COLOURS, networks, strict=False):
        for seed in seeds:
            run, label = folders[f"{name}_seed{seed}"], ABLATION[name][0] if seed == seeds[0] else None
            steps, kurtosis = kurtosis_of(run)
            left.plot(steps, [value - 1 for value in kurtosis], color=colour, lw=1.4, label=label)
            right.plot(*validation_of(run), "o-", ms=3, color=colour, lw=1.4)
    left.set(title="Kurtosis − 1 of the worst layer (0: all neurons alike)", xlabel="step", yscale="log")
    right.set(title="Validation loss, nats a token", xlabel="step")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(result: dict[str, Any]) -> str:
    """For the terminal and docs/outlier_protected.md."""
    recipes = list(next(iter(result["networks"].values()))["output_kl"])
    lines = ["| network | validation loss | kurtosis, peak | last | " + " | ".join(f"`{recipe}`" for recipe in recipes) + " |"]
    lines.append("|---" * (4 + len(recipes)) + "|")
    for network in result["networks"].values():
        cells = [network["what"], *(spread(network[key], 3) for key in ("validation_loss", "peak_kurtosis", "final_kurtosis"))]
        for recipe in recipes:
            ratio, kl = network["perplexity_ratio"][recipe]["mean"], network["output_kl"][recipe]["mean"]
            cells.append(f"{100 * (ratio - 1):+.2f}% ({kl:.2g})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(figure: dict[str, float], digits: int) -> str:
    return f"{figure['mean']:.{digits}g}" + (f" ± {figure['deviation']:.1g}" if "deviation" in figure else "")


def corpus_of(runs: Path) -> str:
    """The prepared corpus of the runs that are there, or a new one: all seeds read the same text, whatever is installed between them."""
    for record in sorted(runs.glob("ablation_*/data.json")):
        return json.loads(record.read_text())["prepared"]
    print("prepare the data ...", flush=True)
    return str(prepare(load_recipe("recipes/ablation_pre_norm.yaml").recipe.data).folder)


def train(name: str, seed: int, runs: str, corpus: str) -> None:
    run, (_, recipe, different) = f"{name}_seed{seed}", ABLATION[name]
    overrides = [*different, f"run.seed={seed}", f"run.name={run}", f"run.folder={runs}", f"data.prepared={corpus}"]
    run_python(run, ["train.py", f"recipes/{recipe}.yaml", *overrides], Path(runs) / f"{run}.log")


if __name__ == "__main__":
    sys.exit(main())
