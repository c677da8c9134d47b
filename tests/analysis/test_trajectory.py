"""Trajectory measures against float64 truth and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.__main__ import main
from analysis.fused import Heads
from analysis.grams import _products, increment_grams
from analysis.runs import find_run
from analysis.shards import open_checkpoint
from analysis.trajectory import analyze_trajectory, describe, kind_of, layer_of, null_values, summarize
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


def test_checkpoints_equal_to_the_first_are_left_out_of_the_mean_from_it(tmp_path):
    """A warm-up that begins at a rate of 0: the same as the path without them, on its own grid."""
    generator = torch.Generator().manual_seed(0)
    points = [torch.ones(300)] * 3 + list(torch.ones(300) + torch.randn(3, 300, generator=generator).cumsum(0))
    steps = [0, 1, 2, 4, 8, 16]
    folders = [write(tmp_path / "run" / f"step{step}", step, {"a": p.clone()}) for step, p in zip(steps, points, strict=True)]
    result = analyze_trajectory(find_run(tmp_path / "run"), progress=False)
    network = result["network"]
    moved = np.stack([(point - points[0]).double().numpy() for point in points[3:]])
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert network["displacements"] == result["tensors"]["a"]["displacements"] == 3
    assert network["omega_relative"] == pytest.approx(cosines.mean(), rel=1e-9)
    assert network["omega_relative_off_diagonal"] == pytest.approx((cosines.sum() - 3) / 6, rel=1e-9)
    weights = np.array([3.0, 6.0, 4.0]) / 13  # half the gaps on either side: 2 to 8, 4 to 16, 8 to 16
    assert network["omega_relative_grid"] == pytest.approx(weights @ cosines @ weights, rel=1e-9)
    assert network["relative_map"][0] == [None] * 5 and network["apex_angles"][:2] == [None, None]
    assert "2 of them equal to the first, and left out" in describe(result)
    still = increment_grams([open_checkpoint(folder) for folder in folders[:3]], progress=False)["a"].numpy()
    assert (summarize(still)["displacements"], summarize(still)["omega_relative_grid"]) == (0, None)


def test_memory_bound_does_not_change_the_result(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folders = [write(tmp_path / f"{i}", i, {"a": torch.randn(1001, generator=generator)}) for i in range(4)]
    checkpoints = [open_checkpoint(folder) for folder in folders]
    whole = increment_grams(checkpoints, progress=False)["a"]
    parts = increment_grams(checkpoints, memory_megabytes=0.001, progress=False)["a"]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_sums_over_many_elements_round_little(tmp_path):
    """Against exactly rounded sums: an order of addition that rounds more would make several processes differ from one by over 1e-12."""
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(1 << 18, generator=generator)]
    for _ in range(31):
        points.append(points[-1] + 0.01 * torch.randn(1 << 18, generator=generator))
    checkpoints = [open_checkpoint(write(tmp_path / f"{i}", i, {"a": point})) for i, point in enumerate(points)]
    found = increment_grams(checkpoints, progress=False)["a"]
    steps = [points[0].double(), *(b.double() - a.double() for a, b in pairwise(points))]
    exact = [math.fsum((step * step).tolist()) for step in steps[:4]]
    np.testing.assert_allclose(found.diag()[:4].numpy(), exact, rtol=1e-13)


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
        ("blocks.1.attention.context_pruning.query_key.weight", 1, "context pruning"),
        ("model.model.layers.2.self_attn.context_pruning.gain", 2, "context pruning"),
        ("model.model.layers.2.self_attn.q_proj.lora_A.default.weight", 2, "adapters"),
        ("model.layers.2.self_attn.q_proj.base_layer.weight", 2, "attention query"),
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


@pytest.mark.parametrize("every", [0, -8])
def test_every_is_a_positive_number_of_steps(tmp_path, capsys, every):
    moving(tmp_path)
    assert main(["trajectory", str(tmp_path / "run"), "--every", str(every)]) == 2
    assert f"--every {every}: expected a positive number of steps" in capsys.readouterr().err


def moving(tmp_path: Path, count: int = 5, seed: int = 0) -> list[Path]:
    """Checkpoints of two tensors on a random path, step-00000000 .. in tmp_path/run/checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    a, b, folders = torch.randn(700, 3, generator=generator), torch.randn(41, generator=generator), []
    for i in range(count):
        folders.append(
            write(tmp_path / "run" / "checkpoints" / f"step-{i * 10:08d}", i * 10, {"a": a.clone(), "blocks.0.mlp.b": b.clone()})
        )
        a += 1e-3 * torch.randn(a.shape, generator=generator)
        b += 1e-3 * torch.randn(b.shape, generator=generator)
    return folders


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gram in expected.items():
        torch.testing.assert_close(found[name], gram, rtol=1e-12, atol=1e-12 * float(gram.abs().max()))


