"""A DeepSpeed checkpoint rewritten for another number of ranks, so that DeepSpeed itself goes on from it.

DeepSpeed loads a ZeRO checkpoint only at the number of ranks that wrote it. Here the float32 masters and every state of the optimizer
are cut anew, in the layout that DeepSpeed 0.19.8 would have written on so many ranks; the rest is copied. One rank's shards are filled
at a time, a few megabytes in memory: they lie in a scratch file until they are written.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.files import StandIn
from analysis.formats.deepspeed import DeepSpeedCheckpoint
from analysis.shards import open_checkpoint
from model.errors import InputError

PIECE = 1 << 22  # elements read and written at a time


class _Run(NamedTuple):
    """Elements [start, stop) of a flattened parameter lie at `position` of a rank's flat vector."""

    name: str
    start: int
    stop: int
    position: int


class _Group(NamedTuple):
    """One flat vector a rank: of a parameter group, or at ZeRO 3 of a sub-group.

    Attributes:
        names: its parameters in order, each with the alignment padding after it.
        runs: what each rank holds.
        size: elements of a rank's vector, padding included.
        source: a group of the old checkpoint whose settings and step count are this one's.
    """

    names: dict[str, int]
    runs: list[list[_Run]]
    size: int
    source: int


def reshard(checkpoint: DeepSpeedCheckpoint, folder: Path, ranks: int, progress: bool = True) -> str:
    """Write the checkpoint for `ranks` ranks into an empty folder; what was written, in words.

    A Burnish manifest is written anew; the random state of rank r is that of the old rank r modulo their number.

    Raises:
        InputError: an elastic checkpoint, or one with objects in it that are not plain values.
        OSError: the disk refused.
    """
    stage = checkpoint.zero_stage or 0
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: expected at least 1")
    groups = _groups_of_stage_3(checkpoint, ranks) if stage == 3 else _groups_of_stages_1_and_2(checkpoint, ranks) if stage else []
    total = sum(run.stop - run.start for group in groups for runs in group.runs for run in runs)
    kinds = ["weight", *_state_tensors(checkpoint, 0)] if stage else []
    size = 4 * len(kinds) * total  # none at ZeRO 0, where the optimizer is in the model's file
    with tqdm(total=size, unit="B", unit_scale=True, desc="reshard", mininterval=1.0, disable=not (progress and size)) as bar:
        for rank in range(ranks):
            if stage:
                _write_optimizer_file(checkpoint, folder, groups, kinds, rank, ranks, bar)
            if stage == 3 or rank == 0:
                _write_model_file(checkpoint, folder, groups, rank, ranks)
    for file in checkpoint.path.iterdir():
        cut = file.name.endswith("_states.pt") or file.name.startswith("random_state_rank_")
        if file.is_file() and file.name != "manifest.json" and not cut:
            shutil.copy(file, folder / file.name)
    for rank in range(ranks):
        random_state = checkpoint.path / f"random_state_rank_{rank % checkpoint.world_size:05d}.pt"
        if random_state.exists():
            shutil.copy(random_state, folder / f"random_state_rank_{rank:05d}.pt")
    if checkpoint.manifest is not None:
        _write_manifest(checkpoint.manifest, folder, ranks)
    _compare(checkpoint, folder, kinds)
    return (
        f"{checkpoint.format}: {checkpoint.world_size} -> {ranks} ranks, {len(checkpoint.shapes)} parameters, "
        f"{', '.join(kinds) or 'weight'}; read back: equal, bit for bit"
    )


# ---- where things go -------------------------------------------------------------------------------------------------


def _groups_of_stages_1_and_2(checkpoint: DeepSpeedCheckpoint, ranks: int) -> list[_Group]:
    """Each parameter group is one vector, parameters one after the other, filled up to a multiple of 2 ranks and cut into equal parts."""
    zero, groups = _zero_section(checkpoint), []
    for number, shapes in enumerate(checkpoint.model_states()["param_shapes"]):
        names = list(shapes)
        if zero.get("round_robin_gradients"):
            natural = _round_robin(list(range(len(names))), checkpoint.world_size)  # natural[i] is the number of the i-th name here
            names = [name for _, name in sorted(zip(natural, names, strict=True))]
            names = _round_robin(names, ranks)
        alignment = 1
        if zero.get("parameter_alignment"):
            alignment = 16 // math.gcd(16, checkpoint.model_states()["module"][names[0]].element_size())
        padded: dict[str, int] = {}
        starts: dict[str, int] = {}
        position = 0
        for name in names:
            starts[name] = position
            position += shapes[name].numel()
            padded[name] = -position % alignment if name != names[-1] else 0
            position += padded[name]
        size = 2 * math.ceil(position / (2 * ranks))
        runs = [
            [
                _Run(name, max(low - start, 0), min(high - start, shapes[name].numel()), max(start - low, 0))
                for name, start in starts.items()
                if max(low, start) < min(high, start + shapes[name].numel())
            ]
            for low, high in ((rank * size, (rank + 1) * size) for rank in range(ranks))
        ]
        groups.append(_Group(padded, runs, size, number))
    return groups


