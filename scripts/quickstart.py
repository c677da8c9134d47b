"""The main job on this machine in minutes: two small language models trained with DeepSpeed, then read from their shards.

    python -m scripts.quickstart [--out runs]

Trains recipes/quickstart_pre_norm.yaml and recipes/quickstart_outlier_protected.yaml on every GPU of this machine, or on two CPU
ranks, and writes a page that compares what happened inside them. Launched again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from analysis.output import write_json
from training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("quickstart_pre_norm", "quickstart_outlier_protected")
SEQUENCES_PER_STEP = 8  # of both recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs", help="folder of the runs and the report")
    out = Path(parser.parse_args().out)
    started = time.perf_counter()
    for name in RUNS:
        call(f"train {name}", [*launcher(), "train.py", f"recipes/{name}.yaml", f"run.folder={out}", *overrides()])
    call(
        "analyse the shards and write the report",
        [sys.executable, "-m", "analysis", "report", *(str(out / name) for name in RUNS)],  # into the folder that holds both
    )
    print()
    summary: dict[str, Any] = {"command": "make quickstart", "seconds": round(time.perf_counter() - started), "runs": {}}
    for name in RUNS:
        validation, unigram = last_validation(out / name)
        print(f"{name:<32} validation loss {validation:.3f} nats a token; a unigram model has {unigram:.3f}")
        environment = json.loads((out / name / "environment.json").read_text())
        summary["runs"][name] = {
            "validation_loss": validation,
            "unigram_loss": unigram,
            "largest_kurtosis": largest_kurtosis(out / name),
            "seed": load_recipe(out / name / "recipe.yaml").recipe.run.seed,
            **environment,
        }
    write_json(out / "quickstart.json", summary)
    print(f"done in {summary['seconds']} s. Open {(out / 'report.html').resolve()}")


def ranks() -> int:
    """Two on a CPU; on GPUs the largest power of two of them that shares a step evenly."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 2
    return max(n for n in (1, 2, 4, 8) if n <= count)


def launcher() -> list[str]:
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", f"--num_accelerators={ranks()}"]


def overrides() -> list[str]:
    chosen = [f"training.micro_batch_size={SEQUENCES_PER_STEP // ranks()}"]
    return [*chosen, "training.precision=bf16"] if torch.cuda.is_available() else chosen


def call(what: str, command: list[str]) -> None:
    """Run a step, showing what it is and what it prints; stop with its exit code if it fails."""
    print(f"\n== {what}\n   {' '.join([Path(command[0]).name, *command[1:]])}", flush=True)
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def last_validation(run: Path) -> tuple[float, float]:
    """(last validation loss, the unigram model's) of a run, nats a token."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    return losses[-1], json.loads((run / "data.json").read_text())["validation_unigram_loss"]


def largest_kurtosis(run: Path) -> float:
    """Over layers and checkpoints, as `python -m analysis outliers` measured it."""
    checkpoints = json.loads((run / "report" / "outliers.json").read_text())["checkpoints"]
    return max(place["kurtosis"] for checkpoint in checkpoints for place in checkpoint["places"].values())


if __name__ == "__main__":
    main()
