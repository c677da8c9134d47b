"""DeepSpeed's own checkpoints, ZeRO 0 to 3: named float32 tensors from the shards as they lie.

How the shards hold a parameter (DeepSpeed 0.19.8; the `_index_stage...` methods below are the only place that knows):
  * ZeRO 1 and 2: each parameter group is one flat float32 vector, its parameters in the order of `param_shapes`, cut into
    equal parts, one a rank. The trailing padding is left out, or kept as zeros (BF16_Optimizer).
  * ZeRO 3: each parameter is cut into equal chunks of ceil(n / ranks), and a rank's flat vector holds its chunks one after
    the other. The last chunks are padded with uninitialised memory, which must not be read.
  * ZeRO 0: nothing is cut. In bf16 the float32 masters lie beside the weights, without names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.checkpoint import AdamSettings, Checkpoint, Kind, Segment, precision_of
from analysis.files import checkpoint_files, load_file, some
from model.errors import InputError


class _Piece(NamedTuple):
    """Where a run of a flattened parameter lies: elements [offset, offset + length) are [start, start + length) of a shard's group."""

    offset: int
    length: int
    rank: int
    group: int
    start: int


class DeepSpeedCheckpoint(Checkpoint):
    """A folder of *_states.pt files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        model_files, optimizer_files = checkpoint_files(path)
        self._load: Callable[[Path], dict[str, Any]] = cache(load_file)  # one mapping a file, gone with this object
        self._model_files, self._optimizer_files = model_files, optimizer_files
        self._shapes: dict[str, torch.Size] = {}  # of what is in pieces
        self._whole: dict[str, Tensor] = {}  # parameters that one file holds entirely, in any dtype
        self._pieces: dict[str, list[_Piece]] = {}
        self._fragments: dict[str, list[Segment]] = {}  # frozen parameters of ZeRO 3
        self._moments: dict[str, dict[str, Tensor]] = {}  # ZeRO 0: name -> Adam state
        self._moments_missing: str | None = None  # why there are none
        self._adam: dict[str, Any] = {}  # ZeRO 0: the optimizer's state_dict, and each parameter's number in it
        self._numbers: dict[str, int] = {}

        first = self._load(model_files[0])
        for key in ("module", "buffer_names", "global_steps"):
            if key not in first:
                raise InputError(f"{model_files[0]}: not a DeepSpeed checkpoint: it has no {key!r}")
        if first["module"] is None or first.get("mp_world_size", 1) != 1:
            raise InputError(f"{path}: written with pipeline or tensor parallelism, which this reader does not take apart")
        module = first["module"]
        self.step, self.step_is_said = int(first["global_steps"]), True
        self.buffers = {name: module[name] for name in first["buffer_names"] if name in module}
        self.aliases = dict(first.get("shared_params") or {})
        if optimizer_files:
            self.zero_stage, self.world_size = self._layout(first, model_files)
        else:
            self.zero_stage, self.world_size = 0, int(first.get("dp_world_size") or 1)

        if self.zero_stage == 3:
            self._index_stage_3(first, model_files)
        elif self.zero_stage > 0:
            self._index_stages_1_and_2(first)
        else:
            self._index_stage_0(first)
        if self.zero_stage > 0:
            self.precision = precision_of(self._groups(0))
            self._check_one_step(model_files)
        self.format = f"DeepSpeed ZeRO {self.zero_stage}"
        self.shapes = self._ordered_shapes(module)

    # ---- values --------------------------------------------------------------------------------------------------

    def _segments(self, name: str, kind: Kind) -> list[Segment]:
        if name in self._pieces:
            return [Segment(piece.offset, self._view(piece, kind)) for piece in self._pieces[name]]
        if kind != "weight":
            if name not in self._moments:
                reason = "it is frozen" if name in self.frozen else self._moments_missing
                raise InputError(f"{self.path}: no Adam moments for {name!r}: {reason}")
            return [Segment(0, self._moments[name][kind].reshape(-1))]
        if name in self._fragments:
            return self._fragments[name]
        return [Segment(0, self._whole[name].reshape(-1))]

    def adam_settings(self, name: str) -> AdamSettings:
        name = self.owner(name)
        if name in self._pieces:
            piece = self._pieces[name][0]
            base, number = self.base_state(piece.rank), piece.group
        elif name in self._moments:
            base, number = self._adam, self._numbers[name]
        else:
            raise InputError(f"{self.path}: no Adam state for {name!r}: {'it is frozen' if name in self.frozen else self._moments_missing}")
        if not isinstance(base, dict):
            raise InputError(f"{self.path}: an elastic checkpoint, which does not hold the optimizer's settings")
        return adam_settings(base, number, self.path)

    # ---- the files' own contents, for analysis/resharding.py -----------------------------------------------------

    def model_states(self) -> dict[str, Any]:
        """What the first rank's model-states file holds."""
        return self._load(self._model_files[0])

    def optimizer_path(self, rank: int) -> Path:
        return self._optimizer_files[rank]

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        """What a rank's optimizer-states file holds."""
        return self._load(self._optimizer_files[rank])

    def optimizer_state(self, rank: int) -> dict[str, Any]:
        """The state_dict of a rank's ZeRO optimizer, within that file."""
        state = self.optimizer_states(rank).get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise InputError(f"{self._optimizer_files[rank]}: not a DeepSpeed checkpoint: it has no 'optimizer_state_dict'")
        return state

    def base_state(self, rank: int) -> Any:
        """A rank's state_dict of the optimizer inside DeepSpeed's: one state a group; a list in the elastic form."""
        state = self.optimizer_state(rank)
        return state.get("optimizer_state_dict") or state.get("base_optimizer_state") or {}

    def flat_dtype(self, group: int, kind: str) -> torch.dtype:
        """Of a flat vector in the files."""
        return self._groups(0, kind)[group].dtype

    # ---- the index -----------------------------------------------------------------------------------------------

    def _layout(self, first: dict[str, Any], model_files: list[Path]) -> tuple[int, int]:
        """(ZeRO stage, ranks), after checking that every rank's files are there and agree."""
        state = self.optimizer_state(next(iter(self._optimizer_files)))
        count = state.get("partition_count")
        world_size = max(count) if isinstance(count, list) else count
        if not isinstance(world_size, int):
            raise InputError(f"{self._any_optimizer_file()}: not a ZeRO checkpoint: partition_count is {count!r}")
        stage = int(state.get("zero_stage", 1))  # BF16_Optimizer, always stage 1, does not say
        expected = [self._any_optimizer_file().name.replace("rank_0_mp", f"rank_{rank}_mp") for rank in range(world_size)]
        present = {path.name for path in self._optimizer_files.values()}
        if stage == 3:
            expected += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)]
            present |= {path.name for path in model_files}
        missing = [name for name in expected if name not in present]
        if missing:
            raise InputError(f"{self.path}: {world_size} ranks wrote this checkpoint; missing: {some(missing)}")
        surplus = sorted(present - set(expected) - {path.name for path in model_files})
        if surplus:
            raise InputError(f"{self.path}: {world_size} ranks wrote this checkpoint; left over from another: {some(surplus)}")
        if not first.get("param_shapes"):
            raise InputError(f"{model_files[0]}: param_shapes is missing, so the shards cannot be named")
        return stage, world_size

    def _check_one_step(self, model_files: list[Path]) -> None:
        """Files of another step among these would be silently wrong weights."""
        if self.zero_stage == 3:
            for file in model_files:
                if (step := self._load(file).get("global_steps")) != self.step:
                    raise InputError(f"{file}: of step {step}, among files of step {self.step}; files of two checkpoints are mixed")
        taken: dict[int, int] = {}  # rank -> steps its optimizer took
        for rank in self._optimizer_files:
            base = self.base_state(rank)
            state = next(iter(base.get("state", {}).values()), {}) if isinstance(base, dict) else {}
            if "step" in state:
                taken[rank] = int(state["step"])
        odd = next((rank for rank, steps in taken.items() if steps != max(taken.values())), None)
        if odd is not None:
            raise InputError(
                f"{self._optimizer_files[odd]}: its optimizer took {taken[odd]} steps, another rank's {max(taken.values())}; "
                "files of two checkpoints are mixed"
            )

    def _any_optimizer_file(self) -> Path:
        return next(iter(self._optimizer_files.values()))

    def _groups(self, rank: int, kind: str = "weight") -> list[Tensor]:
        """A rank's flat vectors, one a parameter group (ZeRO 3: a sub-group)."""
        state = self.optimizer_state(rank)
        if kind == "weight":
            groups = state.get("fp32_flat_groups") or state.get("single_partition_of_fp32_groups") or []
            return [group.detach() for group in groups]
        base = self.base_state(rank)
        states = base if isinstance(base, list) else [base.get("state", {}).get(i, {}) for i in range(len(self._groups(rank)))]
        if not all(kind in group for group in states):
            raise InputError(f"{self._optimizer_files[rank]}: no {kind}: the optimizer is not Adam, or has not taken a step yet")
        return [group[kind] for group in states]

    def _view(self, piece: _Piece, kind: Kind) -> Tensor:
        group = self._groups(piece.rank, kind)[piece.group]
        if piece.start + piece.length > group.numel():
            raise InputError(
                f"{self._optimizer_files[piece.rank]}: {kind} of group {piece.group} has {group.numel()} elements, "
                f"and the layout needs {piece.start + piece.length}"
            )
        return group[piece.start : piece.start + piece.length]

    def _check_group_count(self, rank: int, expected: int) -> list[Tensor]:
        groups = self._groups(rank)
        if len(groups) != expected:
            raise InputError(
                f"{self._optimizer_files[rank]}: {len(groups)} groups of float32 weights, expected {expected} "
                "(are they offloaded to NVMe? this reader takes them from the checkpoint files alone)"
            )
        return groups

    def _index_stages_1_and_2(self, first: dict[str, Any]) -> None:
        shapes_by_group = first["param_shapes"]
        by_rank = [self._check_group_count(rank, len(shapes_by_group)) for rank in range(self.world_size)]
        alignment = self.optimizer_state(0).get("param_alignment_paddings")
        for group, shapes in enumerate(shapes_by_group):
            # the ranks' parts joined are the group's flat vector
            starts = [0]
            for groups in by_rank:
                starts.append(starts[-1] + groups[group].numel())
            position = 0
            for i, (name, shape) in enumerate(shapes.items()):
                stop = position + shape.numel()
                self._pieces[name] = [
                    _Piece(max(position, low) - position, min(stop, high) - max(position, low), rank, group, max(position, low) - low)
                    for rank, (low, high) in enumerate(pairwise(starts))
                    if max(position, low) < min(stop, high)
                ]
                position = stop + (alignment[group][i] if alignment else 0)
            if not position <= starts[-1] <= 2 * self.world_size * math.ceil(max(position, 1) / (2 * self.world_size)):
                raise InputError(
                    f"{self.path}: the shards hold {starts[-1]} elements for parameter group {group}, and its parameters have {position}"
                )
        # Stage 2 lists frozen parameters; stage 1 leaves them in the module alone.
        fragments = first.get("frozen_param_fragments") or {}
        known = self._pieces.keys() | self.aliases.keys() | set(first["buffer_names"])
        self._whole = {name: fragments.get(name, value).detach() for name, value in first["module"].items() if name not in known}
        self._join_tied_copies()
        self.frozen = frozenset(self._whole)
        self._shapes = {name: shape for shapes in shapes_by_group for name, shape in shapes.items()}

    def _index_stage_3(self, first: dict[str, Any], model_files: list[Path]) -> None:
        shapes_by_group = first["param_shapes"]
        for rank in range(self.world_size):
            groups = self._check_group_count(rank, len(shapes_by_group))
            for group, shapes in enumerate(shapes_by_group):
                needed = sum(math.ceil(shape.numel() / self.world_size) for shape in shapes.values())
                if groups[group].numel() != needed:
                    raise InputError(
                        f"{self._optimizer_files[rank]}: group {group} has {groups[group].numel()} elements, its parameters need {needed}"
                    )
        for group, shapes in enumerate(shapes_by_group):
            start = 0
            for name, shape in shapes.items():
                chunk = math.ceil(shape.numel() / self.world_size)
                self._pieces[name] = [
                    _Piece(rank * chunk, length, rank, group, start) for rank, length in _chunks(shape.numel(), chunk, self.world_size)
                ]
                start += chunk
        frozen_shapes = first.get("frozen_param_shapes") or {}
        for name, shape in frozen_shapes.items():
            chunk = math.ceil(shape.numel() / self.world_size)
            self._fragments[name] = [
                Segment(rank * chunk, self._load(model_files[rank])["frozen_param_fragments"][name][:length])
                for rank, length in _chunks(shape.numel(), chunk, self.world_size)
            ]
        self.frozen = frozenset(frozen_shapes)
        self._shapes = {name: shape for shapes in [*shapes_by_group, frozen_shapes] for name, shape in shapes.items()}

    def _index_stage_0(self, first: dict[str, Any]) -> None:
        self._whole = {name: value.detach() for name, value in first["module"].items() if name not in self.buffers}
        self._join_tied_copies()
        optimizer = first.get("optimizer") or {}
        adam = self._adam = optimizer.get("optimizer_state_dict") or optimizer
        groups = [list(group["params"]) for group in adam.get("param_groups", [])]
        masters = optimizer.get("fp32_groups")
        names = _names_of_groups(self._whole, adam.get("param_groups", []), masters, adam.get("state", {}))
        if masters is not None and names is not None:
            for group_names, group_masters in zip(names, masters, strict=True):
                for name, master in zip(group_names, group_masters, strict=True):
                    self._whole[name] = master.detach()
        trained = {name for group in names or [] for name in group}
        if names is None:
            self._moments_missing = "without ZeRO DeepSpeed saves the optimizer's state without names, and here they do not follow"
        else:
            self.frozen = frozenset(self._whole.keys() - trained) if trained else frozenset()
            self._moments_missing = "the optimizer is not Adam, or has not taken a step yet"
            for group_names, group in zip(names, groups, strict=True):
                for name, number in zip(group_names, group, strict=True):
                    state = adam["state"].get(number, {})
                    if "exp_avg" in state:
                        self._moments[name], self._numbers[name] = state, number
        self.precision = precision_of(self._whole[name] for name in trained or self._whole)

    def _join_tied_copies(self) -> None:
        """Names of `_whole` that share one storage are one parameter: the first keeps it, the others become aliases."""
        owners: dict[tuple[int, torch.Size], str] = {}
        for name, value in list(self._whole.items()):
            owner = owners.setdefault((value.data_ptr(), value.shape), name) if value.numel() else name
            if owner != name:
                self.aliases[name] = owner
                del self._whole[name]

    def _ordered_shapes(self, module: dict[str, Tensor]) -> dict[str, torch.Size]:
        """Shapes of all parameters, in the module's order."""
        shapes = {**self._shapes, **{name: value.shape for name, value in self._whole.items()}}
        order = {name: i for i, name in enumerate(module)}
        return {name: shapes[name] for name in sorted(shapes, key=lambda name: order.get(name, len(order)))}


