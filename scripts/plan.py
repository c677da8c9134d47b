"""What fits G GPUs of M gigabytes, by the plan, before anything is started.

    python -m scripts.plan recipes/X.yaml --gpus 8 --gigabytes 80 [section.key=value ...]     the largest micro-batch, by stage and blocks
    python -m scripts.plan recipes/X.yaml --gpus 8 --gigabytes 80 --sizes                     the largest model
    python -m scripts.plan recipes/X.yaml --scaling 8 64 512 [--teraflops 450]                what ranks send, and what it costs

Fits: the planned tensors of a rank within --share (default 0.9) of the memory; the rest is for the CUDA context, the libraries' buffers
and fragmentation, which the plan does not count. For each ZeRO stage three micro-batches are given: with nothing recomputed, with
selective checkpointing of every block, and with every block recomputed (training.activation_checkpointing false, selective and true).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from model.config import SIZES
from model.errors import InputError
from training.communication import scaling
from training.distributed import leave, one_clear_line
from training.plan import passes, plan, planned_network
from training.recipe import Recipe
from training.recipe_file import load_recipe

LARGEST_MICRO_BATCH = 1024
LATE = 10**9  # a step by which every sharpness-aware one has begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, help="memory of one GPU, 10^9 bytes")
    parser.add_argument("--share", type=float, default=0.9, help="of that memory, for the tensors that the plan counts")
    parser.add_argument("--sizes", action="store_true", help="also for every model.size in the place of the recipe's")
    parser.add_argument("--scaling", type=int, nargs="+", metavar="GPUS", help="communication and predicted tokens per second")
    parser.add_argument("--teraflops", type=float, default=450.0, help="what one GPU sustains alone, for --scaling")
    arguments = parser.parse_intermixed_args()
    with one_clear_line():
        recipe = load_recipe(arguments.recipe, arguments.overrides).recipe
        if arguments.gigabytes is None and not arguments.scaling:
            raise InputError("--gigabytes: give the memory of a GPU, or --scaling")
        if arguments.gpus < 1:
            raise InputError(f"--gpus: expected a positive number, found {arguments.gpus}")
        if arguments.sizes and recipe.model.pretrained is not None:
            raise InputError(f"--sizes: {recipe.model.pretrained} has the size that it has; leave it out")
        if arguments.gigabytes is not None:
            print(what_fits(recipe, arguments))
        if arguments.scaling:
            print(how_it_scales(recipe, arguments))
    leave(0)


def what_fits(recipe: Recipe, arguments: argparse.Namespace) -> str:
    budget = round(arguments.share * arguments.gigabytes * 1e9)
    lines = [
        f"{arguments.gpus} x {arguments.gigabytes:g} GB, of which {budget / 1e9:.1f} GB for planned tensors; length "
        f"{recipe.training.sequence_length}, {recipe.training.precision}",
        f"{'model':<18}{'stage':>6}{'micro-batch':>14}{'GB':>8}{'selective':>12}{'GB':>8}{'all recomputed':>17}{'GB':>8}",
    ]
    sizes: list[str | None] = [None, *(SIZES if arguments.sizes else [])]
    for size in sizes:
        for stage in stages(recipe):
            cells = []
            for checkpointing in (False, "selective", True):
                found = largest_micro_batch(variant(recipe, size, stage, checkpointing), arguments.gpus, budget)
                cells += [str(found[0]) if found[0] else "-", f"{found[1] / 1e9:.1f}"]
            name = size or "the recipe's"
            lines.append(f"{name:<18}{stage:>6}{cells[0]:>14}{cells[1]:>8}{cells[2]:>12}{cells[3]:>8}{cells[4]:>17}{cells[5]:>8}")
    if arguments.sizes:
        fitting = [
            size for size in SIZES if largest_micro_batch(variant(recipe, size, stages(recipe)[-1], True), arguments.gpus, budget)[0]
        ]
        lines.append(
            f"the largest model.size that trains: {fitting[-1] if fitting else 'none'}; -: not even one sequence, which takes so much"
        )
    return "\n".join(lines)


def stages(recipe: Recipe) -> tuple[int, ...]:
    """Those that the recipe's optimizer can be trained at."""
    return (0, 1, 2, 3) if recipe.optimizer.kind == "adamw" else (0,)


