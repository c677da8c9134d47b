"""The coordinate check: its measures are the network's, muP and CompleteP pass it, and the standard parametrisation does not."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.attention import Context, rotary_tables
from model.parametrization import initialize
from model.transformer import Transformer
from scripts.coordinate_check import MODULES, average, main, size_overrides, slope, train
from training.recipe import model_config
from training.recipe_file import load_recipe

RECIPE = """
model: {width: 32, depth: 2, heads: 2, init_std: 0.1}
data: {tokenizer: {vocab_size: 260}}
training: {tokens: 1e6, tokens_per_step: 128, micro_batch_size: 4, sequence_length: 32, precision: fp32}
optimizer: {learning_rate: 5e-3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(
        sys, "argv", ["coordinate_check", *arguments, "--length", "32", "--sequences", "4", "--out", str(out / "check.json")]
    )
    code, path = main(), out / "check.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_slope() -> None:
    assert slope([2, 4, 8], [3 * size**0.5 for size in (2, 4, 8)]) == pytest.approx(0.5)
    assert slope([2, 8], [1.0, 1.0]) == 0
    assert slope([2, 4], [0.0, 1.0]) is None
    assert slope([2, 4], [None, 1.0]) is None


def test_seeds_are_averaged_as_logarithms() -> None:
    runs = [{module: [value, 2.0] for module in MODULES} for value in (2.0, 8.0)]
    assert average(runs)["mlp"] == pytest.approx([4.0, 2.0])
    runs[1]["mlp"] = [0.0, math.nan]
    assert average(runs)["mlp"] == [0.0, None]
    assert average([{**runs[0], "mlp": [math.inf, 2.0]}])["mlp"] == [None, 2.0]


@pytest.mark.parametrize(
    ("rate", "problem"),
    [
        ("1e3", "attention is 0 at step 3, width 32, so its slope is undefined"),
        ("1e30", "residual is not finite at step 2, width 32"),
        ("1e10", "residual is not finite at step 1, width 32"),  # and no logit has moved before: a panel has nothing to draw
    ],
)
def test_networks_that_broke_do_not_pass(
    rate: str, problem: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(monkeypatch, tmp_path, recipe, "--widths", "32", "64", "--steps", "6", f"optimizer.learning_rate={rate}")
    found = result["parametrizations"]["standard"]
    assert code == 1 and not found["passes"]
    assert problem in found["problem"] and found["problem"] in capsys.readouterr().out
    assert result["definitions"].keys() >= found.keys()


def test_values_are_the_networks(recipe: str) -> None:
    """Before the first step against the modules called one by one; logits move, and by nothing at first."""
    loaded = load_recipe(recipe).recipe
    batch = torch.randint(260, (2, 9), generator=torch.Generator().manual_seed(1))
    values = train(loaded, batch, steps=2, seed=3)
    assert list(values) == list(MODULES) and all(len(steps) == 2 for steps in values.values())
    model = Transformer(model_config(loaded, 260))
    initialize(model, 3)
    context = Context(rotary_tables(0, 8, 16, 10000.0, torch.device("cpu")))
    with torch.no_grad():
        x = model.blocks[0](model.embedding(batch[:, :-1]), context)
        block = model.blocks[1]
        normed = block.attention_norm(x)
        attended = block.attention(normed, normed, context)
        query, key = (getattr(block.attention, kind)(normed).view(2, 8, 2, 16) for kind in ("query", "key"))
        expected = {
            "attention": attended,
            "mlp": block.mlp(block.mlp_norm(x + attended)),
            "residual": block(x, context),
            "scores": torch.einsum("bqhd,bkhd->bhqk", query, key) / 4,
            "logits": model(batch[:, :-1]),
        }
    for module, tensor in expected.items():
        assert values[module][0] == pytest.approx(float(tensor.abs().mean()), rel=1e-4), module
    assert values["logits_moved"][0] == 0 < values["logits_moved"][1]


def test_mup_passes_over_width_and_the_standard_does_not(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [recipe, "--widths", "32", "64", "128", "--parametrizations", "mup", "standard", "--steps", "6"]
    code, result = run(monkeypatch, tmp_path / "out", *arguments)
    found = result["parametrizations"]
    assert code == 1 and found["mup"]["passes"] and not found["standard"]["passes"]
    assert abs(found["mup"]["slopes"]["residual"][4]) < 0.25
    assert found["standard"]["slopes"]["residual"][4] > 0.8
    assert found["mup"]["slopes"]["logits"][0] == pytest.approx(-0.5, abs=0.1)  # the 1 / m_N on logits of sum m_N^1/2
    assert found["mup"]["slopes"]["logits_moved"][0] is None
    assert found["mup"]["values"]["32"] == found["standard"]["values"]["32"]  # the base is the standard
    assert (tmp_path / "out" / "check.png").stat().st_size > 20_000
    assert "| standard | " in capsys.readouterr().out


def test_complete_p_passes_over_depth(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # learning has to undo the fall at the start
    arguments = [recipe, "--depths", "2", "8", "24", "--parametrizations", "complete_p", "--steps", "6", "optimizer.learning_rate=1e-2"]
    code, result = run(monkeypatch, tmp_path / "out", *arguments)
    slopes = result["parametrizations"]["complete_p"]["slopes"]
    assert code == 0 and abs(slopes["residual"][4]) < 0.25
    assert slopes["residual"][0] < -0.3  # by design, and not judged


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_other_optimizers_take_their_steps(recipe: str, optimizer: str) -> None:
    loaded = load_recipe(recipe, [f"optimizer.kind={optimizer}", "deepspeed.zero_optimization.stage=0"]).recipe
    batch = torch.randint(260, (2, 9), generator=torch.Generator().manual_seed(1))
    values = train(loaded, batch, steps=3, seed=0)
    assert values["logits_moved"][2] > 0


def test_a_recipe_of_another_size_and_parametrisation(recipe: str) -> None:
    def config(*arguments: Any, overrides: list[str] | None = None) -> Any:
        loaded = load_recipe(recipe, [*(overrides or []), *size_overrides(recipe, overrides or [], *arguments)]).recipe
        return model_config(loaded, 260)

    wide = config("mup", "width", 128, 32)
    assert (wide.width, wide.heads, wide.base_width, wide.base_depth, wide.width_ratio) == (128, 8, 32, None, 4)
    deep = config("complete_p", "depth", 16, 2)
    assert (deep.depth, deep.width, deep.base_width, deep.base_depth, deep.width_ratio, deep.depth_ratio) == (16, 32, 32, 2, 1, 8)
    based = ["model.parametrization=complete_p", "model.base_width=16", "model.base_depth=4", "model.base_head_dim=16"]
    own = config("complete_p", "width", 128, 64, overrides=based)
    assert (own.base_width, own.base_depth) == (64, 4)
    back = config("standard", "width", 128, 64, overrides=based)
    assert back.base_width is None and back.parametrization == "standard"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "32"], "--widths 32: expected at least two different positive sizes"),
        (["--widths", "32", "40"], "40 does not make whole heads"),
        (["--widths", "32", "64", "--steps", "3"], "--steps 3: expected more than 3"),
        (["--widths", "32", "64", "--parametrizations", "mu"], "model.parametrization: 'mu' is not one of"),
        (["--widths", "32", "64", "--data", "missing"], "missing: cannot be read"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(monkeypatch, tmp_path / "out", recipe, *arguments)
    assert code == 2 and message in capsys.readouterr().err
    assert result == {}
