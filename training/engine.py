"""The only file that touches DeepSpeed's insides: build a model born sharded, run micro-batches, perturb, step, save, load.

What it relies on beyond DeepSpeed's documentation is listed here and fenced by tests/distributed:
  * `deepspeed.ops.__compatible_ops__`: an entry set to False keeps the shared-memory collectives from being compiled;
  * ZeRO-1 and 2's `step()` sets `overflow` to False, calls `check_overflow()`, and sets it again where the norm is not finite;
  * `engine.optimizer.overflow`, `_global_grad_norm` and `engine.skipped_steps`: whether the last step was applied; `skipped_steps`,
    `global_steps` and `global_samples` are set to what a checkpoint, or a step that is left out, makes of them;
  * DeepSpeed's optimizers end every step by calling `step()` of the optimizer they were given, with the reduced gradient of each
    master tensor in its `.grad`, clipped to their `clip_grad`; then they write masters to forward weights and empty their gradient
    buffers, all of them. `Engine.take_gradient` puts another `step` in the place of that one to read a gradient;
  * `engine.checkpoint_engine`: `save_checkpoint` writes through its `save(state, path)` alone, so another one in its place gets all
    files, but for what `_copy_recovery_script` copies;
  * `_hp_optimizer_states_linked` (ZeRO-1, 2 and BF16_Optimizer): the first such call would link an optimizer state that is not
    there yet, so the flag is put back;
and, in training/master_weights.py, which belongs to this file:
  * the masters and forward weights: `single_partition_of_fp32_groups` and `parallel_partitioned_bit16_groups` (ZeRO-1, 2),
    `fp32_groups_flat_partition` and `bf16_partitioned_groups` (BF16_Optimizer), `fp32_partitioned_groups_flat` and
    `fp16_partitioned_groups_flat` (ZeRO-3), `fp32_groups` and `fp16_groups` (FP16_UnfusedOptimizer: bf16 without ZeRO);
  * from one to the other: `update_lp_params()`; at ZeRO-3 `_partition_all_parameters`, `_reassign_or_swap_out_partitioned_parameters`,
    `persistent_parameters` and `invalidate_secondary_tensor`, in the order of its own step;
  * which element is whose: `round_robin_bit16_groups` and `round_robin_bit16_offsets` (ZeRO-1, 2), `bf16_groups` (BF16_Optimizer),
    `fp16_groups`, `partition_numel()`, `ds_numel`, `ds_shape` (ZeRO-3).
"""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from analysis.checkpoint import Checkpoint
from analysis.files import load_file
from analysis.shards import open_checkpoint
from model.config import ModelConfig
from model.errors import InputError
from model.linear_cross_entropy import FrozenHead
from model.parametrization import initialize, owned_parameters
from model.pretrained import PretrainedDecoder, PretrainedModel, check_weights, pretrained_weights
from model.pretrained import load as load_pretrained
from model.transformer import Transformer
from training.data import Batch
from training.distributed import Ranks, heard_by_all, raise_together
from training.network import make_network, mend_rotary
from training.optimizers import JointOptimizer, make_optimizer
from training.plan import choose_checkpointing, count_parameters, with_memory_budget
from training.recipe import Recipe, zero_stage

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported: it picks its accelerator then
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
import deepspeed  # noqa: E402
import deepspeed.comm  # noqa: E402
from deepspeed.comm.config import CommsLoggerConfig  # noqa: E402
from deepspeed.compile.config import CompileConfig  # noqa: E402
from deepspeed.monitor.config import CometConfig, CSVConfig, WandbConfig  # noqa: E402
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig  # noqa: E402
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfigError  # noqa: E402
from deepspeed.runtime.precision_config import DeepSpeedBF16Config  # noqa: E402
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig  # noqa: E402

from training.master_weights import MasterWeights, Vector  # noqa: E402

