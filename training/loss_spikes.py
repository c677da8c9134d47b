"""Loss spikes: a step whose loss is far above the recent ones is skipped, or the run is rewound to a checkpoint before it and its data
passed over.

A loss is a spike when it is above median + threshold x spread of the last `window` accepted losses, with spread 1.4826 x their median
absolute deviation (the standard deviation, were they normal), and at least a thousandth of the median. Unlike mean and deviation, these
are not moved by the spikes themselves. Every rank decides alike, from the loss over all ranks, before the update.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor

from training.distributed import TrainingStoppedError, sum_over_ranks
from training.recipe import LossSpikesSection

LEAST_SPREAD = 1e-3  # of the median: a loss that has hardly moved for a while is no reason to call the next one a spike


class LossSpikes:
    """Judges losses and remembers what it saw: it travels in checkpoints, so a resumed run judges as the uninterrupted one does.

    Attributes:
        data_ahead: steps' worth of data passed over so far: step s (from 0) reads what would have been that of s + data_ahead.
        count: spikes so far.
    """

    def __init__(self, section: LossSpikesSection, device: torch.device) -> None:
        self.section, self.device = section, device
        self.data_ahead, self.count = 0, 0
        self.loss = math.nan  # of the step at hand
        self._accepted: list[float] = []
        self._steps: list[int] = []  # of the last spikes

    def accept(self, loss_sum: Tensor, tokens: int) -> bool:
        """Whether the update may be made. Every rank calls it with its own sum; without an action it costs nothing."""
        if self.section.action == "none":
            return True
        total, counted = sum_over_ranks(loss_sum, tokens, device=self.device)
        self.loss = total / max(counted, 1)
        # one that is not finite has gradients that are not either: that step is skipped and counted as any such step
        return not math.isfinite(self.loss) or self.loss <= self.limit()

    def limit(self) -> float:
        """Above it lies a spike; infinite until there are `warmup` losses."""
        if len(self._accepted) < self.section.warmup:
            return math.inf
        middle = median(self._accepted)
        spread = 1.4826 * median(abs(loss - middle) for loss in self._accepted)
        return middle + self.section.threshold * max(spread, LEAST_SPREAD * abs(middle))

    def remember(self) -> None:
        """The step at hand was applied."""
        if self.section.action != "none" and math.isfinite(self.loss):
            self._accepted = [*self._accepted, self.loss][-self.section.window :]

    def count_spike(self, step: int) -> None:
        """The loss of `step` was a spike.

        Raises:
            TrainingStoppedError: there are too many.
        """
        self.count += 1
        self._steps = [earlier for earlier in self._steps if earlier > step - self.section.window] + [step]
        if len(self._steps) > self.section.limit:
            raise TrainingStoppedError(
                f"stopped at step {step}: more than {self.section.limit} loss spikes within {self.section.window} steps "
                f"(training.loss_spikes.limit); the last loss is {self.loss:.4f}, the limit was {self.limit():.4f}: "
                "look at the data of these steps, or lower optimizer.learning_rate"
            )

    def go_back(self, step: int, to_step: int, state_there: dict[str, Any]) -> None:
        """After a rewind from `step` (done) to `to_step`: the data in between is passed over, the accepted losses are those of then."""
        self.data_ahead += step - to_step
        self._accepted = [float(loss) for loss in state_there.get("accepted", [])][-self.section.window :]

    def state(self) -> dict[str, Any]:
        """For the checkpoint, in JSON's types."""
        return {"data_ahead": self.data_ahead, "count": self.count, "accepted": self._accepted, "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.data_ahead, self.count = int(state.get("data_ahead", 0)), int(state.get("count", 0))
        self._accepted = [float(loss) for loss in state.get("accepted", [])][-self.section.window :]
        self._steps = [int(step) for step in state.get("steps", [])]
