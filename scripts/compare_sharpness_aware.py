"""AdamW, SAM and Functional-SAM side by side: `python -m scripts.compare_sharpness_aware [--sizes 0.5m 1m 2m] [--seeds 0 1 2] [--jobs 1]`.

At each size the learning rate is tuned for AdamW; at the smallest the radius is tuned for each method. Then every method is trained once
a seed at equal steps, and AdamW for twice the steps as well, which is equal compute. Of every last checkpoint: validation loss,
curvature, the loss after W4A8 quantisation, and how much Python it forgets when it is fine-tuned on C++. What a run came to is written to
--out as soon as it is known, and is not computed again: launched with more seeds or sizes, this carries on.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.curvature import Surface, lanczos
from analysis.decoders import build_model
from analysis.pictures import RUN_COLOURS
from analysis.runs import Run, find_run, read_metrics
from analysis.tokens import encoder, validation_tokens
from scripts.many_runs import Results, common_corpus, environment_of, run_python

STEPS, TUNING_SEED = 512, 100
COMMON = [
    f"training.tokens={STEPS * 1024}", "training.tokens_per_step=1024", "training.micro_batch_size=8", "training.sequence_length=128",
    "data.tokenizer.vocab_size=2048", "evaluation.every=256", "evaluation.tokens=131072",
    f"checkpoint.every={2 * STEPS}", "checkpoint.first=false", "optimizer.final_learning_rate_fraction=0",
    "deepspeed.zero_optimization.stage=0", "logging.tensorboard=false",
]  # fmt: skip
SIZES = {
    "0.5m": ["model.size=null", "model.width=96", "model.depth=3", "model.heads=3"],
    "1m": [],  # nano: width 128, depth 4, heads 4
    "2m": ["model.size=null", "model.width=192", "model.depth=4", "model.heads=6"],
}
# method: its recipe, steps over AdamW's, and passes a step
METHODS = {
    "adamw": ("adamw_nano", 1, 1),
    "adamw_twice": ("adamw_nano", 2, 1),
    "sam": ("sam_nano", 1, 2),
    "functional_sam": ("functional_sam_nano", 1, 2),
    "functional_sam_preconditioned": ("functional_sam_preconditioned_nano", 1, 2),
}
NAMES = {
    "adamw": "AdamW",
    "adamw_twice": "AdamW, twice the steps",
    "sam": "SAM",
    "functional_sam": "Functional-SAM",
    "functional_sam_preconditioned": "Functional-SAM, preconditioned",
}
LEARNING_RATES = {"0.5m": [2e-3, 4e-3, 8e-3], "1m": [2e-3, 4e-3, 8e-3], "2m": [1e-3, 2e-3, 4e-3]}
RADII = [0.005, 0.01, 0.02, 0.05, 0.1]
FINE_TUNE_STEPS, FINE_TUNE_RATE = 64, 1e-3
FIGURES = ("validation_loss", "hessian_top", "gauss_newton_top", "w4a8_loss", "forgotten", "learned")
DEFINITIONS = {
    "validation_loss": "of held-out Python at the last step, nats a token",
    "hessian_top": "largest eigenvalue of the loss's Hessian over 2048 held-out tokens, by 10 steps of Lanczos",
    "gauss_newton_top": "that of its Gauss-Newton part",
    "w4a8_loss": "nats a token that W4A8 quantisation adds, over 32768 held-out tokens (python -m analysis quantization)",
    "forgotten": f"nats a token that Python's loss rises by in {FINE_TUNE_STEPS} AdamW steps on C++ headers, at rate {FINE_TUNE_RATE:g}",
    "learned": "nats a token that the loss of held-out C++ falls by in them",
    "difference": "mean and standard error over seeds of the figure less AdamW's with the same seed; below 0 is better but for learned",
    "split": "medians over training: what acts through the logits, norm(g_sam - g_fsam) / radius, and what through the function, "
    "norm(g_fsam - g) / radius",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one core")
    parser.add_argument("--runs", default="runs/sharpness", help="folder of the runs")
    parser.add_argument("--out", default="docs/evidence/sharpness_cpu.json")
    arguments = parser.parse_args()
    study = Study(Path(arguments.runs), Results(Path(arguments.out)), arguments.jobs)
    rates = {size: study.tune_learning_rate(size) for size in arguments.sizes}
    radii = study.tune_radii(rates.get("0.5m") or study.tune_learning_rate("0.5m"))
    for seed in arguments.seeds:
        for size in arguments.sizes:
            study.each([(size, method, seed, rates[size], radii.get(method)) for method in METHODS])
    rates = {size: study.tuned_rate(size) for size in SIZES if study.is_tuned(size)}  # what earlier calls found is told as well
    summary = summarise(study.results.runs, rates, radii)
    header = {"command": "python -m scripts.compare_sharpness_aware", "environment": study.environment(), "definitions": DEFINITIONS}
    study.results.write(**header, content_hash=study.results.header["content_hash"], **summary)
    draw(summary, Path(arguments.out).with_suffix(".png"))
    print(table(summary))
    return 0


class Study:
    """The runs of one call: where they are, what is known of them, and the corpora that all of them read."""

    def __init__(self, runs: Path, results: Results, jobs: int) -> None:
        self.folder, self.results, self.jobs = runs, results, jobs
        self.corpus = common_corpus(runs, results, "recipes/adamw_nano.yaml", COMMON)

    def tune_learning_rate(self, size: str) -> float:
        """Train AdamW at every rate; returns that of the least validation loss on the tuning seed."""
        self.train_all([(size, "adamw", TUNING_SEED, rate, None) for rate in LEARNING_RATES[size]])
        return self.tuned_rate(size)

    def is_tuned(self, size: str) -> bool:
        return all(name_of(size, "adamw", TUNING_SEED, rate, None) in self.results.runs for rate in LEARNING_RATES[size])

    def tuned_rate(self, size: str) -> float:
        return min(LEARNING_RATES[size], key=lambda rate: self.loss(name_of(size, "adamw", TUNING_SEED, rate, None)))

    def tune_radii(self, rate: float) -> dict[str, float]:
        """Method -> the radius of its least validation loss at the smallest size, on the tuning seed."""
        methods = [method for method, (_, _, passes) in METHODS.items() if passes == 2]
        self.train_all([("0.5m", method, TUNING_SEED, rate, radius) for method in methods for radius in RADII])
        return {m: min(RADII, key=lambda radius: self.loss(name_of("0.5m", m, TUNING_SEED, rate, radius))) for m in methods}

    def train_all(self, jobs: list[tuple[str, str, int, float, float | None]]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda job: self.train(*job), jobs))

    def each(self, jobs: list[tuple[str, str, int, float, float | None]]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda job: self.measure(*job), jobs))

    def loss(self, run: str) -> float:
        return self.results.runs[run]["validation_loss"]

    def train(self, size: str, method: str, seed: int, rate: float, radius: float | None) -> str:
        """Train one run, unless what it came to is known; returns its name."""
        run = name_of(size, method, seed, rate, radius)
        if "validation_loss" in self.results.runs.get(run, {}):
            return run
        recipe, longer, _ = METHODS[method]
        overrides = [*COMMON, *SIZES[size], f"data.prepared={self.corpus}", f"training.tokens={longer * STEPS * 1024}"]
        overrides += [f"optimizer.learning_rate={rate}", f"run.seed={seed}", f"run.folder={self.folder}", f"run.name={run}"]
        if radius is not None:
            overrides += [f"optimizer.sharpness.radius={radius}", f"optimizer.sharpness.split_every={STEPS // 8}"]
        run_python(run, ["train.py", f"recipes/{recipe}.yaml", *overrides], self.folder / f"{run}.log")
        records = read_metrics(find_run(self.folder / run))
        losses = [r["validation_loss"] for r in records if "validation_loss" in r]
        split = [{k: v for k, v in r.items() if k.startswith("split_")} for r in records if "split_logit_norm" in r]
        keys = split[0].keys() if split else ()
        self.results.set(
            run, size=size, method=method, seed=seed, learning_rate=rate, radius=radius, validation_loss=losses[-1],
            split={key: statistics.median(s[key] for s in split) for key in keys} or None,
        )  # fmt: skip
        return run

    def measure(self, size: str, method: str, seed: int, rate: float, radius: float | None) -> None:
        """Train one run and look at its last checkpoint: curvature, W4A8, and forgetting."""
        run = self.train(size, method, seed, rate, radius)
        known, folder = self.results.runs[run], self.folder / run
        if "hessian_top" not in known:
            print(f"{run} curvature ...", flush=True)
            self.results.set(run, **sharpness(find_run(folder)))
        if "w4a8_loss" not in known:
            run_python(f"{run} W4A8", ["-m", "analysis", "quantization", str(folder), "--recipes", "w4a8", "--tokens", "32768"])
            (found,) = json.loads((folder / "report" / "quantization.json").read_text())["checkpoints"]
            self.results.set(run, w4a8_loss=math.log(found["recipes"]["w4a8"]["perplexity_ratio"]))
        if "forgotten" not in known:
            print(f"{run} fine-tune ...", flush=True)
            self.results.set(run, **fine_tune(find_run(folder)))

    def environment(self) -> dict[str, Any]:
        return environment_of(next(iter(self.folder.glob("*/environment.json"))).parent)


def name_of(size: str, method: str, seed: int, rate: float, radius: float | None) -> str:
    return f"{size}_{method}_lr{rate:g}" + (f"_r{radius:g}" if radius is not None else "") + f"_seed{seed}"


def sharpness(run: Run) -> dict[str, float]:
    """Largest eigenvalue of the Hessian and of its Gauss-Newton part at a run's last checkpoint, by 10 products each."""
    torch.set_num_threads(1)
    sequences, _ = validation_tokens(run, 2048, 128)
    surface = Surface(build_model(run.last(verify=False)), sequences)
    start = torch.randn(sum(surface.sizes), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, product in (("hessian_top", surface.hessian), ("gauss_newton_top", surface.gauss_newton)):
        values, _, _ = lanczos(product, start, 10)
        found[name] = float(values[-1])
    return found


def fine_tune(run: Run) -> dict[str, float]:
    """Plain AdamW on C++ headers from a run's last checkpoint: what it learns of them, and what it forgets of Python."""
    torch.set_num_threads(1)
    model = build_model(run.last(verify=False))
    python, _ = validation_tokens(run, 65536, 128)
    tokens = torch.tensor(encoder(run)(cpp_text()), dtype=torch.int64)
    training = tokens[: FINE_TUNE_STEPS * 8 * 129].view(FINE_TUNE_STEPS, 8, 129)
    held_out = tokens[training.numel() :][: 65536 // 129 * 129].view(-1, 129)

    @torch.no_grad()
    def loss_on(sequences: Tensor) -> float:
        return sum(float(model(part[:, :-1], part[:, 1:])) for part in sequences.split(8)) / sequences[:, 1:].numel()

    before = loss_on(python), loss_on(held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=FINE_TUNE_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(training):
        optimizer.param_groups[0]["lr"] = FINE_TUNE_RATE * (1 - step / FINE_TUNE_STEPS)
        optimizer.zero_grad()
        (model(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = loss_on(python), loss_on(held_out)
    return {"forgotten": after[0] - before[0], "learned": before[1] - after[1]}


@functools.cache
def cpp_text() -> str:
    """The headers that come with PyTorch, 2 MB of them: another language on any machine that this runs on."""
    headers = sorted((Path(torch.__file__).parent / "include" / "ATen").rglob("*.h"))
    return "\n".join(header.read_text(encoding="utf-8", errors="ignore") for header in headers)[: 2 << 20]


def summarise(runs: dict[str, dict[str, Any]], rates: dict[str, float], radii: dict[str, float]) -> dict[str, Any]:
    """By size and method: mean and deviation over the seeds that are known, and the difference to AdamW seed by seed."""
    sizes: dict[str, Any] = {}
    for size, rate in rates.items():
        known = {m: {r["seed"]: r for r in chosen(runs, size, m, rate, radii.get(m))} for m in METHODS}
        sizes[size] = {}
        for method, by_seed in known.items():
            entry: dict[str, Any] = {"what": NAMES[method], "seeds": sorted(by_seed)}
            for figure in FIGURES:
                values = [r[figure] for r in by_seed.values()]
                paired = [r[figure] - known["adamw"][seed][figure] for seed, r in by_seed.items() if seed in known["adamw"]]
                entry[figure] = spread(values, 0)
                entry[figure]["difference"] = spread(paired, 1)
            splits = [r["split"] for r in by_seed.values() if r["split"]]
            entry["split"] = {key: statistics.mean(split[key] for split in splits) for key in (splits[0] if splits else ())}
            sizes[size][method] = entry
    return {"learning_rates": rates, "radii": radii, "sizes": sizes}


def chosen(runs: dict[str, dict[str, Any]], size: str, method: str, rate: float, radius: float | None) -> list[dict[str, Any]]:
    """What is wholly known of a method at its tuned settings, but for the seed that these were tuned on."""
    wanted = {"size": size, "method": method, "learning_rate": rate, "radius": radius}
    return [r for r in runs.values() if wanted.items() <= r.items() and r["seed"] != TUNING_SEED and "forgotten" in r]


def spread(values: list[float], error: int) -> dict[str, float]:
    """Mean, and the deviation or (error=1) the standard error of the mean where there are several values."""
    if not values:
        return {}
    if len(values) < 2:
        return {"mean": values[0]}
    deviation = statistics.stdev(values)
    return {
        "mean": statistics.mean(values),
        ("error" if error else "deviation"): deviation / math.sqrt(len(values)) if error else deviation,
    }


def table(summary: dict[str, Any]) -> str:
    """For the terminal and docs/functional_sam.md: validation loss itself, and all else as the difference to AdamW."""
    lines = ["| size | method | seeds | validation loss | " + " | ".join(f"{figure} - AdamW's" for figure in FIGURES) + " |"]
    lines.append("|---" * (4 + len(FIGURES)) + "|")
    for size, methods in summary["sizes"].items():
        for entry in methods.values():
            cells = [size, entry["what"], str(len(entry["seeds"])), number(entry["validation_loss"], "deviation", ".3f")]
            cells += [number(entry[figure]["difference"], "error", "+.3g") for figure in FIGURES]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: dict[str, float], error: str, form: str) -> str:
    if not value:
        return ""
    return format(value["mean"], form) + (f" ± {value[error]:.1g}" if error in value else "")


def draw(summary: dict[str, Any], path: Path) -> None:
    """The difference to AdamW's validation loss, sharpness, W4A8 loss and forgetting, at each size."""
    import matplotlib.pyplot as plt

    shown = ("validation_loss", "hessian_top", "w4a8_loss", "forgotten")
    figure, panels = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 3.6), layout="constrained")
    sizes = list(summary["sizes"])
    for panel, what in zip(panels, shown, strict=True):
        for i, (method, colour) in enumerate(zip([m for m in METHODS if m != "adamw"], RUN_COLOURS, strict=False)):
            points = [(n + 0.12 * (i - 1.5), summary["sizes"][size][method][what]["difference"]) for n, size in enumerate(sizes)]
            points = [(x, d["mean"], d.get("error", 0.0)) for x, d in points if d]
            if points:
                x, mean, error = zip(*points, strict=True)
                panel.errorbar(x, mean, yerr=error, fmt="o", ms=4, color=colour, capsize=2, label=NAMES[method])
        panel.axhline(0, color="0.6", lw=0.8)
        panel.set(title=f"{what.replace('_', ' ')} − AdamW's", xticks=range(len(sizes)), xticklabels=sizes)
    panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