warnings.filterwarnings("ignore", message=".*is deprecated. Please use .*_single", category=FutureWarning)  # DeepSpeed's own calls


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    norm: torch.Tensor | float | None  # as DeepSpeed has it: on the device, negative where it is not finite
    applied: bool

    @property
    def grad_norm(self) -> float:
        """The global norm before clipping. Reading it waits for the device, so only steps that are logged do."""
        norm = float(self.norm) if self.norm is not None else math.nan
        return norm if norm >= 0 else math.inf


def start_distributed(ranks: Ranks) -> torch.device:
    """Join the process group (NCCL on GPUs, else gloo) and return this rank's device."""
    deepspeed_logger.setLevel(logging.ERROR)
    # DeepSpeed would compile its shared-memory collectives for CPU ranks, a minute and a C++ compiler; gloo needs neither.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of(ranks, torch.cuda.device_count(), os.environ))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # where DeepSpeed looks for the device
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False, dist_init_required=True)
    return device


def gpu_of(ranks: Ranks, visible: int, environment: Mapping[str, str]) -> int:
    """Which of the `visible` GPUs is this rank's: its own number on the host, or the only one that Slurm shows it (--gpus-per-task).

    Raises:
        InputError: there are more ranks than GPUs.
    """
    if ranks.local_rank < visible:
        return ranks.local_rank
    if visible == 1 and "SLURM_STEP_ID" in environment:
        return 0
    raise InputError(
        f"rank {ranks.rank} is number {ranks.local_rank} on its host, of {ranks.local_world_size}, and {visible} GPUs are visible to it: "
        "launch as many ranks as GPUs"
    )


class _Strict(BaseModel):
    """Of a section for which DeepSpeed has no model, and takes what it finds: unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class _TorchAutocast(_Strict):
    enabled: bool = False
    dtype: Literal["bf16", "bfloat16", "torch.bfloat16", "fp16", "float16", "torch.float16", "half"] | None = None
    lower_precision_safe_modules: list[str] | None = None


class _Timers(BaseModel):
    model_config = ConfigDict(extra="forbid")
    throughput: DeepSpeedThroughputTimerConfig = Field(default_factory=DeepSpeedThroughputTimerConfig)


def _model_of_defaults(name: str, defaults: Mapping[str, Any]) -> type[BaseModel]:
    """A model whose fields have the types of these defaults; None stands for a text that may be left out."""
    fields: dict[str, Any] = {key: (str | None if value is None else type(value), value) for key, value in defaults.items()}
    return create_model(name, __base__=_Strict, **fields)


_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "timers": _Timers,
    "torch_autocast": _TorchAutocast,
    "aio": _model_of_defaults("Aio", AIO_DEFAULT_DICT),
    "flops_profiler": _model_of_defaults("FlopsProfiler", vars(DeepSpeedFlopsProfilerConfig({}))),
}


def deepspeed_section_problems(name: str, section: dict[str, Any]) -> list[str]:
    """What DeepSpeed would refuse in one of its sections, or ignore, a line each. What is no ZeRO stage is not looked at."""
    key, model = f"deepspeed.{name}", _SECTIONS[name]
    problems = [_unknown(key, other, model) for other in section if other not in _known_keys(model)]
    known = {other: value for other, value in section.items() if other in _known_keys(model)}
    if name == "zero_optimization" and not (type(section.get("stage")) is int and 0 <= section["stage"] <= 3):
        known.pop("stage", None)
    try:
        model(**known)
    except ValidationError as error:
        for details in error.errors():
            place = [str(part) for part in details["loc"]]
            if details["type"] == "extra_forbidden":
                problems.append(_unknown(".".join([key, *place[:-1]]), place[-1], _section_below(model, place[:-1])))
            elif place:
                problems.append(f"{'.'.join([key, *place])}: {details['msg']}, found {repr(details['input'])[:80]}")
            else:  # about keys that do not go together
                problems.append(f"{key}: {details['msg'].removeprefix('Assertion failed, ').removeprefix('Value error, ')}")
    except AssertionError as error:  # of a key that has another name now, and is given under both
        problems.append(f"{key}: {error}")
    return problems


def _unknown(section: str, key: str, model: type[BaseModel] | None) -> str:
    near = difflib.get_close_matches(key, _known_keys(model), n=1)
    return f"{section}.{key}: unknown key" + (f"; did you mean {near[0]}?" if near else " to DeepSpeed")


def _known_keys(model: type[BaseModel] | None) -> list[str]:
    """The keys of a section of DeepSpeed's, by each of their names."""
    fields = {} if model is None else model.model_fields
    return [*fields, *(field.alias for field in fields.values() if field.alias is not None)]


