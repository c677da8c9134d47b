"""A short form of `make soak`: a few deaths and a few dozen mutated files, through the programs themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.soak import Result, compare

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.distributed


def run(program: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", f"scripts.{program}", *words], cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_deaths_lose_nothing(tmp_path: Path) -> None:
    done = run("soak", "--kills", "3", "--seed", "3", "--out", str(tmp_path / "soak.json"))
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads((tmp_path / "soak.json").read_text())
    assert sum(result["deaths"].values()) >= 3 and result["losses_compared"] >= 24 and result["checkpoints_checked"] > 0
    assert result["checkpoints_lost"] == result["losses_wrong"] == 0 and result["faults"] == []


def test_a_wrong_loss_would_be_seen() -> None:
    result = Result()
    compare({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0 * (1 + 1e-7)}, "run", exactly=False, result=result)
    assert result.losses_wrong == 0
    compare({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0 * (1 + 1e-7)}, "run", exactly=True, result=result)
    compare({1: 2.0, 2: 3.0}, {1: 2.0}, "run", exactly=False, result=result)
    assert result.losses_wrong == 2 == len(result.faults)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    words = ["--recipes", "20", "--checkpoints", "8", "--data", "8", "--seed", "4"]
    done = run("fuzz", *words, "--out", str(tmp_path / "fuzz.json"))
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["cases"] == {"recipes": 20, "checkpoints": 8, "data": 8} and result["faults"] == []
    assert 0 < sum(result["refused"].values()) < 36
