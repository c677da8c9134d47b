"""Run by test_trouble.py under torchrun: one of two ranks meets an error, and no rank may be left waiting for it in a collective.

torchrun --nproc_per_node 2 -m tests.distributed.trouble_worker RECIPE FOLDER
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import training.checkpoint
import training.engine
from analysis.checkpoint import Checkpoint
from model.errors import InputError
from tests.distributed.engine_worker import VOCAB
from tests.training.tiny_pretrained import save_tiny_llama
from training import checkpoint
from training.distributed import Ranks, discover, leave
from training.engine import Engine, start_distributed
from training.recipe import CheckpointSection, Recipe, model_config
from training.recipe_file import load_recipe


def raised(do: Callable[[], object]) -> list[str]:
    """The type and the message of what `do` raises."""
    try:
        do()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    return fail


def saved(engine: Engine, run: Path, step: int) -> Path:
    if engine.ranks.is_first:
        run.mkdir(exist_ok=True)
    dist.barrier()
    return checkpoint.write(checkpoint.contents(engine, run, step, step, {}), engine.ranks, CheckpointSection())


def loading(engine: Engine, run: Path) -> None:
    found = checkpoint.newest_whole(run, engine.ranks)
    assert found is not None
    checkpoint.load(engine, found)


def pretrained(folder: Path, ranks: Ranks, device: Any, stage: int) -> Engine:
    section = {"tokens": 10**6, "tokens_per_step": 128, "micro_batch_size": 1, "sequence_length": 64, "precision": "fp32"}
    zero = {"zero_optimization": {"stage": stage}}
    recipe = Recipe.model_validate({"model": {"pretrained": str(folder)}, "training": section, "deepspeed": zero})
    return Engine(recipe, model_config(recipe, 1), 1, ranks, device)


def save_tiny_mixture(folder: Path) -> None:
    """A mixture of experts whose router has a correction, which is a buffer."""
    config = transformers.Glm4MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, max_position_embeddings=64, vocab_size=97,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.copy_(torch.randn(buffer.shape))
    model.save_pretrained(folder)


def main() -> None:
    path, place = sys.argv[1], Path(sys.argv[2])
    ranks = discover()
    device = start_distributed(ranks)
    second = not ranks.is_first
    seen: dict[str, list[str]] = {}

    recipe = load_recipe(path, ["training.precision=fp32", "deepspeed.zero_optimization.stage=3"]).recipe
    engine = Engine(recipe, model_config(recipe, VOCAB), 1, ranks, device)
    run = place / "run"
    saved(engine, run, 1)

    read = Checkpoint.read
    for name, error in (("refuses", InputError("no such tensor")), ("disk", OSError(5, "Input/output error", "a file"))):
        Checkpoint.read = failing(error) if second else read
        seen[f"reading: {name}"] = raised(lambda: loading(engine, run))
        Checkpoint.read = read
    seen["reading: nothing"] = raised(lambda: loading(engine, run))

    clean_up = training.checkpoint.clean_up
    training.checkpoint.clean_up = failing(OSError(13, "Permission denied", "a folder")) if ranks.is_first else clean_up
    seen["mending"] = raised(lambda: checkpoint.newest_whole(run, ranks))
    training.checkpoint.clean_up = clean_up

    def spoiled() -> None:
        contents = checkpoint.contents(engine, run, 2, 2, {})
        if second:
            contents.files[contents.writing / "lock.pt"] = threading.Lock()
        checkpoint.write(contents, ranks, CheckpointSection())

    seen["pickling"] = raised(spoiled)
    seen["left of it"] = sorted(path.name for path in (run / "checkpoints").iterdir())

    llama = place / "llama"
    if ranks.is_first:
        save_tiny_llama(llama)
    dist.barrier()
    all_weights = training.engine.pretrained_weights

    def without_one(source: str) -> dict[str, Any]:
        weights = all_weights(source)
        del weights["model.layers.1.mlp.up_proj.weight"]
        return weights

    for name, weights in (("missing", without_one), ("unreadable", failing(InputError("cannot be read"))), ("nothing", all_weights)):
        training.engine.pretrained_weights = weights
        seen[f"pretrained: {name}"] = raised(lambda: pretrained(llama, ranks, device, 3))
    # what no gathering brings to the other ranks: the buffers that are saved with a model
    mixture = place / "mixture"
    if ranks.is_first:
        save_tiny_mixture(mixture)
    dist.barrier()
    corrections = [buffer for name, buffer in pretrained(mixture, ranks, device, 3).model.named_buffers() if "correction" in name]
    expected = [buffer for name, buffer in all_weights(str(mixture)).items() if "correction" in name]
    seen["buffers"] = [str(all(torch.equal(one, other) and one.any() for one, other in zip(corrections, expected, strict=True)))]
    seen["buffers"].append(str(len(corrections)))
    (place / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
