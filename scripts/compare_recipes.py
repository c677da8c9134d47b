"""Recipes side by side, by what they reach: `python -m scripts.compare_recipes recipes/blocks_*.yaml [--seeds 0 1] [--out FILE.json]`.

Every recipe is trained once for each seed, in turn, all on one prepared corpus. With --learning-rates each is trained at all of them first,
on a seed of its own, beyond them by factors of two while the best lies at their edge, and then at its best. A run whose result --out
already has is not trained again, and an --out of runs under other --overrides is refused. A run that diverges is a result as well: its loss
is null. Validation loss and the largest kurtosis of a layer, with their spread over seeds; tokens a second of training steps that take
turns in one process, on a CPU of one thread's processor time; curves beside the JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.pictures import RUN_COLOURS
from analysis.runs import find_run, read_metrics
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from scripts.benchmark_outliers import adamw_step, take_turns
from scripts.many_runs import DIVERGED, Results, common_corpus, environment_of, run_python
from training.distributed import one_clear_line
from training.recipe import model_config
from training.recipe_file import load_recipe

TUNING_SEED = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning-rates", type=float, nargs="+", help="tune each recipe's among these (default: its own)")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value", help="for all of them")
    parser.add_argument("--runs", type=Path, default=Path("runs/compared"), help="folder of the runs")
    parser.add_argument("--rounds", type=int, default=9, help="turns that the training steps take to be timed (default: 9)")
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
    study = Study(arguments, results, corpus)
    rates = {recipe.stem: study.best_rate(recipe) for recipe in arguments.recipes}
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            study.train(recipe, rates[recipe.stem], seed)
    header = {
        **results.header,
        "learning_rates": rates,
        "tokens_per_second": tokens_per_second(arguments.recipes, arguments.overrides, arguments.rounds),
    }
    results.write(**header)
    shown = {
        name: run
        for name, run in results.runs.items()
        if run["seed"] in arguments.seeds and run.get("learning_rate") == rates.get(run["recipe"])
    }
    draw(shown, arguments.out.with_suffix(".png"))
    print(table(shown, header))


@dataclass
class Study:
    """The runs of one call."""

    arguments: argparse.Namespace
    results: Results
    corpus: Path

    def best_rate(self, recipe: Path) -> float:
        """The learning rate of the least validation loss on the tuning seed, with others tried on both sides; else the recipe's own.

        Raises InputError where it diverges at all of --learning-rates.
        """
        if self.arguments.learning_rates is None:
            return load_recipe(recipe, self.arguments.overrides).recipe.optimizer.learning_rate

        def loss(rate: float) -> float:
            found = self.train(recipe, rate, TUNING_SEED)["validation_loss"]
            return math.inf if found is None else found

        losses = {rate: loss(rate) for rate in self.arguments.learning_rates}
        if min(losses.values()) == math.inf:
            raise InputError(f"{recipe}: diverges at every one of --learning-rates: give smaller ones")
        while True:
            best = min(losses, key=lambda rate: losses[rate])
            beyond = 2 * best if best == max(losses) else best / 2 if best == min(losses) else None
            if beyond is None:
                return best
            losses[beyond] = loss(beyond)

    def train(self, recipe: Path, rate: float, seed: int) -> dict[str, Any]:
        """What is known of a run, which is trained if nothing is."""
        name = f"{recipe.stem}_lr{rate:g}_seed{seed}"
        if name not in self.results.runs:
            arguments = self.arguments
            own = [f"run.name={name}", f"run.folder={arguments.runs.resolve()}", f"run.seed={seed}", f"data.prepared={self.corpus}"]
            own.append(f"optimizer.learning_rate={rate!r}")
            whole = run_python(name, ["train.py", str(recipe.resolve()), *arguments.overrides, *own], may_say=DIVERGED)
            self.results.header["environment"] = environment_of(arguments.runs / name)
            self.results.header["command"] = "python -m scripts.compare_recipes " + " ".join(sys.argv[1:])
            found = figures(arguments.runs / name) if whole else {"validation_loss": None}
            self.results.set(name, recipe=recipe.stem, learning_rate=rate, seed=seed, **found)
        return self.results.runs[name]


def figures(run: Path) -> dict[str, Any]:
    records = read_metrics(find_run(run))
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    places = [m for r in records if "activations" in r for place, m in r["activations"].items() if place != "unembedding"]
    return {
        "validation_loss": validation[-1][1],
        "peak_kurtosis": max(m["kurtosis"] for m in places),
        "validation": validation,
    }


def tokens_per_second(recipes: list[Path], overrides: list[str], rounds: int) -> dict[str, float]:
    """Of a training step of each recipe's network on one micro-batch, AdamW, float32; median over rounds in which they take turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    steps, sizes = {}, {}
    for path in recipes:
        recipe = load_recipe(path, overrides).recipe
        config = model_config(recipe, recipe.data.tokenizer.vocab_size)
        if not isinstance(config, ModelConfig):
            raise InputError(f"{path}: a pretrained model; expected recipes that train networks of their own")
        model = Transformer(config)
        initialize(model, 0)
        tokens = torch.randint(config.vocab_size, (recipe.training.micro_batch_size, recipe.training.sequence_length), device=device)
        steps[path.stem], sizes[path.stem] = adamw_step(model.to(device), tokens), tokens.numel()
    return {name: sizes[name] / statistics.median(seconds) for name, seconds in take_turns(steps, rounds, device).items()}


def over_seeds(runs: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """recipe -> figure -> its value for each seed that did not diverge."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs.values():
        figures_of = found.setdefault(run["recipe"], {"validation_loss": [], "peak_kurtosis": []})
        if run["validation_loss"] is not None:
            for key, values in figures_of.items():
                values.append(run[key])
    return found


def table(runs: dict[str, Any], header: dict[str, Any]) -> str:
    """For the terminal and the docs."""
    lines = ["| recipe | learning rate | seeds | validation loss | kurtosis, peak | tokens a second |", "|---|---|---|---|---|---|"]
    for recipe, found in over_seeds(runs).items():
        whole, seeds = len(found["validation_loss"]), sum(run["recipe"] == recipe for run in runs.values())
        cells = [
            f"`{recipe}`",
            f"{header['learning_rates'][recipe]:g}",
            f"{seeds}" if whole == seeds else f"{seeds}, {seeds - whole} diverged",
        ]
        for key, form in (("validation_loss", ".3f"), ("peak_kurtosis", ".2f")):
            if not whole:
                cells.append("")
                continue
            spread = f" ± {format(statistics.stdev(found[key]), form)}" if len(found[key]) > 1 else ""
            cells.append(format(statistics.mean(found[key]), form) + spread)
        lines.append("| " + " | ".join([*cells, format(header["tokens_per_second"][recipe], ",.0f")]) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, Any], path: Path) -> None:
    """Validation loss over steps, one colour a recipe and one line a seed."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    recipes = list(over_seeds(runs))
    labelled: set[str] = set()
    for run in (run for run in runs.values() if run["validation_loss"] is not None):
        colour = RUN_COLOURS[recipes.index(run["recipe"]) % len(RUN_COLOURS)]
        label = None if run["recipe"] in labelled else run["recipe"]
        labelled.add(run["recipe"])
        panel.plot(*zip(*run["validation"], strict=True), "o-", ms=3, lw=1.4, color=colour, label=label)
    panel.set(title="Validation loss, nats a token", xlabel="step")
    if labelled:
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
