"""An error that one of two ranks meets ends what both do, with the same words: none waits for the other until the watchdog comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.conftest import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]
Seen = list[dict[str, list[str]]]


@pytest.fixture(scope="module")
def seen(workplace: Path) -> Seen:
    """What each rank raised, by case."""
    place = workplace / "trouble"
    place.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "tests.distributed.trouble_worker",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command += [str(workplace / "recipe.yaml"), str(place)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((place / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("reading: refuses", "no such tensor"),
        ("reading: disk", "a file: cannot be read: Input/output error"),
        ("mending", "a folder: what a launch left half-done cannot be mended: Permission denied"),
        ("pretrained: missing", "model.layers.1.mlp.up_proj.weight is (51, 36), found None"),
        ("pretrained: unreadable", "cannot be read"),
    ],
)
def test_what_one_rank_cannot_read_is_refused_by_both(case: str, message: str, seen: Seen) -> None:
    """Reading by the second, mending and a pretrained model by the first, at ZeRO stage 3."""
    assert seen[0][case] == seen[1][case] and seen[0][case][0] == "InputError"
    assert seen[0][case][1].endswith(message)


def test_without_trouble_nothing_is_raised(seen: Seen) -> None:
    assert all(rank[case] == [] for rank in seen for case in ("reading: nothing", "pretrained: nothing"))


def test_buffers_of_a_pretrained_model_reach_every_rank(seen: Seen) -> None:
    assert [rank["buffers"] for rank in seen] == [["True", "2"]] * 2


def test_a_fault_of_ours_in_a_save_is_raised_where_it_is_and_told_elsewhere(seen: Seen) -> None:
    first, second = (rank["pickling"] for rank in seen)
    assert second == ["TypeError", "cannot pickle '_thread.lock' object"]
    assert first[0] == "TrainingStoppedError" and first[1].endswith(
        "the checkpoint of step 2 could not be written: rank 1: TypeError: cannot pickle '_thread.lock' object"
    )
    assert seen[0]["left of it"] == ["step-00000001"]
