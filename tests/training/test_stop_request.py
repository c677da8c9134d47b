"""Signals to a single rank; several ranks are in tests/distributed/test_survival.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from training.stop_request import SIGNALS, StopRequest


@pytest.fixture
def request_to_stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_only_asks(number: int, request_to_stop: StopRequest) -> None:
    assert not request_to_stop.after_step()
    os.kill(os.getpid(), number)
    assert request_to_stop.after_step() and request_to_stop.after_step()


def test_a_second_ctrl_c_ends_it_at_once(request_to_stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_trouble_stops_too(request_to_stop: StopRequest) -> None:
    assert request_to_stop.after_step(trouble=True) and not request_to_stop.after_step()
