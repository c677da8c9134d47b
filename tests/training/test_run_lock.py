"""One launch holds a run folder: against the kernel's locks of real processes, and against beats of another host."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from model.errors import InputError
from training.run_lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_held_until_the_process_ends_however_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert holder.stdout.readline()
    with pytest.raises(InputError, match=rf"in use by another launch \(process {holder.pid} on"):
        RunLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    RunLock(tmp_path, patience=1).release()
    assert "watching it" not in capsys.readouterr().err  # the same host: nothing to wait for
    assert not (tmp_path / ".lock.json").exists()


def another_hosts(folder: Path, number: int) -> None:
    (folder / ".lock.json").write_text(json.dumps({"host": "elsewhere", "process": 7, "boot": "another", "beat": number}))


def test_another_hosts_beat_is_respected_and_a_silent_one_is_dead(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    another_hosts(tmp_path, 1)
    timer = threading.Timer(0.1, another_hosts, (tmp_path, 2))
    timer.start()
    with pytest.raises(InputError, match=r"in use by another launch \(process 7 on elsewhere\)"):
        RunLock(tmp_path, patience=10)
    lock = RunLock(tmp_path, patience=0.2)  # it has stopped
    assert "watching it for" in capsys.readouterr().err
    lock.release()


def test_it_beats(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, beat=0.01)
    seen = {json.loads((tmp_path / ".lock.json").read_text())["beat"]}
    while len(seen) < 3:
        seen.add(json.loads((tmp_path / ".lock.json").read_text())["beat"])
    lock.release()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks_is_said_and_the_beat_guards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    RunLock(tmp_path, beat=0.05).release()
    assert "has no locks" in capsys.readouterr().err


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_last_of_two_that_begin_together_has_the_folder(tmp_path: Path) -> None:
    """The other has written its name after this one looked for one, and reads it back."""
    timer = threading.Timer(0.2, another_hosts, (tmp_path, 0))
    timer.start()
    with pytest.raises(InputError, match=r"in use by another launch \(process 7 on elsewhere\)"):
        RunLock(tmp_path, beat=1.0)
    timer.join()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_launch_of_this_host_that_lives_is_found_by_its_beat(tmp_path: Path) -> None:
    """Its name does not say whether it lives, since its lock says nothing."""
    holder = RunLock(tmp_path, beat=0.1)
    holder._me["process"] = 7  # as if it were another process's
    with pytest.raises(InputError, match=r"in use by another launch \(process 7 on"):
        RunLock(tmp_path, beat=0.5)
    holder.release()


def test_a_start_with_locks_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    RunLock(tmp_path).release()
