"""When checkpoints are written: at once, or beside training, from a copy in the host's memory, with `checkpoint.asynchronous`.

Beside training nothing that `training/checkpoint.py` promises is given up, since the same `checkpoint.write` runs, in a thread on every
rank that agrees with the others over a group of its own. One save is under way at a time: the next one, a rewind, a stop on request, the
end and an error wait for it. What goes wrong in it is an error of the run, on every rank after the same step.

A thread and no process: what it does (writing, CRC-32, SHA-256, fsync) it does without Python's lock (scripts/benchmark_saving.py).
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training import checkpoint
from training.distributed import Ranks
from training.engine import Engine
from training.recipe import Recipe
from training.watchdog import Watchdog, is_lost_connection


@dataclass
class Saved:
    """A checkpoint of this launch. `seconds`: from its beginning until it was whole; `wait_seconds`: of these without training."""

    step: int
    tokens: int
    folder: Path = Path()
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"step": self.step, "tokens": self.tokens, "save_seconds": self.seconds, "save_wait_seconds": self.wait_seconds}


class Saver:
    """A context that every rank enters when the process group is up; its end waits for a save that is under way.

    Attributes:
        failed: the save under way could not be made, on every rank: the run is to stop, and `wait` says why.
    """

    def __init__(self, run: Path, recipe: Recipe, ranks: Ranks, watchdog: Watchdog) -> None:
        self.run, self.keep, self.ranks, self.watchdog = run, recipe.checkpoint, ranks, watchdog
        self._group: Any = None
        if self.keep.asynchronous and ranks.world_size > 1:
            # the watchdog ends a save that takes too long, and says more than gloo would
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=recipe.run.hang_seconds + 60))
        self._copies = HostCopies()
        self._under_way: tuple[threading.Thread, Saved] | None = None
        self._whole: list[Saved] = []
        self._problem: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self._problem is not None

    def save(self, engine: Engine, step: int, tokens: int, state: dict[str, Any]) -> None:
        """Write the checkpoint after `step` steps and `tokens` tokens, or begin to. Every rank calls it.

        Args:
            state: what else the loop needs to go on, in JSON's types; it comes back in the manifest.

        Raises:
            InputError: on every rank alike: the disk refused this one, or the one before. TrainingStoppedError: as `checkpoint.write`.
        """
        self.wait()
        saved, began = Saved(step, tokens), time.perf_counter()
        contents = checkpoint.contents(engine, self.run, step, tokens, state)
        if self.keep.asynchronous:
            copies, arrived = self._copies.of(contents.files)
            work = (contents._replace(files=copies), arrived, saved, began)
            thread = threading.Thread(target=self._write_beside, args=work, name="checkpoint writer", daemon=True)
            self._under_way = (thread, saved)
            thread.start()
            saved.wait_seconds = time.perf_counter() - began
        else:
            self._write(contents, saved, began)
            saved.wait_seconds = saved.seconds
            self._whole.append(saved)

    def _write(self, contents: checkpoint.Contents, saved: Saved, began: float) -> None:
        saved.folder = checkpoint.write(contents, self.ranks, self.keep, self._group)
        saved.seconds = time.perf_counter() - began

    def _write_beside(self, contents: checkpoint.Contents, arrived: Callable[[], None], saved: Saved, began: float) -> None:
        self.watchdog.beside(f"saving step {saved.step} beside training")
        try:
            arrived()
            self._write(contents, saved, began)
        except BaseException as error:
            self._problem = error
        finally:
            self.watchdog.beside(None)

    def wait(self) -> None:
        """Until the save under way is made. Raises what went wrong in it, on every rank."""
        if self._under_way is None:
            return
        (thread, saved), began = self._under_way, time.perf_counter()
        thread.join()
        saved.wait_seconds += time.perf_counter() - began
        self._under_way = None
        if self._problem is not None:
            raise self._problem
        self._whole.append(saved)

    def finished(self) -> list[Saved]:
        """The checkpoints that have become whole since the last call."""
        if self._under_way is not None and not self._under_way[0].is_alive() and not self.failed:
            self.wait()
        whole, self._whole = self._whole, []
        return whole

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error the save under way is awaited too, unless a rank is lost (it could not finish) or the error is Ctrl-C."""
        if error is None:
            self.wait()
        elif isinstance(error, Exception) and not is_lost_connection(error):
            try:
                self.wait()
            except Exception as problem:
                print(f"warning: {problem}", file=sys.stderr, flush=True)


class HostCopies:
    """Copies of what is to be written, in memory of the host that is kept for the next time: pinned for what lies on a GPU."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def of(self, content: Any) -> tuple[Any, Callable[[], None]]:
        """(the same with copies of all tensors, a function that waits until these have arrived). It overwrites the copies before.

        Each storage is copied once, so tensors that share one still do, and the files hold what they would have held.
        """
        free: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)
        for buffer in self._kept:
            free[buffer.numel(), buffer.is_pinned()].append(buffer)
        copies: dict[int, Tensor] = {}  # by the address of the storage
        on_gpu = False

        def copied(value: Any) -> Any:
            nonlocal on_gpu
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                buffer = copies.get(storage.data_ptr())
                if buffer is None:
                    size, pinned = storage.nbytes(), value.is_cuda
                    on_gpu |= pinned
                    same = free[size, pinned]
                    buffer = same.pop() if same else torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
                    # on a GPU in the stream of the training step: what changes the weights next comes after it
                    buffer.copy_(torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage), non_blocking=True)
                    copies[storage.data_ptr()] = buffer
                return torch.empty(0, dtype=value.dtype).set_(
                    buffer.untyped_storage(), value.storage_offset(), value.size(), value.stride()
                )
            if isinstance(value, dict):
                same_kind = copy.copy(value)
                same_kind.update((key, copied(inner)) for key, inner in value.items())
                return same_kind
            if isinstance(value, list):
                return [copied(inner) for inner in value]
            if type(value) is tuple:
                return tuple(copied(inner) for inner in value)
            return copy.deepcopy(value)

        result = copied(content)
        self._kept = list(copies.values())
        if not on_gpu:
            return result, lambda: None
        event = torch.cuda.Event()
        event.record()
        return result, event.synchronize
