"""Tokens per second of Burnish's loop beside a bare DeepSpeed loop and a bare PyTorch loop, in one run.

    python -m scripts.benchmark_training [--recipe recipes/quickstart_pre_norm.yaml] [--rounds 5] [--steps 24] [--out FILE.json]
    torchrun --nproc_per_node 2 -m scripts.benchmark_training ...

All three train the same network on batches of the same size, in the same processes, in turn, round after round, so that a
machine whose speed drifts treats them alike. Burnish's loop is `training.loop.train` itself, data, logging and TensorBoard
included; the bare loops repeat one fixed batch and log nothing. The first steps of each turn are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from model.parametrization import initialize
from model.transformer import Transformer
from training.data import prepare
from training.distributed import Ranks, discover, leave, one_clear_line
from training.engine import deepspeed_config, start_distributed
from training.loop import train
from training.optimizers import make_optimizer
from training.plan import accumulation_steps
from training.recipe import LoadedRecipe, load_recipe
from training.run_folder import describe_environment

LOGGED_EVERY = 4  # steps; each turn drops its first so many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart_pre_norm.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of a turn")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    arguments = parser.parse_args()
    with one_clear_line():
        benchmark(arguments)
    leave(0)


def benchmark(arguments: argparse.Namespace) -> None:
    ranks = discover()
    device = start_distributed(ranks)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_recipe(arguments.recipe, arguments.overrides)
        tokens = arguments.steps * loaded.recipe.training.tokens_per_step
        never = arguments.steps + 1
        common = [
            f"training.tokens={tokens}",
            f"logging.every={LOGGED_EVERY}",
            f"evaluation.every={never}",
            f"checkpoint.every={never}",
            "checkpoint.first=false",
        ]
        loaded = load_recipe(arguments.recipe, [*arguments.overrides, *common, f"run.folder={scratch}"])
        subjects: dict[str, Callable[[int], list[float]]] = {
            "burnish": lambda turn: burnish(loaded, scratch, turn),
            "bare_deepspeed": lambda turn: bare_deepspeed(loaded, ranks, device, arguments.steps),
            "bare_pytorch": lambda turn: bare_pytorch(loaded, ranks, device, arguments.steps),
        }
        rates: dict[str, list[float]] = {name: [] for name in subjects}
        for turn in range(arguments.rounds):
            # each round in another order, so that none always runs on the machine that the same other one has warmed
            names = list(subjects)
            for name in names[turn % 3 :] + names[: turn % 3]:
                measured = subjects[name](turn)
                gc.collect()
                dist.barrier()
                if ranks.is_first:
                    rates[name].append(statistics.median(measured))
                    print(f"round {turn + 1}/{arguments.rounds}  {name:<15}{rates[name][-1]:>12,.0f} tokens/s", flush=True)
    if ranks.is_first:
        report(rates, arguments, ranks, device)


def burnish(loaded: LoadedRecipe, scratch: str, turn: int) -> list[float]:
    """Tokens per second of each logged stretch of `training.loop.train`, the first left out."""
    name = f"turn{turn}"
    recipe = loaded.recipe.model_copy(update={"run": loaded.recipe.run.model_copy(update={"name": name})})
    with contextlib.redirect_stdout(io.StringIO()):
        train(loaded._replace(recipe=recipe))
    metrics = Path(scratch) / name / "metrics.jsonl"
    dist.barrier()
    if not metrics.exists():
        return [0.0]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [r["tokens_per_second"] for r in records if r.get("step", 0) > LOGGED_EVERY and "tokens_per_second" in r]


def bare_deepspeed(loaded: LoadedRecipe, ranks: Ranks, device: torch.device, steps: int) -> list[float]:
    """A DeepSpeed loop with nothing around it."""
    import deepspeed  # after training.engine, which tells it the accelerator

    recipe = loaded.recipe
    accumulation = accumulation_steps(recipe, ranks.world_size)
    model, tokens, targets = network_and_batch(loaded, device)
    config = deepspeed_config(recipe, sum(p.numel() for p in model.parameters()), accumulation, ranks.world_size)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(model, recipe.optimizer, fused=device.type == "cuda"), config=config
    )

    def step() -> None:
        for _ in range(accumulation):
            engine.backward(engine(tokens, targets) / targets.numel())
            engine.step()

    return timed(step, steps, recipe.training.tokens_per_step, device)


def bare_pytorch(loaded: LoadedRecipe, ranks: Ranks, device: torch.device, steps: int) -> list[float]:
    """A PyTorch loop with nothing around it: DistributedDataParallel when there is more than one rank, autocast for bf16."""
    recipe = loaded.recipe
    accumulation = accumulation_steps(recipe, ranks.world_size)
    model, tokens, targets = network_and_batch(loaded, device)
    model.to(device)
    optimizer = make_optimizer(model, recipe.optimizer, fused=device.type == "cuda")
    data_parallel = torch.nn.parallel.DistributedDataParallel(model) if ranks.world_size > 1 else None
    forward = data_parallel or model

    def step() -> None:
        for index in range(accumulation):
            waits = index < accumulation - 1  # gradients are reduced with the last micro-batch alone
            local = data_parallel.no_sync() if data_parallel and waits else contextlib.nullcontext()
            with local, torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
                loss = forward(tokens, targets) / (targets.numel() * accumulation)
                loss.backward()
        if recipe.training.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, steps, recipe.training.tokens_per_step, device)


def network_and_batch(loaded: LoadedRecipe, device: torch.device) -> tuple[Transformer, torch.Tensor, torch.Tensor]:
    recipe = loaded.recipe
    config = recipe.model.config(prepare(recipe.data, recipe.training.sequence_length).vocab_size, recipe.training.sequence_length)
    model = Transformer(config)
    initialize(model, recipe.run.seed)
    model.activation_checkpointing = recipe.training.activation_checkpointing
    tokens = torch.randint(config.vocab_size, (recipe.training.micro_batch_size, recipe.training.sequence_length + 1))
    return model, tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)


def timed(step: Callable[[], None], steps: int, tokens_per_step: int, device: torch.device) -> list[float]:
    """Tokens per second of each stretch of LOGGED_EVERY steps, the first left out."""
    rates = []
    for stretch in range(steps // LOGGED_EVERY):
        started = time.perf_counter()
        for _ in range(LOGGED_EVERY):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if stretch:
            rates.append(LOGGED_EVERY * tokens_per_step / (time.perf_counter() - started))
    return rates


def report(rates: dict[str, list[float]], arguments: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
    """Medians, and the median over rounds of the ratio within a round."""

    def ratio(name: str) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(rates["burnish"], rates[name], strict=True))

    result = {
        "what": "tokens per second over all ranks; each figure of a round is the median over its stretches of steps",
        "rounds": rates,
        "median": {name: statistics.median(values) for name, values in rates.items()},
        "burnish_over_bare_deepspeed": ratio("bare_deepspeed"),
        "burnish_over_bare_pytorch": ratio("bare_pytorch"),
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "steps_per_turn": arguments.steps,
        "environment": describe_environment(ranks.world_size, device),
    }
    for peer in ("bare_deepspeed", "bare_pytorch"):
        print(f"burnish / {peer} {result[f'burnish_over_{peer}']:.3f}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
