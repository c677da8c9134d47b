"""Does the best learning rate stay where it is when the network grows? Learning rates x widths or depths x seeds, from one recipe.

    python -m scripts.transfer_sweep recipes/blocks_pre_norm.yaml --widths 32 64 128 256 --parametrizations standard mup
    python -m scripts.transfer_sweep recipes/blocks_pre_norm.yaml --depths 2 4 8 16 --parametrizations standard complete_p

Each run is `train.py` on one core, on the recipe's tokens and schedule, whatever its size. Learning rates are powers of two. Besides the
parametrisations of the recipe there is `standard_embedding`: standard, with the embeddings' learning rate times the ratio of widths, a
simple rival to muP. At the base size (--base, else the recipe's own or the smallest) all are one network, which is trained once.

What a run came to is in --out as soon as it is known, and is not computed again: launched again, with more seeds or sizes, this carries
on. Runs are deleted once their figures are there. --sharpness-at E also follows, in runs of their own at learning rate 2^E, the largest
eigenvalue of the preconditioned Hessian over the value at which full-batch Adam becomes unstable (arXiv 2207.14484): a common line for
all sizes, since the learning rate's factor on each tensor counts as a part of the preconditioner (arXiv 2402.17457).
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.runs import find_run, read_metrics
from analysis.study_pictures import transfer_picture
from model.errors import InputError
from scripts.coordinate_check import add_size_arguments, axis_and_sizes, size_overrides
from scripts.many_runs import DIVERGED, Results, common_corpus, environment_of, run_python
from training.recipe_file import load_recipe

EMBEDDING = "standard_embedding"
DEFINITIONS = {
    "validation_loss": "at the last step, nats a token; null where training stopped because gradients were not finite",
    "losses": "exponent of the learning rate -> mean validation loss over the seeds; null where a seed's run stopped",
    "best_exponent": "log2 of the grid's best learning rate; at_the_edge: it is the grid's first or last, so the optimum may lie outside",
    "vertex": "log2 of the learning rate at the lowest point of the parabola through the best and its two neighbours; null at the edge",
    "shift": "best_exponent less that of the base size, in octaves; vertex_shift likewise",
    "largest_shift": "the shift of largest magnitude over the sizes",
    "larger_is_better": "whether the best loss falls with every step in size",
    "sharpness": "of a run at sharpness_exponent: step -> preconditioned_hessian_top / stability_line; 1 is where full-batch Adam becomes "
    "unstable at the step's learning rate",
}

LANCZOS_STEPS = 8  # products, from the eigenvector that was found the last time


@dataclass(frozen=True)
class Job:
    """One run."""

    parametrization: str
    size: int
    exponent: float
    seed: int
    sharpness: bool = False

    def name(self, axis: str) -> str:
        kind = "sharpness_" if self.sharpness else ""
        return f"{kind}{self.parametrization}_{axis}{self.size}_lr2^{self.exponent:g}_seed{self.seed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_arguments(parser)
    parser.add_argument("--parametrizations", nargs="+", metavar="NAME", default=["standard"])
    parser.add_argument("--exponents", type=float, nargs="+", metavar="E", default=[-10, -9, -8, -7, -6, -5], help="log2 of learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sharpness-at", type=float, metavar="E", help="follow the sharpness at learning rate 2^E, first seed")
    parser.add_argument("--sharpness-every", type=int, default=16, metavar="STEPS", help="default: 16")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one core")
    parser.add_argument("--runs", default="runs/transfer", help="folder of the runs")
    parser.add_argument("--out", default="transfer/transfer.json", help="results; the picture goes beside it")
    arguments = parser.parse_intermixed_args()
    try:
        result = Sweep(arguments).run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    print(f"  {arguments.out}\n  {transfer_picture(result, Path(arguments.out).with_suffix('.png'))}")
    return 0


class Sweep:
    """The runs of one call. Raises InputError when some cannot be, before the first begins."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.axis, sizes = axis_and_sizes(arguments)
        self.sizes, self.exponents = sorted(set(sizes)), sorted(set(arguments.exponents))
        section = load_recipe(arguments.recipe, arguments.overrides).recipe.model
        own = section.base_width if self.axis == "width" else section.base_depth
        self.base: int = arguments.base or own or self.sizes[0]
        if self.base not in self.sizes:
            raise InputError(f"--base {self.base}: expected one of the sizes {' '.join(map(str, self.sizes))}: shifts are counted from it")
        # what has one rule for width and another for depth is the standard at the base of both alone
        other, there = (section.base_depth, section.depth) if self.axis == "width" else (section.base_width, section.width)
        self.one_at_the_base = other in (None, there) and section.base_head_dim is None
        names, sharp = arguments.parametrizations, arguments.sharpness_at
        jobs = [Job(n, s, e, seed) for seed in arguments.seeds for s in self.sizes for e in self.exponents for n in names]
        if sharp is not None:
            jobs += [Job(n, s, sharp, arguments.seeds[0], sharpness=True) for s in self.sizes for n in names]
        self.jobs = list(dict.fromkeys(self.canonical(job) for job in jobs))
        for job in self.jobs:  # every recipe is checked first, so that nothing is refused after hours
            load_recipe(arguments.recipe, self.overrides(job))
        self.results = Results(Path(arguments.out))
        same = {"recipe": arguments.recipe, "overrides": arguments.overrides, "axis": self.axis, "base": self.base}
        for key, value in same.items():
            if self.results.header.get(key, value) != value:
                raise InputError(f"{arguments.out}: holds a sweep with {key} {self.results.header[key]}, not {value}: name another --out")
        self.results.header = {**self.results.header, **same}

    def canonical(self, job: Job) -> Job:
        """At the base size every parametrisation is the standard one."""
        return replace(job, parametrization="standard") if job.size == self.base and self.one_at_the_base else job

    def overrides(self, job: Job) -> list[str]:
        """What makes the recipe this run's."""
        arguments, embedding = self.arguments, job.parametrization == EMBEDDING
        found = [*arguments.overrides, f"optimizer.learning_rate={2.0**job.exponent!r}", f"run.seed={job.seed}"]
        name = "standard" if embedding else job.parametrization
        found += size_overrides(arguments.recipe, arguments.overrides, name, self.axis, job.size, self.base)
        if embedding and self.axis == "width":
            found.append(f"optimizer.embedding_learning_rate_factor={job.size / self.base!r}")
        if job.sharpness:  # Lanczos tells the largest eigenvalue from the one of largest magnitude, which early on can be negative
            found += [f"evaluation.curvature_every={arguments.sharpness_every}", f"evaluation.curvature_lanczos={LANCZOS_STEPS}"]
        return found

    def run(self) -> dict[str, Any]:
        """Train what is not known yet, and return what transfer.json holds."""
        folder = Path(self.arguments.runs)
        corpus = common_corpus(folder, self.results, self.arguments.recipe, self.arguments.overrides)
        missing = [job for job in self.jobs if job.name(self.axis) not in self.results.runs]
        done = len(self.jobs) - len(missing)

        def train(job: Job) -> None:
            nonlocal done
            self.train(job, folder, corpus)
            done += 1
            print(
                f"{done} of {len(self.jobs)}: {job.name(self.axis)}: {self.results.runs[job.name(self.axis)]['validation_loss']}",
                flush=True,
            )

        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(train, missing))
        summary = self.summary()
        self.results.write(**summary)
        return {**summary, "runs": self.results.runs}

    def train(self, job: Job, folder: Path, corpus: Path) -> None:
        name = job.name(self.axis)
        overrides = [
            *self.overrides(job), f"run.folder={folder.resolve()}", f"run.name={name}", f"data.prepared={corpus}",
            "checkpoint.every=1000000", "logging.tensorboard=false",
        ]  # fmt: skip
        command = ["train.py", str(Path(self.arguments.recipe).resolve()), *overrides]
        whole = run_python(name, command, may_say=DIVERGED)
        records = read_metrics_of(folder / name)
        losses = [r["validation_loss"] for r in records if "validation_loss" in r]
        sharpness = {str(r["step"]): r["preconditioned_hessian_top"] / r["stability_line"] for r in records if "stability_line" in r}
        loss = None if not (whole and losses) else losses[-1]
        self.results.header["environment"] = environment_of(folder / name)
        self.results.set(name, validation_loss=loss, **({"sharpness": sharpness} if job.sharpness else {}))
        shutil.rmtree(folder / name)

    def summary(self) -> dict[str, Any]:
        """Optima and their shifts, from the runs that are known."""
        found: dict[str, Any] = {}
        for name in self.arguments.parametrizations:
            by_size = {size: self.optimum(name, size) for size in self.sizes}
            base = by_size[self.base]
            for one in by_size.values():
                one["shift"] = difference(one["best_exponent"], base["best_exponent"])
                one["vertex_shift"] = difference(one["vertex"], base["vertex"])
            best = [one["best_loss"] for one in by_size.values()]
            shifts = [one["shift"] for one in by_size.values() if one["shift"] is not None]
            found[name] = {
                "sizes": {str(size): one for size, one in by_size.items()},
                "largest_shift": max(shifts, key=abs, default=None),
                "larger_is_better": None not in best and all(b < a for a, b in itertools.pairwise(best)),
                "sharpness": {str(size): sharp for size in self.sizes if (sharp := self.sharpness(name, size)) is not None},
            }
        arguments = self.arguments
        return {
            **self.results.header,
            "format": 1,
            "command": " ".join(["python -m scripts.transfer_sweep", *sys.argv[1:]]),
            "definitions": DEFINITIONS,
            "sizes": self.sizes,
            "exponents": self.exponents,
            "seeds": arguments.seeds,
            "sharpness_exponent": arguments.sharpness_at,
            "parametrizations": found,
        }

    def optimum(self, parametrization: str, size: int) -> dict[str, Any]:
        losses: dict[float, float | None] = {}
        for exponent in self.exponents:
            jobs = [self.canonical(Job(parametrization, size, exponent, seed)) for seed in self.arguments.seeds]
            of_seeds = [self.results.runs[job.name(self.axis)]["validation_loss"] for job in jobs]
            losses[exponent] = None if None in of_seeds else statistics.fmean(of_seeds)
        best, edge, lowest = optimum_of(losses)
        return {
            "losses": {f"{exponent:g}": loss for exponent, loss in losses.items()},
            "best_exponent": best,
            "best_loss": None if best is None else losses[best],
            "at_the_edge": edge,
            "vertex": lowest,
        }

    def sharpness(self, parametrization: str, size: int) -> dict[str, float] | None:
        if self.arguments.sharpness_at is None:
            return None
        job = self.canonical(Job(parametrization, size, self.arguments.sharpness_at, self.arguments.seeds[0], sharpness=True))
        return self.results.runs[job.name(self.axis)]["sharpness"]


