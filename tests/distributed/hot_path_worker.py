"""A program for torchrun: what a plain step reads back from tensors, and whether compiled blocks are compiled again. Prints JSON."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model.linear_cross_entropy
from training.data import Batch
from training.distributed import Ranks, discover, leave
from training.engine import Engine, start_distributed
from training.recipe import model_config
from training.recipe_file import load_recipe
from training.sharpness_aware import take_step

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)
ON_THE_HOST = {"data.py"}  # counts the targets of batches that have not been moved to the device yet


class HostReads(TorchDispatchMode):
    """Counts, by file, the operations that would have the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            outside = [f.filename for f in traceback.extract_stack()[:-1] if "/site-packages/torch/" not in f.filename]
            self.files["/".join(outside[-1].split("/")[-2:])] += 1
        return func(*args, **(kwargs or {}))


def steps(path: str, ranks: Ranks, device: torch.device, count: int, *overrides: str) -> Any:
    recipe = load_recipe(path, ["training.tokens_per_step=256", *overrides]).recipe
    engine = Engine(recipe, model_config(recipe, 401), 2, ranks, device)
    tokens = torch.randint(401, (2, 64), generator=torch.Generator().manual_seed(0))
    for step in range(count):
        take_step(engine, [Batch(tokens, tokens, None)] * 2, 256.0, step, 100, logged=False)
        yield step, engine
    engine.deepspeed.destroy()


def main() -> None:
    path = sys.argv[1]
    ranks = discover()
    device = start_distributed(ranks)
    result: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            options = (f"training.precision={precision}", f"deepspeed.zero_optimization.stage={stage}")
            run = steps(path, ranks, device, 3, *options)
            for _ in range(2):
                next(run)
            with HostReads() as reads:
                next(run)
            result[f"{precision}-{stage}"] = {name: n for name, n in reads.files.items() if name.split("/")[-1] not in ON_THE_HOST}
    compile_with = torch.nn.Module.compile
    # what is compiled again is Dynamo's choice, whatever compiles its graphs: this needs no C++ compiler
    torch.nn.Module.compile = lambda self: compile_with(self, backend="aot_eager")  # pyright: ignore[reportAttributeAccessIssue]
    loss = torch.compile(model.linear_cross_entropy.loss_and_derivative_, backend="aot_eager")
    model.linear_cross_entropy.compiled_loss_and_derivative = lambda: loss  # pyright: ignore[reportAttributeAccessIssue]
    for stage, checkpointing in ((0, "false"), (1, "selective"), (2, "1"), (3, "true")):
        torch._dynamo.reset()
        options = (
            f"deepspeed.zero_optimization.stage={stage}",
            f"training.activation_checkpointing={checkpointing}",
            "training.compile=true",
        )
        compiled = []
        for step, engine in steps(path, ranks, device, 5, *options):
            if step == 2:  # an evaluation, between steps, runs without gradients: one graph more, and once
                tokens = torch.zeros(2, 64, dtype=torch.long)
                engine.summed_loss(Batch(tokens, tokens, None))
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        result[f"compiled-{stage}"] = compiled
    if ranks.is_first:
        print(json.dumps(result))
    leave(0)


if __name__ == "__main__":
    main()
