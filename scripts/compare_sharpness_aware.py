"""AdamW, SAM and Functional-SAM side by side: `python -m scripts.compare_sharpness_aware [--sizes 0.5m 1m 4m] [--seeds 0 1 2] [--jobs 1]`.

At each size the learning rate is tuned for AdamW; at the smallest the radius is tuned for each method. Then every method is trained once
a seed at equal steps, and AdamW for twice the steps as well, which is equal compute. Of every last checkpoint: validation loss,
curvature, the loss after W4A8 quantisation, and how much Python it forgets when it is fine-tuned on C++. What a run came to is written to
--out as soon as it is known, and is not computed again: launched with more seeds or sizes, this carries on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from analysis.runs import find_run, read_metrics
from training.data import prepare
from training.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
STEPS, TUNING_SEED = 512, 100
COMMON = [
    f"training.tokens={STEPS * 1024}", "training.tokens_per_step=1024", "training.micro_batch_size=8", "training.sequence_length=128",
    "data.tokenizer.vocab_size=2048", "evaluation.every=256", "evaluation.tokens=131072", f"checkpoint.every={2 * STEPS}",
    "checkpoint.first=false", "optimizer.final_learning_rate_fraction=0", "deepspeed.zero_optimization.stage=0", "logging.tensorboard=false",
]  # fmt: skip
SIZES = {
    "0.5m": ["model.size=null", "model.width=96", "model.depth=3", "model.heads=3"],
    "1m": [],  # nano: width 128, depth 4, heads 4
    "4m": ["model.size=null", "model.width=256", "model.depth=5", "model.heads=8"],
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
LEARNING_RATES = {"0.5m": [2e-3, 4e-3, 8e-3, 1.6e-2], "1m": [2e-3, 4e-3, 8e-3], "4m": [1e-3, 2e-3, 4e-3]}
RADII = [0.02, 0.05, 0.1, 0.2, 0.4]
FINE_TUNE_STEPS = 64


class Results:
    """What is known so far, by run, kept in a JSON file that several threads write."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        self.runs: dict[str, dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else {}

    def set(self, run: str, **figures: Any) -> None:
        with self.lock:
            self.runs.setdefault(run, {}).update(figures)
            self.write()

    def write(self, **summary: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**summary, "runs": self.runs}, indent=1) + "\n")
        partial.replace(self.path)


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
    summary = summarise(study.results.runs, rates, radii)
    study.results.write(command="python -m scripts.compare_sharpness_aware", environment=study.environment(), **summary)
    print(table(summary))
    return 0


class Study:
    """The runs of one call: where they are, what is known of them, and the corpora that all of them read."""

    def __init__(self, runs: Path, results: Results, jobs: int) -> None:
        self.folder, self.results, self.jobs = runs, results, jobs
        runs.mkdir(parents=True, exist_ok=True)
        self.corpus = self._corpus("python", ["data.source=python_source"])

    def _corpus(self, name: str, overrides: list[str]) -> Path:
        """The prepared corpus of the runs that are there, or a new one: all read the same text, whatever is installed between them."""
        record = self.folder / f"{name}.corpus"
        if not record.exists():
            recipe = load_recipe("recipes/adamw_nano.yaml", [*COMMON, *overrides]).recipe
            record.write_text(str(prepare(recipe.data).folder.resolve()))
        return Path(record.read_text())

    def tune_learning_rate(self, size: str) -> float:
        """The learning rate of AdamW's least validation loss on the tuning seed."""
        self.train_all([(size, "adamw", TUNING_SEED, rate, None) for rate in LEARNING_RATES[size]])
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
        call(run, ["train.py", f"recipes/{recipe}.yaml", *overrides], self.folder / f"{run}.log")
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
            call(f"{run} curvature", ["-m", "analysis", "curvature", str(folder), "--tokens", "4096", "--steps", "12", "--probes", "1"])
            found = json.loads((folder / "report" / "curvature.json").read_text())
            self.results.set(
                run, hessian_top=found["hessian"]["top"][0], gauss_newton_top=found["gauss_newton"]["top"][0],
                hessian_trace=found["hessian"]["trace"],
            )  # fmt: skip
        if "w4a8" not in known:
            call(f"{run} W4A8", ["-m", "analysis", "quantization", str(folder), "--recipes", "w4a8", "--tokens", "32768"])
            (found,) = json.loads((folder / "report" / "quantization.json").read_text())["checkpoints"]
            self.results.set(run, w4a8={key: found["recipes"]["w4a8"][key] for key in ("perplexity_ratio", "output_kl")})

    def environment(self) -> dict[str, Any]:
        recorded = json.loads(next(iter(self.folder.glob("*/environment.json"))).read_text())
        return {key: value for key, value in recorded.items() if key != "command"}


def name_of(size: str, method: str, seed: int, rate: float, radius: float | None) -> str:
    return f"{size}_{method}_lr{rate:g}" + (f"_r{radius:g}" if radius is not None else "") + f"_seed{seed}"


def call(what: str, arguments: list[str], log: Path | None = None) -> None:
    """Run Python in one thread; its output goes to `log`, or is shown when it fails. Ends this program when it fails."""
    print(f"{what} ...", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode:
        raise SystemExit(f"{what}: failed with exit code {done.returncode}\n{done.stdout[-2000:]}")


def summarise(runs: dict[str, dict[str, Any]], rates: dict[str, float], radii: dict[str, float]) -> dict[str, Any]:
    return {"learning_rates": rates, "radii": radii}


def table(summary: dict[str, Any]) -> str:
    return json.dumps(summary)


if __name__ == "__main__":
    sys.exit(main())
