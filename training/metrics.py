"""What is measured while training, and where it goes: the console, TensorBoard and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from training.distributed import Ranks
from training.recipe import LoggingSection

# Dense bf16 peak, FLOP/s, of accelerators whose makers state it. MFU is printed for these alone.
PEAK_FLOPS = {
    "H100": 989.5e12,
    "H200": 989.5e12,
    "H800": 989.5e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
}
MFU_DEFINITION = (
    "MFU = tokens/s x (6 N_matmul + 12 depth width length) / (GPUs x dense bf16 peak); "
    "N_matmul counts every matrix but the embedding look-up; sharpness-aware steps count their passes"
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of this device, FLOP/s, or None when it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Dense bf16 peak of a GPU by the name that its driver gives; a part of one, and slower kinds of it, are not known."""
    words = name.replace("-", " ").split()
    kind = next((kind for kind in PEAK_FLOPS if kind in words), None)
    slower = {"MIG", *(("PCIe", "NVL") if kind in ("H100", "H200", "H800") else ())}
    return None if kind is None or slower & set(words) else PEAK_FLOPS[kind]


class PeakMemory:
    """Peak memory of this process since construction, in bytes.

    On a GPU: what the allocator gave out, since DeepSpeed last set its count back while it built the optimizer. On a CPU: growth of the
    resident set, so the interpreter and its libraries, which were there before, do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.what = "allocated" if device.type == "cuda" else "more than before the model was built, libraries included"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):  # not permitted in some containers: the mark then includes what was held before
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        self.before = self._status("VmRSS")

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        return 0

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, self._status("VmHWM") - self.before)


def _finite(value: Any) -> Any:
    """A copy with None in the place of every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """Writes one record a logged step on the first rank; the other ranks do nothing."""

    def __init__(self, run: Path, section: LoggingSection, ranks: Ranks, total_steps: int, start_step: int) -> None:
        self.first, self.total_steps = ranks.is_first, total_steps
        self.started, self.start_step = time.perf_counter(), start_step
        self.writer = self.file = None
        if self.first:
            drop_half_a_line(run / "metrics.jsonl")
            self.file = open(run / "metrics.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the run
            if section.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def record(self, values: dict[str, Any]) -> None:
        """Append one record (it must hold "step") to metrics.jsonl and its numbers to TensorBoard. What is not finite is null in JSON,
        which has no word for it."""
        if self.file is None:
            return
        self.file.write(json.dumps(_finite({k: v for k, v in values.items() if v is not None}), allow_nan=False) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                if key not in ("step", "tokens") and isinstance(value, int | float):
                    self.writer.add_scalar(key, value, values["step"])

    def record_activations(self, step: int, tokens: int, places: dict[str, dict[str, float | None]]) -> None:
        """One record of the measures at each place; TensorBoard gets `measure/place`, and the largest kurtosis by itself."""
        if self.file is None:
            return
        largest = max((m["kurtosis"] for m in places.values() if m["kurtosis"] is not None), default=None)
        self.record({"step": step, "tokens": tokens, "largest_kurtosis": largest, "activations": places})
        if self.writer is not None:
            for place, measures in places.items():
                for measure, value in measures.items():
                    if value is not None:
                        self.writer.add_scalar(f"{measure}/{place.replace(' ', '_')}", value, step)

    def say(self, text: str) -> None:
        """Print a line, on the first rank alone."""
        if self.first:
            print(text, flush=True)

    def progress(self, step: int, values: dict[str, Any]) -> None:
        """The progress line: step, loss, learning rate, gradient norm, rate, MFU where known, time left."""
        elapsed = time.perf_counter() - self.started
        left = elapsed / max(1, step - self.start_step) * (self.total_steps - step)
        mfu = f"  mfu {values['mfu']:.1%}" if values.get("mfu") is not None else ""
        self.say(
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"grad {values['grad_norm']:.3f}  {values['tokens_per_second']:,.0f} tok/s{mfu}  {duration(left)} left"
        )

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.file is not None:
            self.file.close()


def drop_half_a_line(path: Path) -> None:
    """Cut off what a launch that was killed in the middle of a line left at the end of a file of lines."""
    if path.exists():
        with open(path, "rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 4d03h."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
