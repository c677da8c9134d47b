"""How much memory a run takes on one rank, part by part, before it is built.

Predicted tensor by tensor from what PyTorch and DeepSpeed 0.19 allocate (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`bf16_optimizer.py`, `fp16/unfused_optimizer.py`). Not in it: the CUDA context, NCCL's buffers, fragmentation, workspaces of
matrix products, and, on a CPU, Python and its libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from model.activation_checkpointing import NOTHING_RECOMPUTED, ActivationCheckpointing
from model.config import ModelConfig
from model.errors import InputError
from model.linear_cross_entropy import chunk_rows
from training.activation_memory import ActivationBytes, activation_bytes, pruning_bytes
from training.recipe import Recipe, zero_stage

# DeepSpeed's defaults (runtime/zero/config.py, runtime/engine.py), in elements
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
PERSISTENCE_THRESHOLD = 100_000
SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank, by part; `host` is what offloading moves to the CPU's memory or to disk.

    The parts are not all there at once: `phases` says how much is there at each moment of a step, and `total` is the most.
    """

    weights: int
    gradients: int  # that wait for the optimizer's step
    optimizer: int  # float32 weights and the optimizer's state
    activations: int  # kept for the backward pass
    logits: int
    buckets: int  # where gradients are reduced and, at stage 3, whole weights are gathered
    step: int  # what the optimizer's step makes beside its state
    statistics: int  # sums over activations, in the steps that measure outliers
    host: int
    checkpoint: int  # the copy that is written beside training, in the host's memory, kept from one save to the next
    phases: dict[str, int]

    @property
    def total(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])


