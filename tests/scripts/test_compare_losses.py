"""What counts as the same loss: verdicts on invented curves, and on launches that differ in nothing or in the learning rate."""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from model.errors import InputError
from scripts.compare_losses import ROOT, compare, judge, side, sign_flip
from tests.distributed.conftest import workplace as workplace


def curve(seed: int, noise: float = 0.0, shift: float = 0.0) -> list[float]:
    chooser = random.Random(seed)
    return [(5.0 - 0.02 * step + shift) * (1 + noise * chooser.uniform(-1, 1)) for step in range(100)]


def test_the_same_bits_are_identical_and_one_other_bit_is_not() -> None:
    a = {0: curve(0), 1: curve(1)}
    assert judge(a, {0: curve(0), 1: curve(1)}, None, 0.005)["verdict"] == "identical"
    one_bit = {0: curve(0), 1: [*curve(1)[:-1], curve(1)[-1] * (1 + 2.0**-52)]}
    assert judge(a, one_bit, None, 0.005)["verdict"] == "different"


@pytest.mark.parametrize(("times", "verdict"), [(1.0, "equal to rounding"), (20.0, "different")])
def test_rounding_is_what_another_order_of_the_sums_does(times: float, verdict: str) -> None:
    found = judge({0: curve(0)}, {0: curve(0, noise=times * 1e-6)}, curve(0, noise=1e-6), 0.005)
    assert found["verdict"] == verdict


@pytest.mark.parametrize(("places", "verdict"), [(1, "equal to rounding"), (3, "different")])
def test_one_place_of_a_loss_is_rounding_even_before_the_control_parts(places: int, verdict: str) -> None:
    a, control = [4.0, 3.0, 2.5, 2.0, 1.5], [4.0, 3.0, 2.5, 2.0, 1.5 * (1 + 1e-7)]
    b = [a[0], a[1] * (1 + places * 2.0**-24), *a[2:]]
    assert judge({0: a}, {0: b}, control, 0.005)["verdict"] == verdict


@pytest.mark.parametrize(
    ("seeds", "shift", "verdict"), [(6, 0.0, "statistically equal"), (6, 0.1, "different"), (6, -0.1, "different"), (4, 0.0, "different")]
)
def test_seeds_show_equality_within_the_margin_alone(seeds: int, shift: float, verdict: str) -> None:
    """0.1 nats of about 3.3 are 3%, and the margin is 0.5%; four seeds could not show it however equal they are."""
    a = {seed: curve(seed, noise=1e-3) for seed in range(seeds)}
    b = {seed: curve(seed + 100, noise=1e-3, shift=shift) for seed in range(seeds)}
    assert judge(a, b, None, 0.005)["verdict"] == verdict


def test_the_sign_flip_test_counts() -> None:
    assert sign_flip([1.0, 2.0, 3.0]) == 1 / 8
    assert sign_flip([-1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip([-1.0, -2.0, -3.0]) == 1.0


def test_a_side_is_a_commit_or_overrides(tmp_path: Path) -> None:
    with side("training.compile=true model.depth=3", str(tmp_path)) as found:
        assert found == (ROOT, ["training.compile=true", "model.depth=3"])
    with side("HEAD", str(tmp_path)) as (tree, overrides):
        assert (tree / "train.py").exists() and tree != ROOT and not overrides
    assert not tree.exists()
    with pytest.raises(InputError, match="no_such_commit: expected a commit"), side("no_such_commit", str(tmp_path)):
        pass


@pytest.mark.distributed
def test_launches_that_differ_in_nothing_or_in_the_learning_rate(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    options: dict[str, Any] = {"recipe": workplace / "recipe.yaml", "overrides": [], "steps": 3, "seeds": [0], "ranks": 1, "margin": 0.005}
    same = argparse.Namespace(a=".", b="logging.tensorboard=false", out=tmp_path / "same.json", **options)
    assert compare(same) == 0
    assert json.loads(same.out.read_text())["verdict"] == "identical"
    other = argparse.Namespace(a="", b="optimizer.learning_rate=1e-2", out=tmp_path / "other.json", **options)
    assert compare(other) == 1
    assert len(json.loads(other.out.read_text())["losses"]["control"]["0"]) == 3