def variant(recipe: Recipe, size: str | None, stage: int, checkpointing: bool | int | str) -> Recipe:
    tree: dict[str, Any] = recipe.model_dump()
    if size is not None:
        shape = ("width", "depth", "heads", "kv_heads", "head_dim", "mlp_width")  # left out, so that the size says them
        tree["model"] = {**{field: value for field, value in tree["model"].items() if field not in shape}, "size": size}
    tree["training"].update(activation_checkpointing=checkpointing, memory_budget_gb=None)
    tree["deepspeed"]["zero_optimization"] = {**tree["deepspeed"].get("zero_optimization", {}), "stage": stage}
    return Recipe.model_validate(tree)


def largest_micro_batch(recipe: Recipe, ranks: int, budget: int) -> tuple[int, int]:
    """The largest power of two of sequences that fits, and the bytes that it takes; 0 and those of one sequence if none does."""
    config, found = planned_network(recipe), (0, 0)
    # more than one micro-batch a step, so that gradients add up as they do in a long run; and as many as the ascent needs
    size, accumulation = 1, max(2, round(1 / recipe.optimizer.sharpness.ascent_fraction))
    while size <= LARGEST_MICRO_BATCH:
        tokens = accumulation * size * ranks * recipe.training.sequence_length
        training = recipe.training.model_copy(update={"micro_batch_size": size, "tokens_per_step": tokens, "tokens": 1000 * tokens})
        taken = plan(recipe.model_copy(update={"training": training}), config, ranks, device="cuda").memory.total
        if taken > budget:
            return found if found[0] else (0, taken)
        found, size = (size, taken), 2 * size
    return found


def how_it_scales(recipe: Recipe, arguments: argparse.Namespace) -> str:
    """Weak scaling: a rank's tokens stay as on one host's GPUs, those of the recipe's step over 8 ranks."""
    config, training = planned_network(recipe), recipe.training
    work = passes(recipe, LATE, LATE)
    unit = training.micro_batch_size * training.sequence_length
    accumulation = max(1, training.tokens_per_step // (8 * unit))
    made = plan(at_ranks(recipe, 8, accumulation), config, 8, device="cuda")
    lines = [
        f"{made.parameters.total:,} parameters, {accumulation} micro-batches of {unit} tokens a step and rank"
        f"{f', gone over {work:.3g} times' if work != 1 else ''}, "
        f"{arguments.teraflops:g} TFLOP/s a GPU alone (training/communication.py has the formula)",
        f"{'GPUs':>6}{'stage':>7}{'GB sent a step':>16}{'GB of memory':>14}{'tokens/s, nothing hidden':>26}"
        f"{'all hidden':>14}{'efficiency':>18}",
    ]
    for ranks in arguments.scaling:
        for stage in stages(recipe):
            asked = training.activation_checkpointing
            case = at_ranks(variant(recipe, None, stage, True if asked == "auto" else asked), ranks, accumulation)
            memory = plan(case, config, ranks, device="cuda").memory.total
            s = scaling(
                stage,
                made.parameters.total,
                made.flops_per_token,
                accumulation * unit,
                accumulation,
                ranks,
                arguments.teraflops * 1e12,
                work,
            )
            lines.append(
                f"{ranks:>6}{stage:>7}{s.sent / 1e9:>16.2f}{memory / 1e9:>14.1f}{s.exposed:>26,.0f}{s.hidden:>14,.0f}"
                f"{f'{s.share_exposed:.0%} to {s.share_hidden:.0%}':>18}"
            )
    return "\n".join(lines)


def at_ranks(recipe: Recipe, ranks: int, accumulation: int) -> Recipe:
    training = recipe.training
    tokens = ranks * accumulation * training.micro_batch_size * training.sequence_length
    return recipe.model_copy(update={"training": training.model_copy(update={"tokens_per_step": tokens, "tokens": 1000 * tokens})})


if __name__ == "__main__":
    main()
