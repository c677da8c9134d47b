"""What every checkpoint offers, however its files lie: `Checkpoint`. A format is a subclass in analysis/formats that fills it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis.files import check_crc, read_in_order, read_manifest, some
from model.errors import InputError

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]

_PRECISIONS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
}


class Segment(NamedTuple):
    """A run of consecutive elements of a flattened parameter: where it begins, and a 1-D view of the file."""

    offset: int
    values: Tensor


class AdamSettings(NamedTuple):
    """What AdamW did with a parameter at the step that was saved."""

    step: int
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    learning_rate_factor: float = 1.0  # of this parameter's group, in learning_rate already: the parametrization's


class Checkpoint:
    """One checkpoint. Made by `analysis.shards.open_checkpoint`.

    Attributes:
        path: the folder or file.
        named: what it was opened by: `path`, or the folder of a library whose DeepSpeed folder `path` is; there config.json lies.
        format: how it is stored, in words: "DeepSpeed ZeRO 2", "safetensors", ...
        step: optimizer steps taken when it was saved; where the files do not say, the number at the end of its name, else 0.
        step_is_said: by the files, or by a name like step1000 or 1000; not so where the number may mean something else.
        zero_stage: 0 to 3 for DeepSpeed's own files, else None.
        world_size: data-parallel ranks that wrote it; 1 where that left no trace.
        precision: what the trained weights are read in: "fp32" (masters), or "bf16", "fp16", "fp8_..." where the file holds nothing better.
        shapes: {name: shape} of every parameter, frozen ones too, in the order of the file; tied weights once.
        frozen: names of the parameters that were not trained; they are kept in the precision of the forward pass.
        aliases: {other name: name in `shapes`} of tied weights.
        buffers: {name: tensor}, memory-mapped.
        manifest: what manifest.json holds, or None where there is none.
    """

    format: str
    zero_stage: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = self.named = path
        self.manifest = read_manifest(path) if path.is_dir() else None
        self.step = step_of_name(path)
        self.step_is_said = _said_step(path) is not None
        self.world_size = 1
        self.precision = "fp32"
        self.shapes: dict[str, torch.Size] = {}
        self.frozen: frozenset[str] = frozenset()
        self.aliases: dict[str, str] = {}
        self.buffers: dict[str, Tensor] = {}
        self._last: tuple[tuple[str, Kind], list[Segment]] | None = None

    def __repr__(self) -> str:
        stage = f", zero_stage={self.zero_stage}" if self.zero_stage is not None else ""
        return f"Checkpoint({str(self.path)!r}, {self.format}, step={self.step}{stage}, world_size={self.world_size})"

    # ---- what a format fills in ----------------------------------------------------------------------------------

    def _segments(self, name: str, kind: Kind) -> list[Segment]:
        """`segments` for a name of `shapes`."""
        raise NotImplementedError

    def adam_settings(self, name: str) -> AdamSettings:
        """The optimizer's settings for a parameter. Raises InputError when the files do not hold them."""
        raise InputError(f"{self.path}: {self.format} files do not hold the optimizer's settings")

    def files(self) -> list[Path]:
        """The files that it reads."""
        return sorted(p for p in self.path.rglob("*") if p.is_file()) if self.path.is_dir() else [self.path]

    # ---- what is there -------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of the parameters, tied weights once."""
        return list(self.shapes)

    def owner(self, name: str) -> str:
        """The name a parameter is stored under. Raises InputError when there is no such parameter."""
        name = self.aliases.get(name, name)
        if name not in self.shapes:
            raise InputError(f"{self.path}: no parameter named {name!r}")
        return name

    # ---- values --------------------------------------------------------------------------------------------------

    def segments(self, name: str, kind: Kind = "weight") -> list[Segment]:
        """The flattened parameter as memory-mapped runs in ascending order, without padding: together they cover it once.

        Args:
            kind: "weight", or "exp_avg" or "exp_avg_sq" for Adam's moments.

        Raises:
            InputError: no such parameter; its moments are not in the files; a shard is shorter than the layout says.
        """
        return self._segments(self.owner(name), kind)

    def read(self, name: str, start: int, out: Tensor, kind: Kind = "weight") -> None:
        """Fill the 1-D tensor `out` with elements [start, start + len(out)) of the flattened parameter, cast to its dtype."""
        filled = 0
        for place, values in self._runs(name, start, start + out.numel(), kind):
            out[place : place + values.numel()].copy_(values)
            filled += values.numel()
        if filled != out.numel():
            shape = tuple(self.shapes[self.owner(name)])
            raise InputError(f"{self.path}: {name!r} has no elements {start} to {start + out.numel()}: its shape is {shape}")

    def expect(self, name: str, kind: Kind = "weight") -> None:
        """Say that `read` is about to ask for all of a parameter, from front to back, so that the disk reads ahead."""
        for _, values in self._remembered(self.owner(name), kind):
            read_in_order(values)

    def _runs(self, name: str, start: int, stop: int, kind: Kind) -> Iterator[tuple[int, Tensor]]:
        """(place counted from `start`, memory-mapped values) of what there is of elements [start, stop)."""
        segments = self._remembered(self.owner(name), kind)
        # tensor-parallel weights come in a segment a row: go to the first one that matters
        for offset, values in segments[max(bisect_right(segments, start, key=lambda segment: segment.offset) - 1, 0) :]:
            if offset >= stop:
                break
            first, last = max(start, offset), min(stop, offset + values.numel())
            if first < last:
                yield first - start, values[first - offset : last - offset]

    def _remembered(self, name: str, kind: Kind) -> list[Segment]:
        """The segments asked for last are kept: a tensor is read a piece at a time, by several threads."""
        last = self._last
        if last is None or last[0] != (name, kind):
            last = self._last = ((name, kind), self._segments(name, kind))
        return last[1]

    def tensor(self, name: str, kind: Kind = "weight") -> Tensor:
        """The whole parameter, float32, in its own memory."""
        flat = torch.empty(self.shapes[self.owner(name)].numel(), dtype=torch.float32)
        self.read(name, 0, flat, kind)
        return flat.view(self.shapes[self.owner(name)])

    def load_into(self, model: nn.Module) -> None:
        """Fill a model's parameters and persistent buffers in place, cast to their dtype; tied ones once.

        Raises:
            InputError: names or shapes differ. Nothing is written then.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        wanted = {name: self.aliases.get(name, name) for name in parameters}
        missing = sorted(name for name, owner in wanted.items() if owner not in self.shapes)
        unused = sorted(self.shapes.keys() - set(wanted.values()))
        if missing or unused:
            sides = [f"the model has {some(missing)} more"] * bool(missing) + [f"the checkpoint has {some(unused)} more"] * bool(unused)
            raise InputError(f"{self.path}: these are not this model's weights: {'; '.join(sides)}")
        for name, parameter in parameters.items():
            if parameter.shape != self.shapes[wanted[name]]:
                raise InputError(
                    f"{self.path}: {name} has shape {tuple(self.shapes[wanted[name]])}, and the model expects {tuple(parameter.shape)}"
                )
        filled: set[int] = set()
        with torch.no_grad():
            for name, parameter in parameters.items():
                if id(parameter) not in filled:
                    filled.add(id(parameter))
                    parameter.copy_(self.tensor(name))
            for name, buffer in model.named_buffers():
                if name in self.buffers:
                    buffer.copy_(self.buffers[name])

    def verify(self) -> None:
        """`verify_checkpoints` of this one."""
        verify_checkpoints([self])

    def check_contents(self) -> None:
        """Read everything and compare it with what the files themselves say: the CRC-32 in torch's, copies with their originals.

        A safetensors file carries no checksum.

        Raises:
            InputError: a file was altered.
        """
        for path in self.files():
            check_crc(path)


_CHECKSUMS: dict[tuple[Path, int, int], str] = {}  # sha256 of what this process has hashed, by path, size and time of the last change


def verify_checkpoints(checkpoints: Iterable[Checkpoint], progress: bool = True) -> None:
    """Compare every file of checkpoints with the checksum that its manifest recorded; without a manifest there is nothing to compare.

    A file is hashed once in a process, as long as it does not change. A bar over bytes appears once that takes seconds.

    Raises:
        InputError: a file was altered or cannot be read; a manifest without its checksum.
    """
    files: dict[Path, str] = {}
    for checkpoint in checkpoints:
        for name, recorded in (checkpoint.manifest or {}).get("files", {}).items():
            if not isinstance(recorded.get("sha256"), str):
                raise InputError(
                    f"{checkpoint.path / 'manifest.json'}: damaged: no sha256 of {name}; restore it, or give --skip-checksums to go without"
                )
            files[checkpoint.path / name] = recorded["sha256"]
    try:
        keys = {file: (file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files}
        total = sum(key[1] for key in keys.values() if key not in _CHECKSUMS)
        with tqdm(total=total, unit="B", unit_scale=True, desc="checksums", delay=2.0, mininterval=1.0, disable=not progress) as bar:
            for file, expected in files.items():
                key = keys[file]
                if key not in _CHECKSUMS:
                    _CHECKSUMS[key] = _sha256(file, bar)
                if _CHECKSUMS[key] != expected:
                    raise InputError(
                        f"{file}: altered since it was saved: sha256 {_CHECKSUMS[key][:12]}..., and manifest.json expects "
                        f"{expected[:12]}...; restore the file or leave this checkpoint out"
                    )
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}; restore the file or leave this checkpoint out") from None


def _sha256(file: Path, bar: tqdm) -> str:
    found, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            found.update(piece[:count])
            bar.update(count)
    return found.hexdigest()


def step_of_name(path: Path) -> int:
    """step-00001000, step1000, checkpoint-1000, global_step1000, iter_0001000, 1000.safetensors -> 1000; no number at the end: 0.

    A Hugging Face folder is often named after its model: gpt2 and qwen3 are no steps.
    """
    said = _said_step(path)
    if said is not None:
        return said
    configured = os.path.exists(path / "config.json")  # unlike Path.exists, False in a folder that may not be looked into
    match = re.search(r"[-_](\d+)$" if configured else r"(\d+)$", _stem(path))
    return int(match[1]) if match else 0


def _said_step(path: Path) -> int | None:
    """The step that a name says in so many words, or as digits alone."""
    match = re.search(r"(?:step|checkpoint|iter|^)[-_]?(\d+)$", _stem(path), re.IGNORECASE)
    return int(match[1]) if match else None


def _stem(path: Path) -> str:
    name = path.resolve().name
    return name if path.is_dir() else name.split(".")[0]


def precision_of(tensors: Iterable[Tensor]) -> str:
    """What `Checkpoint.precision` says of trained weights: the dtype of most elements."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return _PRECISIONS.get(max(counts, key=lambda dtype: counts[dtype]), "fp32") if counts else "fp32"


def block_segments(shape: torch.Size, offsets: tuple[int, ...], block: Tensor) -> Iterator[Segment]:
    """The runs of a flattened tensor of `shape` that a block of it, placed at `offsets`, covers; ascending."""
    if block.dim() == 0:
        yield Segment(0, block.reshape(1))
        return
    # leading dimensions before `split` are walked one index at a time; from `split` on the block is one run
    split = block.dim() - 1
    while split > 0 and block.shape[split] == shape[split]:
        split -= 1
    run = math.prod(block.shape[split:])
    inner = math.prod(shape[split + 1 :])
    if run == 0:
        return
    for index in torch.cartesian_prod(*(torch.arange(n) for n in block.shape[:split])).reshape(-1, split).tolist() if split else [()]:
        position = 0
        for dimension, i in enumerate(index):
            position = position * shape[dimension] + offsets[dimension] + i
        position = (position * shape[split] + offsets[split]) * inner
        yield Segment(position, block[tuple(index)].reshape(-1))
