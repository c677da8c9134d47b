"""The watchdog of one process: a main thread that hangs is ended, one that was suspended with all the rest is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from training.distributed import Ranks
from training.watchdog import Watchdog

seconds, hang_seconds, progress = map(float, sys.argv[2:])
with Watchdog(Path(sys.argv[1]), Ranks(0, 1, 0, 1), hang_seconds=hang_seconds, lost_seconds=hang_seconds) as watchdog:
    print("begins", flush=True)
    ended = time.process_time() + seconds
    while time.process_time() < ended:  # its own time, not that in which it stands still
        if progress:
            watchdog.progress("step")
print("done", flush=True)
"""


def start(run: Path, seconds: float, hang_seconds: float, progress: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(run), str(seconds), str(hang_seconds), str(int(progress))]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    return process


def test_a_run_that_was_suspended_goes_on(tmp_path: Path) -> None:
    hang_seconds = 2.0
    process = start(tmp_path, 1.5, hang_seconds, progress=True)
    for _ in range(2):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2 * hang_seconds)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.2)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "done\n"), errors


def test_a_run_that_hangs_is_ended_though_it_was_suspended_before(tmp_path: Path) -> None:
    process = start(tmp_path, 60.0, 2.0, progress=False)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no progress for" in errors
    assert (tmp_path / "stacks" / "rank-00000.txt").exists()
