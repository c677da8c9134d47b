"""DeepSpeed's universal checkpoints, which ds_to_universal writes: one file a parameter and kind.

    zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt     a tensor, bare and flat (from ZeRO 3) or {"param": tensor, ...}
    zero/optimizer_state.pt, mp_rank_00_model_states.pt  the groups' settings; names, shapes and buffers

What must not be believed (DeepSpeed 0.19.8): `zero/` also holds buffers, and tied weights under their other names, copied from the
16-bit weights; so parameters are those that model_states lists. And converted from round-robin gradients, the float32 files hold
values of other parameters, without a word: where the 16-bit weights are there they are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.checkpoint import AdamSettings, Checkpoint, Kind, Segment, precision_of
from analysis.files import load_file, load_tensor_or_dict, some
from analysis.formats.deepspeed import adam_settings
from model.errors import InputError

_FILES: dict[Kind, str] = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}


def is_universal(path: Path) -> bool:
    return path.is_dir() and any((path / "zero").glob("*/fp32.pt"))


class UniversalCheckpoint(Checkpoint):
    """A folder that ds_to_universal wrote."""

    format = "DeepSpeed universal"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        states = sorted(path.glob("*mp_rank_*_model_states.pt"))
        if not states:
            raise InputError(f"{path}: no *_model_states.pt beside zero/, so parameters cannot be told from buffers and tied copies")
        if any("mp_rank_00" not in file.name for file in states):
            raise InputError(f"{path}: several tensor-parallel ranks; merge them with ds_to_universal first")
        self._load: Callable[[Path], Any] = cache(load_tensor_or_dict)
        first = load_file(states[0])
        self.step, self.step_is_said = int(first["global_steps"]), True
        self.world_size = int(first.get("dp_world_size") or 1)
        self.aliases = dict(first.get("shared_params") or {})
        module: dict[str, Tensor] = first["module"]
        self.buffers = {name: module[name] for name in first["buffer_names"] if name in module}
        self._groups = {name: number for number, group in enumerate(first["param_shapes"]) for name in group}
        trained = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
        missing = sorted(name for name in trained if not self._file(name, "weight").is_file())
        if missing:
            raise InputError(f"{path / 'zero'}: {some(missing)} missing")
        # Frozen weights: copied beside the trained ones from ZeRO 1 and 2; from ZeRO 3 they are in the ranks' model_states.
        self._frozen_values: dict[str, Tensor] = {}
        frozen_shapes = first.get("frozen_param_shapes") or {}
        stage_3 = any(value.numel() == 0 for name, value in module.items() if trained.get(name, torch.Size([0])).numel())
        if stage_3:
            parts = [load_file(file)["frozen_param_fragments"] for file in _by_rank(states)] if frozen_shapes else []
            for name, shape in frozen_shapes.items():
                self._frozen_values[name] = torch.cat([part[name] for part in parts])[: shape.numel()].view(shape)
        else:
            known = trained.keys() | self.aliases.keys() | self.buffers.keys()
            self._frozen_values = {name: value for name, value in module.items() if name not in known}
        self.frozen = frozenset(self._frozen_values)
        shapes = {**trained, **{name: value.shape for name, value in self._frozen_values.items()}}
        self.shapes = {**{name: shapes[name] for name in module if name in shapes}, **shapes}
        self.precision = precision_of(self._whole(name, "weight") for name in trained)
        self._module = {} if stage_3 else {name: module[name] for name in trained}
        config = first.get("ds_config")
        if isinstance(config, dict) and config.get("zero_optimization", {}).get("round_robin_gradients"):
            self._compare_with_used()

    def check_contents(self) -> None:
        super().check_contents()
        self._compare_with_used()

    def _file(self, name: str, kind: Kind) -> Path:
        file = self.path / "zero" / name / _FILES[kind]
        if not file.resolve().is_relative_to((self.path / "zero").resolve()):
            raise InputError(f"{self.path}: refused: {name!r} lies outside the checkpoint")
        return file

    def _whole(self, name: str, kind: Kind) -> Tensor:
        if name in self._frozen_values:
            if kind != "weight":
                raise InputError(f"{self.path}: no Adam moments for {name!r}: it is frozen")
            return self._frozen_values[name]
        file = self._file(name, kind)
        if not file.is_file():
            raise InputError(f"{file}: missing")
        content = self._load(file)
        value = content["param"] if isinstance(content, dict) else content
        if name in self.shapes and value.numel() != self.shapes[name].numel():
            raise InputError(f"{file}: {value.numel()} elements, and {name} has shape {tuple(self.shapes[name])}")
        return value.detach()

    def _segments(self, name: str, kind: Kind) -> list[Segment]:
        return [Segment(0, self._whole(name, kind).reshape(-1))]

    def adam_settings(self, name: str) -> AdamSettings:
        name = self.owner(name)
        if name in self.frozen:
            raise InputError(f"{self.path}: no Adam state for {name!r}: it is frozen")
        groups = load_file(self.path / "zero" / "optimizer_state.pt").get("param_groups", [])
        step_file = self.path / "zero" / name / "step.pt"
        state: dict[str, Any] = {"exp_avg": None}
        if step_file.is_file():
            state["step"] = load_tensor_or_dict(step_file)
        else:  # from ZeRO 3, where optimizer_state.pt is rank 0's whole state
            whole = load_file(self.path / "zero" / "optimizer_state.pt").get("optimizer_state_dict", {}).get("state", {})
            state |= whole.get(self._groups[name], {})
        return adam_settings({"param_groups": groups, "state": {self._groups[name]: state}}, self._groups[name], self.path)

    def _compare_with_used(self) -> None:
        """Every float32 weight, rounded, must be the weight that the network computed with. From ZeRO 3 there is none to compare."""
        for name, used in self._module.items():
            if used.shape != self.shapes[name]:
                raise InputError(f"{self.path}: {name} is {tuple(used.shape)} in module and {tuple(self.shapes[name])} in param_shapes")
            if not torch.equal(self._whole(name, "weight").reshape(-1).to(used.dtype), used.reshape(-1)):
                raise InputError(
                    f"{self.path}: zero/{name}/fp32.pt does not hold {name}: it differs from the weight the network used. ds_to_universal "
                    "writes this from round-robin gradients; read the checkpoint that it was made from"
                )


def _by_rank(files: list[Path]) -> list[Path]:
    """zero_pp_rank_R_... in the order of R."""
    return sorted(files, key=lambda file: int(file.name.removeprefix("zero_pp_rank_").partition("_")[0]))
