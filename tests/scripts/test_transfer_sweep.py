"""The transfer sweep: optima and shifts of losses that are known, what is trained once, what is remembered, and real runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.transfer_sweep import Job, Sweep, main, optimum_of
from training.recipe_file import load_recipe

RECIPE = """
model: {width: 16, depth: 2, heads: 2, init_std: 0.1}
data: {source: files, paths: [TEXT], prepared: PREPARED, validation_fraction: 0.2, tokenizer: {vocab_size: 300}}
training: {tokens: 1024, tokens_per_step: 128, micro_batch_size: 4, sequence_length: 32, precision: fp32}
deepspeed: {zero_optimization: {stage: 0}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x * {i} + {i * i}\n" * 8)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("TEXT", f"{tmp_path}/text/*.txt").replace("PREPARED", str(tmp_path / "prepared")))
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = folder / "transfer.json"
    monkeypatch.setattr(sys, "argv", ["transfer_sweep", *arguments, "--runs", str(folder / "runs"), "--out", str(out)])
    code = main()
    return code, json.loads(out.read_text()) if out.exists() else {}


def test_the_optimum() -> None:
    parabola = {float(e): (e + 6.3) ** 2 + 1 for e in range(-9, -3)}
    best, edge, vertex = optimum_of(parabola)
    assert (best, edge) == (-6, False) and vertex == pytest.approx(-6.3)
    uneven = {e: (e + 6.3) ** 2 for e in (-9.0, -6.0, -5.0)}
    assert optimum_of(uneven)[2] == pytest.approx(-6.3)
    assert optimum_of({-3.0: 2.0, -2.0: 1.0}) == (-2, True, None)
    assert optimum_of({-3.0: 2.0, -2.0: 1.0, -1.0: None}) == (-2, False, None)
    assert optimum_of({-3.0: None}) == (None, True, None)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Instead of training: standard's optimum falls by an octave with each doubling of the width, muP's stays and its loss falls."""
    trained: list[Job] = []

    def train(self: Sweep, job: Job, folder: Path, corpus: str) -> None:
        trained.append(job)
        octaves = {16: 0, 32: 1, 64: 2}[job.size]
        optimum, floor = (-6 - octaves, 2.0) if job.parametrization == "standard" else (-6, 2.0 - 0.1 * octaves)
        loss = None if job.exponent > -4 else floor + 0.01 * (job.exponent - optimum) ** 2 + 0.002 * job.seed
        sharpness = {"sharpness": {"4": 0.5, "8": 0.9}} if job.sharpness else {}
        self.results.set(job.name(self.axis), validation_loss=loss, **sharpness)

    monkeypatch.setattr(Sweep, "train", train)
    return trained


def test_shifts_and_what_is_remembered(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [recipe, "--widths", "16", "32", "64", "--parametrizations", "standard", "mup", "--exponents", "-9", "-8", "-7", "-6", "-5"]
    code, result = run(monkeypatch, tmp_path, *arguments, "-3", "--sharpness-at", "-6", "--seeds", "0", "1")
    assert code == 0
    # the base is trained once, for both: 5 networks of 6 rates and 2 seeds, and 5 followed closely
    assert len(pretend) == len(set(pretend)) == 5 * 12 + 5
    assert {job.parametrization for job in pretend if job.size == 16} == {"standard"}
    standard, mup = (result["parametrizations"][name] for name in ("standard", "mup"))
    assert [one["best_exponent"] for one in standard["sizes"].values()] == [-6, -7, -8]
    assert [one["vertex_shift"] for one in standard["sizes"].values()] == pytest.approx([0, -1, -2])
    assert (standard["largest_shift"], mup["largest_shift"]) == (-2, 0)
    assert mup["larger_is_better"] and not standard["larger_is_better"]
    assert mup["sizes"]["32"]["losses"]["-3"] is None and mup["sizes"]["32"]["losses"]["-6"] == pytest.approx(1.901)
    assert mup["sharpness"]["64"] == {"4": 0.5, "8": 0.9}
    assert (tmp_path / "transfer.png").stat().st_size > 20_000
    assert "| standard | 2^-6 (-6.0): 2.001 | 2^-7 (-7.0): 2.001 | 2^-8 (-8.0): 2.001 | -2 | no |" in capsys.readouterr().out
    run(monkeypatch, tmp_path, *arguments, "--seeds", "0", "2")
    assert len(pretend) == 65 + 25 and {job.seed for job in pretend[65:]} == {2}
    code, _ = run(monkeypatch, tmp_path, recipe, "training.tokens=2048", *arguments[1:])
    assert code == 2 and "holds a sweep with overrides []" in capsys.readouterr().err


def test_the_recipes_of_the_runs(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend: list[Job]) -> None:
    made: list[Sweep] = []
    begin = Sweep.run
    monkeypatch.setattr(Sweep, "run", lambda self: made.append(self) or begin(self))
    run(monkeypatch, tmp_path, recipe, "--widths", "16", "64", "--parametrizations", "standard_embedding", "mup", "--exponents", "-6", "-5")
    sweep = made[0]

    def resolved(job: Job) -> Any:
        return load_recipe(recipe, sweep.overrides(job)).recipe

    rival = resolved(Job("standard_embedding", 64, -6, 1))
    assert (rival.model.parametrization, rival.optimizer.embedding_learning_rate_factor, rival.run.seed) == ("standard", 4.0, 1)
    assert (rival.model.width, rival.model.heads, rival.optimizer.learning_rate) == (64, 8, 2**-6)
    mup = resolved(Job("mup", 64, -5, 0, sharpness=True))
    assert (mup.model.base_width, mup.optimizer.embedding_learning_rate_factor, mup.evaluation.curvature_every) == (16, 1.0, 16)
    assert mup.training == rival.training and mup.optimizer.warmup_fraction == rival.optimizer.warmup_fraction


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "16"], "--widths 16: expected at least two"),
        (["--widths", "16", "32", "--base", "64"], "--base 64: expected one of the sizes 16 32"),
        (["--widths", "16", "32", "--parametrizations", "mu"], "model.parametrization: 'mu' is not one of"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(monkeypatch, tmp_path, recipe, *arguments)
    assert code == 2 and message in capsys.readouterr().err
    assert result == {} and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_real_runs(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two widths, one with its sharpness, and a learning rate that no network survives."""
    arguments = [recipe, "--widths", "16", "32", "--parametrizations", "mup", "--seeds", "0", "--exponents", "-7"]
    code, result = run(monkeypatch, tmp_path, *arguments, "--sharpness-at", "-7", "--sharpness-every", "4")
    assert code == 0 and len(result["runs"]) == 4
    for own in result["parametrizations"]["mup"]["sizes"].values():
        assert 2 < own["best_loss"] < 6 and own["at_the_edge"]
    for size in ("16", "32"):
        sharpness = result["parametrizations"]["mup"]["sharpness"][size]
        assert list(sharpness) == ["4", "8"] and all(value > 0 for value in sharpness.values())
    names = {"standard_width16_lr2^-7_seed0": "sharpness_standard_width16_lr2^-7_seed0"}
    for plain, followed in names.items():  # looking changes nothing
        assert result["runs"][plain]["validation_loss"] == result["runs"][followed]["validation_loss"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["corpus"]
