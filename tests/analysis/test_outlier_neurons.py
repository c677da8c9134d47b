"""Top neurons, massive activations and LLM.int8()'s outlier features, against plain numpy in float64 and planted cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.decoders import projection_groups
from analysis.outlier_neurons import MassiveActivations, OutlierFeatures, Thresholds, top_neurons, watch_projections
from model.activation_statistics import ActivationMoments
from model.errors import InputError
from tests.analysis.test_decoders import ours


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_top_neurons_over_any_split():
    x = random(6, 5, 12) * torch.linspace(0.1, 3, 12).flip(0)
    x[..., 7] += 20
    moments = ActivationMoments(12, x.device)
    for part in x.split([1, 2, 3]):
        moments.add(part)
    squares = (x.double().numpy().reshape(30, 12) ** 2).mean(axis=0)
    top = top_neurons(moments, 3)
    assert [one["neuron"] for one in top] == np.argsort(-squares)[:3].tolist() and top[0]["neuron"] == 7
    assert [one["rms"] for one in top] == pytest.approx(np.sqrt(np.sort(squares)[::-1][:3]))
    assert [one["share"] for one in top] == pytest.approx(np.sort(squares)[::-1][:3] / squares.sum())
    assert sum(one["share"] for one in top_neurons(moments, 99)) == pytest.approx(1.0)
    moments.add(torch.full((1, 1, 12), torch.nan))
    assert top_neurons(moments, 3) == []


def test_massive_activations_are_large_and_dwarf_their_own_sequence():
    x = random(3, 10, 8) * 0.01
    x[0, 4, 2] = -150.0  # 150 and some 22,000 times the median: massive
    x[1] *= 1000
    x[1, 3, 5] = 120.0  # large, but its own sequence is too
    x[2, 0, 0] = 90.0  # dwarfs its sequence, but is below 100
    massive = MassiveActivations(Thresholds())
    for sequence in x.split(1):
        massive.add(sequence)
    magnitudes = np.abs(x.double().numpy()).reshape(3, -1)
    medians = np.sort(magnitudes, axis=1)[:, (magnitudes.shape[1] - 1) // 2]
    assert massive.measures()["count"] == ((magnitudes > 100) & (magnitudes >= 1000 * medians[:, None])).sum() == 1
    largest = massive.measures()["largest"]
    assert (largest["value"], largest["position"], largest["neuron"]) == (-150.0, 4, 2)
    assert largest["median_ratio"] == pytest.approx(150 / medians[0], rel=1e-6)
    loose = MassiveActivations(Thresholds(massive_magnitude=80))
    loose.add(x)
    assert loose.measures()["count"] == 2
    loose.add(torch.full((1, 2, 8), torch.nan))
    assert loose.measures()["count"] == 2


def brute_force(inputs: np.ndarray, magnitude: float, layers: float, positions: float) -> list[int]:
    """inputs (layers, positions, d) -> the dimensions that meet the criterion."""
    large = np.abs(inputs) >= magnitude
    return [
        i for i in range(inputs.shape[2]) if large[:, :, i].any(axis=1).mean() >= layers and large[:, :, i].any(axis=0).mean() >= positions
    ]


def test_outlier_features_at_the_edges_of_the_criterion():
    x = np.zeros((8, 100, 6))  # layers, positions, dimensions
    x[[1, 5], 10:16, 0] = 6.0  # 2 of 8 layers, 6 of 100 positions: just an outlier feature
    x[1, 10:50, 1] = 60.0  # one layer is too few
    x[:, 10:15, 2] = -60.0  # five positions are too few
    x[:, :, 3] = 5.99  # too small
    x[[0, 1], :3, 4] = 7.0  # six positions in two layers, but only three different ones
    x[0, :3, 5], x[7, 3:6, 5] = 7.0, -8.0  # six positions, three in each of two layers
    features = OutlierFeatures(8, Thresholds())
    for part in (slice(0, 40), slice(40, 100)):  # batches
        for layer in range(8):
            features.add("residual", layer, torch.tensor(x[layer, part], dtype=torch.float32))
            features.add("heads", layer, torch.tensor(x[layer, part, :1], dtype=torch.float32))
        features.end_batch()
    found = features.measures()
    assert [one["dimension"] for one in found["residual"]["features"]] == [0, 5] == brute_force(x, 6, 0.25, 0.06)
    assert found["residual"]["features"][0] == {"dimension": 0, "layers": 0.25, "positions": 0.06, "largest": 6.0}
    assert found["residual"]["largest"] == 60.0
    assert len(found["heads"]["features"]) == 1


def test_what_is_looked_at_are_the_inputs_of_the_projections_but_the_last():
    """The inputs, taken apart by hand, give the same dimensions; what the contraction reads would give others."""
    decoder = ours()
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    thresholds = Thresholds(feature_magnitude=2.0, feature_layers=1.0, feature_positions=0.1)
    features = OutlierFeatures(2, thresholds)
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in ("attention.query", "mlp.up", "attention.output")}
    for block in decoder.layers:
        for name, kept in inputs.items():
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0].double().numpy().reshape(-1, 16))
            )
    with torch.no_grad(), watch_projections(decoder, projection_groups(decoder, "toy"), features):
        for kept in inputs.values():
            kept.clear()
        decoder.logits(tokens)
        features.end_batch()
    residual = np.stack([np.concatenate(pair) for pair in zip(inputs["attention.query"], inputs["mlp.up"], strict=True)])
    # a position is the same position in both inputs
    large = np.abs(residual.reshape(2, 2, 32, 16)) >= 2.0
    expected = [i for i in range(16) if large[..., i].any(axis=(1, 2)).all() and large[..., i].any(axis=(0, 1)).mean() >= 0.1]
    found = features.measures()
    assert [one["dimension"] for one in found["residual"]["features"]] == expected and len(expected) > 0
    assert [one["dimension"] for one in found["heads"]["features"]] == brute_force(np.stack(inputs["attention.output"]), 2.0, 1.0, 0.1)
    assert found["residual"]["largest"] == pytest.approx(np.abs(residual).max())


def test_impossible_thresholds_are_named():
    with pytest.raises(InputError, match=r"--feature-layers 1\.5: expected a share"):
        Thresholds(feature_layers=1.5)
    with pytest.raises(InputError, match="--massive-ratio 0: expected a positive number"):
        Thresholds(massive_ratio=0)