def _section_below(model: type[BaseModel] | None, keys: list[str]) -> type[BaseModel] | None:
    for key in keys:
        field = None if model is None else model.model_fields.get(key)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return model


def deepspeed_config(recipe: Recipe, parameters: int, accumulation: int, world_size: int) -> dict[str, Any]:
    """The recipe's `deepspeed` section, completed with what the rest of the recipe says; `parameters` is their number."""
    config = copy.deepcopy(recipe.deepspeed)
    config["train_micro_batch_size_per_gpu"] = recipe.training.micro_batch_size
    config["gradient_accumulation_steps"] = accumulation
    config["train_batch_size"] = recipe.training.micro_batch_size * accumulation * world_size
    # Without ZeRO in fp32 our optimizer clips (see JointOptimizer); everywhere else DeepSpeed does.
    config["gradient_clipping"] = 0.0 if _unguarded(recipe) else recipe.training.gradient_clipping
    config.setdefault("steps_per_print", 10**9)  # the loop prints; DeepSpeed's own line would be a second one
    if zero_stage(recipe) < 3:  # its clock waits for a GPU at each micro-batch and step; at stage 3 that wait keeps its streams in order
        config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW serves offload too, without a compiler
    if "zero_optimization" in config:
        # DeepSpeed allocates the whole bucket, 5e8 elements by default, however small the model is
        config["zero_optimization"].setdefault("reduce_bucket_size", min(500_000_000, parameters))
    if recipe.training.precision == "bf16":
        config.setdefault("bf16", {})["enabled"] = True
    return config


def _unguarded(recipe: Recipe) -> bool:
    return zero_stage(recipe) == 0 and recipe.training.precision == "fp32"


def _check_start(recipe: Recipe, weights: dict[str, torch.Tensor] | None) -> None:
    """Raises InputError, on every rank, where the decisions to begin with were learned on other weights (None: not this rank's)."""
    if recipe.context_pruning is None or recipe.context_pruning.start is None:
        return
    from model.pruning_files import check_base  # transformers takes seconds to import

    problem = None
    if weights is not None:
        try:
            check_base(recipe.context_pruning.start, weights)
        except InputError as error:
            problem = f"context_pruning.start: {error}"
    raise_together(problem)


