"""The engine at every stage and precision against plain autograd: gradients, clipping, skipped steps, sharding."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import LIMIT, ROOT
from tests.distributed.engine_worker import COMPILED_NETWORKS, NETWORKS, VARIANTS

pytestmark = pytest.mark.distributed
KEYS = [f"{precision}-{stage}" for precision in ("fp32", "bf16") for stage in range(4)]


@pytest.fixture(scope="module")
def seen(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("engine") / "seen.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "tests.distributed.engine_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(workplace / "recipe.yaml"), str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * LIMIT
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text())


def test_rotary_frequencies_are_exact_in_bf16_at_stage_3(seen: dict[str, Any]) -> None:
    assert seen["rotary"] < 1e-6


def test_ranks_recompute_what_the_one_with_the_least_memory_needs(seen: dict[str, Any]) -> None:
    """Or at stage 3 they would gather different weights, and wait for one another for ever; where nothing fits, all say so."""
    assert seen["recomputed"] == [[[0, 1], "training.activation_checkpointing"]] * 2


@pytest.mark.parametrize("key", KEYS)
def test_first_step_is_plain_autograd(key: str, seen: dict[str, Any]) -> None:
    """Loss and gradient norm (before clipping) of 8 sequences over 2 ranks x 2 micro-batches, as one process computes them."""
    tolerance = 1e-5 if key.startswith("fp32") else 2e-2
    assert seen[key]["losses"][0] == pytest.approx(seen["reference"]["loss"], rel=tolerance)
    assert seen[key]["grad_norms"][0] == pytest.approx(seen["reference"]["grad_norm"], rel=tolerance)


def test_stages_take_the_same_clipped_step(seen: dict[str, Any]) -> None:
    for precision, tolerance in (("fp32", 1e-6), ("bf16", 5e-3)):
        for stage in range(1, 4):
            assert seen[f"{precision}-{stage}"]["losses"][1] == pytest.approx(seen[f"{precision}-0"]["losses"][1], rel=tolerance)
    assert seen["reference"]["grad_norm"] > 0.5  # so the steps above were clipped


@pytest.mark.parametrize("key", KEYS)
def test_non_finite_gradients_are_skipped_counted_and_named(key: str, seen: dict[str, Any]) -> None:
    """DeepSpeed alone applies such a step at stage 0 in fp32, and skips it without a word elsewhere."""
    run = seen[key]
    assert run["applied"] == [True, True, False] and run["skipped_steps"] == 1
    assert not math.isfinite(run["grad_norms"][2])
    assert not run["changed"]
    assert run["named"] == "output of blocks.1.mlp.up (rank 0); output of blocks.1.mlp.up (rank 1)"


def test_stage_3_is_born_sharded(seen: dict[str, Any]) -> None:
    """No rank ever holds a whole parameter outside its use: not when the model is made, and not after."""
    for precision in ("fp32", "bf16"):
        assert seen[f"{precision}-3"]["elements_at_birth"] == 0 < seen[f"{precision}-2"]["elements_at_birth"]
        whole, held, elements = seen[f"{precision}-3"]["held_elements"]
        assert whole in (0, elements) and held == math.ceil(elements / 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_blocks_compute_the_same(stage: int, seen: dict[str, Any]) -> None:
    """torch.compile, at stage 3 over gathered weights and with activation checkpointing."""
    assert seen[f"compiled-{stage}"]["losses"][:2] == pytest.approx(seen[f"fp32-{stage}"]["losses"][:2], rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon", "soap"])
def test_optimizers_step_as_in_one_process(kind: str, seen: dict[str, Any]) -> None:
    """Without ZeRO on 2 ranks x 2 micro-batches, against plain autograd and the base optimizer alone.

    The order in which ranks and micro-batches are summed rounds differently. Muon orthogonalises in bf16, and the first gradients leave
    SOAP eigenvectors that are determined by nothing else, so it shows more in them.
    """
    reference = seen[f"{kind}-reference"]
    assert reference[4] < reference[0] - 0.01
    assert seen[f"{kind}-fp32"] == pytest.approx(reference, rel={"muon": 1e-4, "soap": 5e-3}.get(kind, 2e-6))
    assert seen[f"{kind}-bf16"] == pytest.approx(reference, rel=5e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_parametrizations_train_as_in_one_process(name: str, variant: str, seen: dict[str, Any]) -> None:
    """Five steps at every stage and in bf16, against plain autograd."""
    reference = seen[f"{name}-reference"]
    assert reference[4] < reference[0] - 0.01
    assert seen[f"{name}-{variant}"] == pytest.approx(reference, rel=5e-3 if variant == "bf16-2" else 1e-5)


@pytest.mark.parametrize(("name", "compiled"), [(name, case) for name, cases in COMPILED_NETWORKS.items() for case in cases])
def test_networks_compile_with_activation_checkpointing(name: str, compiled: str, seen: dict[str, Any]) -> None:
    """In full over weights that ZeRO-3 gathers, and selectively."""
    assert seen[f"{name}-{compiled}"] == pytest.approx(seen[f"{name}-reference"], rel=1e-5)
