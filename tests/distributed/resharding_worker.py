"""Run by survival_worker.py: checkpoints of each stage and precision that 2 ranks write, and 3 read and write again."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from analysis.files import load_file
from analysis.shards import open_checkpoint
from tests.distributed.engine_worker import VOCAB
from training.data import Batch
from training.distributed import Ranks, discover, leave
from training.engine import Engine, start_distributed
from training.recipe import model_config
from training.recipe_file import load_recipe

KINDS = ("adafactor", "muon", "soap")


# what else moves the masters to other places: other devices, many small groups
LAYOUTS = (
    "{stage: 2, offload_optimizer: {device: cpu}, round_robin_gradients: true}",
    "{stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}}",
    "{stage: 3, sub_group_size: 5000}",
)


def engine(recipe_file: str, precision: str, zero: str, kind: str, ranks: Ranks, device: torch.device) -> Engine:
    words = [f"training.precision={precision}", f"deepspeed.zero_optimization={zero}", f"optimizer.kind={kind}"]
    recipe = load_recipe(recipe_file, words).recipe
    return Engine(recipe, model_config(recipe, VOCAB), 1, ranks, device)


def step(engine: Engine, number: int) -> None:
    tokens = torch.randint(VOCAB, (2, 33), generator=torch.Generator().manual_seed(10 * number + engine.ranks.rank))
    engine.accumulate(Batch(tokens[:, :-1], tokens[:, 1:].clone(), None), 1 / 128)
    assert engine.step(1e-2).applied


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def difference(a: Path, b: Path) -> float:
    """Largest difference of weights, moments and the moments' step between two checkpoints, read by the analysis."""
    first, second = open_checkpoint(a), open_checkpoint(b)
    assert first.precision == second.precision == "fp32" and first.names() and set(first.names()) == set(second.names())
    worst = 0.0
    for name in first.names():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            worst = max(worst, (first.tensor(name, kind) - second.tensor(name, kind)).abs().max().item())
        worst = max(worst, abs(first.adam_settings(name).step - second.adam_settings(name).step))
    return worst


def difference_of_whole(a: Path, b: Path) -> float:
    """The same for an optimizer other than AdamW: every tensor of the weights and of the state."""
    states = []
    for folder in (a, b):
        file = load_file(folder / "mp_rank_00_model_states.pt")
        states.append(list(tensors_of([file["module"], file["optimizer"]])))
    assert len(states[0]) == len(states[1]) > 40
    return max((x.float() - y.float()).abs().max().item() if x.numel() else 0.0 for x, y in zip(*states, strict=True))


def save(made: Engine, folder: Path, tag: str) -> None:
    (folder / tag).mkdir(parents=True, exist_ok=True)
    for path, content in made.files(folder, tag).items():
        torch.save(content, path)
    torch.distributed.barrier()


def run(task: str, recipe: str, folder: Path) -> None:
    """One rank's part: "write", or "read", which leaves differences.json."""
    ranks = discover()
    device = start_distributed(ranks)
    found: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3, *(LAYOUTS if precision == "fp32" and task == "read" else ())):
            zero = stage if isinstance(stage, str) else f"{{stage: {stage}}}"
            made = engine(recipe, precision, zero, "adamw", ranks, device)
            if task == "write":
                step(made, 1)
                step(made, 2)
                save(made, folder, f"{precision}{stage}")
            for source in range(4) if task == "read" else ():
                # one engine for all four: what was loaded before must leave nothing behind
                made.load(folder / f"{precision}{source}", 2, 0, with_moments=True)
                save(made, folder, "again")
                case = f"{precision} {source} -> {stage}"
                found[case] = difference(folder / f"{precision}{source}", folder / "again") if ranks.is_first else 0.0
                torch.distributed.barrier()
                step(made, 3)
                for old in (folder / "again").glob("*") if ranks.is_first else ():
                    old.unlink()
                torch.distributed.barrier()
            del made
            gc.collect()
        for kind in KINDS:
            made = engine(recipe, precision, "{stage: 0}", kind, ranks, device)
            if task == "write":
                step(made, 1)
                step(made, 2)
                save(made, folder, f"{kind}{precision}")
            else:
                step(made, 5)
                made.load(folder / f"{kind}{precision}", 2, 0, with_moments=True)
                save(made, folder, f"{kind}{precision}_again")
                if ranks.is_first:
                    found[f"{kind} {precision}"] = difference_of_whole(folder / f"{kind}{precision}", folder / f"{kind}{precision}_again")
                step(made, 3)
            del made
            gc.collect()
    assert all(math.isfinite(value) for value in found.values())
    if task == "read" and ranks.is_first:
        (folder / "differences.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    leave(0)
