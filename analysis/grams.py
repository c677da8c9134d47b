"""One Gram matrix a tensor, from many checkpoints in one lock-step pass over their files.

Inner products are summed in the increment basis

    b_0 = theta_0,   b_t = u_(t-1) = theta_t - theta_(t-1),        B_st = <b_s, b_t>,   float64,

because steps are a thousand times shorter than weights: from inner products of the weights themselves, rounded to float32, the
angle between two steps comes out wrong even in sign. B of a layer or of the network is the sum over its tensors.

Cost, for K checkpoints of N parameters of b bytes: K N b bytes read once while K^2 N multiply-adds run beside; memory as asked. What
is kept in a file need not be computed again: a checkpoint more takes one reading of all, and multiply-adds for its own row alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from analysis.checkpoint import Checkpoint
from analysis.fused import Heads, heads_of, parts_of
from analysis.output import write_whole
from analysis.ranks import Ranks
from model.errors import InputError

BUFFERS = 4  # units in memory: one is multiplied while the others are read
READERS = 2  # threads: one copies while the other waits for the disk
SAVE_SECONDS = 60.0  # how often unfinished work is written down
BLOCK_BYTES = 1 << 20  # multiplied at once: stays in a core's cache, and sums of few thousand elements round little


class _Unit(NamedTuple):
    """What is multiplied at once: runs (start, stop) of a flattened tensor, all of one part."""

    part: str
    tensor: str
    runs: list[tuple[int, int]]

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.runs)


@dataclass
class _Kept:
    """What a file of Gram matrices holds: `grams[part]` (K, K) float64, or (new, K) where unfinished, of these checkpoints in order.

    layout: what `_layout` says of the parts: with other heads, parts of the same names are other elements.
    """

    identities: list[str]
    layout: str
    grams: dict[str, Tensor]


def increment_grams(
    checkpoints: Sequence[Checkpoint],
    memory_megabytes: float = 512,
    progress: bool = True,
    keep: Path | None = None,
    ranks: Ranks | None = None,
    heads: Heads | None = None,
) -> dict[str, Tensor]:
    """One Gram matrix a tensor, in the increment basis; of a fused query-key-value tensor one each, `NAME[query]` and so on.

    The checkpoints may differ in format, ZeRO stage and ranks: elements are matched by their place in the parameter.

    Args:
        checkpoints: K checkpoints of one model, in order of step.
        memory_megabytes: bounds the buffers, `BUFFERS` of K rows of float32 of as many elements as fit.
        keep: a file to keep the matrices in. What it holds of these checkpoints is not computed again, and a pass that was cut off
            goes on where it last wrote (each rank beside it, under its own name).
        ranks: the processes that share the work; each takes a run of the elements and gets the whole result.
        heads: of the attention, where the checkpoint does not say; see `analysis.fused`.

    Returns:
        {part: B}, B (K, K) float64, B_st = <b_s, b_t> of weights read as float32.

    Raises:
        InputError: fewer than two checkpoints; parameters differ in name or shape; a weight is not finite. On every rank alike.
    """
    ranks = ranks or Ranks()
    _check_one_model(checkpoints)
    count, first = len(checkpoints), checkpoints[0]
    columns = int(memory_megabytes * 2**20 / (BUFFERS * 4 * count))
    if columns < 1:
        raise InputError(f"--memory-megabytes {memory_megabytes}: {count} checkpoints need at least {BUFFERS * 4 * count / 2**20:.6f}")

    identities = [identity(checkpoint) for checkpoint in checkpoints] if keep else []
    heads = heads or heads_of(first)
    units = list(_units(first, columns, heads))
    parts, layout = list(dict.fromkeys(unit.part for unit in units)), _layout(first, heads)
    known = _known(keep, identities, layout) if keep else None
    old = 0 if known is None else len(next(iter(known.values())))  # the first so many checkpoints need no products among themselves
    problem = None
    share = {part: torch.zeros(count - old, count, dtype=torch.float64) for part in parts}
    try:
        if old < count:
            mine = _share(units, ranks)
            unfinished = _Kept([*identities, f"{old} old", f"{columns} columns"], layout, {})
            _multiply(checkpoints, mine, old, share, keep, unfinished, ranks, progress)
    except InputError as error:
        problem = error
    ranks.raise_together(problem)
    new = ranks.add_up(torch.stack(list(share.values())))
    grams: dict[str, Tensor] = {}
    for part, rows in zip(parts, new, strict=True):
        gram = torch.empty(count, count, dtype=torch.float64)
        if known is not None:
            gram[:old, :old] = known[part]
        gram[old:], gram[:old, old:] = rows, rows[:, :old].T
        grams[part] = gram
    broken = next((part for part, gram in grams.items() if not gram.isfinite().all()), None)
    if broken is not None:
        name = next(unit.tensor for unit in units if unit.part == broken)
        bad = next(c for c in checkpoints if not all(values.float().isfinite().all() for _, values in c.segments(name)))
        raise InputError(f"{bad.path}: {name} holds values that are not finite; leave this checkpoint out")
    if keep and ranks.is_first and old < count:
        _write(keep, _Kept(identities, layout, grams))
    ranks.wait()
    if keep:
        _unfinished(keep, ranks).unlink(missing_ok=True)
    return grams


def _multiply(
    checkpoints: Sequence[Checkpoint],
    units: list[_Unit],
    old: int,
    share: dict[str, Tensor],
    keep: Path | None,
    unfinished: _Kept,
    ranks: Ranks,
    progress: bool,
) -> None:
    """Add this rank's units to `share[part]` (new, K), going on from what it wrote down before, under what `unfinished` says."""
    count = len(checkpoints)
    kept = _read(_unfinished(keep, ranks), unfinished.layout) if keep else None
    if kept and kept.identities == unfinished.identities:
        unfinished.grams = {part: gram for part, gram in kept.grams.items() if part in share}
        for part, gram in unfinished.grams.items():
            share[part] += gram
    todo = [unit for unit in units if unit.part not in unfinished.grams]
    if not todo:
        return
    width = max(unit.width for unit in todo)
    buffers = torch.empty(min(BUFFERS, len(todo)), count * width, dtype=torch.float32)
    block_columns = max(BLOCK_BYTES // (8 * count), 256)
    weights, increments = torch.empty(2, count, min(block_columns, width), dtype=torch.float64)
    written = time.monotonic()
    total = sum(unit.width for unit in todo)

    def load(i: int) -> Tensor:
        if i == 0 or todo[i].tensor != todo[i - 1].tensor:
            for checkpoint in checkpoints:
                checkpoint.expect(todo[i].tensor)
        rows = buffers[i % len(buffers), : count * todo[i].width].view(count, todo[i].width)
        for row, checkpoint in zip(rows, checkpoints, strict=True):
            position = 0
            for start, stop in todo[i].runs:
                checkpoint.read(todo[i].tensor, start, row[position : position + stop - start])
                position += stop - start
        return rows

    quiet = not (progress and ranks.is_first)
    with (
        ThreadPoolExecutor(READERS) as readers,  # read the units behind the one that is multiplied
        tqdm(total=4 * count * total, unit="B", unit_scale=True, desc="trajectory", mininterval=1.0, disable=quiet) as bar,
    ):
        coming = deque(readers.submit(load, i) for i in range(len(buffers) - 1))
        for i, unit in enumerate(todo):
            if i + len(buffers) - 1 < len(todo):  # into the buffer of the unit before this one
                coming.append(readers.submit(load, i + len(buffers) - 1))
            rows = coming.popleft().result()
            for block in rows.split(block_columns, dim=1):
                thetas, steps = weights[:, : block.shape[1]].copy_(block), increments[:, : block.shape[1]]
                steps[0] = thetas[0]
                torch.sub(thetas[1:], thetas[:-1], out=steps[1:])  # of float32 numbers, nearly always exact in float64
                share[unit.part] += _products(steps[old:], steps)  # each block a sum of its own, which rounds less
            bar.update(4 * count * unit.width)
            ends_part = i + 1 == len(todo) or todo[i + 1].part != unit.part
            if keep and ends_part:
                unfinished.grams[unit.part] = share[unit.part]
                if time.monotonic() - written > SAVE_SECONDS and i + 1 < len(todo):
                    _write(_unfinished(keep, ranks), unfinished)
                    written = time.monotonic()


def _products(new: Tensor, all_: Tensor) -> Tensor:
    """new (n, c) and all_ (K, c) -> (n, K), by NumPy, which makes a matrix times its own transpose as what it is, symmetric."""
    return torch.from_numpy(new.numpy() @ all_.numpy().T)


def _check_one_model(checkpoints: Sequence[Checkpoint]) -> None:
    if len(checkpoints) < 2:
        raise InputError(
            f"{checkpoints[0].path}: a trajectory needs at least two checkpoints, found 1" if checkpoints else "no checkpoints"
        )
    first = checkpoints[0]
    for other in checkpoints[1:]:
        differing = sorted({name for name, _ in first.shapes.items() ^ other.shapes.items()})
        if differing:
            raise InputError(f"{first.path} and {other.path} are not of one model: they differ in {', '.join(differing[:3])}")


# ---- who multiplies what ---------------------------------------------------------------------------------------------


def _units(checkpoint: Checkpoint, columns: int, heads: Heads | None) -> Iterator[_Unit]:
    """Every element of every tensor once, at most `columns` at a time, one part after the other."""
    for name in checkpoint.shapes:
        for part, part_runs in parts_of(checkpoint, name, heads):
            runs: list[tuple[int, int]] = []
            filled = 0
            for start, stop in part_runs:
                while start < stop:
                    end = min(stop, start + columns - filled)
                    runs.append((start, end))
                    filled += end - start
                    start = end
                    if filled == columns:
                        yield _Unit(part, name, runs)
                        runs, filled = [], 0
            if runs:
                yield _Unit(part, name, runs)


def _share(units: list[_Unit], ranks: Ranks) -> list[_Unit]:
    """This rank's units: a run of them with about its share of the elements."""
    total, position, mine = sum(unit.width for unit in units), 0, []
    for unit in units:
        if position * ranks.count // total == ranks.rank:
            mine.append(unit)
        position += unit.width
    return mine


# ---- what is kept ----------------------------------------------------------------------------------------------------


def identity(checkpoint: Checkpoint) -> str:
    """Tells a checkpoint from any other: its manifest's checksums, else the names, sizes and times of its files."""
    files = (checkpoint.manifest or {}).get("files") or [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files()
    ]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _layout(checkpoint: Checkpoint, heads: Heads | None) -> str:
    """Tells the parts of a checkpoint, and which elements of which tensor each takes, from any other division."""
    parts = [(name, list(parts_of(checkpoint, name, heads))) for name in checkpoint.shapes]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _known(keep: Path, identities: list[str], layout: str) -> dict[str, Tensor] | None:
    """Gram matrices of the longest beginning of these checkpoints that the file covers, or None.

    Checkpoints that were deleted since are no hindrance: b_t between two that are left is the sum of the increments between them.
    """
    kept = _read(keep, layout)
    if kept is None or any(len(gram) != len(kept.identities) for gram in kept.grams.values()):
        return None
    places: list[int] = []
    for one in identities:
        if one not in kept.identities or (places and kept.identities.index(one) <= places[-1]):
            break
        places.append(kept.identities.index(one))
    if len(places) < 2:
        return None
    merge = torch.zeros(len(places), len(kept.identities), dtype=torch.float64)
    for row, place in enumerate(places):
        merge[row, (places[row - 1] + 1 if row else 0) : place + 1] = 1.0
    return {part: merge @ gram @ merge.T for part, gram in kept.grams.items()}


def _unfinished(keep: Path, ranks: Ranks) -> Path:
    return keep.with_name(f".{keep.stem}-{ranks.rank}-of-{ranks.count}{keep.suffix}")


def _write(path: Path, kept: _Kept) -> None:
    tensors = {part: gram.clone() for part, gram in kept.grams.items()}
    write_whole(path, save(tensors, {"format": "1", "checkpoints": json.dumps(kept.identities), "layout": kept.layout}))


def _read(path: Path, layout: str) -> _Kept | None:
    """What a file holds; None when there is none, it is not ours, or of another layout: then it is made anew."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata["layout"] != layout:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
            return _Kept(json.loads(metadata["checkpoints"]), layout, tensors)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
