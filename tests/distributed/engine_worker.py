"""Run by test_engine.py under torchrun: an Engine at each stage and precision; what was seen goes to a JSON file.

torchrun --nproc_per_node 2 -m tests.distributed.engine_worker RECIPE OUT.json
"""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

import training.engine
import training.plan
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from tests.training.tiny_pretrained import save_tiny_llama
from training.data import Batch
from training.distributed import Ranks, discover, leave, sum_over_ranks
from training.engine import Engine, deepspeed, start_distributed
from training.optimizers import JointOptimizer, make_optimizer
from training.plan import plan
from training.recipe import Recipe, model_config
from training.recipe_file import LoadedRecipe, load_recipe

VOCAB, LENGTH, SEQUENCES, SIZE = 333, 32, 8, 2
# Blocks with gains of their own, each with a parametrization whose factors reach into the network and the optimizer
NETWORKS = {
    "simplified": ["model.block=simplified", "model.activation=relu", "model.parametrization=mup"],
    "simplified_parallel": ["model.block=simplified_parallel", "model.activation=relu", "model.parametrization=mup"],
    "shaped": ["model.attention=shaped", "model.kv_heads=1", "model.parametrization=depth_mup", "model.base_depth=1"],
    "outlier_protected": ["model.block=outlier_protected", "model.attention=shaped", "model.activation=shaped_relu"],
}
VARIANTS = {
    **{f"fp32-{stage}": ["training.precision=fp32", f"deepspeed.zero_optimization.stage={stage}"] for stage in range(4)},
    "bf16-2": ["training.precision=bf16", "deepspeed.zero_optimization.stage=2"],
    **{
        f"selective-{stage}": [
            "training.precision=fp32",
            f"deepspeed.zero_optimization={{stage: {stage}, stage3_param_persistence_threshold: 0}}",
            "training.activation_checkpointing=selective",
        ]
        for stage in (2, 3)
    },
}
# Compiling takes long, and these two have all that is new
COMPILED_NETWORKS = {"simplified": ("compiled", "compiled-selective"), "shaped": ("compiled",)}
COMPILED = {
    "compiled": ["training.compile=true", "training.activation_checkpointing=true", "deepspeed.zero_optimization.stage=3"],
    "compiled-selective": ["training.compile=true", "training.activation_checkpointing=selective", "deepspeed.zero_optimization.stage=2"],
}


def batches(step: int, ranks: Ranks) -> list[Batch]:
    """This rank's micro-batches of a step: 8 sequences over all, some targets not counted."""
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, 1:].clone()
    targets[3, 7:] = -100
    accumulation = SEQUENCES // (SIZE * ranks.world_size)
    rows = [slice((m * ranks.world_size + ranks.rank) * SIZE, (m * ranks.world_size + ranks.rank + 1) * SIZE) for m in range(accumulation)]
    return [Batch(tokens[r, :-1], targets[r], None) for r in rows]


def reference(recipe: LoadedRecipe) -> dict[str, float]:
    """Loss and gradient norm of the first step by plain autograd in this process, over all sequences at once."""
    model = Transformer(model_config(recipe.recipe, VOCAB))
    initialize(model, recipe.recipe.run.seed)
    whole = [b for r in (0, 1) for b in batches(0, Ranks(r, 2, r, 2))]
    tokens, targets = torch.cat([b.tokens for b in whole]), torch.cat([b.targets for b in whole])
    loss = model(tokens, targets) / (targets != -100).sum()
    loss.backward()
    return {
        "loss": loss.item(),
        "grad_norm": math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters() if p.grad is not None)),
    }


