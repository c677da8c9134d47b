"""What a run will take, before it takes it: parameters, the batch equation, memory by part, steps, FLOPs and data.

`train.py --dry-run` prints it; the loop logs the predicted peak of memory beside the measured one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.activation_checkpointing import ActivationCheckpointing
from model.blocks import Block
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import owned_parameters
from model.pretrained import PretrainedModel
from model.transformer import Transformer
from training.distributed import smallest_over_ranks
from training.memory import Memory, predict
from training.metrics import duration
from training.network import Network, make_network, require_compiler
from training.optimizers import state_elements
from training.recipe import ContextPruningSection, Recipe, model_config, zero_stage
from training.recipe_file import LoadedRecipe
from training.run_folder import check_run_folder

FLOPS_CONVENTION = (
    "6 N_matmul + 12 depth width length a token, forward and backward; N_matmul counts every matrix but the embedding",
    "look-up, the unembedding included; attention counts whole, not halved for causality; recomputation does not count",
)


@dataclass(frozen=True)
class Parameters:
    """Number of parameters by part; a tied unembedding counts 0."""

    embedding: int
    positions: int
    attention: int
    mlp: int
    norms_and_gains: int
    unembedding: int
    context_pruning: int
    frozen: int  # of all these
    matmul: int  # in the matrices that every token is multiplied by: all but the embedding look-up, also a tied unembedding
    tensor_sizes: list[int]  # of what is trained

    @property
    def total(self) -> int:
        return self.embedding + self.positions + self.non_embedding + self.unembedding

    @property
    def non_embedding(self) -> int:
        return self.attention + self.mlp + self.norms_and_gains + self.context_pruning


@dataclass(frozen=True)
class Batch:
    """tokens_per_step = ranks x micro_batch_size x accumulation x sequence_length."""

    tokens_per_step: int
    ranks: int
    micro_batch_size: int
    accumulation: int
    sequence_length: int


@dataclass(frozen=True)
class Plan:
    """Everything --dry-run prints, as numbers."""

    recipe: Recipe
    model: ModelConfig
    parameters: Parameters
    batch: Batch
    memory: Memory
    device: str
    steps: int
    tokens: int
    flops_per_token: int
    train_tokens: int | None  # of the prepared corpus, when it is known
    checkpointing: ActivationCheckpointing

    @property
    def flops(self) -> int:
        more = sum(passes(self.recipe, step, self.steps) - 1 for step in range(self.steps))
        return self.flops_per_token * (self.tokens + round(more * self.batch.tokens_per_step))


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches each rank adds up for one optimizer step.

    Raises:
        InputError: tokens_per_step does not divide by ranks x micro-batch x sequence length; names the nearest values that do.
    """
    training = recipe.training
    per_rank = world_size * training.sequence_length
    unit = per_rank * training.micro_batch_size
    accumulation, rest = divmod(training.tokens_per_step, unit)
    if rest == 0:
        _check_ascent(recipe, accumulation)
        return accumulation
    nearest = " or ".join(f"{count * unit} (accumulation {count})" for count in (accumulation, accumulation + 1) if count)
    advice = f"nearest valid: {nearest}"
    if training.tokens_per_step % per_rank == 0:
        sequences = training.tokens_per_step // per_rank
        smaller = max(size for size in range(1, training.micro_batch_size) if sequences % size == 0)
        advice += f"; or keep it with training.micro_batch_size {smaller}"
    equation = f"{_many(world_size, 'rank')} x {training.micro_batch_size} micro-batch x {training.sequence_length} length"
    raise InputError(f"training.tokens_per_step: {training.tokens_per_step} does not divide by {equation} = {unit}; {advice}")


def _check_ascent(recipe: Recipe, accumulation: int) -> None:
    """The ascent direction is taken from whole micro-batches: as many of them as the recipe's fraction says, or InputError."""
    wanted = recipe.optimizer.sharpness.ascent_fraction * accumulation
    if recipe.optimizer.sharpness_aware != "none" and (round(wanted) < 1 or abs(wanted - round(wanted)) > 1e-6):
        raise InputError(
            f"optimizer.sharpness.ascent_fraction: {recipe.optimizer.sharpness.ascent_fraction} of {_many(accumulation, 'micro-batch')} "
            f"of a rank is no whole number of them; valid: {', '.join(f'{n / accumulation:.6g}' for n in range(1, accumulation + 1)[:8])}, "
            "or lower training.micro_batch_size"
        )