def _groups_of_stage_3(checkpoint: DeepSpeedCheckpoint, ranks: int) -> list[_Group]:
    """Each parameter is cut into equal chunks; a parameter group is split in sub-groups of `sub_group_size` elements of a rank."""
    largest = int(float(_zero_section(checkpoint).get("sub_group_size", 1e9)))
    old, groups = checkpoint.model_states()["param_shapes"], []
    for settings in checkpoint.base_state(0)["param_groups"]:
        shapes = {name: shape for number in settings["params"] for name, shape in old[number].items()}
        chunks = {name: math.ceil(shape.numel() / ranks) for name, shape in shapes.items()}
        whole = largest >= sum(chunks.values())
        sub_groups: list[list[str]] = [[]]
        filled = 0
        for name, chunk in chunks.items():
            if filled >= largest and not whole:
                sub_groups.append([])
                filled = 0
            sub_groups[-1].append(name)
            filled += chunk
        for names in sub_groups:
            runs: list[list[_Run]] = [[] for _ in range(ranks)]
            position = 0
            for name in names:
                for rank in range(ranks):
                    start, stop = rank * chunks[name], min((rank + 1) * chunks[name], shapes[name].numel())
                    if start < stop:
                        runs[rank].append(_Run(name, start, stop, position))
                position += chunks[name]
            groups.append(_Group(dict.fromkeys(names, 0), runs, position, settings["params"][0]))
    return groups


def _round_robin(items: list[Any], ranks: int) -> list[Any]:
    """DeepSpeed's order under `round_robin_gradients`: each rank's items together, dealt out like cards."""
    return [item for rank in range(ranks) for item in items[rank::ranks]]


def _zero_section(checkpoint: DeepSpeedCheckpoint) -> dict[str, Any]:
    return checkpoint.model_states().get("ds_config", {}).get("zero_optimization", {})


# ---- writing ---------------------------------------------------------------------------------------------------------


def _state_tensors(checkpoint: DeepSpeedCheckpoint, rank: int) -> list[str]:
    """Names of the optimizer's states that are cut as the weights are: exp_avg, exp_avg_sq."""
    base = checkpoint.base_state(rank)
    if not isinstance(base, dict):
        raise InputError(f"{checkpoint.path}: an elastic checkpoint, which DeepSpeed cuts by itself")
    states = list(base.get("state", {}).values())
    return [key for key, value in states[0].items() if isinstance(value, Tensor) and value.dim()] if states else []