def adam_settings(state: dict[str, Any], number: int, path: Path) -> AdamSettings:
    """The settings of parameter `number` in the state_dict of a torch optimizer. Raises InputError when it is not Adam's."""
    group = next((group for group in state.get("param_groups", []) if number in group["params"]), None)
    own = state.get("state", {}).get(number, {})
    if group is None or not {"lr", "betas", "eps"} <= group.keys() or "exp_avg" not in own:
        raise InputError(f"{path}: the optimizer is not Adam, or has not taken a step yet")
    if group.get("decoupled_weight_decay") is False and group.get("weight_decay"):
        raise InputError(f"{path}: the optimizer is Adam with weight decay in the gradient, which cannot be told apart in the moments")
    step = own.get("step", group.get("step"))  # fused Adam of DeepSpeed keeps it in the group
    if step is None:
        raise InputError(f"{path}: the optimizer does not say how many steps it took, so its moments cannot be unbiased")
    betas = (float(group["betas"][0]), float(group["betas"][1]))
    decay, factor = float(group.get("weight_decay", 0.0)), float(group.get("lr_factor", 1.0))
    return AdamSettings(int(step), float(group["lr"]), betas, float(group["eps"]), decay, factor)


def _chunks(numel: int, chunk: int, world_size: int) -> list[tuple[int, int]]:
    """(rank, elements that are not padding) of a ZeRO-3 parameter, for the ranks that hold any."""
    lengths = [(rank, min(max(numel - rank * chunk, 0), chunk)) for rank in range(world_size)]
    return [(rank, length) for rank, length in lengths if length]