def test_a_checkpoint_more_multiplies_its_own_row_alone(tmp_path, monkeypatch):
    folders = moving(tmp_path, 6)
    opened = [open_checkpoint(folder) for folder in folders]
    keep = tmp_path / "grams.safetensors"
    shapes = []
    monkeypatch.setattr("analysis.grams._products", lambda a, b: (shapes.append((len(a), len(b))), _products(a, b))[1])
    expected = increment_grams(opened, progress=False)
    assert set(shapes) == {(6, 6)}
    shapes.clear()
    increment_grams(opened[:4], progress=False, keep=keep)
    assert set(shapes) == {(4, 4)}
    shapes.clear()
    assert_same(increment_grams(opened, progress=False, keep=keep), expected)
    assert set(shapes) == {(2, 6)}
    shapes.clear()
    assert_same(increment_grams(opened, progress=False, keep=keep), expected)
    assert shapes == []
    # one that was deleted since, and none anew: from what is kept
    left = [opened[i] for i in (0, 2, 3, 5)]
    assert_same(increment_grams(left, progress=False, keep=keep), increment_grams(left, progress=False))
    assert shapes.count((4, 4)) == len(shapes)
    # one that changed: everything from there on
    changed = torch.load(folders[4] / "mp_rank_00_model_states.pt")
    changed["module"]["a"] += 1
    torch.save(changed, folders[4] / "mp_rank_00_model_states.pt")
    again = [open_checkpoint(folder) for folder in folders]
    shapes.clear()
    assert_same(increment_grams(again, progress=False, keep=keep), increment_grams(again, progress=False))
    assert shapes[0] == (2, 6)


def test_a_pass_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    opened = [open_checkpoint(folder) for folder in moving(tmp_path)]
    expected = increment_grams(opened, 0.01, progress=False)
    keep = tmp_path / "grams.safetensors"
    monkeypatch.setattr("analysis.grams.SAVE_SECONDS", -1.0)
    read, reads = type(opened[0]).read, []

    def failing(self, name, start, out, kind="weight"):
        if name == "blocks.0.mlp.b" and self is opened[3]:
            raise KeyboardInterrupt
        read(self, name, start, out, kind)

    monkeypatch.setattr(type(opened[0]), "read", failing)
    with pytest.raises(KeyboardInterrupt):
        increment_grams(opened, 0.01, progress=False, keep=keep)
    assert [path.name for path in tmp_path.glob(".grams*")] == [".grams-0-of-1.safetensors"]
    monkeypatch.setattr(type(opened[0]), "read", lambda self, name, *rest: (reads.append(name), read(self, name, *rest))[1])
    assert_same(increment_grams(opened, 0.01, progress=False, keep=keep), expected)
    assert set(reads) == {"blocks.0.mlp.b"}
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["grams.safetensors"]
    assert not list(tmp_path.glob(".grams*"))


def fused(tmp_path: Path) -> list:
    """Three checkpoints of a fused matrix of 24 rows, which 4 heads of 2 divide and 8 heads of 1, and one after it."""
    points = torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(0))
    return [
        open_checkpoint(write(tmp_path / f"step{i}", i, {"a.query_key_value.weight": point.clone(), "b": point[:2].clone()}))
        for i, point in enumerate(points)
    ]


def test_matrices_of_other_heads_are_not_used_again(tmp_path, monkeypatch):
    opened, keep = fused(tmp_path), tmp_path / "grams.safetensors"
    four, eight = (increment_grams(opened, progress=False, heads=Heads(n, n)) for n in (4, 8))
    assert four.keys() == eight.keys() and not torch.equal(*(grams["a.query_key_value.weight[key]"] for grams in (four, eight)))
    assert_same(increment_grams(opened, progress=False, keep=keep, heads=Heads(4, 4)), four)
    assert_same(increment_grams(opened, progress=False, keep=keep, heads=Heads(8, 8)), eight)
    keep.unlink()
    # cut off with four heads, after the fused matrix; gone on with eight
    monkeypatch.setattr("analysis.grams.SAVE_SECONDS", -1.0)
    read = type(opened[0]).read

    def failing(self, name, *rest):
        if name == "b" and self is opened[2]:
            raise KeyboardInterrupt
        read(self, name, *rest)

    monkeypatch.setattr(type(opened[0]), "read", failing)
    with pytest.raises(KeyboardInterrupt):
        increment_grams(opened, 0.001, progress=False, keep=keep, heads=Heads(4, 4))
    monkeypatch.setattr(type(opened[0]), "read", read)
    assert list(tmp_path.glob(".grams*"))
    assert_same(increment_grams(opened, 0.001, progress=False, keep=keep, heads=Heads(8, 8)), eight)