@dataclass
class _States:
    """What DeepSpeed holds, in bytes: by part, and beside `weights` and `optimizer` at each moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    step: int
    at_loss: int
    at_first_gradients: int
    at_last_gradients: int
    at_step: int
    host: int = 0


def predict(
    recipe: Recipe,
    config: ModelConfig,
    tensor_sizes: list[int],
    state_elements: int,
    world_size: int,
    accumulation: int,
    device: str,
    frozen: int = 0,
    checkpointing: ActivationCheckpointing = NOTHING_RECOMPUTED,
) -> Memory:
    """Bytes on one rank, by part and by moment.

    Args:
        tensor_sizes: elements of each parameter tensor that is trained, shared ones once.
        state_elements: numbers the optimizer keeps beside the weights where it is not sharded (`optimizers.state_elements`).
        accumulation: micro-batches of a step.
        device: "cuda" or "cpu".
        frozen: elements that are not trained, which are weights and nothing else.
        checkpointing: which blocks do not keep everything.
    """
    training = recipe.training
    compute = 2 if training.precision == "bf16" else 4
    if zero_stage(recipe) == 0:
        states = _unsharded(recipe, tensor_sizes, state_elements, accumulation)
    elif zero_stage(recipe) == 3:
        states = _sharded_weights(recipe, tensor_sizes, world_size, frozen, device)
    else:
        states = _sharded_optimizer(recipe, tensor_sizes, world_size, accumulation, device)
    states.weights += compute * math.ceil(frozen / world_size if zero_stage(recipe) == 3 else frozen)
    tokens = training.micro_batch_size * training.sequence_length
    activations = _activations(recipe, config, compute, device)
    block, head = activations.block, activations.head
    kept = tokens * activations.kept(config.depth, checkpointing)
    # The backward pass of a block: what it kept, the gradient that came in, and that of the MLP's hidden layer.
    assert config.mlp_width is not None
    inside = tokens * (block + compute * (config.width + config.mlp_width))
    # The loss goes by chunks (model/linear_cross_entropy.py), all in the same place: a chunk's logits, which in bf16 stand there in float32
    # as well unless compiled, and then its part of the unembedding's gradient, whose sum in float32 waits for the backward pass.
    chunk, matrix = min(tokens, chunk_rows(config.vocab_size, device)) * config.vocab_size, config.vocab_size * config.width
    low = compute == 2
    logits = 4 * matrix + _chunk_bytes(chunk, matrix, low, training.compile, device)
    # That sum, in bf16 a second time; or the unembedding's gradient and the last block's backward pass, when the head's part is gone
    last_block = inside - tokens * activations.kept_by_last(config.depth, checkpointing)
    behind = max((6 if low else 4) * matrix, compute * matrix + last_block - tokens * head)
    if recipe.model.pretrained is not None or recipe.context_pruning is not None:  # whole logits: log-probabilities, and two gradients
        logits, behind = 12 * tokens * config.vocab_size, max(behind, compute * tokens * config.vocab_size)
    # A shared matrix has one gradient of two parts, and autograd keeps the unembedding's until the embedding's is there.
    inside += compute * matrix if config.tied_embeddings else 0
    at_the_end = compute * matrix * (2 if config.tied_embeddings else 1)
    if zero_stage(recipe) == 0 and accumulation == 1:  # there the first part becomes the gradient itself
        at_the_end -= compute * matrix
        inside -= compute * matrix if config.tied_embeddings else 0
    pruning = recipe.context_pruning
    if pruning is not None and pruning.attention_fraction == 1 and pruning.trainable == "interactions":
        # Nothing goes back through the network: each layer keeps what its decisions are made of, one at a time its need
        # (model/attention_need.py), and the loss, which nothing follows from, logits and log-probabilities.
        kept, behind, at_the_end = tokens * config.depth * compute * (config.width + 6 * pruning.rank), 0, 0
        logits, inside = (8 + (compute if low else 0)) * tokens * config.vocab_size, 28 * tokens * training.sequence_length
    # X^T X and the sums beside it at each place (model/activation_statistics.py)
    statistics = (config.depth + 1) * (4 * config.width**2 + 8 * (config.width + 4)) if recipe.logging.outliers_every else 0
    checkpoint = _checkpoint_copy(states, tensor_sizes, zero_stage(recipe), compute, world_size) if recipe.checkpoint.asynchronous else 0
    fixed = states.weights + states.optimizer + statistics + (checkpoint if device == "cpu" else 0)
    recomputing = tokens * activations.at_recomputing(checkpointing) + inside
    phases = {
        "the loss": fixed + states.at_loss + kept + logits,
        "the first gradients": fixed + states.at_first_gradients + kept + behind,
        "the recomputing": fixed + states.at_first_gradients + recomputing if any(checkpointing) else 0,
        "the last gradients": fixed + states.at_last_gradients + max(inside, at_the_end),
        "the optimizer's step": fixed + states.at_step,
    }
    if recipe.evaluation.curvature_every:  # training/curvature.py: eigenvectors, a Lanczos basis, and gradients at two perturbed weights
        count, stage = sum(tensor_sizes), zero_stage(recipe)
        vectors = 9 + (recipe.evaluation.curvature_lanczos or 0)
        phases["the curvature"] = phases["the loss"] + (
            4 * (vectors + 2) * count if stage == 0 else 4 * vectors * math.ceil(count / world_size)
        )
    if recipe.optimizer.sharpness_aware != "none":
        second = kept, inside
        if recipe.optimizer.sharpness.float32_second_pass:
            wide = _activations(recipe, config, 4, device)
            second = (
                tokens * wide.kept(config.depth, checkpointing),
                inside + tokens * (wide.block - block + (4 - compute) * (config.width + config.mlp_width)),
            )
        phases = _two_passes(recipe, config, phases, tensor_sizes, world_size, accumulation, fixed, kept, second, states, chunk, device)
    return Memory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=kept + (tokens * block if any(checkpointing) else 0),
        logits=logits,
        buckets=states.buckets,
        step=states.step,
        statistics=statistics,
        host=states.host,
        checkpoint=checkpoint,
        phases=phases,
    )


def _chunk_bytes(chunk: int, matrix: int, low: bool, compiled: bool, device: str) -> int:
    """The logits of a chunk, of so many elements, and in bf16 what its part of the unembedding's gradient takes, of `matrix` elements."""
    if not low:
        return 4 * chunk
    wide = 0 if compiled else 4
    turned = 2 if device == "cpu" else 0  # bf16 products on a CPU copy a matrix that stands transposed
    return (2 + wide + turned) * chunk + 2 * matrix


def _checkpoint_copy(states: _States, tensor_sizes: list[int], stage: int, compute: int, world_size: int) -> int:
    """What the first rank writes of a checkpoint: whole weights but at stage 3, and its share of float32 weights and moments."""
    if stage == 0:
        return states.weights + states.optimizer
    return (compute * sum(tensor_sizes) if stage < 3 else 0) + 12 * sum(math.ceil(size / world_size) for size in tensor_sizes)