def _write_optimizer_file(
    checkpoint: DeepSpeedCheckpoint, folder: Path, groups: list[_Group], kinds: list[str], rank: int, ranks: int, bar: Any
) -> None:
    old, stage = checkpoint.optimizer_state(0), checkpoint.zero_stage
    base = checkpoint.base_state(0)
    keeps_padding = "zero_stage" not in old  # BF16_Optimizer
    paddings = [_padding(group, rank) for group in groups]
    scratch = folder / f".scratch-{rank}"
    scratch.mkdir()
    flats: dict[str, list[Tensor]] = {}
    for kind in kinds:
        flats[kind] = []
        for number, group in enumerate(groups):
            dtype = checkpoint.flat_dtype(group.source, kind)
            stripped = kind == "weight" and stage != 3 and not keeps_padding
            size = group.size - paddings[number] * stripped
            file = scratch / f"{kind}-{number}"
            flat = torch.from_file(str(file), shared=True, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
            for run in group.runs[rank]:
                for start in range(run.start, run.stop, PIECE):
                    stop = min(start + PIECE, run.stop)
                    position = run.position + start - run.start
                    checkpoint.read(run.name, start, flat[position : position + stop - start], kind)  # pyright: ignore[reportArgumentType]
                    bar.update(4 * (stop - start))
            flats[kind].append(flat)

    def state_of(number: int, group: _Group) -> dict[str, Any]:
        # a copy each: sub-groups that shared one step count would count every step several times
        return {key: flats[key][number] if key in flats else copy.deepcopy(value) for key, value in base["state"][group.source].items()}

    new_base = {
        **base,
        "state": {number: state_of(number, group) for number, group in enumerate(groups) if group.source in base["state"]},
        "param_groups": [
            {**settings, "params": [number for number, group in enumerate(groups) if group.source in settings["params"]]}
            for settings in base["param_groups"]
        ],
    }
    new = {key: _revived(value, bool(old.get("dynamic_loss_scale"))) if isinstance(value, StandIn) else value for key, value in old.items()}
    if stage == 3:
        new |= {"partition_count": ranks, "optimizer_state_dict": new_base, "fp32_flat_groups": flats["weight"]}
    else:
        new |= {
            "partition_count": [ranks] * len(groups),
            "base_optimizer_state": new_base,
            "single_partition_of_fp32_groups": flats["weight"],
            "group_paddings": paddings,
            "param_slice_mappings": [_slices(group, rank) for group in groups],
        }
        if "param_alignment_paddings" in old:
            new["param_alignment_paddings"] = [list(group.names.values()) for group in groups]
    content = {**checkpoint.optimizer_states(0), "optimizer_state_dict": new}
    _save(content, folder / checkpoint.optimizer_path(0).name.replace("rank_0_mp", f"rank_{rank}_mp"))
    shutil.rmtree(scratch)


def _padding(group: _Group, rank: int) -> int:
    """How many elements at the end of a rank's vector belong to no parameter."""
    total = sum(run.stop - run.start for runs in group.runs for run in runs) + sum(group.names.values())
    return min(max((rank + 1) * group.size - total, 0), group.size)


def _deepspeed(module: str) -> Any:
    """A module of DeepSpeed, whose own objects its files have to hold. All else here reads without it. Raises InputError without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError("--ranks writes DeepSpeed's own files, for which DeepSpeed has to be installed: pip install deepspeed") from None


def _slices(group: _Group, rank: int) -> dict[str, Any]:
    """Where a rank's vector holds each parameter, as DeepSpeed's conversion to a universal checkpoint reads it."""
    fragment_address = _deepspeed("deepspeed.utils.tensor_fragment").fragment_address
    return {run.name: fragment_address(numel=run.stop - run.start, start=run.position) for run in group.runs[rank]}


def _revived(stand_in: StandIn, dynamic: bool) -> Any:
    """DeepSpeed's own loss scaler with the attributes that were saved."""
    scalers = _deepspeed("deepspeed.runtime.fp16.loss_scaler")
    kind = scalers.DynamicLossScaler if dynamic else scalers.LossScaler
    scaler = kind.__new__(kind)
    scaler.__dict__.update(stand_in.__dict__)
    return scaler


def _write_model_file(checkpoint: DeepSpeedCheckpoint, folder: Path, groups: list[_Group], rank: int, ranks: int) -> None:
    content = {**checkpoint.model_states(), "dp_world_size": ranks}
    name = "mp_rank_00_model_states.pt"
    if checkpoint.zero_stage:
        content["param_shapes"] = [{name: checkpoint.shapes[name] for name in group.names} for group in groups]
    if checkpoint.zero_stage == 3:
        name = f"zero_pp_rank_{rank}_{name}"
        if content.get("frozen_param_fragments"):
            content["frozen_param_fragments"] = {frozen: _frozen_chunk(checkpoint, frozen, rank, ranks) for frozen in checkpoint.frozen}
    _save(content, folder / name)


def _frozen_chunk(checkpoint: DeepSpeedCheckpoint, name: str, rank: int, ranks: int) -> Tensor:
    numel = checkpoint.shapes[name].numel()
    chunk = math.ceil(numel / ranks)
    values = torch.zeros(chunk, dtype=checkpoint.segments(name)[0].values.dtype)
    length = min(max(numel - rank * chunk, 0), chunk)
    if length:
        checkpoint.read(name, rank * chunk, values[:length])
    return values


def _save(content: dict[str, Any], path: Path) -> None:
    if (where := next(_stand_ins(content), None)) is not None:
        raise InputError(f"{path.name}: {where} is an object that only the library which wrote it can write again")
    torch.save(content, path)


def _stand_ins(value: Any, where: str = "") -> Iterator[str]:
    """Where a `StandIn` is left."""
    if isinstance(value, StandIn):
        yield where
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _stand_ins(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _stand_ins(item, f"{where}[{i}]")


def _write_manifest(old: dict[str, Any], folder: Path, ranks: int) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            files[path.name] = {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({**old, "world_size": ranks, "files": files}, indent=1) + "\n", encoding="utf-8")


def _compare(old: DeepSpeedCheckpoint, folder: Path, kinds: list[str]) -> None:
    """Read what was written and compare it with the source, bit for bit.

    Raises:
        RuntimeError: they differ, which is a fault of the disk or ours.
    """
    new: Any = open_checkpoint(folder)
    source: Any = old
    if new.shapes != old.shapes or new.frozen != old.frozen or new.aliases != old.aliases:
        raise RuntimeError(f"{folder}: the parameters are not those of {old.path}")
    for name, shape in old.shapes.items():
        for kind in kinds if name not in old.frozen else ["weight"]:
            for start in range(0, shape.numel(), PIECE):
                first, second = (torch.empty(min(PIECE, shape.numel() - start)) for _ in range(2))
                source.read(name, start, first, kind)
                new.read(name, start, second, kind)
                if not torch.equal(first.view(torch.int32), second.view(torch.int32)):
                    raise RuntimeError(f"{name} ({kind}) was not written as it was read")