def count_parameters(config: ModelConfig | PretrainedModel, pruning: ContextPruningSection | None = None) -> Parameters:
    """Counted on the model itself, made on the meta device, where it takes no memory."""
    return _count(_meta_model(config, pruning))


def _count(model: Network) -> Parameters:
    counts: Counter[str] = Counter()
    tensor_sizes, matmul = [], 0
    part = _part if isinstance(model, Transformer) else _part_of_pretrained
    for name, module, parameter in owned_parameters(model):
        counts[part(name, module)] += parameter.numel()
        if parameter.requires_grad:
            tensor_sizes.append(parameter.numel())
        else:
            counts["frozen"] += parameter.numel()
        if parameter.ndim == 2 and not isinstance(module, nn.Embedding):
            matmul += parameter.numel()
    if model.unembedding.weight is _embedding(model).weight:  # the shared matrix is listed under the embedding's name
        matmul += counts["embedding"]
    parts = ("embedding", "positions", "attention", "mlp", "norms_and_gains", "unembedding", "context_pruning", "frozen")
    return Parameters(**{name: counts[name] for name in parts}, matmul=matmul, tensor_sizes=tensor_sizes)


def _embedding(model: Network) -> nn.Module:
    return model.embedding if isinstance(model, Transformer) else model.model.get_input_embeddings()


def _meta_model(config: ModelConfig | PretrainedModel, pruning: ContextPruningSection | None = None) -> Network:
    with torch.device("meta"):
        return make_network(config, pruning)


def _sizes(recipe: Recipe, config: ModelConfig | PretrainedModel) -> tuple[Parameters, int]:
    """(parameters, numbers that the optimizer keeps beside them), of one model, since making a pretrained one takes a second."""
    model = _meta_model(config, recipe.context_pruning)
    return _count(model), state_elements(model, recipe.optimizer)


def _part(name: str, module: nn.Module) -> str:
    if ".context_pruning." in name:
        return "context_pruning"
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm, Block)):
        return "norms_and_gains"
    parts = name.split(".")
    if parts[0] == "blocks":
        return parts[2]
    return "positions" if parts[0] == "position_embedding" else parts[0]


def _part_of_pretrained(name: str, module: nn.Module) -> str:
    if ".context_pruning." in name:
        return "context_pruning"
    if isinstance(module, nn.Embedding):
        return "positions" if any(word in name for word in ("wpe", "position")) else "embedding"
    if "norm" in name or "ln_" in name:
        return "norms_and_gains"
    if "attn" in name or "attention" in name:
        return "attention"
    return "unembedding" if name.startswith(("model.lm_head", "model.embed_out")) else "mlp"


def flops_per_token(config: ModelConfig, parameters: Parameters, sequence_length: int) -> int:
    """Of training, by `FLOPS_CONVENTION`: the forward pass once and the backward pass twice."""
    assert config.head_dim is not None
    return 6 * parameters.matmul + 12 * config.depth * config.heads * config.head_dim * sequence_length


def passes(recipe: Recipe, step: int, total_steps: int) -> float:
    """Work of step `step` (0-based) as a multiple of a plain step's forward and backward pass; of every so many steps, their mean.

    A sharpness-aware step takes `ascent_fraction` of a pass more, and functional_sam a forward pass, a third, over the rest of the
    batch if that is perturbed too. (The second pass rebuilds the first one's logits and leaves out its own.)
    """
    optimizer, options = recipe.optimizer, recipe.optimizer.sharpness
    if optimizer.sharpness_aware == "none" or options.radius == 0 or step < round(options.start_fraction * total_steps):
        return 1.0
    more = options.ascent_fraction
    if optimizer.sharpness_aware == "functional_sam" and options.rest == "perturbed":
        more += (1 - options.ascent_fraction) / 3
    return 1.0 + more / options.every