def read_metrics_of(run: Path) -> list[dict[str, Any]]:
    """Of a run, with a checkpoint or stopped before its first."""
    return read_metrics(find_run(run)) if any((run / "checkpoints").glob("step-*")) else []


def optimum_of(losses: dict[float, float | None]) -> tuple[float | None, bool, float | None]:
    """(best exponent, whether it is the first or last, lowest point of the parabola through it and its neighbours) of exponent -> loss."""
    exponents = sorted(losses)
    known = {exponent: loss for exponent, loss in losses.items() if loss is not None}
    if not known:
        return None, True, None
    best = min(known, key=lambda exponent: known[exponent])
    i = exponents.index(best)
    if i in (0, len(exponents) - 1):
        return best, True, None
    left, right = exponents[i - 1], exponents[i + 1]
    if left not in known or right not in known:
        return best, False, None
    # Newton's divided differences of the three points
    first, second = (known[best] - known[left]) / (best - left), (known[right] - known[best]) / (right - best)
    curvature = (second - first) / (right - left)
    return best, False, (left + best) / 2 - first / (2 * curvature) if curvature > 0 else None


def difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def table(result: dict[str, Any]) -> str:
    """For the terminal and docs/signal_propagation.md."""
    titles = ["parametrisation", *(f"{result['axis']} {size}" for size in result["sizes"]), "largest shift, octaves", "larger is better"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, found in result["parametrizations"].items():
        cells = []
        for one in found["sizes"].values():
            if one["best_exponent"] is None:
                cells.append("diverged")
                continue
            vertex = "" if one["vertex"] is None else f" ({one['vertex']:.1f})"
            cells.append(f"2^{one['best_exponent']:g}{vertex}{' edge' * one['at_the_edge']}: {one['best_loss']:.3f}")
        shift = "-" if found["largest_shift"] is None else f"{found['largest_shift']:+g}"
        lines.append(f"| {name} | {' | '.join(cells)} | {shift} | {'yes' if found['larger_is_better'] else 'no'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
