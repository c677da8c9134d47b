"""SAM and Functional-SAM at every ZeRO stage against a float64 reference in one process, and what must hold between the passes.

`sharpness_worker.py` does the work, one launch for each number of ranks; the reference in it is written from the equations.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.curvature import analyze_curvature
from analysis.runs import find_run
from tests.distributed.conftest import LIMIT, ROOT, Launch, losses, records
from tests.distributed.sharpness_worker import SHARDINGS

pytestmark = pytest.mark.distributed
BF16 = [name for name in SHARDINGS if name.startswith("bf16") and not name.endswith("wide")]


@pytest.fixture(scope="module")
def seen(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the worker saw, by number of ranks."""
    results = {}
    for ranks in (1, 2, 3):
        out = tmp_path_factory.mktemp("sharpness") / "seen.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, "-m", "tests.distributed.sharpness_worker", str(workplace / "recipe.yaml"), str(out)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=5 * LIMIT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        results[ranks] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_are_the_references(stage: int, ranks: int, seen: dict[int, dict[str, Any]]) -> None:
    """Three clipped steps of every kind, fp32: weights to 1e-5 of float64's after moves of 3e-2, gradient norms to 1e-6. On one rank
    also with muP, learned positions, documents, recomputed blocks, softcaps, windows, shared keys and two embeddings."""
    cases = {name: case for name, case in seen[ranks].items() if "difference" in case and name.endswith(f"-{stage}")}
    assert len(cases) == {1: 4, 2: 6, 3: 3}[ranks]
    for name, case in cases.items():
        assert case["difference"] < 1e-5, name  # 2e-7 was seen
        assert case["norm"] < 1e-6, name
        if name in (f"functional-3-{stage}", f"sam-1-{stage}"):
            assert case["split"] < 1e-4, name  # norms of differences


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_gradient_leaves_nothing_behind(name: str, seen: dict[int, dict[str, Any]]) -> None:
    """Taken twice it has the same bits, and every tensor's norm is the reference's: no pass is added to another's."""
    run = seen[2][name]
    assert run["repeatable"]
    assert run["gradient"] < (1e-5 if name.startswith("fp32") else 2e-2)


@pytest.mark.parametrize("name", SHARDINGS)
def test_perturbed_weights_come_and_go(name: str, seen: dict[int, dict[str, Any]]) -> None:
    """The forward pass has masters + vector, the masters keep their bits, an exception puts all back, nothing is saved meanwhile."""
    run = seen[2][name]
    assert run["perturbed"] < (1e-5 if name.startswith("fp32") else 2**-6)
    assert run["masters_untouched"] and run["restored"]
    assert "perturbed weights" in run["save"]


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_step_that_is_not_finite_leaves_clean_weights(name: str, seen: dict[int, dict[str, Any]]) -> None:
    """In either pass: not applied, counted, masters and forward weights as before to the bit; the next step is a good one."""
    run = seen[2][name]
    assert run["step"] and run["clean"]
    assert run["second_skipped"] == [False, True, 1] and run["second_untouched"]
    assert run["first_skipped"] == [False, False, 2] and run["first_untouched"]
    assert run["after"]
    assert run["counters"] == [5, 12]  # two passes are one step to DeepSpeed, and so is a refused one, with no micro-batch


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_refused_step_is_left_out_at_once(name: str, seen: dict[int, dict[str, Any]]) -> None:
    """It is not asked for a second time, by a plain pass: not applied, no skipped step, everything as before to the bit."""
    run = seen[2][name]
    assert run["refused"] == [True, False, 1, 2] and run["refused_untouched"]


def test_a_vector_is_the_same_however_it_is_cut(seen: dict[int, dict[str, Any]]) -> None:
    """Norm, inner product and norm of one tensor of seeded normal vectors; the norm of n of them is about sqrt(n)."""
    reference = seen[2]["fp32-0"]["normal"]
    for name in SHARDINGS:
        assert seen[2][name]["normal"] == pytest.approx(reference, rel=1e-5), name
    assert reference[0] == pytest.approx(math.sqrt(6968), rel=0.05)
    assert abs(reference[1]) < 4 * math.sqrt(6968)


@pytest.mark.parametrize("name", SHARDINGS)
def test_the_realised_perturbation_is_measured(name: str, seen: dict[int, dict[str, Any]]) -> None:
    """All of it arrives in float32; in bf16 it is rounded, and right on average."""
    values = seen[2][name]["values"]
    assert values["perturbation_norm"] == pytest.approx(0.3, rel=1e-5)
    if name in BF16:
        assert 0.9 < values["perturbation_cosine"] < 0.999
        assert values["perturbation_projection"] == pytest.approx(1, abs=0.05)
        assert values["perturbation_cosine_worst"] < values["perturbation_cosine"]
    else:
        assert values["perturbation_cosine"] == pytest.approx(1, abs=1e-5)
        assert values["perturbation_cosine_worst"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["fp32-0", "fp32-3", "bf16-2-fp32"])
