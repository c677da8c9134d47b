"""What a checkpoint costs training, written at once or beside it, in one run.

    torchrun --nproc_per_node 2 -m scripts.benchmark_saving [--rounds 5] [--out FILE.json] [section.key=value ...]

Round after round, in turn: some steps with nothing beside them; a save at once; a save with `checkpoint.asynchronous` and steps until it is
whole. Every save is the whole of `training/checkpoint.py`: files, fsync, reading back, CRC-32, SHA-256, rename. After these rounds, since
a fork makes every page of this process cost a fault when it is next written, as many in which a forked process writes the same copy
instead of a thread, for comparison. Two ratios to the save at once, medians over the rounds:

    wait    how long training stood still
    lost    that, and what the steps meanwhile took longer than steps with nothing beside them: where there are no cores to spare,
            what writes takes time from what trains
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from analysis.output import write_json
from training import checkpoint
from training.data import Batch
from training.distributed import Ranks, discover, leave, one_clear_line, sum_over_ranks
from training.engine import Engine, start_distributed
from training.plan import accumulation_steps
from training.recipe import model_config
from training.recipe_file import LoadedRecipe, load_recipe
from training.run_folder import describe_environment
from training.saver import HostCopies, Saved, Saver
from training.watchdog import Watchdog

VOCABULARY, PLAIN_STEPS = 8192, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--recipe", default="recipes/python_10m.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    arguments = parser.parse_args()
    with one_clear_line(), tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".saving") as scratch:
        benchmark(arguments, Path(scratch))
    leave(0)


def benchmark(arguments: argparse.Namespace, scratch: Path) -> None:
    ranks = discover()
    device = start_distributed(ranks)
    place = [str(scratch)]
    dist.broadcast_object_list(place, src=0)  # one folder for all
    run = Path(place[0])
    tokens = f"training.tokens_per_step={ranks.world_size * 256}"
    small = [tokens, "training.tokens=1048576", "training.micro_batch_size=1", "training.sequence_length=256", "training.precision=fp32"]
    small += ["data.document_masks=false", "logging.outliers_every=0"]
    loaded = load_recipe(arguments.recipe, [*small, *arguments.overrides])
    step = Step(loaded, ranks, device)
    engine, watchdog = step.engine, Watchdog(run, ranks, 1800, 60)
    savers = {at_once: Saver(run, with_saving(loaded, asynchronous=not at_once), ranks, watchdog) for at_once in (True, False)}
    copies, rows = HostCopies(), []
    for number in range(arguments.rounds + 1):
        plain = statistics.median(step() for _ in range(PLAIN_STEPS))
        savers[True].save(engine, 4 * number + 1, 0, {})
        (saved,) = savers[True].finished()
        whole = saved.seconds

        savers[False].save(engine, 4 * number + 2, 0, {})
        beside = savers[False].finished()  # nothing yet

        def whole_beside(beside: list[Saved] = beside) -> bool:
            beside += savers[False].finished()
            return bool(beside)

        times = step.until(whole_beside)
        wait = beside[0].wait_seconds

        row = {
            "save_at_once": whole,
            "wait": wait / whole,
            "lost": (wait + sum(times) - plain * len(times)) / whole,
            "beside_seconds": beside[0].seconds,
            "plain_step": plain,
            "steps_beside": len(times),
        }
        if number:  # the first one makes the memory that copies lie in
            rows.append(row)
        if ranks.is_first:
            print({key: round(value, 4) for key, value in row.items()}, flush=True)
    copies.of(checkpoint.contents(engine, run, 4 * arguments.rounds + 6, 0, {}).files)  # makes the memory
    for number, row in enumerate(rows, start=arguments.rounds + 1):
        began = time.perf_counter()
        contents = checkpoint.contents(engine, run, 4 * number + 3, 0, {})
        taken, arrived = copies.of(contents.files)
        arrived()
        process = fork_writer(contents._replace(files=taken))
        wait = (time.perf_counter() - began) / row["save_at_once"]
        times = step.until(lambda process=process: os.waitpid(process, os.WNOHANG)[0] != 0)
        row["process_wait"] = wait
        row["process_lost"] = wait + (sum(times) - row["plain_step"] * len(times)) / row["save_at_once"]
    if ranks.is_first:
        size = sum(file.stat().st_size for file in checkpoint.checkpoints(run)[-1].iterdir())
        result = {
            "what": "seconds, and ratios to save_at_once; the first rank's, medians over the rounds",
            "median": {key: statistics.median(row[key] for row in rows) for key in rows[0]},
            "rounds": rows,
            "checkpoint_bytes": size,
            "recipe": arguments.recipe,
            "overrides": arguments.overrides,
            "environment": describe_environment(ranks.world_size, device),
        }
        print(json.dumps(result["median"], indent=2))
        if arguments.out:
            write_json(arguments.out, result)
    dist.barrier()


def with_saving(loaded: LoadedRecipe, asynchronous: bool) -> Any:
    section = loaded.recipe.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep_last": 1})
    return loaded.recipe.model_copy(update={"checkpoint": section})


class Step:
    """A call takes a step on random tokens and returns its seconds."""

    def __init__(self, loaded: LoadedRecipe, ranks: Ranks, device: torch.device) -> None:
        recipe, self.device = loaded.recipe, device
        self.scale = 1 / recipe.training.tokens_per_step
        self.engine = Engine(recipe, model_config(recipe, VOCABULARY), accumulation_steps(recipe, ranks.world_size), ranks, device)
        tokens = torch.randint(VOCABULARY, (recipe.training.micro_batch_size, recipe.training.sequence_length))
        self.batch = Batch(tokens, tokens.roll(-1, 1), None)
        for _ in range(2):
            self()

    def __call__(self) -> float:
        began = time.perf_counter()
        for _ in range(self.engine.accumulation):
            self.engine.accumulate(self.batch, self.scale)
        self.engine.step(1e-4)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def until(self, whole: Callable[[], bool]) -> list[float]:
        """Seconds of the steps that are taken until every rank's save is over."""
        times, over = [], False
        while True:
            over = over or whole()
            (left,) = sum_over_ranks(float(not over), device=self.device)
            if not left:
                return times
            times.append(self())


def fork_writer(contents: checkpoint.Contents) -> int:
    """Write and read back this rank's files in a process of its own; returns its number."""
    process = os.fork()
    if process:
        return process
    for path, content in contents.files.items():
        torch.save(content, path)
        checkpoint._digest(path)
    os._exit(0)


if __name__ == "__main__":
    main()