def _name_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Have the groups say in checkpoints which parameters are theirs: whole tensors without names could not be told apart."""
    names = {id(parameter): name for name, _, parameter in owned_parameters(model)}
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]


@contextmanager
def _first_non_finite_output(model: torch.nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order in which they ran."""
    names: list[str] = []

    def look(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                names.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _its_refusals() -> Iterator[None]:
    """What DeepSpeed says of values that it does not take is about the recipe. Raises InputError, on every rank alike."""
    try:
        yield
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        said = " ".join(str(error).split())[:500] or "without a word"
        raise InputError(
            f"DeepSpeed refuses its configuration ({type(error).__name__}: {said}); change what the recipe says in its deepspeed section"
        ) from error


class _Collected(CheckpointEngine):
    """Takes what DeepSpeed would write, so that we write it: with an error that every rank hears of, and beside training if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> None: ...

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("checkpoints are read by analysis/shards.py")


class Engine:
    """A model, its optimizer and DeepSpeed around both."""

    def __init__(
        self, recipe: Recipe, model_config: ModelConfig | PretrainedModel, accumulation: int, ranks: Ranks, device: torch.device
    ) -> None:
        """Raises InputError: DeepSpeed refuses a value of its section, or the weights to begin with are wrong."""
        recipe = with_memory_budget(recipe, device.type)
        self.recipe, self.ranks, self.device, self.accumulation = recipe, ranks, device, accumulation
        self.stage = zero_stage(recipe)
        config = deepspeed_config(recipe, count_parameters(model_config, recipe.context_pruning).total, accumulation, ranks.world_size)
        with _its_refusals():
            born_sharded = deepspeed.zero.Init(config_dict_or_path=config) if self.stage == 3 else nullcontext()
        with born_sharded:
            model = make_network(model_config, recipe.context_pruning, recipe.run.seed, self._gather)
        if isinstance(model, PretrainedDecoder):
            mend_rotary(model)
            weights = self._pretrained_weights(model)
            _check_start(recipe, weights)
            load_pretrained(model, weights, self._gather, recipe.run.seed, self._share)
        else:
            initialize(model, recipe.run.seed, gather=self._gather if self.stage == 3 else None)
        model.activation_checkpointing = choose_checkpointing(recipe, model_config, ranks.world_size, accumulation, device.type)
        if recipe.training.compile:
            for block in model.blocks:
                block.compile()
            if isinstance(model, Transformer):
                model.unembedding.compiled = True
        max_norm = recipe.training.gradient_clipping if _unguarded(recipe) else None
        base = make_optimizer(model, recipe.optimizer, sharded=self.stage > 0, max_norm=max_norm)
        if isinstance(base, JointOptimizer):
            _name_parameters(base, model)
        with _its_refusals():
            self.deepspeed, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=base, config=config)
        if isinstance(base, JointOptimizer):
            base.ready = True
        if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
            # its norm finds what is not finite as well, and skips; a look before that is a wait and a dozen kernels a tensor
            optimizer.check_overflow = lambda partition_gradients=True: None  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer: Any = optimizer  # DeepSpeed's wrapper, typed as something without parameter groups
        self.model: Any = model
        self._base = base
        self.interactions_alone = False  # the next step leaves every weight but those that decide about the context as it is
        self._perturbed = False
        self._wide = False  # perturbed, and in float32

    def _gather(self, parameter: torch.nn.Parameter) -> AbstractContextManager:
        """A context in which a ZeRO-3 parameter is whole; what rank 0 writes there is kept."""
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if self.stage == 3 else nullcontext()

    def _pretrained_weights(self, decoder: PretrainedDecoder) -> dict[str, torch.Tensor] | None:
        """What to fill the decoder with; at stage 3 on the first rank alone. Raises InputError on every rank, before any gathering."""
        weights, problem = None, None
        if self.stage < 3 or self.ranks.is_first:
            try:
                weights = pretrained_weights(decoder.config.source)
                check_weights(decoder, weights)
            except (InputError, OSError) as error:
                problem = str(error)
        raise_together(problem)
        return weights

    def _share(self, buffers: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Those of the first rank, where at stage 3 the others have none."""
        held = [buffers]
        if self.stage == 3 and self.ranks.world_size > 1:
            torch.distributed.broadcast_object_list(held, src=0)
        return held[0] or {}

    def accumulate(self, batch: Batch, scale: float, frozen: FrozenHead | None = None) -> torch.Tensor:
        """Forward and backward of one micro-batch; gradients of `scale` x summed loss add up until `step`.

        Returns the summed loss (float32 scalar, detached). The gradient that `step` applies is the sum over ranks and
        micro-batches of `scale` x d(summed loss): with `scale` = 1 / (valid tokens of the step over all ranks) it is the mean
        over tokens, however they fall into micro-batches. With `frozen` the loss's derivative at the logits is that one, and what
        is returned is 0 (model/linear_cross_entropy.py).
        """
        loss = self._forward_backward(batch, scale, frozen)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # DeepSpeed counts micro-batches by these calls; only the one at the boundary changes weights
        return loss

    def _forward_backward(self, batch: Batch, scale: float, frozen: FrozenHead | None) -> torch.Tensor:
        loss = self.deepspeed(*self._on_device(batch), **({"frozen": frozen} if frozen else {}))
        # DeepSpeed averages over ranks and over micro-batches; undo both to get the sum
        self.deepspeed.backward(loss * (scale * self.ranks.world_size * self.accumulation))
        return loss.detach()

    def step(self, learning_rate: float, gradient: Vector | None = None) -> StepResult:
        """Clip, and apply the optimizer with this learning rate times each group's `lr_factor`; or skip, if gradients are not finite.

        Within `perturbed` the gradients are those at the perturbed weights, and the update is applied to the masters. The
        gradient before clipping is written into `gradient` if one is given.
        """
        for group in self.optimizer.param_groups:
            still = self.interactions_alone and not group.get("interactions", False)
            group["lr"] = 0.0 if still else learning_rate * group["lr_factor"]
        self._restore_what_steps()
        skipped_before = self.deepspeed.skipped_steps
        if gradient is None:
            self.deepspeed.step()
        else:
            self._step_with_a_copy(gradient)
        applied = self.deepspeed.skipped_steps == skipped_before
        if applied:
            self._perturbed = False  # DeepSpeed has written the new masters to the forward weights
        return StepResult(self.deepspeed.get_global_grad_norm(), applied)

    def discard(self) -> StepResult:
        """End a step without an update: gradients are dropped; weights, moments and the moments' bias correction stay as they are."""
        base = self._base
        if isinstance(base, JointOptimizer) and base.max_norm is not None:
            do: Any = lambda closure=None: base._clip(0.0)  # noqa: E731 - its gradient norm is read all the same
        else:
            do = lambda closure=None: None  # noqa: E731
        base.step = do
        try:
            self.deepspeed.step()
        finally:
            del base.step
        return StepResult(self.deepspeed.get_global_grad_norm(), applied=False)

    def leave_out(self, norm: float) -> StepResult:
        """Count a step that makes no update and for which nothing was accumulated; `norm`: of its gradient."""
        self.deepspeed.global_steps += 1
        self.deepspeed.global_samples += self.deepspeed.train_batch_size()
        return StepResult(norm, applied=False)

    def _step_with_a_copy(self, gradient: Vector) -> None:
        step = self._base.step

        def copy_and_step(closure: None = None) -> None:
            self.masters.copy_gradients(gradient)
            step()

        self._base.step = copy_and_step  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self.deepspeed.step()
        finally:
            del self._base.step
        clipping = getattr(self.optimizer, "clip_grad", 0.0)  # of DeepSpeed's optimizers, which clip before; ours does within
        if clipping > 0:
            self.masters.scale(gradient, max(1.0, (float(self.deepspeed.get_global_grad_norm() or 0.0) + 1e-6) / clipping))

    @functools.cached_property
    def masters(self) -> MasterWeights:
        """The vector space of this rank's master weights."""
        return MasterWeights(self.optimizer, self._base, self.model, self.device)

    def gradient(
        self, batches: Sequence[Batch], scale: float, frozen: Sequence[FrozenHead] | None = None
    ) -> tuple[Vector | None, torch.Tensor]:
        """The gradient of `scale` x summed loss over all ranks' batches at the weights that the forward pass now has.

        Unclipped, in the masters' layout, or None where it is not finite, on every rank alike; and the summed loss of this rank's
        batches. Nothing else changes: neither weights and optimizer nor the gradients that the next step sees. Must not stand
        between the micro-batches of a step. Every rank calls it, with equally many batches.
        """
        losses = torch.zeros((), device=self.device)
        try:
            for number, batch in enumerate(batches):
                self.deepspeed.set_gradient_accumulation_boundary(number == len(batches) - 1)
                losses += self._forward_backward(batch, scale, frozen[number] if frozen else None)
            gradient = self._take_gradient()
        finally:
            self.deepspeed.set_gradient_accumulation_boundary(None)  # from here on DeepSpeed counts by itself again
        return gradient, losses

    def _take_gradient(self) -> Vector | None:
        """The gradient that DeepSpeed's optimizer would apply now; its buffers are then empty, as after a step."""
        self._restore_what_steps()
        optimizer, gradient = self.optimizer, self.masters.zeros()
        meanwhile = {"overflow": False, "clip_grad": 0.0, "_hp_optimizer_states_linked": True}
        kept = {name: getattr(optimizer, name) for name in meanwhile if hasattr(optimizer, name)}
        vars(optimizer).update({name: meanwhile[name] for name in kept})
        self._base.step = lambda closure=None: self.masters.copy_gradients(gradient)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            optimizer.step()
            finite = not optimizer.overflow
        finally:
            del self._base.step
            vars(optimizer).update(kept)
            optimizer.zero_grad()
        if self.masters.aliased:  # DeepSpeed has no optimizer of its own here that would look
            finite = math.isfinite(self.masters.norm(gradient))
        if finite:
            self._perturbed = False  # DeepSpeed has written the masters to the forward weights
        return gradient if finite else None

    @contextmanager
    def perturbed(self, vector: Vector, in_float32: bool = False) -> Iterator[None]:
        """Within, the forward pass runs on master weights + vector; masters, optimizer and counters are as they were.

        In bf16 the sum is rounded. With `in_float32` every forward and backward pass within is taken in float32, on the weights that
        the forward pass had + vector: see `MasterWeights.widen`.

        It lasts until a gradient is taken, a step is applied, or the end, however that is reached: from then on the forward
        weights are the masters. Every rank enters and leaves together.
        """
        if self._perturbed:
            raise RuntimeError("the weights are perturbed already")
        self._perturbed, self._wide = True, in_float32
        try:
            if in_float32:
                self.masters.widen(vector)
            else:
                self.masters.push(vector)
            del vector  # a caller that does not keep it gets its memory back
            yield
        finally:
            if self._perturbed:
                self._restore()

    def _restore(self) -> None:
        if self._wide:
            self.masters.narrow()
        else:
            self.masters.push()
        self._perturbed = self._wide = False

    def _restore_what_steps(self) -> None:
        """Perturbed weights that the optimizer's step is about to write to: the masters themselves, or float32 data in bf16's place."""
        if self._perturbed and (self.masters.aliased or self._wide):
            self._restore()

    @contextmanager
    def kept_heads(self, logits: bool) -> Iterator[list[torch.Tensor]]:
        """Collect what the unembedding is given, or the logits that it makes, of every forward pass within; detached."""
        kept: list[torch.Tensor] = []
        unembedding = self.model.unembedding
        hook = None if logits else unembedding.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0].detach()))
        unembedding.kept_logits = kept if logits else None
        try:
            yield kept
        finally:
            unembedding.kept_logits = None
            if hook is not None:
                hook.remove()

    def unembedding_weight(self) -> torch.Tensor:
        """The whole unembedding matrix as the forward pass has it now, (vocabulary, width), also when that is perturbed later. Every rank
        calls it."""
        weight = self.model.unembedding.weight
        if self.masters.aliased:  # another storage takes the place of this one, which waits
            return weight.detach()
        with deepspeed.zero.GatheredParameters([weight]) if self.stage == 3 else nullcontext():
            return weight.detach().clone()

    @torch.no_grad()
    def summed_loss(self, batch: Batch, training: bool = False) -> torch.Tensor:
        """Summed loss of a batch (float32 scalar) without gradients. Every rank must call it equally often."""
        self.deepspeed.train(training)
        loss = self.deepspeed(*self._on_device(batch))
        self.deepspeed.train()
        return loss

    def name_non_finite(self, batches: Iterable[Batch]) -> str:
        """Where non-finite gradients come from, found by going through this rank's micro-batches of the skipped step again.

        Weights did not change, so the same numbers come out; gradients are taken beside DeepSpeed's and leave no trace.
        Every rank must call it.
        """
        names, parameters = zip(*((n, p) for n, p in self.model.named_parameters() if p.requires_grad), strict=True)
        found: str | None = None
        for batch in batches:
            with _first_non_finite_output(self.model) as outputs:
                loss = self.model(*self._on_device(batch))
            try:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            except torch.OutOfMemoryError:  # they are whole on every rank, at any stage: the run is worth more than their names
                found = found or f"not looked for: no memory (rank {self.ranks.rank})"
                continue
            bad = [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None and not gradient.isfinite().all()]
            if found is None and outputs:
                found = f"output of {outputs[0]} (rank {self.ranks.rank})"
            elif found is None and bad:  # gradients flow backwards: the last in forward order is where it began
                found = f"gradient of {bad[-1]} and {len(bad) - 1} more (rank {self.ranks.rank})"
        everyone: list[str | None] = [found]
        if self.ranks.world_size > 1:
            everyone = [None] * self.ranks.world_size
            torch.distributed.all_gather_object(everyone, found)
        return "; ".join(filter(None, everyone)) or "each rank's gradients are finite, so their sum overflowed"

    @property
    def skipped_steps(self) -> int:
        """Steps skipped since the run began."""
        return self.deepspeed.skipped_steps

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer's state holds, in the run as a whole; 0 where it does not count."""
        return self.masters.steps()

    def files(self, folder: Path, tag: str) -> dict[Path, Any]:
        """DeepSpeed's files below folder/tag that are this rank's to write: {path: what to torch.save}, the state itself, not copies.

        Every rank calls it; nothing is written. Raises RuntimeError when the weights are perturbed.
        """
        if self._perturbed:
            raise RuntimeError("a checkpoint would hold perturbed weights: save outside `perturbed`")
        collected, theirs = _Collected(), self.deepspeed.checkpoint_engine
        self.deepspeed.checkpoint_engine = collected  # pyright: ignore[reportAttributeAccessIssue]
        self.deepspeed._copy_recovery_script = lambda save_path: None  # it would write, on the first rank alone, between collectives
        try:
            self.deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False)
        finally:
            self.deepspeed.checkpoint_engine = theirs
            del self.deepspeed._copy_recovery_script
        return collected.files

    def load(self, folder: Path, step: int, skipped_steps: int, with_moments: bool) -> None:
        """Weights, optimizer state and counters from a checkpoint that any number of ranks wrote at any ZeRO stage.

        Our own reader takes it apart: DeepSpeed's wants the ranks that wrote it, and unpickles whatever it is given. The state of
        an optimizer other than AdamW is in whole tensors, at stage 0 alone, and loads as it is.

        Args:
            with_moments: False for a checkpoint made before the first update.

        Raises:
            InputError: on every rank alike: not a checkpoint of this model and optimizer, or it cannot be read.
        """
        zero = self.recipe.deepspeed.get("zero_optimization", {})
        if any((zero.get(key) or {}).get("device") == "nvme" for key in ("offload_optimizer", "offload_param")):
            raise InputError(f"{folder}: a run whose state is offloaded to nvme cannot go on from a checkpoint; use device: cpu")
        with heard_by_all(folder):
            checkpoint = open_checkpoint(folder)
            if self.recipe.optimizer.kind == "adamw":
                self.masters.read(checkpoint, with_moments)
            else:
                self._read_whole(checkpoint)
        self.masters.push()
        self._load_untrained(checkpoint)
        self.deepspeed.global_steps, self.deepspeed.skipped_steps = step, skipped_steps
        self.deepspeed.global_samples = step * self.deepspeed.train_batch_size()

    def _read_whole(self, checkpoint: Checkpoint) -> None:
        """Weights and optimizer state at stage 0, where one file has both whole."""
        self.masters.read(checkpoint, with_moments=False)
        file, settings = checkpoint.path / "mp_rank_00_model_states.pt", [dict(group) for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(load_file(file)["optimizer"])
            for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
                group.update({key: value for key, value in ours.items() if key != "params"})  # state is theirs, settings are the recipe's
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{file}: not the state of {self.recipe.optimizer.kind}: {type(error).__name__}: {reason}") from None

    @torch.no_grad()
    def _load_untrained(self, checkpoint: Checkpoint) -> None:
        for name, _, parameter in owned_parameters(self.model):
            if not parameter.requires_grad:
                with self._gather(parameter), heard_by_all(checkpoint.path):
                    if parameter.numel():  # at ZeRO stage 3 whole on every rank within; the first rank's is kept
                        parameter.copy_(checkpoint.tensor(name))

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if t is None else t.to(self.device, non_blocking=True) for t in (batch.tokens, batch.targets, batch.document_ids))
