"""What of sharpness-aware steps needs no ranks: recipes that are refused, schedules, norms, directions, cost.

The steps themselves: tests/distributed/test_sharpness_aware.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import training.recipe_problems
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from training.master_weights import MasterWeights
from training.plan import accumulation_steps, format_plan, passes, plan
from training.recipe import OptimizerSection, Recipe
from training.recipe_file import load_recipe
from training.sharpness_aware import is_split, perturb_along, radius_at, split_of, unit_norm

MINIMAL = """
model: {size: nano}
training: {tokens: 1e6, tokens_per_step: 4096, micro_batch_size: 4, sequence_length: 256}
optimizer: {sharpness_aware: functional_sam}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("radius=-0.1", "optimizer.sharpness.radius: expected greater than or equal to 0, found -0.1"),
        ("ascent_fraction=0", "optimizer.sharpness.ascent_fraction: expected greater than 0, found 0"),
        ("ascent_fraction=1.5", "optimizer.sharpness.ascent_fraction: expected less than or equal to 1, found 1.5"),
        ("rho=0.1", "optimizer.sharpness.rho: unknown key"),
        ("norm_scope=layer", "optimizer.sharpness.norm_scope: 'layer' is not one of"),
        ("start_fraction=1", "optimizer.sharpness.start_fraction: expected less than 1"),
        ("every=0", "optimizer.sharpness.every: expected greater than or equal to 1"),
    ],
)
def test_options_out_of_range_are_named(path: Path, override: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(path, [f"optimizer.sharpness.{override}"])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["optimizer.kind=muon", "deepspeed.zero_optimization.stage=0", "optimizer.sharpness.precondition=true"],
            "optimizer.sharpness.precondition: needs an optimizer with a second moment (adamw); muon has none",
        ),
        (["optimizer.sharpness.split_every=2", "optimizer.sharpness.ascent_fraction=0.5"], "optimizer.sharpness.split_every: compares"),
        (["optimizer.sharpness_aware=sam", "optimizer.sharpness.store_logits=true"], "store_logits: only functional_sam"),
        (["optimizer.sharpness.every=3", "optimizer.sharpness.split_every=4"], "4 is no multiple of optimizer.sharpness.every 3"),
        (
            ["optimizer.sharpness_aware=sam", "context_pruning.trainable=interactions", "context_pruning.target_kept=0.5",
             "optimizer.sharpness.float32_second_pass=true"],
            "float32_second_pass: weights that context_pruning.trainable keeps still stay in bf16",
        ),
        (["training.precision=fp32", "optimizer.sharpness.float32_second_pass=true"], "precision is fp32 already"),
        (["evaluation.curvature_every=5"], "evaluation.curvature_every: bf16 rounds away"),
        (["deepspeed.torch_autocast={enabled: true}"], "deepspeed.torch_autocast: its weights cannot be perturbed"),
        (["deepspeed.zero_optimization={stage: 3, offload_optimizer: {device: nvme, nvme_path: /x}}"], "on nvme cannot be perturbed"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(path, overrides)
    assert expected in str(error.value) and "1 problem in" in str(error.value)


def test_a_fraction_that_is_no_whole_number_of_micro_batches(path: Path) -> None:
    """4096 tokens are 4 micro-batches of a rank: a quarter is one, a third is refused with the fractions that are."""
    assert accumulation_steps(load_recipe(path, ["optimizer.sharpness.ascent_fraction=0.25"]).recipe, 1) == 4
    third = load_recipe(path, ["optimizer.sharpness.ascent_fraction=0.33"]).recipe
    with pytest.raises(InputError, match=r"ascent_fraction: 0.33 of 4 micro-batches .* valid: 0.25, 0.5, 0.75, 1,"):
        accumulation_steps(third, 1)
    with pytest.raises(InputError, match=r"0.25 of 2 micro-batches"):
        accumulation_steps(load_recipe(path, ["optimizer.sharpness.ascent_fraction=0.25"]).recipe, 2)
    load_recipe(path, ["optimizer.sharpness.ascent_fraction=0.33", "optimizer.sharpness_aware=none"])


def section(**options: Any) -> OptimizerSection:
    values = {"learning_rate": 0.1, "warmup_fraction": 0.1, "schedule": "linear", "final_learning_rate_fraction": 0.0}
    return OptimizerSection.model_validate({**values, "sharpness_aware": "sam", "sharpness": options})


def test_the_radius_over_the_steps() -> None:
    assert [radius_at(section(radius=0.3), step, 10) for step in (0, 9)] == [0.3, 0.3]
    assert [radius_at(section(radius=1, every=3, start_fraction=0.2), step, 10) for step in range(10)] == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    # every k-th step is a multiple of k, as what is logged and compared every so many steps is, wherever perturbing begins
    late = section(radius=1, every=2, start_fraction=0.5, split_every=4)
    assert [radius_at(late, step, 20) for step in range(20)] == [0] * 11 + [1, 0] * 4 + [1]
    assert [step + 1 for step in range(20) if is_split(late, step, 20)] == [12, 16, 20]
    assert not any(is_split(section(radius=0, split_every=1), step, 9) for step in range(9))
    assert [radius_at(section(radius=1, schedule="linear_increase", start_fraction=0.5), step, 10) for step in (4, 5, 7, 9)] == [
        0,
        0.2,
        0.6,
        1,
    ]
    falling = section(radius=2, schedule="learning_rate")
    assert radius_at(falling, 1, 20) == pytest.approx(2.0)  # the last step of the warm-up: the peak
    assert radius_at(falling, 19, 20) == 0.0
    off = OptimizerSection.model_validate({"sharpness": {"radius": 1}})
    assert radius_at(off, 3, 10) == 0


def weights(**shape: Any) -> MasterWeights:
    model = Transformer(
        ModelConfig(**{"width": 16, "depth": 1, "heads": 2, "vocab_size": 40, "sequence_length": 8, "mlp_width": 48} | shape)
    )
    initialize(model, seed=0)
    base = torch.optim.AdamW(model.parameters())
    return MasterWeights(base, base, model, torch.device("cpu"))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_perturbation_has_the_radius(scope: str) -> None:
    masters = weights()
    gradient = masters.normal(3)
    original = [part.clone() for part in gradient]
    e = perturb_along(masters, gradient, section(norm_scope=scope), 0.7)
    assert masters.norm(e) == pytest.approx(0.7, rel=1e-6)
    norms = masters.dot_by_tensor(e, e).sqrt()
    cosine = masters.dot(e, original) / masters.norm(e) / masters.norm(original)
    if scope == "global":
        assert cosine == pytest.approx(1, abs=1e-6)
    else:
        torch.testing.assert_close(norms, torch.full_like(norms, 0.7 / math.sqrt(len(norms))), rtol=1e-5, atol=0)
        by_tensor = masters.dot_by_tensor(e, original) / norms / masters.dot_by_tensor(original, original).sqrt()
        torch.testing.assert_close(by_tensor, torch.ones_like(by_tensor), rtol=1e-5, atol=0)


def test_the_width_aware_radius_moves_activations_alike_at_any_width() -> None:
    """A rank-one step along x moves W x by radius in root mean square when x has unit root mean square, whatever the shape."""
    for out_width, in_width in ((64, 16), (16, 64), (128, 128)):
        x, direction = torch.randn(in_width).sign(), torch.randn(out_width).sign()
        step = torch.outer(direction, x)
        step *= unit_norm("blocks.0.mlp.up.weight", (out_width, in_width)) / step.norm()
        assert (step @ x).square().mean().sqrt().item() == pytest.approx(1, rel=1e-5)
    assert unit_norm("embedding.weight", (4000, 64)) == 8  # a row is chosen, so a row of unit entries
    assert unit_norm("unembedding.weight", (4000, 64)) == math.sqrt(4000 / 64)
    masters = weights(tied_embeddings=False)
    e = perturb_along(masters, masters.normal(1), section(norm_scope="tensor_width"), 0.5)
    found = dict(zip(masters.names, masters.dot_by_tensor(e, e).sqrt().tolist(), strict=True))
    assert found["blocks.0.mlp.up.weight"] == pytest.approx(0.5 * math.sqrt(48 / 16), rel=1e-5)
    assert found["embedding.weight"] == pytest.approx(0.5 * 4, rel=1e-5)


def test_tensors_without_a_gradient_are_not_moved() -> None:
    masters = weights()
    gradient = masters.zeros()
    gradient[2].fill_(1.0)
    for scope in ("global", "tensor", "tensor_width"):
        e = perturb_along(masters, [part.clone() for part in gradient], section(norm_scope=scope), 1.0)
        assert all(torch.isfinite(part).all() for part in e)
        assert e[0].abs().sum() == 0 and e[2].abs().sum() > 0
    assert masters.norm(perturb_along(masters, masters.zeros(), section(), 1.0)) == 0


def test_the_split_is_of_the_differences() -> None:
    """With g = a, g_fsam = a + r b, g_sam = a + r b + r c, the parts are b and c."""
    masters = weights()
    a, b, c = (masters.normal(seed) for seed in (1, 2, 3))
    r = 0.5
    functional = masters.add([part.clone() for part in a], b, r)
    sam = masters.add([part.clone() for part in functional], c, r)
    expected_cosine = masters.dot(a, sam) / masters.norm(a) / masters.norm(sam)
    values = split_of(masters, a, functional, sam, r)
    assert values["split_functional_norm"] == pytest.approx(masters.norm(b), rel=1e-5)
    assert values["split_logit_norm"] == pytest.approx(masters.norm(c), rel=1e-5)
    assert values["split_cosine"] == pytest.approx(masters.dot(b, c) / masters.norm(b) / masters.norm(c), abs=1e-5)
    assert values["gradient_cosine_sam"] == pytest.approx(expected_cosine, rel=1e-5)
    assert values["ascent_norm"] == pytest.approx(masters.norm(a), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({}, 2.0, 2.0),
        ({"ascent_fraction": 0.25}, 1.5, 1.5),  # a quarter forward and backward, three quarters forward, all forward and backward
        ({"ascent_fraction": 0.25, "rest": "plain"}, 1.25, 1.25),
        ({"every": 2}, 1.5, 1.5),
        ({"start_fraction": 0.9}, 1.0, 2.0),
        ({"radius": 0}, 1.0, 1.0),
    ],
)
def test_what_a_step_costs(path: Path, options: dict[str, Any], first: float, last: float) -> None:
    loaded = load_recipe(path, [f"optimizer.sharpness.{key}={value}" for key, value in options.items()])
    assert (passes(loaded.recipe, 0, 100), passes(loaded.recipe, 99, 100)) == (first, last)
    sam = load_recipe(path, ["optimizer.sharpness_aware=sam", "optimizer.sharpness.ascent_fraction=0.25"]).recipe
    assert passes(sam, 0, 100) == 1.25
    config = ModelConfig(width=128, depth=4, heads=4, vocab_size=500, sequence_length=256)
    whole, plain = plan(loaded.recipe, config, 1), plan(load_recipe(path, ["optimizer.sharpness_aware=none"]).recipe, config, 1)
    share = 0.9 if "start_fraction" in options else 0.0
    assert whole.flops / plain.flops == pytest.approx(share * first + (1 - share) * last, rel=1e-2)
    assert ("passes a step (functional_sam)" in format_plan(whole)) == (last != 1)


def test_every_optimizer_with_a_second_moment_is_one_of_the_kinds() -> None:
    kinds = OptimizerSection.model_json_schema()["properties"]["kind"]
    known = kinds.get("enum", [kinds.get("const")])
    assert set(training.recipe_problems._WITH_SECOND_MOMENT) <= set(known)
    assert Recipe.model_fields["optimizer"].default.sharpness_aware == "none"
