"""Train the trajectory grid and say what moves the path through weight space: `python -m scripts.ablate_trajectories [--seeds 0 1]`.

Momentum x weight decay x learning rate x batch, on as many tokens each and 25 checkpoints evenly spaced; beside it three widths, an
Outlier-Protected network, and Functional-SAM. After each run `python -m analysis trajectory` reads its checkpoints, which are then
deleted (`--keep-checkpoints`). Figures go to the file --out, and a picture beside it. Launched again it carries on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from analysis.runs import find_run, read_metrics
from training.data import prepare
from training.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
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


def train(name: str, overrides: list[str], seed: int, runs: Path, corpus: str, keep: bool) -> None:
    """Train a run and analyse it, unless that is done already."""
    run = runs / f"{name}_seed{seed}"
    if (run / "report" / "trajectory.json").exists():
        return
    common = [f"run.seed={seed}", f"run.name={run.name}", f"run.folder={runs}", f"data.prepared={corpus}"]
    call(run.name, [sys.executable, "train.py", RECIPE, *overrides, *common], runs / f"{run.name}.log")
    call(run.name, [sys.executable, "-m", "analysis", "trajectory", str(run)], runs / f"{run.name}.log")
    if not keep:
        shutil.rmtree(run / "checkpoints")


def call(what: str, command: list[str], log: Path) -> None:
    """Run a command in one thread, its output into `log`. Ends this program when it fails."""
    print(f"{what}: {command[1] if command[1] != '-m' else command[3]}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "a") as output:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{what}: failed with exit code {code}; see {log}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/trajectory_grid"), help="folder of the runs")
    parser.add_argument("--keep-checkpoints", action="store_true", help="1.2 GB a seed; default: deleted when they are analysed")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/trajectories_cpu.json"))
    arguments = parser.parse_args()
    runs = arguments.runs.resolve()
    record = next(iter(sorted(runs.glob("*/data.json"))), None)
    corpus = json.loads(record.read_text())["prepared"] if record else str(prepare(load_recipe(RECIPE).recipe.data).folder)
    jobs = [(name, [*overrides_of(MIDDLE), *overrides]) for name, (_, overrides) in BESIDE.items()]
    jobs += [(name_of(settings), overrides_of(settings)) for settings in settings_of_grid()]
    for seed in arguments.seeds:
        for name, overrides in jobs:
            train(name, overrides, seed, runs, corpus, arguments.keep_checkpoints)
    return 0


if __name__ == "__main__":
    sys.exit(main())