def run(recipe: LoadedRecipe, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Two good steps, one with a poisoned weight, and a check that the poisoned one changed nothing."""
    accumulation = SEQUENCES // (SIZE * ranks.world_size)
    seen: dict[str, Any] = {"losses": [], "grad_norms": [], "applied": []}

    def look_at_birth(model: Transformer, seed: int, **arguments: Any) -> None:
        seen["elements_at_birth"] = sum(p.numel() for p in model.parameters())
        initialize(model, seed, **arguments)

    training.engine.initialize = look_at_birth
    engine = Engine(recipe.recipe, model_config(recipe.recipe, VOCAB), accumulation, ranks, device)
    weight = engine.model.blocks[1].mlp.up.weight
    if engine.stage == 3:
        seen["held_elements"] = [weight.numel(), weight.ds_tensor.numel(), weight.ds_numel]

    def checksum() -> float:
        with deepspeed.zero.GatheredParameters(list(engine.model.parameters())) if engine.stage == 3 else torch.no_grad():
            return sum(p.detach().double().nan_to_num().abs().sum().item() for p in engine.model.parameters())

    for step in range(3):
        micro_batches = batches(step, ranks)
        (valid,) = sum_over_ranks(sum(int((b.targets != -100).sum()) for b in micro_batches), device=device)
        if step == 2:
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0) if engine.stage == 3 else torch.no_grad(), torch.no_grad():
                weight.view(-1)[5] = math.nan
        before = checksum()
        loss_sum = torch.zeros((), device=device)
        for batch in micro_batches:
            loss_sum += engine.accumulate(batch, scale=1 / valid)
        result = engine.step(1e-2)
        (loss,) = sum_over_ranks(loss_sum, device=device)
        seen["losses"].append(loss / valid)
        seen["grad_norms"].append(result.grad_norm)
        seen["applied"].append(result.applied)
        seen["changed"] = checksum() != before
        if not result.applied:
            seen["named"] = engine.name_non_finite(micro_batches)
    seen["skipped_steps"] = engine.skipped_steps
    return seen


def recomputed_by_rank(recipe: LoadedRecipe, ranks: Ranks, device: torch.device) -> list[Any]:
    """What each rank chooses, first where the last one's memory is less than the others', then where it is too little."""
    config, accumulation = model_config(recipe.recipe, VOCAB), SEQUENCES // (SIZE * ranks.world_size)
    section = recipe.recipe.training
    variants = [section.model_copy(update={"activation_checkpointing": choice}) for choice in (False, "selective")]
    needed = [
        plan(recipe.recipe.model_copy(update={"training": variant}), config, ranks.world_size, device="cpu").memory.total
        for variant in variants
    ]
    asked, chosen = training.plan.device_memory, []
    for least in (needed[1], 1000):
        memory = least if ranks.rank == ranks.world_size - 1 else needed[0]
        training.plan.device_memory = lambda device, memory=memory: memory * 10 // 9 + 10
        try:
            chosen.append(Engine(recipe.recipe, config, accumulation, ranks, device).model.activation_checkpointing)
        except InputError as error:
            chosen.append(str(error).split(":")[0])
        finally:
            training.plan.device_memory = asked
    recomputed: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(recomputed, chosen)
    return recomputed


def rotary_error(folder: Path, ranks: Ranks, device: torch.device) -> float:
    """How far, relatively, rotary frequencies of a pretrained Llama are from their closed form: in bf16 at stage 3."""
    if ranks.is_first:
        save_tiny_llama(folder)
    torch.distributed.barrier()
    training_section = {"tokens": 10**6, "tokens_per_step": 128, "micro_batch_size": 1, "sequence_length": 64, "precision": "bf16"}
    recipe = Recipe.model_validate(
        {"model": {"pretrained": str(folder)}, "training": training_section, "deepspeed": {"zero_optimization": {"stage": 3}}}
    )
    engine = Engine(recipe, model_config(recipe, 1), 1, ranks, device)
    found = dict(engine.model.named_buffers())["model.model.rotary_emb.inv_freq"].double()
    exact = 10000.0 ** (-torch.arange(len(found), dtype=torch.float64) / len(found))
    return float(((found - exact) / exact).abs().max())


def losses_of_steps(recipe: LoadedRecipe, ranks: Ranks, device: torch.device) -> list[float]:
    """The loss before each of 5 steps at a constant learning rate."""
    engine = Engine(recipe.recipe, model_config(recipe.recipe, VOCAB), SEQUENCES // (SIZE * ranks.world_size), ranks, device)
    losses = []
    for step in range(5):
        micro_batches = batches(step % 2, ranks)
        (valid,) = sum_over_ranks(sum(int((b.targets != -100).sum()) for b in micro_batches), device=device)
        loss_sum = torch.zeros((), device=device)
        for batch in micro_batches:
            loss_sum += engine.accumulate(batch, scale=1 / valid)
        engine.step(1e-2)
        losses.append(sum_over_ranks(loss_sum, device=device)[0] / valid)
    return losses


def reference_losses(recipe: LoadedRecipe) -> list[float]:
    """The same by plain autograd and the base optimizer in this process, over all sequences at once, in float32."""
    model = Transformer(model_config(recipe.recipe, VOCAB))
    initialize(model, recipe.recipe.run.seed)
    optimizer = make_optimizer(model, recipe.recipe.optimizer, sharded=False, max_norm=recipe.recipe.training.gradient_clipping)
    assert isinstance(optimizer, JointOptimizer)
    optimizer.ready = True
    losses = []
    for step in range(5):
        whole = [b for r in (0, 1) for b in batches(step % 2, Ranks(r, 2, r, 2))]
        tokens, targets = torch.cat([b.tokens for b in whole]), torch.cat([b.targets for b in whole])
        model.zero_grad()
        loss = model(tokens, targets) / (targets != -100).sum()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["lr_factor"]
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    path, out = sys.argv[1:]
    ranks = discover()
    device = start_distributed(ranks)
    base = ["training.micro_batch_size=2", "training.gradient_clipping=0.5"]
    results: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            recipe = load_recipe(path, [*base, f"training.precision={precision}", f"deepspeed.zero_optimization.stage={stage}"])
            results[f"{precision}-{stage}"] = run(recipe, ranks, device)
            gc.collect()
    for stage, checkpointing in ((2, "false"), (3, "true")):
        compiled = [*base, "training.compile=true", f"training.activation_checkpointing={checkpointing}"]
        recipe = load_recipe(path, [*compiled, f"deepspeed.zero_optimization.stage={stage}"])
        results[f"compiled-{stage}"] = run(recipe, ranks, device)
        gc.collect()
    for kind in ("adamw", "adafactor", "muon", "soap"):
        for precision in ("fp32", "bf16"):
            named = [*base, f"training.precision={precision}", f"optimizer.kind={kind}", "deepspeed.zero_optimization.stage=0"]
            results[f"{kind}-{precision}"] = losses_of_steps(load_recipe(path, named), ranks, device)
            gc.collect()
        results[f"{kind}-reference"] = reference_losses(load_recipe(path, named))
    for name, network in NETWORKS.items():
        network = [*base, *network, *([] if name == "outlier_protected" else ["model.base_width=16"])]
        for variant, overrides in VARIANTS.items():
            results[f"{name}-{variant}"] = losses_of_steps(load_recipe(path, [*network, *overrides]), ranks, device)
            gc.collect()
        for compiled in COMPILED_NETWORKS.get(name, ()):
            results[f"{name}-{compiled}"] = losses_of_steps(load_recipe(path, [*network, *COMPILED[compiled]]), ranks, device)
        results[f"{name}-reference"] = reference_losses(load_recipe(path, [*network, "deepspeed.zero_optimization.stage=0"]))
    results["recomputed"] = recomputed_by_rank(load_recipe(path, [*base, "training.activation_checkpointing=auto"]), ranks, device)
    results["rotary"] = rotary_error(Path(path).parent / "tiny_llama", ranks, device)
    if ranks.is_first:
        results["reference"] = reference(load_recipe(path, base))
        Path(out).write_text(json.dumps(results))
    leave(0)


if __name__ == "__main__":
    main()
