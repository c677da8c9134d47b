"""How fast trajectories are read: against the limit of this machine, and against DeepSpeed's own way.

    python -m scripts.benchmark_trajectory --checkpoints 32 --parameters 200e6 --ranks 4 --peer-checkpoints 4 --folder /tmp/benchmark

Makes checkpoints in DeepSpeed's ZeRO layout (stage 2 or 3), then times, in one run and one after the other:

    read      every byte of the float32 shards once
    multiply  the matrix products of a pass, on data in the processor's caches
    ours      the Gram matrices of all tensors (`analysis.grams`)
    ours, N processes    `torchrun --nproc_per_node N -m analysis trajectory`, start and pictures included; compared with one process
    peer      zero_to_fp32 of each checkpoint; then torch.load of its output, and a dot product a pair of checkpoints

The limit is the larger of the first two. Disks stray, so --rounds passes stand between readings: the share is the median over the rounds
of the limit, with the mean of the readings before and after, over the pass. Where other work shares the machine, seconds of the processor
say more than the clock.
Anonymous memory is sampled while ours runs; files on disk are compared before and after.
With --peer-checkpoints P the peer works on P checkpoints and its times are scaled: converting by K / P, the rest by the pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from analysis.grams import increment_grams
from analysis.output import write_json
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


def multiply(count: int, parameters: int) -> tuple[float, float]:
    """Seconds, by the clock and of the processor, of a pass's products, (K, c) float64 times its transpose, in the best pieces."""
    seconds = []
    for kilobytes in (512, 1024, 2048, 4096, 8192):
        columns = kilobytes * 2**10 // (8 * count)
        rows, gram = torch.randn(count, columns, dtype=torch.float64).numpy(), np.zeros((count, count))
        pieces = math.ceil(parameters / columns)
        measured = min(pieces, 300)
        gram += rows @ rows.T
        start, started = time.perf_counter(), time.process_time()
        for _ in range(measured):
            gram += rows @ rows.T
        scale = pieces / measured
        seconds.append(((time.perf_counter() - start) * scale, (time.process_time() - started) * scale))
    return min(seconds)


def peer(steps: list[Path], scratch: Path) -> tuple[float, float]:
    """Seconds of zero_to_fp32, and of torch.load and a dot product for each pair; checkpoints two at a time in memory."""
    code = (
        "import sys\nfrom deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert\n"
        "for tag in sys.argv[3:]:\n    convert(sys.argv[1], f'{sys.argv[2]}/{tag}', tag=tag, max_shard_size='100GB')"
    )
    command = [sys.executable, "-c", code, str(steps[0].parent), str(scratch), *(step.name for step in steps)]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True)
    whole = [scratch / step.name / "pytorch_model.bin" for step in steps]
    converted = time.perf_counter()
    for i, first in enumerate(whole):
        a = torch.load(first, map_location="cpu", weights_only=True)
        for second in whole[i:]:
            b = torch.load(second, map_location="cpu", weights_only=True)
            sum(float(a[name].flatten() @ b[name].flatten()) for name in a)
    return converted - start, time.perf_counter() - converted


