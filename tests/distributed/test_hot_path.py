"""A step reads nothing back that it does not have to, and compiled blocks stay compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import LIMIT, ROOT

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def seen(workplace: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.distributed.hot_path_worker", str(workplace / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * LIMIT)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


# Whether the gradient is finite, and in ZeRO-1 and 2 once more for each of the optimizer's groups when it clips: DeepSpeed's own
THEIRS = {"runtime/utils.py", "zero/stage_1_and_2.py", "zero/stage3.py", "runtime/bf16_optimizer.py", "fp16/unfused_optimizer.py"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_reads_back_whether_it_is_finite_and_nothing_else(precision: str, stage: int, seen: dict[str, Any]) -> None:
    """Loss and gradient norm stay where they are until a step is logged. In fp32 without ZeRO the look is ours."""
    reads = seen[f"{precision}-{stage}"]
    if (precision, stage) == ("fp32", 0):
        assert reads == {"training/optimizers.py": 1}
    else:
        assert set(reads) <= THEIRS, reads


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_block_is_compiled_again_after_the_second_step(stage: int, seen: dict[str, Any]) -> None:
    """But for the one evaluation after the third, whose graph has no backward pass."""
    graphs = seen[f"compiled-{stage}"]
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]
    assert graphs[4] == graphs[3]
