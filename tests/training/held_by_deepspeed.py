"""A program for torchrun: print, as JSON, what each case of test_plan.py holds between two steps on rank 0, and copies for a checkpoint:
bytes of tensors."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from training.data import Batch
from training.distributed import discover, leave
from training.engine import Engine, start_distributed
from training.recipe import Recipe
from training.saver import HostCopies


def held() -> dict[int, torch.UntypedStorage]:
    """Every storage that a tensor refers to, by its address."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {storage.data_ptr(): storage for storage in storages}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors(inner)


def main() -> None:
    cases, config = json.loads(sys.argv[1]), ModelConfig(**json.loads(sys.argv[2]))
    ranks = discover()
    device = start_distributed(ranks)
    sizes = []
    for case in cases:
        before = held()  # kept, so that no new storage takes the place of one of these
        recipe = Recipe.model_validate(case)
        engine = Engine(recipe, config, accumulation=1, ranks=ranks, device=device)
        tokens = torch.zeros(recipe.training.micro_batch_size, recipe.training.sequence_length, dtype=torch.long)
        for _ in range(2):
            engine.accumulate(Batch(tokens, tokens, None), scale=1.0)
            engine.step(1e-3)
        between_steps = sum(storage.nbytes() for address, storage in held().items() if address not in before)
        copies, arrived = HostCopies().of(engine.files(Path("nowhere"), "step"))
        arrived()
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors(copies)}
        sizes.append((between_steps, sum(storage.nbytes() for storage in storages.values())))
        del copies, storages
        engine.deepspeed.destroy()
        del engine
    if ranks.is_first:
        print(json.dumps(sizes))
    leave(0)


if __name__ == "__main__":
    main()
