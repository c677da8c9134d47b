"""Stopping on request: SIGTERM, SIGUSR1 (Slurm, before the time limit or a preemption) or Ctrl-C to any rank ends the run at a step.

A signal may reach one rank or all, at any time, and all must save the same step. So after every step the ranks add up who was asked;
the sum of one step is awaited after the next, when it has long been there, in a group of its own over gloo: no step waits for it, and
no accelerator. All ranks see the same sum after the same step. Before there are ranks, training/early_stop.py answers.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from training.early_stop import SIGNALS


class StopRequest:
    """Made once, by every rank, after the process group is up. From then on the signals only ask."""

    def __init__(self) -> None:
        self._asked = False
        self._group: Any = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._under_way: tuple[Any, torch.Tensor] | None = None
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once

    def after_step(self, trouble: bool = False) -> bool:
        """Whether the run is to stop here, the same on every rank: one of them was asked to, or has trouble. After every step."""
        if self._group is None:
            return self._asked or trouble
        asked = False
        if self._under_way is not None:
            work, count = self._under_way
            work.wait()
            asked = bool(count.item())
        count = torch.tensor([int(self._asked or trouble)])
        self._under_way = (dist.all_reduce(count, group=self._group, async_op=True), count)
        return asked
