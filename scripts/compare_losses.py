"""Does a change keep the loss? Train both sides for some steps and compare the curves.

    python -m scripts.compare_losses HEAD~1 . [--recipe recipes/adamw_nano.yaml] [--steps 100] [--out FILE.json] [section.key=value ...]
    python -m scripts.compare_losses "" training.compile=true
    python -m scripts.compare_losses main . --seeds 0 1 2 3 4 5 training.precision=bf16

A side is a commit (trained in a git worktree of its own), `.` for the files as they lie here, or overrides of the recipe separated by
spaces ("" for none) on the files as they lie here. What both are to have in common is written behind.

Verdicts:
    identical             every loss of every step has the same bits
    equal to rounding     fp32: the curves differ, but by no more than RATIO times what A differs from itself with half the micro-batch: the
                          same mathematics added up in another order. Compared by the largest relative difference up to each step, of
                          which one place of float32, in which a step's loss is made, always counts as none.
    statistically equal   several seeds: the difference of the mean loss over the last quarter of the steps, paired by seed, lies within
                          +- MARGIN of A's mean loss: two one-sided tests (TOST, Schuirmann 1987), each an exact sign-flip permutation test
                          (Fisher 1935) at 5%; five seeds are the fewest that can show it
    different             none of these
Ends with exit code 0, or 1 if they are different.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from analysis.output import write_json
from model.errors import InputError
from training.data import prepare
from training.distributed import one_clear_line
from training.recipe_file import load_recipe
from training.run_folder import describe_environment

ROOT = Path(__file__).resolve().parent.parent
RATIO = 3.0
LAST_PLACE = 2.0**-23  # of float32, relative: early steps of both can agree to the bit and the curves still part by chance
MARGIN = 0.005
LEVEL = 0.05
FEWEST_SEEDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for both")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/adamw_nano.yaml"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--margin", type=float, default=MARGIN, help="largest difference that counts as none, as a share of the loss")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    arguments = parser.parse_intermixed_args()
    with one_clear_line():
        return compare(arguments)


def compare(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.overrides).recipe
    prepared = prepare(recipe.data, recipe.training.sequence_length).folder.resolve()
    half = recipe.training.micro_batch_size // 2
    precise = recipe.training.precision == "fp32"
    curves: dict[str, dict[int, list[float]]] = {"a": {}, "b": {}, "control": {}}
    with tempfile.TemporaryDirectory() as scratch, side(arguments.a, scratch) as a, side(arguments.b, scratch) as b:

        def run(name: str, what: tuple[Path, list[str]], seed: int, *more: str) -> None:
            print(f"{name}, seed {seed} ...", flush=True)
            common = [*arguments.overrides, f"run.seed={seed}", f"data.prepared={prepared}", *what[1], *more]
            curves[name][seed] = losses(what[0], arguments, common, Path(scratch) / f"{name}-{seed}")

        for seed in arguments.seeds:
            run("a", a, seed)
            run("b", b, seed)
        if precise and half and curves["a"] != curves["b"]:
            run("control", a, arguments.seeds[0], f"training.micro_batch_size={half}")
    verdict = judge(curves["a"], curves["b"], next(iter(curves["control"].values()), None), arguments.margin)
    for name, value in verdict.items():
        print(f"{name}: {value}")
    if arguments.out:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        described = {
            "what": __doc__,
            "command": "python -m scripts.compare_losses " + " ".join(sys.argv[1:]),
            **verdict,
            "losses": curves,
            "environment": {key: value for key, value in describe_environment(arguments.ranks, device).items() if key != "command"},
        }
        write_json(arguments.out, described)
    return 1 if verdict["verdict"] == "different" else 0


@contextmanager
def side(words: str, scratch: str) -> Iterator[tuple[Path, list[str]]]:
    """Where to train, and with what overrides."""
    if words == "." or "=" in words or not words.strip():
        yield ROOT, words.split() if "=" in words else []
        return
    tree = Path(tempfile.mkdtemp(dir=scratch)) / "tree"
    made = subprocess.run(["git", "worktree", "add", "--detach", str(tree), words], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        raise InputError(f"{words}: expected a commit, '.', or section.key=value: {made.stderr.strip().splitlines()[-1]}")
    try:
        yield tree, []
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)


def losses(tree: Path, arguments: argparse.Namespace, overrides: list[str], folder: Path) -> list[float]:
    """The loss of each step of a run of the files in `tree`."""
    quiet = [
        f"run.folder={folder.parent}", f"run.name={folder.name}", f"run.stop_at_step={arguments.steps}", "logging.every=1",
        "logging.tensorboard=false", "logging.outliers_every=0", "evaluation.every=1000000000", "checkpoint.every=1000000000",
        "checkpoint.first=false",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    command = [*(launcher if arguments.ranks > 1 else [sys.executable]), "train.py", str(arguments.recipe.resolve()), *overrides, *quiet]
    done = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{tree}: training ended with exit code {done.returncode}: {done.stderr.strip()[-1500:]}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def judge(a: dict[int, list[float]], b: dict[int, list[float]], control: list[float] | None, margin: float) -> dict[str, Any]:
    """The verdict on curves by seed, as the top of this file says, and the figures behind it."""
    if a == b:
        return {"verdict": "identical", "steps": len(next(iter(a.values()))), "seeds": len(a)}
    seed = next(iter(a))
    found: dict[str, Any] = {"verdict": "different", "largest_relative_difference": difference(a[seed], b[seed])[-1]}
    if control is not None:
        found["largest_relative_difference_of_the_control"] = difference(a[seed], control)[-1]
        # a step late, so that a curve which parts first is not called different for that alone
        limits = [max(RATIO * x, LAST_PLACE) for x in difference(a[seed], control)[1:]]
        if all(x <= limit for x, limit in zip(difference(a[seed], b[seed]), limits, strict=False)):
            found["verdict"] = "equal to rounding"
    if len(a) >= FEWEST_SEEDS:
        ends = [(tail(a[seed]), tail(b[seed])) for seed in a]
        differences, limit = [there - here for here, there in ends], margin * statistics.mean(here for here, _ in ends)
        found |= {
            "mean_difference": statistics.mean(differences),
            "margin": limit,
            "p_not_above": sign_flip([limit - d for d in differences]),
            "p_not_below": sign_flip([limit + d for d in differences]),
        }
        if found["verdict"] == "different" and max(found["p_not_above"], found["p_not_below"]) <= LEVEL:
            found["verdict"] = "statistically equal"
    elif found["verdict"] == "different" and control is None:
        found["note"] = f"one verdict more is possible with --seeds: at least {FEWEST_SEEDS}"
    return found


def difference(a: list[float], b: list[float]) -> list[float]:
    """The largest |b / a - 1| up to each step."""
    return list(itertools.accumulate((abs(y / x - 1) for x, y in zip(a, b, strict=True)), max))


def tail(curve: list[float]) -> float:
    """Mean over the last quarter of the steps."""
    return statistics.mean(curve[-max(1, len(curve) // 4) :])


def sign_flip(values: list[float]) -> float:
    """Of all ways to choose the values' signs, the share whose sum is at least the one that was found: small if their mean is above 0."""
    sums = [sum(sign * v for sign, v in zip(signs, values, strict=True)) for signs in itertools.product((1, -1), repeat=len(values))]
    return sum(s >= sums[0] - 1e-12 * abs(sums[0]) for s in sums) / len(sums)


if __name__ == "__main__":
    sys.exit(main())
