"""One launch at a time holds a run folder.

Two locks, since folders differ in what they can do:
  * flock on `.lock`: the kernel lets go of it however the process ends. On NFS (Linux 2.6.12 and later) and on Lustre or GPFS
    mounted with locks it holds between hosts too.
  * a beat in `.lock.json`, for folders whose locks are missing, or hold on one host alone: the holder, on whichever host, writes its
    name and a growing number every few seconds. A launch that finds another host's name there watches the number: if it moves, the
    folder is in use; if it stands still for `PATIENCE` seconds, its writer is dead. No clock is read, so clocks may differ or jump. Where
    there are no locks at all, a launch waits for two beats and goes on only if the name there is still its own: of two that began at the
    same time one finds the other's, and so does one that took a living launch of this host for dead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from model.errors import InputError

BEAT, PATIENCE = 5.0, 20.0  # seconds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without locks says


class RunLock:
    """The hold on a run folder; `release` gives it back, and so does the end of the process.

    Raises:
        InputError: another launch holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self.folder, self._path, self._beat = folder, folder / ".lock.json", beat
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "boot": _boot()}
        self._released = threading.Event()
        try:
            self._file: IO[str] = (folder / ".lock").open("a")
        except OSError as error:
            raise InputError(f"{folder}: the run folder cannot be written: {error.strerror}") from None
        locked = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            locked = False
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(self._in_use()) from None
            if error.errno not in NO_LOCKS:
                raise InputError(f"{folder}: the run folder cannot be locked: {error.strerror}") from None
            print(
                f"warning: {folder}: its file system has no locks ({error.strerror}); the beat alone guards it", file=sys.stderr, flush=True
            )
        self._wait_for_a_dead_holder(patience)
        try:
            self._write(0)
        except OSError as error:
            raise InputError(f"{folder}: the run folder cannot be written: {error.strerror}") from None
        if not locked:
            time.sleep(2 * beat)
            if {key: (self._read() or {}).get(key) for key in self._me} != self._me:
                raise InputError(self._in_use())
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)
        self._file.close()

    def _wait_for_a_dead_holder(self, patience: float) -> None:
        found = self._read()
        if found is None or found.get("boot") == self._me["boot"]:  # this host's own: its lock was free, so its writer is gone
            return
        print(
            f"{self.folder}: held by a launch on {found.get('host')} until a moment ago; watching it for {patience:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(min(1.0, patience / 10))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise InputError(self._in_use())

    def _keep_beating(self) -> None:
        number = 0
        while not self._released.wait(self._beat):
            number += 1
            try:
                self._write(number)
            except OSError:  # a full disk ends the run by itself, at its next checkpoint
                continue

    def _write(self, number: int) -> None:
        beside = self._path.with_name(".lock.json.writing")
        beside.write_text(json.dumps({**self._me, "beat": number}))
        os.replace(beside, self._path)

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _in_use(self) -> str:
        found = self._read()
        holder = f" (process {found.get('process')} on {found.get('host')})" if found else ""
        return f"{self.folder}: in use by another launch{holder}; wait for it, stop it, or choose another run.name"


def _boot() -> str:
    """Names this start of this machine: host names may be the same in two containers, and a process number in two boots."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
