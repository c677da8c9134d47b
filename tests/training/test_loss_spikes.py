"""Which losses are spikes, against numpy's median and the definition; and what travels in a checkpoint."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from training.distributed import TrainingStoppedError
from training.loss_spikes import LossSpikes
from training.recipe import LossSpikesSection

CPU = torch.device("cpu")


def spikes(**values: object) -> LossSpikes:
    return LossSpikes(LossSpikesSection(action="skip", warmup=8, window=16, threshold=5.0, **values), CPU)


def feed(judge: LossSpikes, loss: float) -> bool:
    accepted = judge.accept(torch.tensor(10 * loss, dtype=torch.float64), 10)
    if accepted:
        judge.remember()
    return accepted


def test_the_limit_is_median_and_deviation_of_the_window() -> None:
    judge, losses = spikes(), 3 + 0.1 * np.random.default_rng(0).standard_normal(40)
    accepted: list[float] = []
    for loss in losses:
        if len(accepted) >= 8:
            last = np.array(accepted[-16:])
            limit = np.median(last) + 5 * max(1.4826 * np.median(np.abs(last - np.median(last))), 1e-3 * np.median(last))
            assert judge.limit() == pytest.approx(limit)
        else:
            assert judge.limit() == math.inf
        if feed(judge, loss):
            accepted.append(loss)
    assert len(accepted) >= 38
    assert not feed(judge, 4.5) and feed(judge, 1.0)  # only upwards
    before = judge.limit()
    assert not feed(judge, 100.0) and judge.limit() == before  # a spike does not move what is usual


def test_a_loss_that_stood_still_may_move_a_little() -> None:
    judge = spikes()
    for _ in range(8):
        feed(judge, 3.0)
    assert judge.limit() == pytest.approx(3.0 * (1 + 5e-3))
    assert feed(judge, 3.01) and not feed(judge, 3.02)


def test_what_is_not_finite_is_left_to_the_gradients() -> None:
    judge = spikes()
    for _ in range(8):
        feed(judge, 3.0)
    assert feed(judge, math.nan) and feed(judge, math.inf)
    assert math.isfinite(judge.limit())


def test_without_an_action_nothing_is_summed_or_kept() -> None:
    judge = LossSpikes(LossSpikesSection(), CPU)
    assert judge.accept(None, 0)  # it does not even look
    judge.remember()
    assert judge.state()["accepted"] == []


def test_the_state_travels_as_json() -> None:
    judge, other = spikes(), spikes()
    for loss in np.linspace(4, 3, 20):
        feed(judge, float(loss))
    judge.count_spike(21)
    judge.go_back(21, 18, judge.state())
    other.restore(json.loads(json.dumps(judge.state())))
    assert other.state() == judge.state() and other.limit() == judge.limit() and other.data_ahead == 3


def test_going_back_judges_as_then() -> None:
    judge = spikes()
    for _ in range(10):
        feed(judge, 4.0)
    then = json.loads(json.dumps(judge.state()))
    limit = judge.limit()
    for _ in range(10):
        feed(judge, 2.0)
    assert judge.limit() != limit
    judge.go_back(20, 10, then)
    assert judge.limit() == limit and judge.data_ahead == 10
    judge.go_back(13, 10, then)
    assert judge.data_ahead == 13


def test_spikes_are_bounded_within_the_window() -> None:
    judge = spikes(limit=2)
    for step in (10, 27, 44, 45):  # 10 and 27 are more than a window of 16 apart
        judge.count_spike(step)
    with pytest.raises(TrainingStoppedError, match="more than 2 loss spikes within 16 steps"):
        judge.count_spike(46)
