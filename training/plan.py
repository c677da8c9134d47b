"""What a run will take, before it takes it: parameters, the batch equation, memory by part, steps, FLOPs and data.

`train.py --dry-run` prints `format_plan(plan(...))`; the loop logs the same prediction beside the measured peak.

Memory is predicted tensor by tensor from what PyTorch and DeepSpeed 0.19 allocate (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`bf16_optimizer.py`, `fp16/unfused_optimizer.py`). Not in it: the CUDA context, NCCL's buffers, fragmentation, workspaces of
matrix products, and, on a CPU, Python and its libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.blocks import Block
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import owned_parameters
from model.transformer import Transformer
from training.recipe import LoadedRecipe, Recipe, model_config, zero_stage

# DeepSpeed's defaults (runtime/zero/config.py), in elements
REDUCE_BUCKET = 500_000_000
ALL_REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
PERSISTENCE_THRESHOLD = 100_000
SUB_GROUP = 1_000_000_000

FLOPS_CONVENTION = (
    "6 N_matmul + 12 depth width length a token, forward and backward; N_matmul counts every matrix but the embedding look-up, "
    "the unembedding included; attention is counted whole, not halved for causality; recomputation does not count"
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
    matmul: int  # in matrices that tokens are multiplied by: all but the embedding look-up; a tied unembedding counts here
    largest: int  # of the largest single tensor
    small: int  # in tensors of at most PERSISTENCE_THRESHOLD elements

    @property
    def total(self) -> int:
        return self.embedding + self.positions + self.attention + self.mlp + self.norms_and_gains + self.unembedding

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding - self.positions - self.unembedding


@dataclass(frozen=True)
class Batch:
    """tokens_per_step = ranks x micro_batch_size x accumulation x sequence_length."""

    tokens_per_step: int
    ranks: int
    micro_batch_size: int
    accumulation: int
    sequence_length: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank, by part; `host` is what offloading moves to the CPU's memory or to disk.

    The parts are not all there at once: `phases` says what is, and `total` is the largest of them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buckets: int
    step: int  # what the optimizer step makes beside its state
    host: int
    phases: dict[str, int]

    @property
    def total(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])


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
    train_tokens: int | None  # in the prepared corpus, when it is known

    @property
    def flops(self) -> int:
        return self.flops_per_token * self.tokens


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches each rank adds up for one optimizer step.

    Raises:
        InputError: tokens_per_step does not divide by ranks x micro-batch x sequence length; names the nearest values that do.
    """
    training = recipe.training
    unit = world_size * training.micro_batch_size * training.sequence_length
    accumulation, rest = divmod(training.tokens_per_step, unit)
    if rest == 0:
        return accumulation
    equation = f"{world_size} ranks x {training.micro_batch_size} micro-batch x {training.sequence_length} length = {unit}"
    nearest = [f"{count * unit} (accumulation {count})" for count in (accumulation, accumulation + 1) if count]
    advice = f"nearest valid: {' or '.join(nearest)}"
    sequences, ragged = divmod(training.tokens_per_step, world_size * training.sequence_length)
    if ragged == 0:
        fitting = [size for size in range(1, sequences + 1) if sequences % size == 0]
        smaller = max((size for size in fitting if size <= training.micro_batch_size), default=None)
        larger = min((size for size in fitting if size > training.micro_batch_size), default=None)
        sizes = " or ".join(str(size) for size in (smaller, larger) if size)
        advice += f"; or keep it with training.micro_batch_size {sizes}"
    raise InputError(f"training.tokens_per_step: {training.tokens_per_step} does not divide by {equation}; {advice}")


def count_parameters(config: ModelConfig) -> Parameters:
    """Counted on the model itself, made on the meta device, where it takes no memory."""
    with torch.device("meta"):
        model = Transformer(config)
    counts = dict.fromkeys(("embedding", "positions", "attention", "mlp", "norms_and_gains", "unembedding"), 0)
    matmul = 0
    sizes = []
    for name, module, parameter in owned_parameters(model):
        counts[_part(name, module)] += parameter.numel()
        sizes.append(parameter.numel())
        if isinstance(module, nn.Linear) and name.endswith(".weight"):
            matmul += parameter.numel()
    if config.tied_embeddings:
        matmul += counts["embedding"]  # listed under the embedding's name
    return Parameters(**counts, matmul=matmul, largest=max(sizes), small=sum(size for size in sizes if size <= PERSISTENCE_THRESHOLD))