@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_several_ranks_add_up(tmp_path, count):
    """Each rank's share alone, added here; what torchrun adds is tested in `test_torchrun_...`."""
    from analysis.ranks import Ranks

    opened = [open_checkpoint(folder) for folder in moving(tmp_path)]
    expected = increment_grams(opened, 0.01, progress=False)
    parts = []
    for rank in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ranks, "add_up", lambda self, values: values)
            patch.setattr(Ranks, "raise_together", lambda self, error: None)
            patch.setattr(Ranks, "wait", lambda self: None)
            parts.append(increment_grams(opened, 0.01, progress=False, ranks=Ranks(rank, count)))
    assert not any(torch.equal(part["a"], expected["a"]) for part in parts)  # nobody does it all
    assert_same({name: sum(part[name] for part in parts) for name in expected}, expected)


@pytest.mark.distributed
def test_torchrun_gives_the_result_of_one_process(tmp_path, capfd):
    import json
    import subprocess
    import sys

    from analysis.__main__ import main

    moving(tmp_path)
    run = tmp_path / "run"
    assert main(["trajectory", str(run), "--out", str(tmp_path / "one"), "--memory-megabytes", "0.01"]) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "analysis",
        "trajectory",
        str(run),
    ]
    root = Path(__file__).parents[2]
    subprocess.run([*command, "--out", str(tmp_path / "two"), "--memory-megabytes", "0.01"], check=True, cwd=root, timeout=120)
    one, two = (json.loads((tmp_path / name / "trajectory.json").read_text()) for name in ("one", "two"))
    for key in ("trajectory_map", "relative_map", "consecutive_update_angles", "update_norms", "radial_updates"):
        np.testing.assert_allclose(np.array(two["network"][key], float), np.array(one["network"][key], float), rtol=1e-9)
    np.testing.assert_allclose(two["network"]["trajectory_map"], one["network"]["trajectory_map"], rtol=1e-12)
    assert capfd.readouterr().out.count("mean directional similarity") == 2  # one of each launch: the first rank alone prints
    (run / "checkpoints" / "step-00000020" / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    failed = subprocess.run([*command, "--out", str(tmp_path / "bad")], capture_output=True, text=True, cwd=root, timeout=120)
    assert failed.returncode != 0
    assert "truncated or damaged" in failed.stderr
    assert not (tmp_path / "bad" / "trajectory.json").exists()


def test_fused_query_key_value_against_the_model_that_fuses_them(tmp_path):
    """Each part's Gram matrix is that of the rows which the attention of that library reads as queries, keys or values."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

    shape = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 30,
        "pad_token_id": 0,
    }

    def neox(weight: torch.Tensor) -> list[torch.Tensor]:  # modeling_gpt_neox: view(..., heads, 3 * head_dim), chunk(3, -1)
        return [part.reshape(-1) for part in weight.view(4, 3 * 6, -1).chunk(3, dim=1)]

    cases = {
        "neox": (GPTNeoXForCausalLM(GPTNeoXConfig(**shape)), "query_key_value.weight", neox),
        "gpt2": (
            GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=4, vocab_size=30, n_positions=16)),
            "c_attn.weight",
            lambda weight: [part.reshape(-1) for part in weight.split(24, dim=1)],
        ),
        "phi3": (
            Phi3ForCausalLM(Phi3Config(**shape, num_key_value_heads=2)),
            "qkv_proj.weight",
            lambda weight: [part.reshape(-1) for part in weight.split([24, 12, 12], dim=0)],
        ),
    }
    for case, (model, suffix, split) in cases.items():
        parts: list[list[torch.Tensor]] = []
        for step in (1, 2, 3):
            with torch.no_grad():
                for i, parameter in enumerate(model.parameters()):
                    parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step * 1000 + i))
            model.save_pretrained(tmp_path / case / f"step{step}")
            fused = next(p for n, p in model.named_parameters() if n.endswith(suffix))
            parts.append([part.detach().double() for part in split(fused)])
        checkpoints = find_run(tmp_path / case).open()
        grams = increment_grams(checkpoints, memory_megabytes=0.002, progress=False)
        name = next(n for n in checkpoints[0].shapes if n.endswith(suffix))
        assert name not in grams
        for i, which in enumerate(("query", "key", "value")):
            basis = torch.stack([parts[0][i], parts[1][i] - parts[0][i], parts[2][i] - parts[1][i]])
            torch.testing.assert_close(grams[f"{name}[{which}]"], basis @ basis.T, rtol=1e-12, atol=1e-12)
            assert kind_of(f"{name}[{which}]") == f"attention {which}"
        result = analyze_trajectory(find_run(tmp_path / case), progress=False)
        assert result["fused"] == []
        assert set(result["layers_by_kind"]["0"]) >= {"attention query", "attention key", "attention value"}
        assert result["network"]["parameters"] == sum(kind["parameters"] for kind in result["kinds"].values())
        assert result["network"]["parameters"] == sum(shape.numel() for shape in checkpoints[0].shapes.values())


def test_radial_parts_principal_components_and_grid_weights():
    """Against coordinates: six points in four dimensions."""
    points = np.random.default_rng(0).normal(size=(6, 4)).cumsum(axis=0) + 5
    updates = np.diff(points, axis=0)
    basis = np.vstack([points[:1], updates])
    steps = [0, 1, 2, 4, 8, 16]
    result = summarize(basis @ basis.T, steps=steps)
    norms = np.linalg.norm(points, axis=1)
    radial = (updates * points[:-1]).sum(axis=1) / norms[:-1]
    np.testing.assert_allclose(result["radial_updates"], radial)
    across = updates - radial[:, None] * points[:-1] / norms[:-1, None]
    np.testing.assert_allclose(result["tangential_updates"], np.linalg.norm(across, axis=1))

    centred = points - points.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    shares = values**2 / (values**2).sum()
    np.testing.assert_allclose(result["principal_components"]["shares"], [*shares, 0.0], atol=1e-12)
    assert result["participation_ratio"] == pytest.approx(1 / (shares**2).sum())
    np.testing.assert_allclose(np.abs(result["principal_components"]["coordinates"]), np.abs(left[:, :3] * values[:3]), atol=1e-9)

    weights = np.array([0.5, 1.0, 1.5, 3.0, 6.0, 4.0]) / 16  # half of each gap on either side
    cosines = points @ points.T / np.outer(norms, norms)
    assert result["omega_grid"] == pytest.approx(weights @ cosines @ weights)


def test_null_values_on_a_doubling_grid():
    """A walk seen at 0, 1, 2, 4, ...: cos = 2^(-|i-j|/2); on an even grid the first component has 6 / pi^2 of the variance."""
    null = null_values([0, *(2**i for i in range(12))])["random_walk"]
    i = np.arange(12)
    assert null["omega_relative"] == pytest.approx((2.0 ** (-np.abs(i[:, None] - i) / 2)).mean())
    walk = summarize(np.eye(300))
    assert walk["principal_components"]["shares"][0] == pytest.approx(6 / math.pi**2, rel=0.01)
    assert null_values(300)["random_walk"]["participation_ratio"] == pytest.approx(walk["participation_ratio"])
    assert null_values(7)["straight_line"]["participation_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize(("dtype", "precision", "ratio"), [(torch.float16, "fp16", 2e-3), (torch.bfloat16, "bf16", 1.2e-2)])
def test_the_rounding_error_of_an_angle_is_foretold(tmp_path, dtype, precision, ratio):
    """Weights stored in 16 bits: the stated error takes the measured angle back to the true one."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(200_000, generator=generator).double()
    update = torch.randn(200_000, generator=generator).double()
    points = []
    for i in range(5):
        points.append(theta.clone())
        write(tmp_path / "run" / f"step{i}", i, {"a": theta.to(dtype)})
        theta += ratio * update
        update = 0.5 * update + math.sqrt(0.75) * torch.randn(200_000, generator=generator)
    result = analyze_trajectory(find_run(tmp_path / "run"), progress=False)
    assert result["checkpoints"][0]["precision"] == precision
    exact = [b - a for a, b in pairwise(points)]
    truth = [float(torch.rad2deg(torch.acos(b @ a / a.norm() / b.norm()))) for a, b in pairwise(exact)]
    measured = np.array(result["network"]["consecutive_update_angles"])
    errors = np.array(result["network"]["consecutive_update_angle_errors"])
    assert (errors > 1).all()
    np.testing.assert_allclose(measured - errors, truth, atol=0.35)


def test_memory_depends_on_the_flag_alone_and_files_stay_as_they_are(tmp_path):
    """The benchmark, small: 4 checkpoints of 8M float32 parameters (128 MB) take a few megabytes."""
    import json
    import subprocess
    import sys

    out = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "scripts.benchmark_trajectory", "--checkpoints", "4", "--parameters", "8e6"]
    command += ["--peer-checkpoints", "0", "--memory-megabytes", "4", "--folder", str(tmp_path / "scratch"), "--out", str(out)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True, timeout=120)
    result = json.loads(out.read_text())
    assert result["anonymous_megabytes"] < 24
    assert result["bytes_on_disk_unchanged"] is True
