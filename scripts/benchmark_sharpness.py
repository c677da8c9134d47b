"""What sharpness-aware steps cost beside AdamW's: time and peak memory, in one run, as ratios.

    python -m scripts.benchmark_sharpness [--recipe recipes/functional_sam_nano.yaml] [--rounds 7] [--out FILE.json] [section.key=value]
    torchrun --nproc_per_node 2 -m scripts.benchmark_sharpness ...

One engine takes every kind of step on the same random tokens, in turn, round after round, so that a machine whose speed drifts
treats them alike; nothing is logged or measured inside. Time is the clock's on a GPU, and on a CPU the processor's, which other
programs on the machine disturb less (waiting for other ranks is not in it). On a CPU the peak is that of PyTorch's allocator above
what is held between steps, to which the planned weights and optimizer state are added; on a GPU it is what the allocator gave out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from analysis.output import write_json
from scripts.measure_memory import recorded_peak
from training.data import Batch
from training.distributed import discover, leave, one_clear_line
from training.engine import Engine, start_distributed
from training.plan import accumulation_steps, passes, plan
from training.recipe import Recipe, SharpnessSection, model_config
from training.recipe_file import load_recipe
from training.run_folder import describe_environment
from training.sharpness_aware import take_step

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"sharpness_aware": "none"},
    "sam": {"sharpness_aware": "sam"},
    "functional_sam": {"sharpness_aware": "functional_sam"},
    "functional_sam_stored_logits": {"sharpness_aware": "functional_sam", "store_logits": True},
    "functional_sam_preconditioned": {"sharpness_aware": "functional_sam", "precondition": True},
    "sam_quarter": {"sharpness_aware": "sam", "ascent_fraction": 0.25},
    "functional_sam_quarter": {"sharpness_aware": "functional_sam", "ascent_fraction": 0.25},
    "functional_sam_quarter_rest_plain": {"sharpness_aware": "functional_sam", "ascent_fraction": 0.25, "rest": "plain"},
}
FLOAT32 = {"functional_sam_float32_pass": {"sharpness_aware": "functional_sam", "float32_second_pass": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/functional_sam_nano.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step; a multiple of 4, so that a quarter is whole")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    arguments = parser.parse_args()
    with one_clear_line():
        benchmark(arguments)
    leave(0)


def benchmark(arguments: argparse.Namespace) -> None:
    ranks = discover()
    first = load_recipe(arguments.recipe, arguments.overrides).recipe
    unit = first.training.micro_batch_size * first.training.sequence_length * ranks.world_size * arguments.accumulation
    size = [f"training.tokens_per_step={unit}", f"training.tokens={1000 * unit}"]
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *size]).recipe
    device = start_distributed(ranks)
    config = model_config(recipe, recipe.data.tokenizer.vocab_size)
    engine = Engine(recipe, config, accumulation_steps(recipe, ranks.world_size), ranks, device)
    shape = (recipe.training.micro_batch_size, recipe.training.sequence_length + 1)
    batches = []
    for _ in range(arguments.accumulation):
        tokens = torch.randint(config.vocab_size, shape)
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None))

    kinds = {**KINDS, **(FLOAT32 if recipe.training.precision == "bf16" else {})}
    recipes = {name: of_kind(recipe, dict(options)) for name, options in kinds.items()}
    held = plan(recipes["adamw"], config, ranks.world_size).memory
    times: dict[str, list[float]] = {name: [] for name in kinds}
    peaks: dict[str, int] = {}

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def step() -> None:
        take_step(engine, batches, float(unit), 1, 1000, logged=False)

    for turn in range(arguments.rounds + 1):
        for name in kinds:
            engine.recipe = recipes[name]
            if turn == 0:  # warm up, and measure memory apart from time
                step()
                peaks[name] = height_of(step, device, held.weights + held.optimizer)
                continue
            dist.barrier()
            started = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(clock() - started)
        if ranks.is_first:
            print(f"round {turn}/{arguments.rounds}", flush=True)
    if ranks.is_first:
        rows = {
            name: {
                "seconds": statistics.median(times[name]),
                "time_over_adamw": statistics.median(a / b for a, b in zip(times[name], times["adamw"], strict=True)),
                "passes_in_theory": passes(recipes[name], 1, 1000),
                "peak_bytes": peaks[name],
                "peak_over_adamw": peaks[name] / peaks["adamw"],
            }
            for name in kinds
        }
        for name, row in rows.items():
            print(f"{name:<32} time {row['time_over_adamw']:.3f} (theory {row['passes_in_theory']:.2f})  peak {row['peak_over_adamw']:.3f}")
        result = {
            "what": "a step over AdamW's in the same round, medians, by the clock on a GPU, in processor time on a CPU; and peak memory",
            "steps": rows,
            "recipe": arguments.recipe,
            "overrides": arguments.overrides,
            "rounds": arguments.rounds,
            "tokens_per_step": unit,
            "environment": describe_environment(ranks.world_size, device),
        }
        if arguments.out:
            write_json(arguments.out, result)


def of_kind(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    """The recipe with another kind of step, at its own radius."""
    update = {"sharpness_aware": options.pop("sharpness_aware")}
    update["sharpness"] = SharpnessSection(radius=recipe.optimizer.sharpness.radius, **options)
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update=update)})


def height_of(step: Callable[[], None], device: torch.device, held: int) -> int:
    """Bytes at the height of a step; `held`: weights and optimizer state, for a CPU, whose allocator keeps no account."""
    gc.collect()  # a tensor in a reference cycle is there until Python's collector happens to run
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("counted"):
        step()
    return held + recorded_peak(profiler)


if __name__ == "__main__":
    main()
