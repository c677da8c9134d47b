"""Where a step's time goes: a torch profiler trace of named steps, and a screen that sums it up by kind of work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from training.run_folder import write_whole

# The first kind one of whose words is in an operation's or a kernel's name; what none names is "everything else".
KINDS: dict[str, tuple[str, ...]] = {
    "communication": ("nccl", "gloo", "c10d", "all_reduce", "allreduce", "all_gather", "reduce_scatter", "broadcast"),
    "attention": ("scaled_dot_product", "flash", "fmha", "flex_attention"),
    "optimizer": ("fused_adam", "foreach", "Optimizer.", "multi_tensor"),
    "loss": ("log_softmax", "nll_loss", "LinearCrossEntropy", "LinearProduct", "exp_", "scatter_add"),
    "norms": ("norm", "rsqrt", "GammaBeta"),
    "matrix products": ("mm", "matmul", "linear", "gemm", "cutlass", "nvjet", "xmma"),
    "copies": ("copy", "Memcpy", "cat", "clone", "contiguous", "to_copy", "Memset"),
    "elementwise": (
        "mul",
        "add",
        "sub",
        "div",
        "gelu",
        "silu",
        "relu",
        "pow",
        "sum",
        "mean",
        "neg",
        "tanh",
        "fill",
        "elementwise",
        "triton",
    ),
}
SHOWN = 12  # operations listed by name


@contextmanager
def profiled(folder: Path, step: int, wanted: bool) -> Iterator[None]:
    """Within, where it is wanted, the work of this process is recorded: folder/step-N.json.gz, a Chrome trace, and step-N.txt, its sum."""
    if not wanted:
        yield
        return
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        yield
        if cuda:
            torch.cuda.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"step-{step:08d}.json.gz"
    beside = trace.with_name(f".writing-{trace.name}")  # torch compresses what ends in .gz
    recorded.export_chrome_trace(str(beside))
    beside.replace(trace)
    write_whole(folder / f"step-{step:08d}.txt", summary(recorded, step, cuda))


def summary(recorded: Any, step: int, cuda: bool) -> str:
    """A screen: milliseconds by kind of work, and the operations that took most; of kernels on a GPU, of operations on a CPU."""
    averages = recorded.key_averages()
    if cuda:  # the kernels themselves; an operation's device time is theirs once more, and so is a named span's
        on_device = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
        kernels = [e for e in averages if e.device_type == on_device and not e.is_user_annotation]
        times = {e.key: (e.self_device_time_total / 1e3, e.count) for e in kernels}
    else:
        times = {e.key: (e.self_cpu_time_total / 1e3, e.count) for e in averages}
    total = sum(time for time, _ in times.values())
    by_kind: dict[str, float] = defaultdict(float)
    for name, (time, _) in times.items():
        by_kind[kind_of(name)] += time
    what = "kernels on the GPU" if cuda else "operations on the CPU, each without those that it calls"
    lines = [f"step {step}: {total:.1f} ms of {what}", ""]
    lines += [
        f"{kind:<20}{time:>12.1f} ms{time / max(total, 1e-9):>8.1%}" for kind, time in sorted(by_kind.items(), key=lambda item: -item[1])
    ]
    lines += ["", f"{'the longest':<62}{'ms':>10}{'share':>8}{'calls':>8}"]
    for name, (time, count) in sorted(times.items(), key=lambda item: -item[1][0])[:SHOWN]:
        lines.append(f"{name[:60]:<62}{time:>10.1f}{time / max(total, 1e-9):>8.1%}{count:>8}")
    return "\n".join(lines) + "\n"


def kind_of(name: str) -> str:
    """The kind of work that an operation or a kernel does, by its name."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "everything else")
