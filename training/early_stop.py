"""Signals before there is anything to save: from the first line of train.py until `StopRequest` answers them.

Imports and the preparing of data take half a minute and more. Data is written beside its place and renamed, and a run folder's lock goes
with the process, so the process may end anywhere. This module imports nothing that takes time.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from types import FrameType

EXIT_CODE = 75  # "temporary failure" in sysexits.h: the same launch again goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def answer_at_once(state: str = "training had not begun, so there is nothing to save") -> None:
    """From now on each of the signals ends this process with one line: SIGINT with 130, as shells expect, the others with 75.

    Args:
        state: what the line says of what was stopped.
    """
    for number in SIGNALS:
        signal.signal(number, partial(_end, state))


def _end(state: str, number: int, frame: FrameType | None) -> None:
    # no exception, which a library's callback would swallow, and no print, which may be what was interrupted
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(2, f"stopped by {signal.Signals(number).name}: {state}; launch again\n".encode())
    os._exit(130 if number == signal.SIGINT else EXIT_CODE)
