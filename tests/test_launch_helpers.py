"""scripts/launch_slurm.sh with a srun that answers as told, and what the doctor finds."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from scripts import doctor

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False), (2, False)])
def test_slurm_requeues_what_was_stopped_and_nothing_else(code: int, requeued: bool, tmp_path: Path) -> None:
    for name, body in (("srun", f'echo "$@" > {tmp_path}/srun.txt; exit {code}'), ("scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "PYTHON": "python-of-mine"}
    command = ["bash", str(ROOT / "scripts" / "launch_slurm.sh"), "recipes/x.yaml", "training.tokens=1e6"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "srun.txt").read_text().split()[-4:] == ["python-of-mine", "train.py", "recipes/x.yaml", "training.tokens=1e6"]
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "4711"]


def verdicts(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.subject: finding.verdict for finding in findings}


def test_the_doctor_sees_names_that_others_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# hosts\n10.1.2.3 slots=8\nlocalhost slots=8\nno-such-host.invalid slots=8\n")
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        found = verdicts(doctor.network(hostfile))
        assert found[f"port {os.environ['MASTER_PORT']}"] == "fix"
    assert (found["host 10.1.2.3"], found["host localhost"], found["host no-such-host.invalid"]) == ("ok", "fix", "fix")


def test_the_doctor_tries_the_folder(tmp_path: Path) -> None:
    assert set(verdicts(doctor.folder(tmp_path)).values()) <= {"ok", "note"}
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (found,) = doctor.folder(tmp_path / "file" / "run")
    assert found.verdict == "fix"


def test_the_doctor_sees_whether_a_folder_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = doctor.shared(tmp_path, hosts=2, seconds=0.5)
    assert found.verdict == "fix" and "1 of 2 hosts" in found.text
    (tmp_path / ".doctor" / "other.json").write_text('{"clock": 100.0}')  # another host, whose clock is decades behind
    both = verdicts(doctor.shared(tmp_path, hosts=2, seconds=5))
    assert both == {f"folder {tmp_path}": "ok", "clocks": "fix"}


def test_versions_are_compared_with_the_pins() -> None:
    found = verdicts(doctor.python_and_packages())
    assert found["python"] == "ok" and set(found) >= {"torch", "deepspeed"} and "fix" not in found.values()