def _two_passes(
    recipe: Recipe,
    config: ModelConfig,
    phases: dict[str, int],
    tensor_sizes: list[int],
    world_size: int,
    accumulation: int,
    fixed: int,
    kept: int,
    second_activations: tuple[int, int],
    states: _States,
    chunk: int,
    device: str,
) -> dict[str, int]:
    """The moments of a sharpness-aware step (training/sharpness_aware.py), from those of a plain one: `phases`.

    Args:
        second_activations: what the second pass keeps for its backward pass, and what a block's takes there.
    """
    options, (second_kept, inside) = recipe.optimizer.sharpness, second_activations
    stage, low = zero_stage(recipe), recipe.training.precision == "bf16"
    count, compute = sum(tensor_sizes), 2 if low else 4
    share = count if stage == 0 else math.ceil(count / world_size)
    zero = recipe.deepspeed.get("zero_optimization", {})
    offloaded = _offloaded(zero, "offload_optimizer")
    vectors = 0 if offloaded else (8 + compute) * share  # the perturbation, masters + perturbation, forward weights as they were
    weights = 4 * count if stage == 0 and not low else 0  # there the masters wait beside the perturbed weights
    tokens = recipe.training.micro_batch_size * recipe.training.sequence_length
    matrix = config.vocab_size * config.width
    heads = head = products = 0
    beside = 0  # what only the second pass has
    if options.float32_second_pass and stage == 3:  # this rank's perturbed shards, and what is gathered twice as wide
        beside += 4 * share + compute * min(count, _elements(zero, "max_live_parameters", MAX_LIVE_PARAMETERS))
    elif options.float32_second_pass:  # whole perturbed weights, and without ZeRO their gradients
        beside += 4 * count + (compute * count if stage == 0 else 0)
    if options.split_every is not None and not offloaded:  # three gradients and the perturbation, at the steps that compare them
        beside += 16 * share
    if recipe.optimizer.sharpness_aware == "functional_sam":
        stored = options.store_logits
        heads = accumulation * tokens * compute * (config.vocab_size if stored else config.width)
        head = 0 if stored or weights else compute * matrix  # the unperturbed unembedding, where the masters do not hold it
        # a chunk's logits in float32, and in bf16 as well, with its part of the unembedding's gradient; that gradient's sum so far
        products = 4 * matrix + _chunk_bytes(chunk, matrix, low, False, device)
        second = {
            "the second first gradients": phases["the first gradients"] + weights + second_kept - kept + heads + head + beside,
            "the second loss": fixed + weights + states.at_loss + second_kept + heads + head + products + beside,
            "the second last gradients": fixed + weights + states.at_last_gradients + inside + heads + head + beside,
        }
    else:
        second = {
            f"the second {moment.removeprefix('the ')}": size + weights + second_kept - kept + beside
            for moment, size in phases.items()
            if moment != "the optimizer's step"
        }
    first = {moment: size + (heads if moment != "the optimizer's step" else heads + head) for moment, size in phases.items()}
    return {**first, "the perturbation": fixed + states.at_loss + vectors + heads + head, **second}


def _activations(recipe: Recipe, config: ModelConfig, compute: int, device: str) -> ActivationBytes:
    training, pruning = recipe.training, recipe.context_pruning
    found = activation_bytes(config, training.sequence_length, compute, recipe.data.document_masks, device == "cuda", training.compile)
    if pruning is None:
        return found
    return replace(found, block=found.block + pruning_bytes(config, training.sequence_length, compute, pruning.decisions == "fixed"))


def _unsharded(recipe: Recipe, tensor_sizes: list[int], state_elements: int, accumulation: int) -> _States:
    """Stage 0: everything whole on every rank. In fp32 the weights are their own master copy."""
    count, low = sum(tensor_sizes), recipe.training.precision == "bf16"
    gradients = (2 if low else 4) * count
    flat = (2 if low else 4) * min(count, REDUCE_BUCKET)  # made at the end to be summed over the ranks
    temporaries = 0 if recipe.optimizer.kind == "adamw" else 8 * max(tensor_sizes)  # a tensor at a time; AdamW, fused, has none
    step = (4 * count if low else 0) + temporaries  # with float32 gradients
    waiting = gradients if accumulation > 1 else 0
    return _States(
        weights=(2 if low else 4) * count,
        gradients=gradients,
        optimizer=4 * state_elements + (4 * count if low else 0),
        buckets=flat,
        step=step,
        at_loss=waiting,
        at_first_gradients=waiting,
        at_last_gradients=gradients + flat,
        at_step=gradients + step,
    )


