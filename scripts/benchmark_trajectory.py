"""How fast trajectories are read: against the limit of this machine, and against DeepSpeed's own way.

    python -m scripts.benchmark_trajectory --checkpoints 8 --parameters 50e6 --ranks 4 --stage 3 --folder /tmp/benchmark

Makes checkpoints in DeepSpeed's ZeRO layout (stage 2 or 3), then times, in one run and one after the other:

    read      every byte of the float32 shards once
    multiply  the matrix products of a pass, on data in the processor's caches
    ours      the Gram matrices of all tensors (`analysis.grams`)
    peer      zero_to_fp32 of each checkpoint, torch.load of its output, and a dot product a pair of checkpoints

The limit is the larger of the first two. Anonymous memory is sampled while ours runs; files on disk are compared before and after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from analysis.grams import increment_grams
from analysis.shards import open_checkpoint


def shapes_of(parameters: int, width: int) -> dict[str, torch.Size]:
    """Matrices of a decoder of that width, and a last one so that the sum is `parameters`."""
    shapes: dict[str, torch.Size] = {}
    left, layer = parameters, 0
    while left > 12 * width * width + width:
        for name, shape in (("attention.query", (3 * width, width)), ("mlp.up", (4 * width, width)), ("mlp.down", (width, 4 * width))):
            shapes[f"blocks.{layer}.{name}.weight"] = torch.Size(shape)
        shapes[f"blocks.{layer}.norm.weight"] = torch.Size([width + 1])  # divides by no number of ranks
        left, layer = parameters - sum(shape.numel() for shape in shapes.values()), layer + 1
    return {**shapes, "embedding.weight": torch.Size([max(left // width, 1), width])}


def write_checkpoint(folder: Path, shapes: dict[str, torch.Size], step: int, ranks: int, stage: int) -> None:
    """DeepSpeed's files of one step: float32 shards, and the 16-bit weights that its converter looks at."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(step)
    module = {name: torch.empty(0 if stage == 3 else shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    state = {
        "module": module,
        "buffer_names": [],
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "global_steps": step,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }
    total = sum(shape.numel() for shape in shapes.values())
    chunks = sum(math.ceil(shape.numel() / ranks) for shape in shapes.values())
    size = chunks if stage == 3 else 2 * math.ceil(total / (2 * ranks))
    for rank in range(ranks):
        if stage == 3 or rank == 0:
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(state, folder / f"{prefix}mp_rank_00_model_states.pt")
        # a random walk whose start is a hundred times longer than its steps
        flat = torch.randn(size, generator=torch.Generator().manual_seed(rank))
        flat += 0.01 * math.sqrt(max(step, 1)) * torch.randn(size, generator=generator)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        count = ranks if stage == 3 else [ranks]
        kept = flat if stage == 3 else flat[: max(min(size, total - rank * size), 0)].clone()
        optimizer = {"zero_stage": stage, "partition_count": count, key: [kept], "base_optimizer_state": {"state": {}}}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def drop_caches(folder: Path) -> None:
    """Ask the kernel to forget the files, so that reading them counts; without effect on some file systems."""
    for path in folder.rglob("*.pt"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory:
    """The most anonymous memory of this process above what it had at the start, in bytes, sampled 50 times a second."""

    def __enter__(self) -> Memory:
        self.peak, self._start, self._done = 0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._done.set()
        self._thread.join()

    def _now(self) -> int:
        match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match is not None
        return 1024 * int(match[1])

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self._now() - self._start)


def read_once(folder: Path) -> float:
    """Seconds to read every shard."""
    drop_caches(folder)
    start, buffer = time.perf_counter(), bytearray(8 << 20)
    for path in sorted(folder.rglob("*optim_states.pt")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def multiply(count: int, parameters: int) -> float:
    """Seconds of the float64 products of a pass, (K, c) times its transpose, at the piece size that suits this processor best."""
    seconds = []
    for megabytes in (1, 2, 4, 8):
        columns = megabytes * 2**20 // (8 * count)
        rows, gram = torch.randn(count, columns, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
        pieces = math.ceil(parameters / columns)
        measured = min(pieces, 200)
        gram.addmm_(rows, rows.T)
        start = time.perf_counter()
        for _ in range(measured):
            gram.addmm_(rows, rows.T)
        seconds.append((time.perf_counter() - start) * pieces / measured)
    return min(seconds)


def peer(folder: Path, scratch: Path) -> float:
    """Seconds of zero_to_fp32, torch.load and pairwise dot products, checkpoints two at a time in memory."""
    drop_caches(folder)
    start = time.perf_counter()
    whole = []
    for step in sorted(path for path in folder.iterdir() if path.is_dir()):
        out = scratch / step.name
        code = (
            "import sys\nfrom deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert\n"
            "convert(sys.argv[1], sys.argv[2], tag=sys.argv[3], max_shard_size='100GB')"
        )
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, "-c", code, str(folder), str(out), step.name], check=True, env=environment, capture_output=True)
        whole.append(out / "pytorch_model.bin")
    for i, first in enumerate(whole):
        a = torch.load(first, map_location="cpu", weights_only=True)
        for second in whole[i:]:
            b = torch.load(second, map_location="cpu", weights_only=True)
            sum(float(a[name].flatten() @ b[name].flatten()) for name in a)
    return time.perf_counter() - start


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.pt")):
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--stage", type=int, choices=(2, 3), default=3)
    parser.add_argument("--memory-megabytes", type=float, default=4)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/burnish_benchmark_trajectory"), help="is emptied before and after")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    count, scratch, folder = arguments.checkpoints, arguments.folder / "peer", arguments.folder / "run"
    shutil.rmtree(arguments.folder, ignore_errors=True)
    shapes = shapes_of(int(arguments.parameters), arguments.width)
    parameters = sum(shape.numel() for shape in shapes.values())
    try:
        for step in range(count):
            write_checkpoint(folder / f"step{step}", shapes, step, arguments.ranks, arguments.stage)
        before = digest(folder)
        seconds = {"read": read_once(folder), "multiply": multiply(count, parameters)}
        drop_caches(folder)
        with Memory() as memory:
            start = time.perf_counter()
            increment_grams([open_checkpoint(folder / f"step{step}") for step in range(count)], arguments.memory_megabytes, progress=False)
            seconds["ours"] = time.perf_counter() - start
        seconds["read again"] = read_once(folder)
        if not arguments.without_peer:
            seconds["peer"] = peer(folder, scratch)
        limit = max(min(seconds["read"], seconds["read again"]), seconds["multiply"])
        result = {
            "checkpoints": count,
            "parameters": parameters,
            "ranks": arguments.ranks,
            "zero_stage": arguments.stage,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "share_of_the_limit": round(limit / seconds["ours"], 2),
            "times_faster_than_the_peer": round(seconds["peer"] / seconds["ours"], 1) if "peer" in seconds else None,
            "anonymous_megabytes": round(memory.peak / 2**20),
            "bytes_on_disk_unchanged": digest(folder) == before,
        }
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