def _names_of_groups(
    weights: dict[str, Tensor], groups: list[dict[str, Any]], masters: list[list[Tensor]] | None, state: dict[int, Any]
) -> list[list[str]] | None:
    """Which parameters an optimizer's groups hold, in order, where only numbers were saved; None when that cannot be told.

    A group lists its parameters in the model's order, so each is the next name whose shape fits, and whose 16-bit weight is the
    master rounded where there are masters. Were a parameter of another group, or of none, to fit as well, the answer would be a guess.
    """
    if not groups:
        return None
    if all("param_names" in group for group in groups):  # the optimizer was given names
        named = [list(group["param_names"]) for group in groups]
        return named if {name for group in named for name in group} <= weights.keys() else None

    def same(a: Tensor, b: Tensor) -> bool:
        """Whether nothing tells these two apart."""
        return a.shape == b.shape and (masters is None or torch.equal(a, b))

    left = dict(weights)
    result: list[list[str]] = []
    for number, group in enumerate(groups):
        names: list[str] = []
        candidates = iter(list(left.items()))
        for i, parameter in enumerate(group["params"]):
            if masters is not None:
                master = masters[number][i]
                match = next((n for n, w in candidates if w.shape == master.shape and torch.equal(master.to(w.dtype), w)), None)
            else:
                shape = state.get(parameter, {}).get("exp_avg", torch.empty(0)).shape
                match = next((n for n, w in candidates if w.shape == shape), None)
            if match is None:
                return None
            names.append(match)
        for name in names:
            del left[name]
        result.append(names)
    sets = [*result, list(left)]
    unique = not any(same(weights[a], weights[b]) for i, one in enumerate(sets) for other in sets[i + 1 :] for a in one for b in other)
    return result if unique else None