def plan(
    recipe: Recipe, config: ModelConfig | PretrainedModel, world_size: int, data: dict[str, Any] | None = None, device: str | None = None
) -> Plan:
    """What this run takes on this many ranks.

    Args:
        config: the network, as `training.recipe.model_config` gives it.
        data: the manifest of the prepared corpus, when there is one.
        device: "cuda" or "cpu"; default: what this machine has.

    Raises:
        InputError: tokens per step do not divide, or a size of DeepSpeed's section is not a number.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    training = recipe.training
    accumulation = accumulation_steps(recipe, world_size)
    parameters, elements = _sizes(recipe, config)
    checkpointing = choose_checkpointing(recipe, config, world_size, accumulation, device)
    config = config.shape() if isinstance(config, PretrainedModel) else config
    steps = training.tokens // training.tokens_per_step
    return Plan(
        recipe=recipe,
        model=config,
        parameters=parameters,
        batch=Batch(training.tokens_per_step, world_size, training.micro_batch_size, accumulation, training.sequence_length),
        memory=predict(
            recipe, config, parameters.tensor_sizes, elements, world_size, accumulation, device, parameters.frozen, checkpointing
        ),
        device=device,
        steps=steps,
        tokens=steps * training.tokens_per_step,
        flops_per_token=flops_per_token(config, parameters, training.sequence_length),
        train_tokens=data["train"]["tokens"] if data else None,
        checkpointing=checkpointing,
    )


def choose_checkpointing(
    recipe: Recipe, config: ModelConfig | PretrainedModel, world_size: int, accumulation: int, device: str
) -> ActivationCheckpointing:
    """What `training.activation_checkpointing` comes to: with auto the cheapest that fits.

    Selective checkpointing costs a few per cent of a block's time and full checkpointing a third of it, so every block keeps only its
    products before the first one keeps only its input. The first blocks are recomputed first: what they keep waits longest.

    Raises:
        InputError: not even all blocks in full make it fit.
    """
    asked, shape = recipe.training.activation_checkpointing, config.shape() if isinstance(config, PretrainedModel) else config
    depth = shape.depth
    if asked == "selective":
        return ActivationCheckpointing(0, depth)
    if asked != "auto":
        full = (depth if asked else 0) if isinstance(asked, bool) else min(asked, depth)
        # transformers has all or none
        return ActivationCheckpointing(depth if full and isinstance(config, PretrainedModel) else full)
    choices = [ActivationCheckpointing(0, n) for n in range(depth + 1)]
    choices += [ActivationCheckpointing(n, depth - n) for n in range(1, depth + 1)]
    if isinstance(config, PretrainedModel):
        choices = [choices[0], *([] if recipe.training.compile else [choices[depth]]), choices[-1]]
    parameters, elements = _sizes(recipe, config)

    def memory(choice: ActivationCheckpointing) -> Memory:
        return predict(recipe, shape, parameters.tensor_sizes, elements, world_size, accumulation, device, parameters.frozen, choice)

    budget = round((with_memory_budget(recipe, device).training.memory_budget_gb or 0) * 1e9)
    for choice in choices:
        if memory(choice).total <= budget:
            return choice
    least = memory(choices[-1])
    raise InputError(
        f"training.activation_checkpointing: auto finds nothing that fits {budget / 1e9:.2f} GB: with all {depth} blocks "
        f"recomputed a rank takes {least.total / 1e9:.2f} GB, most of it at {least.peak_phase}; lower training.micro_batch_size, raise "
        "the ZeRO stage or the ranks, or offload (python -m scripts.plan says what fits)"
    )


def with_memory_budget(recipe: Recipe, device: str) -> Recipe:
    """With activation checkpointing auto, a recipe that says its budget: where it does not, nine tenths of the least that a rank has.

    Every rank calls it, so that all choose alike, and give up alike.
    """
    training = recipe.training
    if training.activation_checkpointing != "auto" or training.memory_budget_gb is not None:
        return recipe
    least = smallest_over_ranks(device_memory(device), torch.device(device))
    return recipe.model_copy(update={"training": training.model_copy(update={"memory_budget_gb": 0.9 * least / 1e9})})


def device_memory(device: str) -> int:
    """Bytes that a rank of this machine has: its GPU's, or its share of the memory that is free for the ranks of this host."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if device == "cuda":
        raise InputError("training.memory_budget_gb: required with activation_checkpointing auto where there is no GPU to ask")
    (free,) = (int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def what_would_fit(made: Plan) -> list[str]:
    """Changes of a recipe that need less memory, by the plan, as `key=value (GB)`, the cheapest first."""
    recipe, found = made.recipe, []
    changes: list[tuple[str, dict[str, Any]]] = [
        ("training", {"activation_checkpointing": setting, "memory_budget_gb": None}) for setting in ("selective", True)
    ]
    size = recipe.training.micro_batch_size
    changes += [("training", {"micro_batch_size": size // factor}) for factor in (2, 4) if size % factor == 0]
    for stage in range(zero_stage(recipe) + 1, 4):
        changes.append(("deepspeed", {"zero_optimization": {**recipe.deepspeed.get("zero_optimization", {}), "stage": stage}}))
    for section, values in changes:
        tree = recipe.model_dump()
        tree[section].update(values)
        try:
            total = plan(Recipe.model_validate(tree), made.model, made.batch.ranks, device=made.device).memory.total
        except InputError:
            continue
        if total < 0.98 * made.memory.total:
            (key, value), *_ = values.items()
            words = (
                f"deepspeed.zero_optimization.stage={value['stage']}" if section == "deepspeed" else f"{section}.{key}={str(value).lower()}"
            )
            found.append(f"{words} ({total / 1e9:.2f} GB)")
    return found


@contextmanager
def memory_advice(plan: Plan, during: str) -> Iterator[None]:
    """Turn running out of memory into one line: what the plan counts, and what it says would need less.

    Raises:
        InputError: the device, or the host, had no memory left.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # a CPU's allocator, and cuBLAS where it finds no room to begin, have no exception of their own
        words = ("not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(word in str(error) for word in words):
            raise
        advice = "; ".join(what_would_fit(plan))
        raise InputError(
            f"out of memory during {during}: the plan counts {plan.memory.total / 1e9:.2f} GB of tensors on a rank, most at "
            f"{plan.memory.peak_phase}. According to the plan, these need less memory: {advice or 'more ranks, or a smaller model'}"
        ) from None


def planned_network(recipe: Recipe) -> ModelConfig | PretrainedModel:
    """The network of a recipe before its data are prepared. Raises InputError where the model or tokenizer that it names cannot be had."""
    tokenizer = recipe.data.tokenizer
    vocab_size = tokenizer.vocab_size
    if tokenizer.kind == "pretrained" and tokenizer.path is not None:
        from training.tokenizer import pretrained_tokenizer  # transformers takes seconds to import

        vocab_size = pretrained_tokenizer(tokenizer.path).vocab_size
    elif recipe.model.pretrained is not None:
        vocab_size = 1  # the model's own tokenizer, which fits
    return model_config(recipe, vocab_size)


def print_plan(loaded: LoadedRecipe, world_size: int) -> None:
    """The plan of a recipe on so many ranks, to standard output; nothing is prepared and nothing is written.

    Raises:
        InputError: something that can be known now is wrong: with the recipe, before the plan is printed; with this machine, after it.
    """
    recipe = loaded.recipe
    if world_size < 1:
        raise InputError(f"--ranks: expected a positive number, found {world_size}")
    config = planned_network(recipe)
    print(f"{loaded.path} is a valid recipe; its run folder is {loaded.run_folder}\n")
    print(format_plan(plan(recipe, config, world_size)))
    for warning in config.warnings():
        print(f"\nwarning: {warning}")
    of_a_hub = f", and whether the data set {recipe.data.dataset} can be had" if recipe.data.source == "huggingface" else ""
    print(f"\nnot looked at: the text itself{of_a_hub}")
    problems = []
    for check in (_check_paths, check_run_folder, lambda loaded: require_compiler(loaded.recipe)):
        try:
            check(loaded)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def _check_paths(loaded: LoadedRecipe) -> None:
    """Raises InputError where the files that a launch would read are not on this machine. Nothing is read."""
    from training.sources import FilesSource  # takes seconds to import

    data = loaded.recipe.data
    is_prepared = (Path(data.prepared).expanduser() / "manifest.json").exists()  # the corpus itself, read whatever the source says
    if data.source == "files" and not is_prepared and not (loaded.run_folder / "data.json").exists():
        FilesSource(data.paths, data.text_field)


def format_plan(plan: Plan) -> str:
    """The plan for a person: about a screen."""
    config, batch, memory = plan.model, plan.batch, plan.memory
    ranks = _many(batch.ranks, "rank")
    equation = f"{ranks} x {batch.micro_batch_size} micro-batch x {batch.accumulation} accumulation x {batch.sequence_length} length"
    where = "GPU" if plan.device == "cuda" else "CPU rank, beside Python and its libraries"
    return "\n".join(
        [
            f"parameters ({plan.recipe.model.pretrained or config.block}, width {config.width}, depth {config.depth})",
            *_parameter_lines(plan),
            "",
            f"tokens per step {batch.tokens_per_step} = {equation}",
            f"steps {plan.steps} = {plan.tokens} tokens",
            "",
            f"memory of one {where} (ZeRO {zero_stage(plan.recipe)} on {ranks}, {plan.recipe.training.precision})",
            *_memory_lines(plan),
            *(f"    at {phase:<24}{_mebibytes(size)}" for phase, size in memory.phases.items()),
            "",
            f"FLOPs {plan.flops_per_token:.4g} a token and pass, {plan.flops:.4g} in all{_passes_note(plan)}",
            *(f"    {line}" for line in FLOPS_CONVENTION),
            f"time {duration(plan.flops / batch.ranks / 1e14)} at 100 TFLOP/s sustained on each rank, in proportion at other speeds",
            f"data {_data_note(plan)}",
        ]
    )


def _parameter_lines(plan: Plan) -> list[str]:
    config, parameters = plan.model, plan.parameters
    tied = "shares the embedding's matrix" if config.tied_embeddings else f"{config.width} x {config.vocab_size}"
    rows = [
        ("embedding", parameters.embedding, f"{config.vocab_size} x {config.width}"),
        ("positions", parameters.positions, config.positions),
        ("attention", parameters.attention, f"{config.heads} heads of {config.head_dim}, {config.kv_heads} for keys and values"),
        ("mlp", parameters.mlp, f"{config.activation}, hidden width {config.mlp_width}"),
        ("norms and gains", parameters.norms_and_gains, ""),
        ("unembedding", parameters.unembedding, tied),
        *([("context pruning", parameters.context_pruning, "interaction queries and keys")] if parameters.context_pruning else []),
        *([("of these frozen", parameters.frozen, "")] if parameters.frozen else []),
        ("total", parameters.total, ""),
        ("non-embedding", parameters.non_embedding, "without embedding, positions and unembedding"),
    ]
    return [f"    {name:<20}{value:>16,}   {note}".rstrip() for name, value, note in rows]


_STATE = {
    "adamw": "two moments",
    "adafactor": "a second moment for each row and column",
    "muon": "momentum; two moments of what is no matrix of a block",
    "soap": "two moments, and a covariance and its eigenvectors for each side of a matrix",
}


def _memory_lines(plan: Plan) -> list[str]:
    memory, batch, stage = plan.memory, plan.batch, zero_stage(plan.recipe)
    kept = f"{batch.micro_batch_size} x {batch.sequence_length} tokens, "
    full, selective = plan.checkpointing
    parts = [
        f"the input of {full} blocks" if full else "",
        f"input, products and attention of {selective}{'' if full else ' blocks'}" if selective else "",
        "one block whole" if full or selective else "",
        f"{plan.model.depth - full - selective} blocks" if full + selective < plan.model.depth else "",
    ]
    kept += ", ".join(part for part in parts if part)
    rows = [
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, ""),
        (
            "optimizer state",
            memory.optimizer,
            ("float32 weights and " if stage or plan.recipe.training.precision == "bf16" else "") + _STATE[plan.recipe.optimizer.kind],
        ),
        ("activations", memory.activations, kept),
        ("logits", memory.logits, "a chunk of them at a time, and the unembedding's gradient in float32"),
        ("ZeRO buckets" if stage else "all-reduce", memory.buckets, "with whole weights where they are used" if stage == 3 else ""),
        ("optimizer's step", memory.step, ""),
        ("outlier statistics", memory.statistics, f"in one step of {plan.recipe.logging.outliers_every}" if memory.statistics else ""),
    ]
    if memory.host:
        rows.append(("offloaded", memory.host, "in the host's memory or on disk, not in the peak"))
    if memory.checkpoint:
        rows.append(("checkpoint's copy", memory.checkpoint, "in the host's memory, to be written beside training"))
    rows.append(("peak", memory.total, f"at {memory.peak_phase}; the parts are not all there at once:"))
    return [f"    {name:<20}{_mebibytes(value)}   {note}".rstrip() for name, value, note in rows]


def _passes_note(plan: Plan) -> str:
    last = passes(plan.recipe, plan.steps, plan.steps)
    if last == 1:
        return ""
    first = round(plan.recipe.optimizer.sharpness.start_fraction * plan.steps)
    return f": {last:.4g} passes a step ({plan.recipe.optimizer.sharpness_aware})" + (f" from step {first}" if first else "")


def _data_note(plan: Plan) -> str:
    size = plan.tokens * (2 if plan.model.vocab_size <= 2**16 else 4)
    note = f"{plan.tokens} tokens, {size / 1e9:.3g} GB as shards if none is read twice"
    if plan.train_tokens is None:
        return note
    return note + f"; the corpus has {plan.train_tokens}: {plan.tokens / plan.train_tokens:.2f} epochs"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:>12,.1f} MiB"


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}{'es' if thing.endswith('ch') else 's'}"
