"""The rebuilt step against the step that DeepSpeed took, and its measures against closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch

from analysis.__main__ import main
from analysis.checkpoint import AdamSettings
from analysis.optimizer_step import StepSums, analyze_step, last_step
from analysis.runs import find_run
from analysis.shards import open_checkpoint
from model.errors import InputError
from tests.analysis.conftest import LAYOUTS


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rebuilt_step_is_the_one_that_was_taken(deepspeed_checkpoints, layout):
    """From the second checkpoint alone; the first says what the step was."""
    folder = deepspeed_checkpoints / "2" / layout
    before, after = (open_checkpoint(folder / f"step-{step:08d}") for step in (1, 2))
    inner = lengths = realised = 0.0
    for name in after.shapes:
        if name not in after.frozen:
            m, v = after.tensor(name, "exp_avg"), after.tensor(name, "exp_avg_sq")
            rebuilt, _, _ = last_step(after.tensor(name).double(), m.double(), v.double(), after.adam_settings(name))
            taken = after.tensor(name).double() - before.tensor(name).double()
            torch.testing.assert_close(rebuilt, taken, rtol=0, atol=3e-7)
            inner, lengths = inner + float((rebuilt * taken).sum()), lengths + float(rebuilt.square().sum())
            realised += float(taken.square().sum())
    assert inner / math.sqrt(lengths * realised) > 0.999999
    assert realised > 0
    result = analyze_step(find_run(folder), progress=False)
    assert result["network"]["update_norm"] == pytest.approx(math.sqrt(lengths))
    with pytest.raises(InputError, match="it is frozen"):
        after.adam_settings("frozen.weight")


def test_measures_against_torch_optim():
    """AdamW itself takes the step; every measure follows from what it did."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(500, dtype=torch.float64))
    start = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    for step in range(4):
        previous = weight.detach().clone()
        weight.grad = torch.randn(500, dtype=torch.float64) * 0.1 + (torch.arange(500) < 200)
        if step == 3:
            weight.grad[:100] = 1.0
        optimizer.step()
    state, after = optimizer.state[weight], weight.detach()
    taken = after - previous
    sums = StepSums()
    settings = AdamSettings(4, 0.02, (0.9, 0.95), 1e-8, 0.3)
    for low, high in ((0, 300), (300, 500)):
        sums.add(after[low:high], state["exp_avg"][low:high], state["exp_avg_sq"][low:high], start[low:high], settings)
    found = sums.measures()
    cosine = float(taken @ (after - start) / taken.norm() / (after - start).norm())
    assert found["update_norm"] == pytest.approx(float(taken.norm()), rel=1e-9)
    assert found["relative_update"] == pytest.approx(float(taken.norm() / after.norm()), rel=1e-9)
    assert found["angle_to_displacement"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-7)
    assert found["angle_to_weights"] == pytest.approx(math.degrees(math.acos(float(taken @ after / taken.norm() / after.norm()))), rel=1e-7)
    assert found["decay_share"] == pytest.approx(float((0.02 * 0.3 * previous).norm() / taken.norm()), rel=1e-9)
    second = state["exp_avg_sq"] / (1 - 0.95**4)
    agree = state["exp_avg"].abs() / (1 - 0.9**4) > 0.9 * second.sqrt()
    assert found["sign_like"] == pytest.approx(float(agree.double().mean()))
    assert 0.3 < found["sign_like"] < 0.6
    assert found["curvature"] == pytest.approx(float(second.mean()), rel=1e-9)
    assert found["curvature_percentiles"][2] == pytest.approx(float(second.median().log10()), abs=0.05)
    assert found["curvature_participation"] == pytest.approx(float(second.sum() ** 2 / 500 / second.square().sum()), rel=1e-9)


def test_what_has_no_step_to_show(run_folder, capsys):
    assert main(["step", str(run_folder)]) == 2
    assert "no Adam state" in capsys.readouterr().err


@pytest.mark.distributed
def test_the_verb_writes_json_and_takes_the_recorded_learning_rate(deepspeed_checkpoints, tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(deepspeed_checkpoints / "2" / "stage3-bf16", run)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 2, "learning_rate": 0.005}) + "\n")
    assert main(["step", str(run), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "step.json").read_text())
    assert (result["learning_rates"], result["learning_rate_from"]) == ([0.005], "metrics.jsonl")
    assert "sign-like coordinates" in capsys.readouterr().out
    assert result["network"]["parameters"] == sum(kind["parameters"] for kind in result["kinds"].values())
    assert result["network"].keys() - {"parameters"} <= result["definitions"].keys()