def _part(name: str, module: nn.Module) -> str:
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm, Block)):
        return "norms_and_gains"
    if ".attention." in name:
        return "attention"
    if ".mlp." in name:
        return "mlp"
    return {"position_embedding": "positions"}.get(name.partition(".")[0], name.partition(".")[0])


def flops_per_token(config: ModelConfig, parameters: Parameters, sequence_length: int) -> int:
    """Of training, by `FLOPS_CONVENTION`: the forward pass once and the backward pass twice."""
    assert config.head_dim is not None
    return 6 * parameters.matmul + 12 * config.depth * config.heads * config.head_dim * sequence_length


def activation_bytes(config: ModelConfig, sequence_length: int, compute: int, masked: bool, fused_norm: bool) -> tuple[int, int]:
    """Bytes a token that the backward pass keeps: (for one block, for what follows the blocks up to the unembedding's input).

    Counted over the tensors that autograd saves, each once, with the flash form of scaled_dot_product_attention, which keeps
    queries, keys, values, output and one float32 a head, and no scores.

    Args:
        compute: bytes of an activation (4 in fp32, 2 in bf16).
        masked: document masks, which SDPA turns into a (length, length) additive mask anew in each block.
        fused_norm: RMSNorm is one kernel that keeps its input (CUDA), not several that keep two float32 tensors (CPU).
    """
    assert config.kv_heads is not None and config.head_dim is not None and config.mlp_width is not None
    width, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim

    def norm(kind: str | None, size: int, vectors: int) -> int:
        """Kept by a norm of `vectors` vectors of `size` elements together, besides its output."""
        if kind == "layer_norm":
            return compute * size + 8 * vectors  # input, mean and inverse deviation
        if kind == "rms_norm":
            return (compute * size if fused_norm else 8 * size) + 4 * vectors
        return 0

    block_norm = config.norm if config.block == "pre_norm" else "none"
    gain = 0 if config.residual_gain_form == "fixed" else compute * width  # a trainable gain keeps what it multiplies
    hidden = {"gelu": 2, "relu": 1, "swiglu": 4}[config.activation] * config.mlp_width
    block = (
        norm(block_norm, width, 1)
        + compute * width  # input of the projections
        + norm(config.qk_norm, queries, config.heads)
        + norm(config.qk_norm, keys, config.kv_heads)
        + compute * (2 * queries + 2 * keys)  # query, output, key, value
        + 4 * config.heads  # log-sum-exp
        + (compute * queries if config.positions == "rope" else 0)  # rotated queries are laid out by head, so the output is copied
        + (compute * sequence_length if masked else 0)
        + gain
        + norm(block_norm, width, 1)
        + compute * width  # input of the MLP
        + compute * hidden
        + gain
    )
    head = norm(config.norm if config.final_norm else "none", width, 1) + compute * width
    return block, head


