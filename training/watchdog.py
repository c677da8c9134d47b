"""A run never hangs silently: a thread on every rank tells the others that it lives, and ends the run when one does not.

Two things can go wrong, and they look alike from inside a collective, which would wait half an hour:
  * a rank is gone, or its host, or the cable: its signs of life stop. After `lost_seconds` the others say which rank on which host.
  * a rank lives but does not get on (a deadlock, a dead disk): its main thread has reported no progress for `hang_seconds`, or what goes
    on beside it (`beside`: a checkpoint that is written while training goes on) takes longer than that.
Then every rank writes the stacks of its threads to stacks/rank-00000.txt in the run folder, the first rank says in a line a rank where
each one stood, and all end with exit code 1. Checkpoints are not touched: the same launch again goes on.

A process that stood still itself (SIGSTOP, as Slurm suspends a job; a debugger) knows it when it wakes, by a nap that took far too long,
and gives everything a fresh start: a job that was suspended whole goes on, but for one that slept past the C library's timer below.

Signs of life go through a store of torch.distributed's on the first rank's host. Should a rank hold Python's lock for ever, so that no
thread of its own can run, a timer of the C library dumps its stack a minute later.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore  # torch.distributed's own, which it does not export to type checkers

from training.distributed import Ranks

GRACE = 5.0  # seconds in which the other ranks dump their stacks before the first one says what they were


class Watchdog:
    """A context that every rank enters after the process group is up, and leaves at the end together with the others."""

    def __init__(self, run: Path, ranks: Ranks, hang_seconds: float, lost_seconds: float) -> None:
        self.folder, self.ranks = run / "stacks", ranks
        self.hang_seconds, self.lost_seconds = hang_seconds, lost_seconds
        self._interval = min(5.0, lost_seconds / 4, hang_seconds / 4)
        self._main = threading.main_thread().ident
        self._last = (time.monotonic(), "starting")
        self._beside: tuple[float, str] | None = None
        self._closed = threading.Event()
        self.hosts = _hosts(ranks)
        self._store = _store(ranks, lost_seconds)
        self._reached, self._ending = time.monotonic(), ""
        # the one that talks to the first rank's host may wait for an answer for ever, so another one looks at the clock
        self._threads = [threading.Thread(target=work, name=work.__name__, daemon=True) for work in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()

    def progress(self, what: str) -> None:
        """The main thread gets on: it now begins `what`."""
        self._last = (time.monotonic(), what)
        faulthandler.dump_traceback_later(self.hang_seconds + 60, exit=True)

    def beside(self, what: str | None) -> None:
        """A thread beside the main one now begins `what`, or has ended it."""
        self._beside = (time.monotonic(), what) if what else None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop watching. A collective that failed because another rank is gone ends this process, with a line that names that one."""
        if is_lost_connection(error):
            reason = " ".join(str(error).split())[:160]
            self._say([f"lost in the middle of {self._last[1]}: {self.silent()} ({reason}); launch again to go on"])
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        if self.ranks.world_size > 1 and error is None:
            dist.barrier()  # from here on none is missed
        self._closed.set()
        if error is None:
            for thread in self._threads:
                thread.join(timeout=self._interval + 1)
            if self.ranks.world_size > 1:
                dist.barrier()  # the first rank's store goes with it

    def _say(self, lines: list[str]) -> None:
        print(f"error{'' if self.ranks.is_first else f' (rank {self.ranks.rank})'}: " + "\n".join(lines), file=sys.stderr, flush=True)

    def silent(self) -> str:
        """After a collective has failed: the ranks that give no more signs of life, by name and host."""
        try:
            before = self._numbers()
            time.sleep(2.5 * self._interval)
            after = self._numbers()
            gone = [rank for rank, number in enumerate(after) if number == before[rank] and rank != self.ranks.rank]
        except (RuntimeError, dist.DistError):  # the first rank's store is gone with it
            gone = [0]
        return ", ".join(map(self._name, gone)) or "no rank is silent"

    def _numbers(self) -> list[str]:
        keys = [f"alive/{rank}" for rank in range(self.ranks.world_size)]
        return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]

    def _talk(self) -> None:
        """Give signs of life, and hear whether the run is to end."""
        number, seen = 0, {}
        for stood_still in self._naps():
            number += 1
            if stood_still:
                seen.clear()  # the others may have stood still as well
            try:
                self._store.set(f"alive/{self.ranks.rank}", f"{number}")
                if self.ranks.is_first and (lost := self._without_sign(seen)):
                    self._store.set("end", f"no sign of life for {self.lost_seconds:.0f} s from {', '.join(map(self._name, lost))}")
                for since, what in filter(None, (self._last, self._beside)):
                    if (waiting := time.monotonic() - since) > self.hang_seconds:
                        self._store.set("end", f"no progress for {waiting:.0f} s, since {what}")
                if self._store.check(["end"]):
                    self._ending = self._store.get("end").decode()
                self._reached = time.monotonic()
            except (RuntimeError, dist.DistError):  # it does not answer; `_watch` says when that has gone on for too long
                continue

    def _watch(self) -> None:
        for stood_still in self._naps():
            if stood_still:
                continue
            if time.monotonic() - self._reached > self.lost_seconds + self._interval:
                self._end(f"{self._name(0)} has not answered for {self.lost_seconds:.0f} s")
            elif self._ending:
                self._end(self._ending)

    def _naps(self) -> Iterator[bool]:
        """Until the end, after every nap of `_interval`: whether this process stood still in it. Then what is timed begins anew."""
        began = time.monotonic()
        while not self._closed.wait(self._interval):
            stood_still = time.monotonic() - began > 3 * self._interval
            if stood_still:
                now = time.monotonic()
                self._reached, self._last = now, (now, self._last[1])
                if self._beside is not None:
                    self._beside = (now, self._beside[1])
            yield stood_still
            began = time.monotonic()

    def _without_sign(self, seen: dict[int, tuple[str, float]]) -> list[int]:
        """Ranks whose number has not grown for `lost_seconds`; `seen` is rank -> (number, when it was new)."""
        now, lost = time.monotonic(), []
        for rank, number in enumerate(self._numbers()):
            if rank not in seen or seen[rank][0] != number:
                seen[rank] = (number, now)
            if now - seen[rank][1] > self.lost_seconds:
                lost.append(rank)
        return lost

    def _end(self, reason: str) -> None:
        """Dump, tell, and end this process."""
        if self._closed.is_set():
            return
        self._closed.set()  # no more signs of life: the store may be gone before this rank is
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            with open(self.folder / f"rank-{self.ranks.rank:05d}.txt", "w", encoding="utf-8") as file:
                file.write(f"{self._name(self.ranks.rank)}: {reason}; last reported: {self._last[1]}\n")
                faulthandler.dump_traceback(file=file, all_threads=True)
        lines = [f"stopped: {reason}"]
        telling = threading.Thread(target=self._tell, args=(lines,), daemon=True)
        telling.start()
        telling.join(timeout=2 * GRACE)
        if not self.ranks.is_first:
            time.sleep(1)  # a launcher ends the others as soon as one has ended
        self._say(lines)
        os._exit(1)

    def _tell(self, lines: list[str]) -> None:
        """Say where this rank stands; the first rank adds where each stood to `lines`."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.set(f"where/{self.ranks.rank}", self._where())
            time.sleep(GRACE)
            if self.ranks.is_first:
                lines[0] += f". Stacks are in {self.folder}; launch again to go on from the newest checkpoint"
                for rank in range(self.ranks.world_size):
                    there = self._store.check([f"where/{rank}"])
                    where = self._store.get(f"where/{rank}").decode() if there else "no stack: it is stopped, dead, or cut off"
                    lines.append(f"  {self._name(rank)}: {where}")

    def _where(self) -> str:
        """Where the main thread stands: the innermost line of this repository, and what it waits in."""
        frames = traceback.extract_stack(sys._current_frames()[self._main])  # pyright: ignore[reportArgumentType]
        root = str(Path(__file__).resolve().parent.parent)
        ours = next((f for f in reversed(frames) if f.filename.startswith(root) and "/.venv/" not in f.filename), frames[-1])
        return f"{Path(ours.filename).name}:{ours.lineno} in {ours.name}, waiting in {frames[-1].name}; since {self._last[1]}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether a collective failed because its partner is gone, as gloo and NCCL say it."""
    words = (
        "gloo/transport",
        "Connection closed by peer",
        "Connection reset by peer",
        "NCCL",
        "Broken pipe",
        "Connection was likely closed",
    )
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))


def _store(ranks: Ranks, lost_seconds: float) -> Store:
    """A store that the first rank serves, at a port that it finds free."""
    if ranks.world_size == 1:
        return HashStore()
    timeout, address = timedelta(seconds=max(1.0, lost_seconds)), os.environ["MASTER_ADDR"]
    server = TCPStore(address, 0, ranks.world_size, True, timeout, wait_for_workers=False) if ranks.is_first else None
    port = [server.port if server is not None else 0]
    dist.broadcast_object_list(port, src=0)
    return server or TCPStore(address, port[0], ranks.world_size, False, timeout, wait_for_workers=False)


def _hosts(ranks: Ranks) -> list[str]:
    """Each rank's host name, with the address that it has towards the first rank's: containers may share a name."""
    name = socket.gethostname()
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 1))
        name = f"{name} ({probe.getsockname()[0]})"
    names = [name]
    if ranks.world_size > 1:
        names = [""] * ranks.world_size
        dist.all_gather_object(names, name)
    return names
