"""Trajectory measures against float64 truth and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.runs import find_run
from analysis.shards import open_checkpoint
from analysis.trajectory import analyze_trajectory, describe, increment_grams, kind_of, layer_of, null_values, summarize
from model.errors import InputError


def write(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> Path:
    """A ZeRO-0 checkpoint of these tensors."""
    folder.mkdir(parents=True)
    state = {"module": tensors, "buffer_names": [], "global_steps": step, "mp_world_size": 1, "optimizer": None}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    return folder


def trajectory_of(tmp_path: Path, points: list[torch.Tensor], memory_megabytes: float = 32) -> dict:
    """The measures of a path whose checkpoints hold these vectors in two tensors."""
    half = len(points[0]) // 3
    folders = [write(tmp_path / f"{i}", i, {"a": p[:half].clone(), "b": p[half:].clone()}) for i, p in enumerate(points)]
    grams = increment_grams([open_checkpoint(folder) for folder in folders], memory_megabytes, progress=False)
    return summarize(sum(gram.numpy() for gram in grams.values()))


def test_against_float64_where_steps_are_a_thousandth_of_the_weights(tmp_path):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200_001, generator=generator)
    points, update = [start], torch.randn(200_001, generator=generator)
    for _ in range(6):
        points.append(points[-1] + 1e-3 * update)
        update = 0.5 * update + math.sqrt(0.75) * torch.randn(200_001, generator=generator)
    result = trajectory_of(tmp_path, points, memory_megabytes=1)

    exact = np.stack([point.double().numpy() for point in points])
    updates = np.diff(exact, axis=0)
    norms = np.linalg.norm(updates, axis=1)
    cosines = [updates[t] @ updates[t - 1] / norms[t] / norms[t - 1] for t in range(1, len(updates))]
    assert min(cosines) > 0.45  # a plain float32 Gram matrix gets these wrong, even in sign
    np.testing.assert_allclose(result["consecutive_update_angles"], np.degrees(np.arccos(cosines)), rtol=1e-9)
    np.testing.assert_allclose(result["update_norms"], norms, rtol=1e-10)
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(result["trajectory_map"], unit @ unit.T, rtol=1e-12)
    assert result["omega"] == pytest.approx(np.linalg.norm(unit.mean(axis=0)) ** 2, rel=1e-12)
    displacements = exact[1:] - exact[0]
    unit = displacements / np.linalg.norm(displacements, axis=1, keepdims=True)
    np.testing.assert_allclose(result["relative_map"], unit @ unit.T, rtol=1e-9)
    np.testing.assert_allclose(result["apex_angles"][:-1], np.degrees(np.arccos((unit @ unit[-1])[:-1])), rtol=1e-8)
    np.testing.assert_allclose(result["displacement_angles"], np.degrees(np.arccos(updates @ unit[-1] / norms)), rtol=1e-9)
    np.testing.assert_allclose(result["displacement_norms"][1:], np.linalg.norm(displacements, axis=1), rtol=1e-10)
    assert result["straightness"] == pytest.approx(np.linalg.norm(displacements[-1]) / norms.sum(), rel=1e-10)


def test_a_straight_line_gives_one(tmp_path):
    direction = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    start = torch.ones(3000)
    result = trajectory_of(tmp_path, [start + t * direction for t in range(6)])
    assert result["omega_relative"] == pytest.approx(1.0, abs=1e-9)
    assert result["straightness"] == pytest.approx(1.0, abs=1e-9)
    assert max(result["consecutive_update_angles"]) < 0.01


def test_a_random_walk_gives_two_thirds():
    """From its Gram matrix: increments of equal length, orthogonal in infinitely many dimensions."""
    for count in (50, 400):
        gram = np.eye(count)
        result = summarize(gram)
        expected = null_values(count)["random_walk"]
        assert result["omega_relative"] == pytest.approx(expected["omega_relative"], rel=1e-12)
        assert result["straightness"] == pytest.approx(expected["straightness"], rel=1e-12)
        assert result["consecutive_update_angles"] == pytest.approx([90.0] * (count - 2))
    assert expected["omega_relative"] == pytest.approx(2 / 3, abs=0.003)


def test_a_sampled_random_walk_gives_nearly_two_thirds(tmp_path):
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.zeros(1, 6000), torch.randn(60, 6000, generator=generator).cumsum(0)]) + 1
    result = trajectory_of(tmp_path, list(points))
    assert result["omega_relative"] == pytest.approx(null_values(61)["random_walk"]["omega_relative"], abs=0.01)
    assert result["omega_relative"] == pytest.approx(2 / 3, abs=0.03)


def test_off_diagonal_means_and_undefined_values():
    result = summarize(np.diag([4.0, 0.0, 0.0]))  # the weights never moved
    assert result["omega"] == pytest.approx(1.0)
    assert result["omega_off_diagonal"] == pytest.approx(1.0)
    assert result["omega_relative"] is None
    assert result["straightness"] is None
    assert result["consecutive_update_angles"] == [None]
    walk = summarize(np.eye(5))
    cosines = np.array(walk["trajectory_map"])
    assert walk["omega_off_diagonal"] == pytest.approx((cosines.sum() - 5) / 20)


def test_memory_bound_does_not_change_the_result(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folders = [write(tmp_path / f"{i}", i, {"a": torch.randn(1001, generator=generator)}) for i in range(4)]
    checkpoints = [open_checkpoint(folder) for folder in folders]
    whole = increment_grams(checkpoints, progress=False)["a"]
    parts = increment_grams(checkpoints, memory_megabytes=0.001, progress=False)["a"]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_what_is_refused(tmp_path, run_folder):
    one = open_checkpoint(write(tmp_path / "1", 1, {"a": torch.ones(3)}))
    with pytest.raises(InputError, match="at least two checkpoints"):
        increment_grams([one], progress=False)
    with pytest.raises(InputError, match="not of one model: they differ in a"):
        increment_grams([one, open_checkpoint(write(tmp_path / "2", 2, {"a": torch.ones(4)}))], progress=False)
    broken = torch.ones(3)
    broken[1] = math.nan
    with pytest.raises(InputError, match=r"/3: a holds values that are not finite"):
        increment_grams([one, open_checkpoint(write(tmp_path / "3", 3, {"a": broken}))], progress=False)


def test_groups_and_tied_weights_count_once(run_folder):
    result = analyze_trajectory(find_run(run_folder), progress=False)
    assert result["steps"] == [0, 10, 20]
    assert result["tied"] == {"unembedding.weight": "embedding.weight"}
    assert result["network"]["parameters"] == sum(summary["parameters"] for summary in result["kinds"].values())
    assert result["kinds"]["embedding"]["parameters"] == 64 * 16
    assert set(result["layers"]) == {"0", "1"}
    assert result["network"]["straightness"] == pytest.approx(1.0, abs=1e-6)  # the fixture moves along a line
    assert result["definitions"].keys() >= result["network"].keys() - {"parameters"}
    assert "random walk" in describe(result)


def test_16_bit_weights_are_marked(tmp_path):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5000, generator=generator)
    run = tmp_path / "run" / "checkpoints"
    for i in range(3):
        write(run / f"step-{i:08d}", i, {"a": (start + 1e-4 * i).bfloat16()})
    result = analyze_trajectory(find_run(tmp_path / "run"), progress=False)
    assert result["checkpoints"][0]["precision"] == "bf16"
    assert min(r for r in result["network"]["rounding_ratios"] if r is not None) > 0.3
    assert "drown in the rounding" in describe(result)


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("blocks.3.attention.query.weight", 3, "attention query"),
        ("blocks.0.attention.query_norm.weight", 0, "norms"),
        ("blocks.10.attention.output.weight", 10, "attention output"),
        ("blocks.1.mlp.down.weight", 1, "mlp"),
        ("blocks.1.mlp_gain", 1, "residual gains"),
        ("embedding.weight", None, "embedding"),
        ("position_embedding.weight", None, "embedding"),
        ("unembedding.weight", None, "unembedding"),
        ("model.layers.2.self_attn.v_proj.weight", 2, "attention value"),
        ("gpt_neox.layers.5.attention.query_key_value.weight", 5, "attention query, key and value"),
        ("transformer.h.7.ln_1.weight", 7, "norms"),
        ("model.norm.weight", None, "norms"),
        ("lm_head.weight", None, "unembedding"),
        ("something", None, "other"),
    ],
)
def test_names(name, layer, kind):
    assert (layer_of(name), kind_of(name)) == (layer, kind)
