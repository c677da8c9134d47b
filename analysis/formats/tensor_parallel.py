"""Tensor-parallel files of Megatron-LM and GPT-NeoX: every rank holds a slice of each matrix, joined here by the layer's name.

    iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt       Megatron-LM: tensor rank TT, pipeline stage PPP
    global_step1000/layer_LL-model_TT-model_states.pt      GPT-NeoX: layer LL of the pipeline, tensor rank TT

How slices join, as gpt-neox's convert_neox_to_hf.py has it:
  * column-parallel (first matrices, embeddings): one below the other;
  * row-parallel (second matrices): side by side; their biases add up in GPT-NeoX and are copies in Megatron-LM;
  * a gated first matrix: a rank holds its part of the gate and then its part of the rest;
  * norms: copies that may have drifted apart; the mean.
A name that none of these fits is refused, not guessed. Padding rows of the vocabulary stay.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.checkpoint import Checkpoint, Kind, Segment, block_segments, precision_of
from analysis.files import load_file, some
from analysis.formats.tensor_files import is_buffer
from model.errors import InputError

_MEGATRON = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_NEOX = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_COLUMN = re.compile(
    r"(query_key_value|linear_qkv|dense_h_to_4h|linear_fc1|linear1|word_embeddings|final_linear|output_layer|lm_head)\.(weight|bias)$"
)
_ROW = re.compile(r"(attention\.dense|linear_proj|dense_4h_to_h|linear_fc2|mlp\.linear2)\.(weight|bias)$")
_NORM = re.compile(r"norm|(^|[._])ln_?\w*(\.|$)")
_SECOND = {"dense_h_to_4h": "dense_4h_to_h", "linear_fc1": "linear_fc2", "linear1": "linear2"}  # first matrix of an MLP -> second


def is_tensor_parallel(path: Path) -> bool:
    if not path.is_dir():
        return False
    neox = any(_NEOX.fullmatch(file.name) for file in path.glob("layer_*-model_*"))
    return neox or any(_megatron_file(folder) for folder in path.glob("mp_rank_*"))


class TensorParallelCheckpoint(Checkpoint):
    """A folder that Megatron-LM or GPT-NeoX wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._blocks: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}  # name -> where each block begins, and the block
        neox = any(_NEOX.fullmatch(file.name) for file in path.glob("layer_*-model_*"))
        ranks, step = _read_neox(path) if neox else _read_megatron(path)
        self.format = f"{'GPT-NeoX' if neox else 'Megatron-LM'}, {len(ranks)} tensor-parallel ranks"
        if step is not None:
            self.step, self.step_is_said = step, True
        names = ranks[0].keys()
        for number, tensors in enumerate(ranks[1:], 1):
            if differing := sorted(names ^ tensors.keys()):
                raise InputError(f"{path}: tensor-parallel ranks 0 and {number} differ in {some(differing)}; files are missing or mixed")
        for name in names:
            self._join(name, [tensors[name] for tensors in ranks], ranks[0], sums_biases=neox)
        if not self.shapes:
            raise InputError(f"{path}: no tensors in it")
        self.precision = precision_of(block for blocks in self._blocks.values() for _, block in blocks)

    def _segments(self, name: str, kind: Kind) -> list[Segment]:
        if kind != "weight":
            raise InputError(f"{self.path}: no Adam moments for {name!r}: this reader takes weights alone from tensor-parallel files")
        segments = [s for offsets, block in self._blocks[name] for s in block_segments(self.shapes[name], offsets, block)]
        return sorted(segments, key=lambda segment: segment.offset)

    def _join(self, name: str, slices: list[Tensor], first_rank: dict[str, Tensor], sums_biases: bool) -> None:
        """Fill `shapes` and `_blocks` for one name."""
        first, count = slices[0], len(slices)
        if any(piece.shape[1:] != first.shape[1:] or piece.dim() != first.dim() for piece in slices):
            raise InputError(f"{self.path}: {name} has shapes {some([str(tuple(piece.shape)) for piece in slices])} on the ranks")
        if is_buffer(name, first.dtype, first.dim()):
            self.buffers[name] = first
        elif count == 1:
            self._place(name, first.shape, [((0,) * first.dim(), first)])
        elif column := _COLUMN.search(name):
            second = name[: column.start(1)] + _SECOND.get(column[1], "") + ".weight"
            gated = second in first_rank and first.shape[0] == 2 * first_rank[second].shape[1]
            rows = [piece.shape[0] for piece in slices]
            starts = [sum(rows[:rank]) for rank in range(count)]
            shape, rest = torch.Size([sum(rows), *first.shape[1:]]), (0,) * (first.dim() - 1)
            if gated:
                halves = [piece.chunk(2) for piece in slices]
                gates = [((start // 2, *rest), gate) for start, (gate, _) in zip(starts, halves, strict=True)]
                ups = [((shape[0] // 2 + start // 2, *rest), up) for start, (_, up) in zip(starts, halves, strict=True)]
                self._place(name, shape, gates + ups)
            else:
                self._place(name, shape, [((start, *rest), piece) for start, piece in zip(starts, slices, strict=True)])
        elif (row := _ROW.search(name)) and row[2] == "weight":
            width = first.shape[1]
            blocks = [((0, rank * width), piece) for rank, piece in enumerate(slices)]
            self._place(name, torch.Size([first.shape[0], count * width]), blocks)
        elif row and sums_biases:
            self._place(name, first.shape, [((0,), torch.stack([piece.float() for piece in slices]).sum(0))])
        elif row or _NORM.search(name):
            self._place(name, first.shape, [((0,) * first.dim(), torch.stack([piece.float() for piece in slices]).mean(0))])
        elif all(torch.equal(piece, first) for piece in slices):
            self._place(name, first.shape, [((0,) * first.dim(), first)])
        else:
            raise InputError(f"{self.path}: how the ranks' parts of {name} {tuple(first.shape)} join is not known to this reader")

    def _place(self, name: str, shape: torch.Size, blocks: list[tuple[tuple[int, ...], Tensor]]) -> None:
        self.shapes[name], self._blocks[name] = shape, blocks


def _megatron_file(folder: Path) -> Path | None:
    return next((folder / name for name in ("model_optim_rng.pt", "model_rng.pt") if (folder / name).is_file()), None)


def _complete(path: Path, found: set[tuple[int, int]], what: str) -> tuple[int, int]:
    """(tensor ranks, stages or layers that are there). Raises InputError when one misses a file that another has."""
    ranks, others = {rank for rank, _ in found}, {other for _, other in found}
    missing = [f"rank {rank}, {what} {other}" for rank in range(max(ranks) + 1) for other in sorted(others) if (rank, other) not in found]
    if missing:
        raise InputError(f"{path}: the files of {some(missing)} are missing")
    return max(ranks) + 1, len(others)


def _read_megatron(path: Path) -> tuple[list[dict[str, Tensor]], int | None]:
    """(names and tensors by tensor rank, step)."""
    files: dict[tuple[int, int], Path] = {}
    for folder in sorted(path.glob("mp_rank_*")):
        if (match := _MEGATRON.fullmatch(folder.name)) and (file := _megatron_file(folder)):
            files[int(match[1]), int(match[2] or 0)] = file
    tensor_ranks, stages = _complete(path, set(files), "pipeline stage")
    ranks: list[dict[str, Tensor]] = []
    steps: dict[int | None, Path] = {}
    for rank in range(tensor_ranks):
        tensors: dict[str, Tensor] = {}
        layers = 0  # a stage counts its layers from 0
        for stage in range(stages):
            content = load_file(files[rank, stage])
            steps.setdefault(content.get("iteration"), files[rank, stage])
            here = 0
            for name, value in _flat(content["model"]):
                if match := re.search(r"(^|\.)layers\.(\d+)\.", name):
                    here = max(here, int(match[2]) + 1)
                    name = f"{name[: match.start(2)]}{layers + int(match[2])}{name[match.end(2) :]}"
                if name in tensors and not torch.equal(tensors[name], value):
                    raise InputError(f"{files[rank, stage]}: {name} differs from the same in an earlier pipeline stage")
                tensors.setdefault(name, value)
            layers += here
        ranks.append(tensors)
    return ranks, _one_step(path, steps)


def _read_neox(path: Path) -> tuple[list[dict[str, Tensor]], int | None]:
    """(names and tensors by tensor rank, step)."""
    files = {(int(m[2]), int(m[1])): file for file in sorted(path.iterdir()) if (m := _NEOX.fullmatch(file.name))}
    tensor_ranks, _ = _complete(path, set(files), "layer")
    ranks: list[dict[str, Tensor]] = [{} for _ in range(tensor_ranks)]
    for (rank, layer), file in sorted(files.items()):
        ranks[rank] |= {f"layers.{layer}.{name}": value for name, value in _flat(load_file(file))}
    steps = {load_file(file).get("global_steps"): file for file in sorted(path.glob("mp_rank_*_model_states.pt"))}
    return ranks, _one_step(path, steps)


def _one_step(path: Path, steps: dict[int | None, Path]) -> int | None:
    if len(steps) > 1:
        raise InputError(f"{path}: files of different steps are mixed: {some([f'{file}: {step}' for step, file in steps.items()])}")
    step = next(iter(steps), None)
    return None if step is None else int(step)


def _flat(state: dict[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    """Dotted names of the tensors in nested dictionaries."""
    found = []
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            found.append((name, value.detach()))
        elif isinstance(value, dict):
            found += _flat(value, f"{name}.")
    return found