def _sharded_optimizer(recipe: Recipe, tensor_sizes: list[int], world_size: int, accumulation: int, device: str) -> _States:
    """Stages 1 and 2: whole weights, and one rank's share of float32 weights and moments; at stage 2 also of the gradients."""
    zero = recipe.deepspeed.get("zero_optimization", {})
    stage, count, low = zero_stage(recipe), sum(tensor_sizes), recipe.training.precision == "bf16"
    share = math.ceil(count / world_size)
    compute = 2 if low else 4
    offloaded = _offloaded(zero, "offload_optimizer")
    in_float32 = low and _accumulates_in_float32(recipe)
    weights, optimizer = compute * count, 12 * share
    if stage == 1 and in_float32 and not offloaded:  # DeepSpeed's BF16_Optimizer: float32 gradients of everything, always there
        gradients, flat = 4 * count, 4 * min(count, REDUCE_BUCKET)
        return _States(weights, gradients, optimizer, flat, 0, gradients, gradients, gradients + flat, gradients)
    bucket = compute * _reduce_bucket(zero, count, device) * (2 if zero.get("overlap_comm") else 1)
    if offloaded:  # the gradients of one tensor at a time go through the device
        passing = compute * max(tensor_sizes) + (compute * count if stage == 1 else 0)
        host = optimizer + 4 * share + compute * share  # with float32 gradients and a copy of the weights
        return _States(weights, passing, 0, bucket, 0, passing, passing + bucket, passing + bucket, passing, host)
    # Gradients that are added up, and those that are left at the step: this rank's, from which a float32 copy is made.
    if stage == 1:
        gradients = waiting = (4 if in_float32 else compute) * count
    else:
        waiting = (4 if in_float32 else compute) * share
        gradients = waiting * (2 if accumulation > 1 and not in_float32 else 1)  # this micro-batch's beside the sum so far
    flat = 0 if in_float32 else compute * share
    step = flat if not low or in_float32 else 4 * share + flat
    if accumulation == 1:
        waiting = 0
    return _States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buckets=bucket,
        step=step,
        at_loss=waiting + (bucket if stage == 1 and accumulation > 1 else 0),  # at stage 1 it stays between micro-batches
        at_first_gradients=waiting + bucket,
        at_last_gradients=gradients + bucket,
        at_step=(4 if in_float32 else compute) * share + step,
    )


def _sharded_weights(recipe: Recipe, tensor_sizes: list[int], world_size: int, frozen: int, device: str) -> _States:
    """Stage 3: one rank's share of everything; small tensors stay whole, the rest is gathered where it is used."""
    zero = recipe.deepspeed.get("zero_optimization", {})
    low, count = recipe.training.precision == "bf16", sum(tensor_sizes)
    share = sum(math.ceil(size / world_size) for size in tensor_sizes)  # each tensor is padded to the ranks
    compute = 2 if low else 4
    optimizer_offloaded, weights_offloaded = _offloaded(zero, "offload_optimizer"), _offloaded(zero, "offload_param")
    threshold = _elements(zero, "param_persistence_threshold", PERSISTENCE_THRESHOLD)
    whole = compute * sum(size for size in tensor_sizes if size <= threshold)  # but for the time of the step
    gathered = max(0, compute * min(count + frozen, _elements(zero, "max_live_parameters", MAX_LIVE_PARAMETERS)) - whole)
    bucket = _reduce_bucket(zero, count, device)
    scattered = compute * min(count, bucket)  # gradients leave the bucket by a second copy
    bucket *= compute
    sub_group = min(share, _elements(zero, "sub_group_size", SUB_GROUP))
    gradients = (4 if _accumulates_in_float32(recipe) else compute) * share  # one buffer, always there
    optimizer, step = 12 * share, 4 * sub_group
    host = compute * share if weights_offloaded else 0
    if optimizer_offloaded:
        host += optimizer + gradients + 4 * share
        gradients = optimizer = step = 0
    return _States(
        weights=whole + (0 if weights_offloaded else compute * share),
        gradients=gradients,
        optimizer=optimizer,
        buckets=bucket + scattered + gathered,
        step=step,
        at_loss=gradients + bucket + gathered,
        at_first_gradients=gradients + bucket + gathered,
        at_last_gradients=gradients + bucket + gathered + scattered,
        at_step=gradients + bucket + step - whole,
        host=host,
    )


def _reduce_bucket(zero: dict[str, Any], count: int, device: str) -> int:
    """Elements of the bucket that gradients are reduced in: our default is the smaller of DeepSpeed's and the model.

    One given in the recipe is taken whole on a GPU; on a CPU memory that is never written to is never taken.
    """
    size = _elements(zero, "reduce_bucket_size", REDUCE_BUCKET)
    return min(size, count) if device == "cpu" or "reduce_bucket_size" not in zero else size


def _elements(zero: dict[str, Any], key: str, default: int) -> int:
    """A number of elements of DeepSpeed's zero_optimization section, by its name or its name with stage3_ before it."""
    value = zero.get(f"stage3_{key}", zero.get(key, default))
    try:
        return int(float(value))
    except (TypeError, ValueError):
        raise InputError(f"deepspeed.zero_optimization.{key}: expected a number of elements, found {value!r}") from None


def _offloaded(zero: dict[str, Any], key: str) -> bool:
    section = zero.get(key) or {}
    if not isinstance(section, dict):
        raise InputError(f"deepspeed.zero_optimization.{key}: expected a mapping such as {{device: cpu}}, found {section!r}")
    return section.get("device", "none") not in (None, "none")


def _accumulates_in_float32(recipe: Recipe) -> bool:
    """Gradients of several micro-batches add up in float32: `deepspeed.data_types.grad_accum_dtype`; default: in the precision."""
    data_types = recipe.deepspeed.get("data_types") or {}
    return recipe.training.precision == "fp32" or str(data_types.get("grad_accum_dtype")) in ("fp32", "float32", "float")
