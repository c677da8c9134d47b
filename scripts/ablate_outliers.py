"""Train the outlier ablation and say what int8 costs each network: `python -m scripts.ablate_outliers [--seeds 0 1] [--jobs 2]`.

Every recipe of ABLATION is trained once for each seed, one process and one core each; then `python -m analysis quantization`
reads the last checkpoints. The figures go to outliers.json and outliers.png below --out. Launched again it carries on: runs that
are complete are not trained again, so seeds can be added later.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABLATION = {
    "ablation_pre_norm": "pre-norm, AdamW",
    "ablation_outlier_protected": "Outlier-Protected, AdamW",
    "ablation_pre_norm_epsilon": "pre-norm, AdamW with epsilon 1e-4",
    "ablation_pre_norm_muon": "pre-norm, Muon",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one core")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--out", default="docs/evidence", help="folder of outliers.json and outliers.png")
    arguments = parser.parse_args()
    jobs = [(name, seed) for seed in arguments.seeds for name in ABLATION]
    call("prepare the data", [sys.executable, "-m", "scripts.prepare_data", "recipes/ablation_pre_norm.yaml"])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: train(job[0], job[1], arguments.runs), jobs))
    return 0


def train(name: str, seed: int, runs: str) -> None:
    run = f"{name}_seed{seed}"
    overrides = [f"run.seed={seed}", f"run.name={run}", f"run.folder={runs}"]
    call(run, [sys.executable, "train.py", f"recipes/{name}.yaml", *overrides], log=Path(runs) / f"{run}.log")


def call(what: str, command: list[str], log: Path | None = None) -> None:
    """Run a command in one thread; its output goes to `log`, where given. Ends this program when it fails."""
    print(f"{what} ...", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") if log is not None else nullcontext() as output:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output and subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{what}: failed with exit code {code}" + (f"; see {log}" if log else ""))
    print(f"{what}: done", flush=True)


if __name__ == "__main__":
    sys.exit(main())