def plan_memory(recipe: Recipe, config: ModelConfig, parameters: Parameters, world_size: int, accumulation: int, device: str) -> Memory:
    """Bytes on one rank, by part and by phase of a step."""
    training = recipe.training
    zero = recipe.deepspeed.get("zero_optimization", {})
    stage = zero_stage(recipe)
    low = training.precision == "bf16"
    compute = 2 if low else 4
    accumulated = _gradient_bytes(recipe, compute)
    count = parameters.total
    share = math.ceil(count / world_size)  # elements of one rank's partition
    offload_optimizer, offload_weights = (
        _offloaded(zero, "offload_optimizer") and stage > 0,
        _offloaded(zero, "offload_param") and stage == 3,
    )
    reduce_bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    if device == "cpu" or "reduce_bucket_size" not in zero:
        reduce_bucket = min(reduce_bucket, count)  # on a CPU, memory that is not touched is not taken
    host = 0

    # Weights, gradients that wait for the step, and the optimizer's state: float32 weights and AdamW's two moments.
    weights = compute * count
    master = 4 * share
    moments = 8 * share
    # Adam away from a GPU is not fused and makes two temporaries of the size of a moment.
    adam = 8 * share if device == "cpu" or offload_optimizer else 0
    if stage == 0:
        gradients = compute * count
        master = 4 * count if low else 0  # in fp32 the weights are their own master
        moments, adam = 8 * count, (8 * parameters.largest if device == "cpu" else 0)
        buckets = compute * min(count, ALL_REDUCE_BUCKET)
        step = (4 * count if low else 0) + adam  # float32 gradients
    elif stage == 1 and accumulated > compute and not offload_optimizer:  # BF16_Optimizer
        gradients = 4 * count
        buckets = 4 * min(count, ALL_REDUCE_BUCKET)
        step = adam
    elif stage in (1, 2):
        buckets = compute * reduce_bucket * (2 if zero.get("overlap_comm") else 1)
        if not zero.get("contiguous_gradients", True) and not offload_optimizer:
            buckets = compute * min(count, reduce_bucket)
        if stage == 1:
            gradients = compute * count
        elif accumulated > compute:
            gradients = 4 * share
        else:
            gradients = compute * share * (2 if accumulation > 1 else 1)  # the new micro-batch's beside the sum so far
        flat = 0 if stage == 2 and accumulated > compute else compute * share + (4 * share if low else 0)
        step = flat + adam  # the partition's gradients made flat, and in float32
    else:
        persistent = compute * parameters.small
        weights = persistent + (0 if offload_weights else compute * share)
        host += compute * share if offload_weights else 0
        master = 4 * share if low or offload_optimizer else 0
        gradients = accumulated * share
        live = min(count, int(float(zero.get("stage3_max_live_parameters", zero.get("max_live_parameters", MAX_LIVE_PARAMETERS)))))
        reduced = compute * min(count, reduce_bucket)  # scattered out of a second copy of the bucket
        buckets = compute * reduce_bucket + reduced + compute * max(0, live - parameters.small)
        sub_group = min(share, int(float(zero.get("sub_group_size", SUB_GROUP))))
        step = (compute if low else 0) * sub_group + 4 * sub_group + (min(adam, 8 * sub_group))
    optimizer = master + moments
    if offload_optimizer:
        host += optimizer + 4 * share + adam  # with a float32 gradient partition
        host += compute * share if stage < 3 else gradients
        gradients = 0 if stage == 3 else gradients
        gradients += 0 if stage == 3 else compute * parameters.largest
        optimizer = step = 0

    tokens = training.micro_batch_size * training.sequence_length
    block, head = activation_bytes(config, training.sequence_length, compute, recipe.data.document_masks, device == "cuda")
    if training.activation_checkpointing:
        kept = tokens * (config.depth * compute * config.width + head)
    else:
        kept = tokens * (config.depth * block + head)
    # Cross-entropy in float32: log-probabilities, the loss's gradient to them, and the gradient to the logits.
    logits = 12 * tokens * config.vocab_size
    waiting = gradients if accumulation > 1 or stage == 3 or (stage == 1 and accumulated > compute) else 0
    states = weights + optimizer
    held = compute * reduce_bucket if stage == 3 else 0
    recomputed = tokens * block
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept + (recomputed if training.activation_checkpointing else 0),
        logits=logits,
        buckets=buckets,
        step=step,
        host=host,
        phases={
            "the loss": states + waiting + buckets + kept + logits,
            "the last gradients": states + gradients + buckets + recomputed,
            "the optimizer step": states + gradients + held + step,
        },
    )


