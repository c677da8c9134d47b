"""Faults on request, for tests: what can go wrong in a run, made to go wrong at a chosen step on a chosen rank.

    BURNISH_FAULTS=kill_saving@4,nan@6:1 python train.py ...

Each fault is KIND@STEP or KIND@STEP:RANK (rank 0 unless given), with the step counted from 1. The kinds:

    kill            SIGKILL before the step            kill_saving     SIGKILL at the start of the save after the step
    kill_written    SIGKILL when DeepSpeed has written its files       kill_renaming   SIGKILL when all is written, before the rename
    slow_saving     the save after the step takes three seconds more        hang_saving     it never ends
    lose_saving     what is being written vanishes in it
    stop            SIGTERM before the step            hang            sleep for ever before the step
    freeze          SIGSTOP before the step            nan             the step's gradients are not finite
    spike           the step's targets are random tokens, on every rank
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import torch

from model.errors import InputError
from training.data import Batch

KINDS = (
    "kill", "kill_saving", "kill_written", "kill_renaming", "slow_saving", "hang_saving", "lose_saving",
    "stop", "hang", "freeze", "nan", "spike",
)  # fmt: skip


def requested() -> list[tuple[str, int, int]]:
    """(kind, step, rank) of each fault in BURNISH_FAULTS. Raises InputError when it cannot be read."""
    faults = []
    for word in filter(None, os.environ.get("BURNISH_FAULTS", "").split(",")):
        kind, _, place = word.strip().partition("@")
        step, _, rank = place.partition(":")
        if kind not in KINDS or not step.isdecimal() or not (rank or "0").isdecimal():
            raise InputError(f"BURNISH_FAULTS: expected KIND@STEP or KIND@STEP:RANK with a kind of {', '.join(KINDS)}, found {word!r}")
        faults.append((kind, int(step), int(rank or 0)))
    return faults


def asked_for(kind: str, step: int, rank: int) -> bool:
    return "BURNISH_FAULTS" in os.environ and (kind, step, rank) in requested()


def kill(kind: str, step: int, rank: int) -> None:
    if asked_for(kind, step, rank):
        os.kill(os.getpid(), signal.SIGKILL)


def at_save(moment: str, step: int, rank: int, folder: Path) -> None:
    """End, delay or hang this rank's writing of `folder`, or take that away, where it was asked for: at "saving", "written", "renaming"."""
    kill(f"kill_{moment}", step, rank)
    if asked_for(f"slow_{moment}", step, rank):
        time.sleep(3)
    if asked_for(f"lose_{moment}", step, rank):
        shutil.rmtree(folder)
    while asked_for(f"hang_{moment}", step, rank):
        time.sleep(1)


def before_step(step: int, rank: int) -> None:
    """End, stop or hang this rank, where that was asked for at this step."""
    kill("kill", step, rank)
    if asked_for("stop", step, rank):
        os.kill(os.getpid(), signal.SIGTERM)
    if asked_for("freeze", step, rank):
        os.kill(os.getpid(), signal.SIGSTOP)
    while asked_for("hang", step, rank):
        time.sleep(1)


def spoil(batches: list[Batch], step: int, vocab_size: int) -> None:
    """Put random tokens in the place of the step's targets, where that was asked for."""
    if asked_for("spike", step, 0):
        generator = torch.Generator().manual_seed(step)
        for batch in batches:
            batch.targets.copy_(torch.randint(vocab_size, batch.targets.shape, generator=generator))
