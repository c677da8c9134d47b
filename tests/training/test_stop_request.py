"""Signals to a single rank; several ranks are in tests/distributed/test_survival.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from training.early_stop import SIGNALS
from training.stop_request import StopRequest

ROOT = Path(__file__).resolve().parents[2]


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


def catches(process: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal, by what the kernel says."""
    (mask,) = (line.split()[1] for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_before_there_is_anything_to_save_ends_it_with_one_line(number: signal.Signals, code: int) -> None:
    """train.py itself, while it imports; on the first rank it says so, on the others nothing."""
    for rank in ("0", "1"):
        process = subprocess.Popen(
            [sys.executable, "train.py", "recipes/quickstart_pre_norm.yaml", "--dry-run"],
            cwd=ROOT, env={**os.environ, "RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and not catches(process.pid, signal.SIGUSR1):
            time.sleep(0.005)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        expected = f"stopped by {number.name}: training had not begun, so there is nothing to save; launch again\n"
        assert (process.returncode, said) == (code, expected if rank == "0" else "")


def test_preparing_data_is_stopped_with_one_line_too() -> None:
    command = [sys.executable, "-m", "scripts.prepare_data", "recipes/quickstart_pre_norm.yaml"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not catches(process.pid, signal.SIGUSR1):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (
        130,
        "stopped by SIGINT: the data was not ready yet, and nothing half-done is used; launch again\n",
    )


def test_nothing_that_takes_time_is_imported_before_signals_are_answered() -> None:
    program = "import sys, train, scripts.prepare_data; assert not {'torch', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