def _offloaded(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def _gradient_bytes(recipe: Recipe, compute: int) -> int:
    """Bytes of an element in which gradients of several micro-batches add up: `deepspeed.data_types.grad_accum_dtype`."""
    name = str((recipe.deepspeed.get("data_types") or {}).get("grad_accum_dtype") or "")
    return 4 if name in ("fp32", "float", "float32") else compute


def plan(recipe: Recipe, config: ModelConfig, world_size: int, data: dict[str, Any] | None = None, device: str | None = None) -> Plan:
    """What this run takes on this many ranks.

    Args:
        config: the network, as `training.recipe.model_config` gives it.
        data: the manifest of the prepared corpus, when there is one.
        device: "cuda" or "cpu"; default: what this machine has.

    Raises:
        InputError: tokens per step do not divide.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    training = recipe.training
    accumulation = accumulation_steps(recipe, world_size)
    parameters = count_parameters(config)
    steps = training.tokens // training.tokens_per_step
    return Plan(
        recipe=recipe,
        model=config,
        parameters=parameters,
        batch=Batch(training.tokens_per_step, world_size, training.micro_batch_size, accumulation, training.sequence_length),
        memory=plan_memory(recipe, config, parameters, world_size, accumulation, device),
        device=device,
        steps=steps,
        tokens=steps * training.tokens_per_step,
        flops_per_token=flops_per_token(config, parameters, training.sequence_length),
        train_tokens=data["train"]["tokens"] if data else None,
    )


def print_plan(loaded: LoadedRecipe, world_size: int) -> None:
    """The plan of a recipe on so many ranks, to standard output; nothing is prepared and nothing is written.

    Raises:
        InputError: something that can be known now is wrong.
    """
    recipe = loaded.recipe
    if world_size < 1:
        raise InputError(f"--ranks: expected a positive number, found {world_size}")
    tokenizer = recipe.data.tokenizer
    vocab_size = tokenizer.vocab_size
    if tokenizer.kind == "pretrained" and tokenizer.path is not None:
        from training.tokenizer import pretrained_tokenizer  # transformers takes seconds to import

        vocab_size = pretrained_tokenizer(tokenizer.path).vocab_size
    print(f"{loaded.path}: a valid recipe; run folder {loaded.run_folder}\n")
    print(format_plan(plan(recipe, model_config(recipe, vocab_size), world_size)))


def format_plan(plan: Plan) -> str:
    """The plan for a person, about a screen."""
    config, parameters, batch, memory = plan.model, plan.parameters, plan.batch, plan.memory
    zero = f"ZeRO {zero_stage(plan.recipe)} over {_many(batch.ranks, 'rank')}"
    per_step = f"{batch.tokens_per_step} = {_many(batch.ranks, 'rank')} x {batch.micro_batch_size} micro-batch"
    tied = "  shared with the embedding" if config.tied_embeddings else ""
    parts = [
        ("embedding", parameters.embedding, f"  {config.vocab_size} x {config.width}"),
        ("positions", parameters.positions, "  learned" if parameters.positions else f"  {config.positions}"),
        (
            "attention",
            parameters.attention,
            f"  {config.depth} blocks, {config.heads} heads of {config.head_dim}, {config.kv_heads} for keys and values",
        ),
        ("mlp", parameters.mlp, f"  {config.depth} blocks, {config.activation}, hidden width {config.mlp_width}"),
        ("norms and gains", parameters.norms_and_gains, ""),
        ("unembedding", parameters.unembedding, tied),
        ("total", parameters.total, ""),
        ("non-embedding", parameters.non_embedding, ""),
    ]
    bytes_by_part = [
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.optimizer, "  float32 weights and two moments"),
        ("activations", memory.activations, _activation_note(plan)),
        ("logits", memory.logits, "  float32, three times: log-probabilities and two gradients"),
        ("ZeRO buckets", memory.buckets, ""),
        ("optimizer's step", memory.step, ""),
        *([("offloaded", memory.host, "  to the host, not in the peak")] if memory.host else []),
        ("peak", memory.total, f"  at {memory.peak_phase}; not every part is there at once"),
    ]
    where = "GPU" if plan.device == "cuda" else "CPU rank, beside Python and its libraries"
    lines = [
        f"model        {config.block}, width {config.width}, depth {config.depth}, {config.norm}, {config.positions}",
        "parameters",
        *(f"  {name:<17}{value:>16,}{note}" for name, value, note in parts),
        f"tokens per step {per_step} x {batch.accumulation} accumulation x {batch.sequence_length} length",
        f"steps        {plan.steps:,} = {plan.tokens:,} tokens",
        f"memory of one {where}: {zero}, {plan.recipe.training.precision}",
        *(f"  {name:<17}{value / 2**20:>12,.1f} MiB{note}" for name, value, note in bytes_by_part),
        f"FLOPs        {plan.flops_per_token:.4g} a token, {plan.flops:.4g} in all",
        f"             ({FLOPS_CONVENTION})",
        f"time         {_duration(plan.flops / batch.ranks / 1e14)} for each 100 TFLOP/s that a rank sustains",
        f"data         {_data_note(plan)}",
    ]
    return "\n".join(lines)


def _activation_note(plan: Plan) -> str:
    sequences = f"{plan.batch.micro_batch_size} x {plan.batch.sequence_length} tokens"
    if plan.recipe.training.activation_checkpointing:
        return f"  {sequences}: the input of {plan.model.depth} blocks, and one block in whole"
    return f"  {sequences} in {plan.model.depth} blocks"


def _data_note(plan: Plan) -> str:
    size = plan.tokens * (2 if plan.model.vocab_size <= 2**16 else 4)
    note = f"{plan.tokens:,} tokens, {size / 1e9:.3g} GB on disk once each"
    if plan.train_tokens is None:
        return note + "; how often the corpus is read is known once it is prepared"
    return note + f"; the corpus has {plan.train_tokens:,}, so it is read {plan.tokens / plan.train_tokens:.2f} times"


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
