"""The processes that share one analysis: alone, or started by a launcher that sets RANK and WORLD_SIZE (torchrun, DeepSpeed).

A rank works on its share and the sums are added up. Nothing here needs a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """This process's number among `count`. Only the first prints and writes results."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, on every rank, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier()

    def raise_together(self, error: InputError | None) -> None:
        """Raise on every rank what any of them found wrong, so that none waits for one that is gone."""
        if self.count == 1:
            found: list[InputError | None] = [error]
        else:
            found = [None] * self.count
            dist.all_gather_object(found, error)
        first = next((problem for problem in found if problem is not None), None)
        if first is not None:
            raise first


def join_ranks() -> Ranks:
    """The ranks of this launch: RANK and WORLD_SIZE where a launcher set them, else alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), count)
