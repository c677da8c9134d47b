"""The planned peak of memory beside the measured one, over sizes, ZeRO stages, checkpointing and methods.

    python -m scripts.measure_memory [--out FILE.json] [--only WORD]

Every case is an engine of its own that takes three steps of two micro-batches, on the GPU if there is one. Measured are the bytes of
tensors that PyTorch's allocator gave out since before the engine was built, at their most after the first step; planned is
`training.memory.predict`'s total.
What --out holds of earlier calls is kept, and not measured again; without it, or with a new file, everything is measured.
"""

from __future__ import annotations

import argparse
import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.benchmark import OURS
from scripts.many_runs import Results
from training.context_pruning import PruningController
from training.data import Batch
from training.distributed import Ranks, discover, leave, one_clear_line
from training.engine import Engine, start_distributed
from training.plan import plan
from training.recipe import Recipe, model_config
from training.run_folder import describe_environment
from training.sharpness_aware import take_step

SIZES = {
    "1m": {"width": 128, "depth": 4, "heads": 4},
    "5m": {"width": 256, "depth": 6, "heads": 4},
    "17m": {"width": 384, "depth": 8, "heads": 6},
    "100m": {"width": 768, "depth": 12, "heads": 12},
}
FEWER_STAGES = {"17m": (0, 2), "100m": (0,)}
METHODS: dict[str, dict[str, Any]] = {
    **{name: more for name, more in OURS.items() if "training" not in more},  # checkpointing is varied for pre_norm
    "compiled": {"training": {"compile": True}},
    "compiled_selective": {"training": {"compile": True, "activation_checkpointing": "selective"}},
    "adafactor": {"optimizer": {"kind": "adafactor"}},
    "muon": {"optimizer": {"kind": "muon"}},
    "sam_float32": {"optimizer": {"sharpness_aware": "sam", "sharpness": {"float32_second_pass": True}}},
    "functional_sam_float32": {"optimizer": {"sharpness_aware": "functional_sam", "sharpness": {"float32_second_pass": True}}},
    "functional_sam_split": {"optimizer": {"sharpness_aware": "functional_sam", "sharpness": {"split_every": 1}}},
    "context_pruning": {"context_pruning": {"rank": 32, "target_kept": 0.25}},
    "context_pruning_fixed": {"context_pruning": {"rank": 32, "target_kept": 0.25, "decisions": "fixed"}},
    "context_pruning_by_attention": {
        "context_pruning": {"rank": 32, "target_kept": 0.25, "attention_fraction": 1.0, "trainable": "interactions"}
    },
}
WITHOUT_ZERO = ("adafactor", "muon")
IN_FLOAT32 = ("sam_float32", "functional_sam_float32")  # a cure of bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this word in it")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    arguments = parser.parse_args()
    with one_clear_line():
        measure_all(arguments)
    leave(0)


def cases() -> dict[str, Recipe]:
    """Sizes, stages, precisions and checkpointing of pre_norm, the largest at fewer of them; and every method at the middle size."""
    found = {}
    for size in SIZES:
        for precision in ("fp32", "bf16"):
            for stage in FEWER_STAGES.get(size, (0, 1, 2, 3)):
                for checkpointing in {"5m": (False, True, 2, "selective"), "100m": (False, "selective")}.get(size, (False, True)):
                    found[f"{size} {precision} zero-{stage} pre_norm recomputed-{checkpointing}"] = case(
                        size, precision, stage, checkpointing, "pre_norm"
                    )
    for method in METHODS:
        for precision in ("bf16",) if method in IN_FLOAT32 else ("fp32", "bf16"):
            for stage in (0,) if method in WITHOUT_ZERO else (0, 2, 3):
                if method != "pre_norm":
                    made = case("5m", precision, stage, False, method)
                    found[f"5m {precision} zero-{stage} {method} recomputed-{made.training.activation_checkpointing}"] = made
    return found


def case(size: str, precision: str, stage: int, checkpointing: bool | int | str, method: str) -> Recipe:
    more = METHODS[method]
    return Recipe.model_validate(
        {
            "model": {**SIZES[size], **more.get("model", {})},
            "data": {"tokenizer": {"vocab_size": 8192}},
            "training": {
                "tokens": 10**7,
                "tokens_per_step": 2 * 4 * 256,
                "micro_batch_size": 4,
                "sequence_length": 256,
                "precision": precision,
                "activation_checkpointing": checkpointing,
                **more.get("training", {}),
            },
            "optimizer": more.get("optimizer", {}),
            "context_pruning": more.get("context_pruning"),
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "logging": {"outliers_every": 0},
        }
    )


def measure_all(arguments: argparse.Namespace) -> None:
    ranks = discover()
    device = start_distributed(ranks)
    results = Results(arguments.out)
    results.header = {"what": __doc__, "environment": describe_environment(ranks.world_size, device)}
    if device.type == "cuda":  # workspaces of matrix products, which stay: this thread's, and the backward pass's
        x = torch.ones(16, 16, device=device, requires_grad=True)
        (x @ x).sum().backward()
    for name, recipe in cases().items():
        if arguments.only not in name or name in results.runs:
            continue
        seen, planned = measure(recipe, ranks, device)
        results.set(name, measured=seen, planned=planned.total, ratio=planned.total / seen, phase=planned.peak_phase)
        print(f"{name:<58}{seen / 2**20:>9.1f} MiB measured{planned.total / 2**20:>9.1f} planned{planned.total / seen:>7.3f}", flush=True)
        gc.collect()
        torch._dynamo.reset()  # of compiled cases too many would be left uncompiled
    ratios = [found["ratio"] for found in results.runs.values()]
    print(f"{len(ratios)} cases: planned over measured from {min(ratios):.3f} to {max(ratios):.3f}")


def measure(recipe: Recipe, ranks: Ranks, device: torch.device) -> tuple[int, Any]:
    """(peak of a case in bytes, its planned memory)."""
    config = model_config(recipe, recipe.data.tokenizer.vocab_size)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    # a CPU's allocator keeps no peak: the profiler has every allocation
    with nullcontext() if cuda else profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        engine = Engine(recipe, config, 2, ranks, device)
        tokens = torch.randint(config.vocab_size, (4, 256))
        batches = [Batch(tokens, tokens, None)] * 2
        pruning = None
        if recipe.context_pruning is not None:
            pruning = PruningController(engine.model.context_pruning_settings, recipe.context_pruning, device)
        for step in range(3):
            gc.collect()
            if cuda and step == 1:
                torch.cuda.reset_peak_memory_stats(device)
            if pruning is not None:
                pruning.before_step(step, 3)
                engine.interactions_alone = pruning.settings.from_attention
            with torch.profiler.record_function("counted" if step else "first"):
                take_step(engine, batches, 2048.0, step, 1000, logged=False)
    planned = plan(recipe, config, ranks.world_size, device=device.type).memory
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else recorded_peak(recorded)
    engine.deepspeed.destroy()
    return peak, planned


def recorded_peak(recorded: Any) -> int:
    """The most bytes that a profile's allocations had given out since its begin, from the first step that is counted on."""
    events: list[Any] = recorded.profiler.kineto_results.events()
    begin = min(event.start_ns() for event in events if event.name() == "counted")
    now = peak = 0
    for when, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += change
        peak = max(peak, now) if when >= begin else 0
    return peak


if __name__ == "__main__":
    main()