def test_off_is_the_baseline(name: str, seen: dict[int, dict[str, Any]]) -> None:
    """`none` and radius 0 give the bits of the plain loop."""
    assert seen[2][f"{name}-plain"] == [True, True]


def test_dropout_is_replayed(seen: dict[int, dict[str, Any]]) -> None:
    """With hardly any perturbation both passes have the same gradient, though each layer's half is dropped."""
    first, second = seen[2]["dropout"]
    assert second == pytest.approx(first, rel=1e-4)


KILLED = """
import os, sys
import training.engine
from training.engine import Engine

plain, calls = Engine.accumulate, []

def accumulate(self, batch, scale, frozen=None):
    calls.append(frozen)
    if len(calls) == 6 * 3 + 2:  # in the second pass of step 7, with the weights perturbed and a gradient half there
        assert self._perturbed and frozen is not None
        os._exit(9)
    return plain(self, batch, scale, frozen)

Engine.accumulate = accumulate
sys.argv = ["train.py", *sys.argv[1:]]
import runpy
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_run_killed_between_the_passes_goes_on_as_if_it_had_not_been(launch: Launch, workplace: Path) -> None:
    """Training itself: killed in a second pass and launched again, the losses of the uninterrupted run to the bit."""
    options = [
        "optimizer.sharpness_aware=functional_sam", "optimizer.sharpness.radius=0.2", "optimizer.sharpness.start_fraction=0.25",
        "optimizer.sharpness.cosine_warning=1", "optimizer.sharpness.split_every=3", "training.tokens_per_step=384",
        "training.tokens=3072", "deepspeed.zero_optimization.stage=2", "training.precision=bf16",
    ]  # fmt: skip
    whole = launch("whole", 1, *options, launcher="python").stdout
    runs = workplace / "runs"
    arguments = ["-c", KILLED, str(workplace / "recipe.yaml"), "run.name=killed", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert killed.returncode == 9, killed.stderr[-3000:]
    assert max(losses(runs / "killed")) == 6
    launch("killed", 1, *options, launcher="python")
    assert losses(runs / "killed") == losses(runs / "whole")

    # what is written beside, and said once
    written = records(runs / "whole")
    by_step = {record["step"]: record for record in written if "loss" in record}
    assert "radius" not in by_step[2] and by_step[3]["radius"] == 0.2
    assert by_step[4]["perturbed_loss"] > by_step[4]["loss"]  # to first order by radius x ||g||
    assert by_step[4]["perturbed_loss"] - by_step[4]["loss"] == pytest.approx(0.2 * by_step[4]["ascent_norm"], rel=0.5)
    assert "split_logit_norm" in by_step[6] and "split_logit_norm" not in by_step[5]
    assert sum(n**2 for n in by_step[6]["ascent_norm_by_tensor"].values()) == pytest.approx(by_step[6]["ascent_norm"] ** 2, rel=1e-5)
    assert whole.count("cosine_warning") == 1 and "step 3: the perturbation that reaches" in whole


@pytest.mark.parametrize("kind", ["none", "sam", "functional_sam"])
@pytest.mark.parametrize("sharding", ["fp32-0", "fp32-2"])
def test_the_planned_memory_is_what_a_step_takes(sharding: str, kind: str, seen: dict[int, dict[str, Any]]) -> None:
    """The allocator's record of a logged step with two micro-batches; with what is held between steps, Functional-SAM takes at most 1.15
    of a plain step."""
    measured = seen[1][f"memory-{sharding}-{kind}"]
    assert measured["seen"] == pytest.approx(measured["planned"], rel=0.03)
    if kind == "functional_sam":
        plain = seen[1][f"memory-{sharding}-none"]
        assert measured["seen"] + measured["held"] < 1.15 * (plain["seen"] + plain["held"])


@pytest.mark.parametrize("name", [*BF16, "bf16-0-compiled", "bf16-2-fp32-compiled"])
def test_a_float32_pass_brings_the_perturbation_back(name: str, seen: dict[int, dict[str, Any]]) -> None:
    """Where bf16 rounds most of it away. The error is the gradient's at the perturbed weights against float64, as a share of how much
    that gradient differs from the one at the weights; what is left with float32 is the rounding of gradients that add up in bf16."""
    run = seen[2][f"{name}-float32"]
    assert run["bf16_cosine"] < 0.8 and run["float32_cosine"] > 0.9999
    assert run["float32_error"] < 0.4 * run["bf16_error"]
    assert run["bf16_clean"] and run["float32_clean"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_measuring_leaves_no_trace(stage: int, seen: dict[int, dict[str, Any]]) -> None:
    """Between two steps, also where it meets a gradient that is not finite: masters, moments, forward weights and random state are those
    of a run that does not measure, to the bit; and every stage measures the same."""
    run = seen[2][f"measured-{stage}"]
    assert run["same"] and run["random"] and run["clean"]
    assert run["not_finite"] == "a gradient near the weights is not finite"
    for key in ("hessian_top", "gauss_newton_top", "hessian_bottom", "preconditioned_hessian_top"):
        assert run[key] == pytest.approx(seen[2]["measured-0"][key], rel=5e-3), key
    scale = 6968 * abs(run["hessian_top"])  # of a trace that is nearly 0 beside its eigenvalues
    assert run["hessian_trace"] == pytest.approx(seen[2]["measured-0"]["hessian_trace"], abs=1e-3 * scale)


def test_curvature_is_that_of_the_exact_matrices(seen: dict[int, dict[str, Any]]) -> None:
    """Products at ZeRO-3 against matrices in float64, the eigenvalue that power iteration tends to, and those that Lanczos finds."""
    run = seen[2]["curvature"]
    for name in ("hessian", "gauss_newton", "preconditioned"):
        assert run[name]["error"] < 2e-3, name
        assert run[name]["lanczos"] == pytest.approx(run[name]["ends"], rel=5e-3, abs=2e-3 * run[name]["exact"]), name
        assert run[name]["top"] == pytest.approx(run[name]["exact"], rel=0.1), name  # power iteration is slow here
        assert abs(run[name]["top"]) < abs(run[name]["exact"]) * (1 + 1e-3)
    assert run["gauss_newton"]["exact"] < 0.9 * run["hessian"]["exact"]  # so that neither is taken for the other
    assert run["clean"]


def test_curvature_is_written_down(launch: Launch, workplace: Path) -> None:
    """And is what the checkpoints' own analysis finds on the same tokens. A step that is split is logged, though it is not one of those
    that are."""
    lanczos = ("evaluation.curvature_every=4", "evaluation.curvature_lanczos=30")
    to_zero = ("optimizer.schedule=linear", "optimizer.final_learning_rate_fraction=0")
    split = ("optimizer.sharpness_aware=sam", "optimizer.sharpness.split_every=3", "logging.every=2")
    mup = ("model.block=pre_norm", "model.parametrization=mup", "model.base_width=12", "model.base_head_dim=6")  # groups' own rates
    launch("curvature", 1, *lanczos, *to_zero, *split, *mup, "deepspeed.zero_optimization.stage=1", launcher="python")
    run = workplace / "runs" / "curvature"
    written = {r["step"]: r for r in records(run) if "hessian_top" in r}
    assert sorted(written) == [4, 8]
    for step, record in written.items():
        found = analyze_curvature(find_run(run / "checkpoints" / f"step-{step:08d}"), 128, 30, 1, progress=False)
        pairs = {"hessian": "hessian_top", "gauss_newton": "gauss_newton_top", "preconditioned": "preconditioned_hessian_top"}
        for there, here in pairs.items():
            assert found[there]["top"][0] == pytest.approx(record[here], rel=2e-2), (step, there)
        assert found["hessian"]["bottom"] == pytest.approx(record["hessian_bottom"], rel=5e-2)
        assert found["preconditioned"]["stability_line"] == record.get("stability_line")
        assert math.isfinite(record["hessian_trace"])
    assert written[4]["stability_line"] == pytest.approx(38 / records_at(workplace, 4)["learning_rate"])
    assert records_at(workplace, 8)["learning_rate"] == 0 and "stability_line" not in written[8]
    logged = {r["step"]: r for r in records(run) if "loss" in r}
    assert sorted(logged) == [1, 2, 3, 4, 6, 8]
    assert [step for step, record in logged.items() if "split_logit_norm" in record] == [3, 6]
    cosines = logged[3]["perturbation_cosine_by_tensor"]
    norms, directions = logged[3]["perturbation_norm_by_tensor"], logged[3]["ascent_norm_by_tensor"]
    assert norms == pytest.approx({name: 0.05 * norm / logged[3]["ascent_norm"] for name, norm in directions.items()}, rel=1e-5)
    assert set(cosines) == set(directions) and min(cosines.values()) == logged[3]["perturbation_cosine_worst"]


def records_at(workplace: Path, step: int) -> dict[str, Any]:
    return next(r for r in records(workplace / "runs" / "curvature") if r["step"] == step and "learning_rate" in r)
