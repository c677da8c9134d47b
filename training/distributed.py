"""Who this process is among the ranks, however it was launched: `deepspeed`, `torchrun`, `srun`, or plain `python`."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.activation_statistics import ActivationMoments
from model.errors import InputError


class TrainingStoppedError(RuntimeError):
    """Training went wrong and was ended, with what was saved untouched: one line, exit code 1."""


# What a disk says that is full, over quota, read-only, not ours, or failing
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# What it says of a name that cannot be a file's here, and what to do about it
NAME_REFUSED = {
    errno.EISDIR: "move it out of the way",
    errno.ENOTDIR: "move what is in the way",
    errno.ENAMETOOLONG: "give a shorter name",
}


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world_size`, and `local_rank` of `local_world_size` on this host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def discover(environment: dict[str, str] | None = None) -> Ranks:
    """Read the launcher's environment, and complete it with what `torch.distributed` needs (MASTER_ADDR, MASTER_PORT, ...).

    Raises:
        InputError: the environment contradicts itself.
    """
    env = os.environ if environment is None else environment
    if "RANK" not in env and "SLURM_STEP_ID" in env:  # srun; a batch script itself has no step
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]
        env.setdefault("LOCAL_WORLD_SIZE", re.split(r"\D", env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1")))[0])
        env.setdefault("MASTER_ADDR", _first_slurm_host(env))
        # every task of a job derives the same port from the job's number, and two jobs on a host rarely collide
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    elif "RANK" not in env:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(free.getsockname()[1])
        env.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
    try:
        rank, world_size, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
        local_world_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size)  # the deepspeed launcher says LOCAL_SIZE
    except (KeyError, ValueError) as error:
        raise InputError(
            f"launcher environment: {error} is missing or not a number; expected RANK and WORLD_SIZE as torchrun sets them"
        ) from None
    if not 0 <= rank < world_size:
        raise InputError(f"launcher environment: RANK {rank} is not below WORLD_SIZE {world_size}")
    env["LOCAL_RANK"] = str(local_rank)
    return Ranks(rank, world_size, local_rank, local_world_size)


def _first_slurm_host(env: Any) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        return subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise InputError(f"srun: cannot expand the node list {nodes!r} with scontrol; set MASTER_ADDR to the first host") from None


def largest_over_ranks(value: int, device: torch.device) -> int:
    """The largest of what the ranks have. Every rank calls it."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return value
    values = torch.tensor(value, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return int(values)


def smallest_over_ranks(value: int, device: torch.device) -> int:
    """The smallest of what the ranks have. Every rank calls it."""
    return -largest_over_ranks(-value, device)


def sum_over_ranks(*values: float | torch.Tensor, device: torch.device) -> list[float]:
    """Each value summed over all ranks, in float64: one collective, one host synchronisation."""
    numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device).reshape(()) for value in values])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


def reduce_moments(moments: dict[str, ActivationMoments]) -> None:
    """Make each rank's moments those of all ranks together, in place: sums are summed and maxima maximised."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for place in moments.values():
            dist.all_reduce(place.sums)
            dist.all_reduce(place.gram)
            dist.all_reduce(place.ratio_max, op=dist.ReduceOp.MAX)


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one, on every rank; every rank calls it."""
    return next(iter(_problems(problem)), None)


def raise_together(problem: str | None) -> None:
    """Raise the same `InputError` on every rank if any rank has a problem, so that none is left waiting for the others."""
    if found := _problems(problem):
        raise InputError("\n".join(found))


@contextmanager
def heard_by_all(folder: Path) -> Iterator[None]:
    """What is read of a checkpoint within. A rank that cannot read its part has every rank raise the same `InputError` at the end of it,
    so that none goes on into a collective and waits there. Every rank enters; no collective may stand within."""
    problem = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or folder}: cannot be read: {error.strerror or error}"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        problem = f"{folder}: damaged: {type(error).__name__}: {error}"
    raise_together(problem)


def _problems(problem: str | None) -> list[str]:
    """What the ranks have met, in their order, each once."""
    problems: list[str | None] = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    return list(dict.fromkeys(p for p in problems if p))


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Turn an `InputError`, or a disk that is full or refuses, into a message on stderr and exit code 2, printed by one rank.

    `TrainingStoppedError` becomes a message and exit code 1. Where nobody reads standard output any more (`| head`) it ends without a word.
    """
    try:
        yield
        sys.stdout.flush()
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            leave(128 + signal.SIGPIPE)  # as a shell has it of programs that SIGPIPE ends
        if isinstance(error, OSError):
            if error.errno not in (*DISK_REFUSES, *NAME_REFUSED):
                raise
            advice = NAME_REFUSED.get(error.errno, "make room or allow writing")
            error = InputError(f"{error.filename or 'a file of the run'}: {error.strerror}; {advice}, and launch again")
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Most errors are the same everywhere and the launcher ends us when rank 0 exits; what only this rank met still comes out.
            time.sleep(3)
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        leave(2)
    except TrainingStoppedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # every rank stops here; the first says why
        leave(1)


def _nobody_reads() -> bool:
    """Whether it is standard output whose reader is gone. What was still to be written there then goes nowhere."""
    watching = select.poll()
    watching.register(1, 0)
    gone = any(events & select.POLLERR for _, events in watching.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def leave(code: int) -> None:
    """End this process now.

    ZeRO-3 over gloo sometimes aborts in the interpreter's teardown, after all work is done; and a rank that has met an
    error must not wait in a collective for the others. Files are closed before this is called.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
