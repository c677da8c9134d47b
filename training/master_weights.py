"""This rank's share of the float32 master weights as a vector space, and the way from it to the weights of the forward pass.

A vector is a list of float32 tensors, one beside each tensor of master weights that DeepSpeed keeps on this rank, of the same shape
and on the same device; together the ranks hold one number for each parameter (without ZeRO every rank holds all of them). Inner
products and norms are those of the whole vector: summed here, then over ranks. Padding that DeepSpeed adds is 0 in every vector.

Used by training/engine.py alone, whose docstring lists what this relies on inside DeepSpeed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from analysis.checkpoint import Checkpoint, Kind
from model.errors import InputError
from model.parametrization import generator_of, owned_parameters

MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")  # of AdamW
Vector = list[Tensor]


@dataclass(frozen=True)
class Segment:
    """Elements `start` to `start + length` of master tensor `index` are elements `offset` ... of parameter number `tensor`."""

    tensor: int
    index: int
    start: int
    length: int
    offset: int


class MasterWeights:
    """The master weights behind one of DeepSpeed's optimizers.

    Attributes:
        names: of the trainable parameters, each once.
        shapes: of the whole parameters.
        masters: the float32 tensors of this rank.
        forward: what the forward pass has in their places: flat pieces or whole parameters, in the precision of training.
        aliased: the masters are themselves the weights of the forward pass (no ZeRO, fp32).
    """

    def __init__(self, optimizer: Any, base: torch.optim.Optimizer, model: nn.Module, device: torch.device) -> None:
        named = [(name, parameter) for name, _, parameter in owned_parameters(model) if parameter.requires_grad]
        self.optimizer, self.base, self.device = optimizer, base, device
        self.names = [name for name, _ in named]
        self.shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for _, parameter in named]
        self._parameters = [parameter for _, parameter in named]
        self._number = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        self.sharded, self.aliased = True, False
        self._kept: Vector | None = None  # the masters' own storages while others stand in for them
        self._wide: Vector | None = None  # between `widen` and `narrow`: float32 shards at ZeRO-3, else the parameters' own data
        self._shards: list[list[Tensor]] | None = None  # ZeRO-3: each parameter's piece of `forward`, from which it is gathered
        self.masters: list[Tensor]
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self.masters, self.forward = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
            self.segments, self._push = self._segments_of_stage_3(), self._push_at_stage_3
            self._shards = optimizer.fp16_partitioned_groups
        elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
            if isinstance(optimizer, BF16_Optimizer):
                self.masters, whole = optimizer.fp32_groups_flat_partition, optimizer.bf16_partitioned_groups
            else:
                self.masters, whole = optimizer.single_partition_of_fp32_groups, optimizer.parallel_partitioned_bit16_groups
            self.forward = [pieces[dist.get_rank()] for pieces in whole]
            self.segments, self._push = self._segments_of_flat_groups(), optimizer.update_lp_params
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            self.sharded = False
            self.masters = [master for group in optimizer.fp32_groups for master in group]
            self.forward = [parameter for group in optimizer.fp16_groups for parameter in group]
            self.segments, self._push = self._segments_of_whole_tensors(), self._push_whole_tensors
        else:
            self.sharded, self.aliased = False, True
            self.masters = self.forward = [parameter for group in base.param_groups for parameter in group["params"]]
            self.segments, self._push = self._segments_of_whole_tensors(), lambda: None

    # ------------------------------------------------------------------ vectors

    def zeros(self) -> Vector:
        return [torch.zeros_like(master, dtype=torch.float32, requires_grad=False) for master in self.masters]

    def normal(self, seed: int) -> Vector:
        """Standard normal entries that depend on the seed and the parameter's name alone, not on ranks or stage."""
        vector = self.zeros()
        for segment in self.segments:
            name, shape = self.names[segment.tensor], self.shapes[segment.tensor]
            device = vector[segment.index].device
            whole = torch.randn(shape, generator=generator_of(seed, name, device), device=device).flatten()
            self.part(vector, segment).copy_(whole[segment.offset : segment.offset + segment.length])
        return vector

    @staticmethod
    def part(vector: Vector, segment: Segment) -> Tensor:
        """The elements of a vector that belong to one parameter, a flat view."""
        return vector[segment.index].detach().view(-1).narrow(0, segment.start, segment.length)

    def dot_by_tensor(self, a: Vector, b: Vector) -> Tensor:
        """Inner products over each parameter, (parameters,), float64 on the CPU. Every rank calls it, and gets the same."""
        products = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        for segment in self.segments:
            product = torch.dot(self.part(a, segment), self.part(b, segment))
            products[segment.tensor] += product.to(self.device, torch.float64)
        if self.sharded and dist.get_world_size() > 1:
            dist.all_reduce(products)
        return products.cpu()

    def dot(self, a: Vector, b: Vector) -> float:
        return float(self.dot_by_tensor(a, b).sum())

    def norm(self, a: Vector) -> float:
        return self.dot(a, a) ** 0.5

    def add(self, a: Vector, b: Vector, factor: float = 1.0) -> Vector:
        """a += factor x b, in place."""
        for x, y in zip(a, b, strict=True):
            x.add_(y, alpha=factor)
        return a

    def scale(self, a: Vector, factor: float) -> Vector:
        """a *= factor, in place."""
        for x in a:
            x.mul_(factor)
        return a

    def scale_by_tensor(self, a: Vector, factors: Tensor) -> Vector:
        """Multiply the elements of each parameter by its factor, in place; `factors` (parameters,)."""
        for segment in self.segments:
            self.part(a, segment).mul_(float(factors[segment.tensor]))
        return a

    def copy_gradients(self, vector: Vector) -> None:
        """Into `vector`: the gradients that DeepSpeed has laid beside the masters that the optimizer is to step now."""
        now = {id(master) for group in self.base.param_groups for master in group["params"]}
        for segment in self.segments:
            master = self.masters[segment.index]
            if id(master) in now and master.grad is not None:
                self.part(vector, segment).copy_(master.grad.view(-1).narrow(0, segment.start, segment.length))

    def state(self, key: str) -> Vector | None:
        """A tensor of the base optimizer's state for each master ("exp_avg_sq", say), or None where there is none yet."""
        found = [self.base.state.get(master, {}).get(key) for master in self.masters]
        return None if any(tensor is None for tensor in found) else found  # pyright: ignore[reportReturnType]

    def steps(self) -> int:
        """Updates that the base optimizer's moments hold."""
        counts = [state["step"] for master in self.masters if "step" in (state := self.base.state.get(master, {}))]
        return int(counts[0]) if counts else 0

    # ------------------------------------------------------------------ from a checkpoint

    @torch.no_grad()
    def read(self, checkpoint: Checkpoint, with_moments: bool) -> None:
        """Masters, and AdamW's moments and step, from a checkpoint that any ranks wrote at any ZeRO stage.

        A rank reads its own elements and no others, and waits for no other rank. The forward weights follow with `push`, when every rank
        has read its own.

        Args:
            with_moments: False for a checkpoint made before the first update, which has none.

        Raises:
            InputError: other names or shapes, weights that are not float32, or no moments.
        """
        self._require_same_tensors(checkpoint)
        self._read(checkpoint, "weight", self.masters)
        for moment in MOMENTS if with_moments else ():
            self._read(checkpoint, moment, [self._moment(master, moment) for master in self.masters])
        if with_moments:
            step = checkpoint.adam_settings(self.names[0]).step
            for master in self.masters:
                # with the weights: the fused kernel reads it there
                self.base.state[master]["step"] = torch.tensor(float(step), dtype=torch.float32, device=master.device)
        else:
            self.base.state.clear()

    def _require_same_tensors(self, checkpoint: Checkpoint) -> None:
        for name, shape in zip(self.names, self.shapes, strict=True):
            found = checkpoint.shapes.get(checkpoint.aliases.get(name, name))
            if found is None or tuple(found) != shape:
                there = f"has it as {tuple(found)}" if found is not None else "has none"
                raise InputError(f"{checkpoint.path}: not of this model: {name} is {shape} here, and the checkpoint {there}")
        if checkpoint.precision != "fp32":
            raise InputError(f"{checkpoint.path}: its float32 master weights cannot be told apart, only {checkpoint.precision} weights")

    def _moment(self, master: Tensor, key: str) -> Tensor:
        """The tensor of the base optimizer's state, made where it is not there yet."""
        return self.base.state[master].setdefault(key, torch.zeros_like(master, requires_grad=False))

    def _read(self, checkpoint: Checkpoint, kind: Kind, vector: Vector) -> None:
        for segment in self.segments:
            part = torch.empty(segment.length, dtype=torch.float32)
            checkpoint.read(self.names[segment.tensor], segment.offset, part, kind)
            self.part(vector, segment).copy_(part)

    # ------------------------------------------------------------------ to the forward pass

    @torch.no_grad()
    def push(self, vector: Vector | None = None) -> None:
        """Make the forward pass run on masters + vector, or on the masters; the masters keep their bits. Every rank calls it."""
        if vector is None:
            if self._kept is not None:
                self._put(self._kept)
                self._kept = None
            self._push()
            return
        self._kept = [master.data for master in self.masters]
        try:
            self._put([master + addend for master, addend in zip(self._kept, vector, strict=True)])
            self._push()
        finally:
            if not self.aliased:
                self._put(self._kept)
                self._kept = None

    @torch.no_grad()
    def widen(self, vector: Vector) -> None:
        """Make the forward pass run in float32, on its own weights + vector, until `narrow`; weights and masters keep their bits.

        Parameters hold float32 data for the time: below ZeRO-3 whole, from a vector that came in the precision of training; at ZeRO-3
        each rank's shards, from which DeepSpeed gathers whole ones as it does others. Every rank calls it.
        """
        if self._shards is not None:
            self.optimizer._partition_all_parameters()
            self._wide = [weight.float().add_(part.to(weight.device)) for weight, part in zip(self.forward, vector, strict=True)]
            for shards, wide in zip(self._shards, self._wide, strict=True):
                for shard, piece in zip(shards, self.optimizer.unflatten(wide, shards), strict=True):
                    shard.data = piece
            self._gather_what_stays_whole()
            return
        added = self._whole(vector)
        self._wide = [parameter.data for parameter in self._parameters]
        for number, parameter in enumerate(self._parameters):
            parameter.data = parameter.data.float().add_(added[number])
            added[number] = torch.empty(0)

    @torch.no_grad()
    def narrow(self) -> None:
        """Back from `widen`: the forward pass runs in the precision of training, on the masters. Every rank calls it."""
        kept, self._wide = self._wide, None
        if self._shards is None:
            for parameter, data in zip(self._parameters, kept or [], strict=True):
                parameter.data = data
            return
        self.optimizer._partition_all_parameters()
        for parameter in self._parameters:  # empty now, and of the precision in which it was last whole
            parameter.data = parameter.data.to(self.forward[0].dtype)
        self.push()

    def moved(self, before: Vector) -> Vector:
        """By how much the weights that the forward pass now has differ from `before`, copies of `forward`."""
        moved = self.zeros()
        for segment in self.segments:
            if self._wide is None or self._shards is not None:
                now = self.part(self._wide or self.forward, segment)
            else:
                now = self._parameters[segment.tensor].detach().view(-1).narrow(0, segment.offset, segment.length)
            part = self.part(moved, segment)
            part.copy_(now).sub_(self.part(before, segment).to(part.device))
        return moved

    def _whole(self, vector: Vector) -> list[Tensor]:
        """A vector as whole parameters, on every rank, in the precision of training. Not at ZeRO-3."""
        self._kept = [master.data for master in self.masters]
        try:
            self._put(vector)
            self._push()
            return [parameter.detach().clone() for parameter in self._parameters]
        finally:
            self.push()

    def _put(self, data: Vector) -> None:
        for master, tensor in zip(self.masters, data, strict=True):
            master.data = tensor

    def _push_whole_tensors(self) -> None:
        for master, weight in zip(self.masters, self.forward, strict=True):
            weight.data.copy_(master.data)

    def _push_at_stage_3(self) -> None:
        """What the optimizer's step does after the update: drop gathered copies, write the shards, gather what stays whole."""
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(self.masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_what_stays_whole()

    def _gather_what_stays_whole(self) -> None:
        optimizer = self.optimizer
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif torch.cuda.is_available():
            torch.cuda.synchronize()  # which gathering does by itself: the stream of later ones does not wait for what was written here
        optimizer.invalidate_secondary_tensor()

    # ------------------------------------------------------------------ which element is whose

    def _segments_of_whole_tensors(self) -> list[Segment]:
        groups = getattr(self.optimizer, "fp16_groups", None) or [group["params"] for group in self.base.param_groups]
        numbers = [self._number[id(parameter)] for group in groups for parameter in group]
        return [Segment(number, index, 0, self.masters[index].numel(), 0) for index, number in enumerate(numbers)]

    def _segments_of_flat_groups(self) -> list[Segment]:
        """ZeRO-1 and 2 lay a group's tensors end to end and cut that into equal pieces, wherever tensors begin or end."""
        segments, rank = [], dist.get_rank()
        for index, (master, group) in enumerate(zip(self.masters, self._flat_groups(), strict=True)):
            piece = rank * master.numel()
            for parameter, place in group:
                first, end = max(place, piece), min(place + parameter.numel(), piece + master.numel())
                if first < end:
                    segments.append(Segment(self._number[id(parameter)], index, first - piece, end - first, first - place))
        return segments

    def _flat_groups(self) -> list[list[tuple[nn.Parameter, int]]]:
        """Parameters of each group and where they begin. (`_hp_mapping` says so too, but wrongly with round_robin_gradients.)"""
        optimizer = self.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            groups = optimizer.bf16_groups
            places = [itertools.accumulate([parameter.numel() for parameter in group], initial=0) for group in groups]
        else:
            groups, places = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
        return [list(zip(group, starts, strict=False)) for group, starts in zip(groups, places, strict=True)]

    def _segments_of_stage_3(self) -> list[Segment]:
        """ZeRO-3 cuts every tensor into equal pieces, the last padded, and lays a group's pieces end to end."""
        segments, rank = [], dist.get_rank()
        for index, group in enumerate(self.optimizer.fp16_groups):
            start = 0
            for parameter in group:
                size = parameter.partition_numel()
                offset = rank * size
                length = min(size, parameter.ds_numel - offset)
                if length > 0:
                    segments.append(Segment(self._number[id(parameter)], index, start, length, offset))
                start += size
        return segments