def spread_over(processes: int, folder: Path, scratch: Path, expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(seconds of a launch of several processes, its largest deviation from `expected` relative to the lengths multiplied)."""
    out = scratch / f"processes-{processes}"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "-m", "analysis"]
    start = time.perf_counter()
    subprocess.run([*command, "trajectory", str(folder), "--out", str(out)], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    deviation = 0.0
    for name, gram in load_file(out / "grams.safetensors").items():
        lengths = expected[name].diag().sqrt()
        deviation = max(deviation, float(((gram - expected[name]).abs() / lengths.outer(lengths)).max()))
    return seconds, deviation


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
    parser.add_argument("--memory-megabytes", type=float, default=512)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/burnish_benchmark_trajectory"), help="is emptied before and after")
    parser.add_argument("--rounds", type=int, default=3, help="readings and passes in turn (default: 3)")
    parser.add_argument("--processes", type=int, nargs="*", default=[], help="also spread over so many processes")
    parser.add_argument("--peer-checkpoints", type=int, metavar="P", help="default: all; 0: without the peer")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    count, scratch, folder = arguments.checkpoints, arguments.folder / "peer", arguments.folder / "run"
    shutil.rmtree(arguments.folder, ignore_errors=True)
    shapes = shapes_of(int(arguments.parameters), arguments.width)
    parameters = sum(shape.numel() for shape in shapes.values())
    steps = [folder / f"step{step}" for step in range(count)]
    peers = count if arguments.peer_checkpoints is None else arguments.peer_checkpoints
    try:
        print(f"writing {count} checkpoints of {parameters:,} parameters ...", flush=True)
        for step, path in enumerate(steps):
            write_checkpoint(path, shapes, step, arguments.ranks, arguments.stage)
        before, size = digest(folder), sum(path.stat().st_size for path in folder.rglob("*optim_states.pt"))
        multiplying, of_processor = multiply(count, parameters)
        print("reading, and passes in turn ...", flush=True)
        readings, passes, processor, anonymous = [read_once(folder)], [], [], 0
        for _ in range(arguments.rounds):
            drop_caches(folder)
            with Memory() as memory:
                start, started = time.perf_counter(), time.process_time()
                grams = increment_grams([open_checkpoint(path) for path in steps], arguments.memory_megabytes, progress=False)
                passes.append(time.perf_counter() - start)
                processor.append(time.process_time() - started)
            anonymous = max(anonymous, memory.peak)
            readings.append(read_once(folder))
            print(f"read in {readings[-2]:.1f} s, a pass in {passes[-1]:.1f} s, read in {readings[-1]:.1f} s", flush=True)
        reading = [statistics.fmean(pair) for pair in itertools.pairwise(readings)]
        shares = [max(read, multiplying) / ours for read, ours in zip(reading, passes, strict=True)]
        seconds = {
            "read": statistics.median(readings),
            "multiply": multiplying,
            "multiply, of the processor": of_processor,
            "ours": statistics.median(passes),
            "ours, of the processor": statistics.median(processor),
        }
        result = {
            "command": "python -m scripts.benchmark_trajectory " + " ".join(sys.argv[1:]),
            "checkpoints": count,
            "parameters": parameters,
            "ranks": arguments.ranks,
            "zero_stage": arguments.stage,
            "bytes": size,
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "share_of_the_limit": round(statistics.median(shares), 2),
            "rounds": {
                "read": [round(x, 2) for x in readings],
                "ours": [round(x, 2) for x in passes],
                "share": [round(x, 2) for x in shares],
            },
            "anonymous_megabytes": round(anonymous / 2**20),
        }
        deviations = {}
        for processes in arguments.processes:
            drop_caches(folder)
            print(f"{processes} processes ...", flush=True)
            seconds[f"ours, {processes} processes"], deviations[processes] = spread_over(processes, folder, scratch, grams)
        if deviations:
            result["largest_deviation_from_one_process"] = deviations
        result["bytes_on_disk_unchanged"] = digest(folder) == before
        if peers:
            drop_caches(folder)
            print(f"zero_to_fp32 of {peers} checkpoints ...", flush=True)
            convert, pairs = peer(steps[:peers], scratch)
            seconds["peer, converting"] = convert * count / peers
            seconds["peer, loading and dot products"] = pairs * count * (count + 1) / (peers * (peers + 1))
            whole = seconds["peer, converting"] + seconds["peer, loading and dot products"]
            result |= {
                "peer_checkpoints": peers,
                "times_faster_than_the_peer": round(whole / seconds["ours"], 1),
                "times_faster_than_its_converting_alone": round(seconds["peer, converting"] / seconds["ours"], 1),
            }
        rate = size / min(readings)
        result["predicted_hours_of_154_checkpoints_of_12B"] = {
            "reading, fp16 files": round(154 * 12e9 * 2 / rate / 3600, 1),
            "reading, float32 shards": round(154 * 12e9 * 4 / rate / 3600, 1),
            "multiplying, one process": round(multiply(154, 12_000_000_000)[0] / 3600, 1),
        }
        result["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
