"""What int8 costs: torchao against numpy, planted outliers that only coarse scales suffer from, and the verb from run to picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from analysis.__main__ import main
from analysis.decoders import Decoder, find_decoder, projection_groups, run_decoder
from analysis.quantization import (
    RECIPES,
    Options,
    analyze_checkpoint,
    compare,
    describe,
    measure_before,
    measure_recipe,
    quantise_linears,
    summarise,
)
from analysis.runs import find_run
from analysis.tokens import file_windows, training_windows
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer


def network(**changes) -> Decoder:
    """Wide enough for groups of 32, its weights large enough for predictions to be sharp."""
    shape = {"width": 32, "depth": 2, "heads": 2, "vocab_size": 64, "sequence_length": 32, "init_std": 0.15, "tied_embeddings": False}
    model = Transformer(ModelConfig(**{**shape, **changes}))
    initialize(model, seed=0)
    return run_decoder(model)


def plant(decoder: Decoder, factor: float) -> None:
    """Make neuron 5 of what every block's norms put out `factor` times larger, and what reads it as much smaller: the same function."""
    with torch.no_grad():
        for block in decoder.layers:
            block.attention_norm.weight[5] *= factor
            block.mlp_norm.weight[5] *= factor
            for reader in (block.attention.query, block.attention.key, block.attention.value, block.mlp.up):
                reader.weight[:, 5] /= factor


TOKENS = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(0))


def on_grid(x: np.ndarray, scale: np.ndarray, low: int, high: int, zero: np.ndarray | float = 0.0) -> np.ndarray:
    """Whole numbers. In float32, as the largest value lies on 127.5 steps, between two of them, where the last bit decides."""
    return np.clip(np.round(x.astype(np.float32) * (np.float32(1) / scale.astype(np.float32))) + zero, low, high).astype(np.float64)


def w8a8(x: np.ndarray, weight: np.ndarray, per_row: bool) -> np.ndarray:
    """x weight^T with both rounded to symmetric int8, float64: one scale a row of each, or one for all. 255 steps, -128 to 127."""
    x_scale, weight_scale = (np.abs(y).max(axis=1 if per_row else (0, 1), keepdims=True) / np.float32(127.5) for y in (x, weight))
    return on_grid(x, x_scale, -128, 127) @ on_grid(weight, weight_scale, -128, 127).T * x_scale * weight_scale.T


def w4a8(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x weight^T, float64: weights rounded to symmetric int4 in groups of 32, each row of x to asymmetric int8."""
    groups = weight.reshape(len(weight), -1, 32)
    weight_scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(7.5)
    weight = (on_grid(groups, weight_scale, -8, 7) * weight_scale).reshape(weight.shape)
    low, high = np.minimum(x.min(axis=1, keepdims=True), 0), np.maximum(x.max(axis=1, keepdims=True), 0)
    scale = (high - low) / np.float32(255)
    zero = np.clip(-128 - np.round(low / scale), -128, 127)
    return scale * (on_grid(x, scale, -128, 127, zero) - zero) @ weight.T


@pytest.mark.parametrize("recipe", ["w8a8_dynamic", "w8a8_per_token", "w4a8"])
def test_torchao_multiplies_as_numpy_does(recipe):
    decoder = network()
    quantised = quantise_linears(decoder, projection_groups(decoder, "toy"), recipe)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, 20)[:, None]
    linear = decoder.layers[0].mlp.up
    arrays = x.numpy(), linear.weight.detach().numpy()
    expected = w4a8(*arrays) if recipe == "w4a8" else w8a8(*arrays, per_row=recipe == "w8a8_per_token")
    with torch.no_grad():
        found = quantised.layers[0].mlp.up(x).double().numpy()
    step = np.abs(expected).max() / 127
    assert np.abs(found - expected).max() < 1e-4 * step
    assert np.abs(linear(x).detach().double().numpy() - expected).max() > 0.1 * step
    assert torch.equal(quantised.unembedding.weight, decoder.unembedding.weight)
    assert type(quantised.unembedding.weight) is torch.nn.Parameter and type(linear.weight) is torch.nn.Parameter


def test_loss_and_kl_against_float64():
    decoder, other = network(), network(init_std=0.16)
    found, itself = compare(decoder.logits, [other.logits, decoder.logits], list(TOKENS.split(3)))
    with torch.no_grad():
        p, q = (one.logits(TOKENS[:, :-1]).double().log_softmax(-1) for one in (decoder, other))
    assert found["loss"] == pytest.approx(-q.gather(-1, TOKENS[:, 1:, None]).mean().item(), rel=1e-6)
    assert found["output_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert itself["output_kl"] == 0.0
    before = measure_before(decoder, list(TOKENS.split(3)), "toy")
    assert before["perplexity"] == pytest.approx(math.exp(itself["loss"]), rel=1e-6)


def costs(decoder: Decoder) -> dict[str, float]:
    """The output's KL under each recipe, w8a8_static calibrated on other tokens."""
    groups = projection_groups(decoder, "toy")
    calibration = [[torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]]
    return {
        recipe: measure_recipe(recipe, decoder, groups, [TOKENS], calibration, 99.999)["over_seeds"][0]["output_kl"] for recipe in RECIPES
    }


def test_a_planted_outlier_ruins_coarse_scales_alone():
    plain, planted = network(), network()
    plant(planted, 200.0)
    with torch.no_grad():
        assert torch.allclose(plain.logits(TOKENS[:, 1:]), planted.logits(TOKENS[:, 1:]), rtol=1e-4, atol=1e-4)
    without, with_outlier = costs(plain), costs(planted)
    for recipe in ("w8a8_static", "w8a8_dynamic"):
        assert with_outlier[recipe] > 100 * without[recipe], recipe
    # one scale a token shares it with the outlier as well; but not with the tokens in which it is larger
    assert with_outlier["w8a8_per_token"] < with_outlier["w8a8_dynamic"]
    assert max(without["w8a8_static"], without["w8a8_dynamic"], without["w8a8_per_token"]) < 0.01


def test_an_outlier_token_ruins_one_scale_a_tensor_and_not_one_a_token():
    """One token of the vocabulary with an enormous first-layer input: whoever takes a scale from the whole batch rounds the rest away."""
    planted = network(block="outlier_protected")
    tokens = TOKENS.clone()
    tokens[:, 0] = 0
    tokens[:, 1:][tokens[:, 1:] == 0] = 1
    with torch.no_grad():
        planted.network.embedding.weight[0] *= 200
    groups = projection_groups(planted, "toy")
    kl = {}
    for recipe in RECIPES:
        kl[recipe] = measure_recipe(recipe, planted, groups, [tokens], [[tokens[:, :-1]]], 100)["over_seeds"][0]["output_kl"]
    assert kl["w8a8_dynamic"] > 20 * kl["w8a8_per_token"]
    assert kl["w8a8_static"] > 20 * kl["w8a8_per_token"]


def test_integers_lose_nothing_under_int8():
    """Weights and activations that are whole numbers up to the largest of int8 come out exact, per tensor and per token."""
    decoder = network()
    generator = torch.Generator().manual_seed(0)
    linear = decoder.layers[0].mlp.up
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-127, 128, linear.weight.shape, generator=generator))
        linear.weight[:, 0] = 127.5  # so that the scale is 1 whether or not -128 is used
    x = torch.randint(-127, 128, (20, 32), generator=generator).float()
    x[:, 0] = 0.0
    x[:, 1] = 127.5
    exact = x.round().clamp(-128, 127) @ linear.weight.round().clamp(-128, 127).T
    for recipe in ("w8a8_dynamic", "w8a8_per_token"):
        with torch.no_grad():
            found = quantise_linears(decoder, projection_groups(decoder, "toy"), recipe).layers[0].mlp.up(x)
        assert torch.allclose(found, exact, rtol=1e-5), recipe


def test_a_shape_that_a_recipe_cannot_take_is_named():
    decoder = network(width=24)
    with pytest.raises(InputError, match=r"blocks\.0\.attention\.key: 24 x 24: 24 inputs do not divide into groups of 32"):
        quantise_linears(decoder, projection_groups(decoder, "toy"), "w4a8")


@pytest.mark.gpu
def test_a_shape_that_cuda_cannot_multiply_is_named():
    decoder = network(width=28)
    decoder.network.cuda()
    with pytest.raises(InputError, match=r"blocks\.0\.attention\.key: 28 x 28: int8 products on CUDA need multiples of 8"):
        quantise_linears(decoder, projection_groups(decoder, "toy"), "w8a8_per_token")


def test_the_spread_is_over_calibration_seeds():
    found = {"over_seeds": [{"loss": math.log(x), "output_kl": x} for x in (10.0, 12.0, 14.0)]}
    result = summarise(found, {"perplexity": 10.0}, "w8a8_static")
    assert result["perplexity"] == pytest.approx(12.0) and result["spread"] == pytest.approx(2.0)
    assert result["perplexity_increase"] == pytest.approx(2.0) and result["perplexity_ratio"] == pytest.approx(1.2)
    assert summarise({"over_seeds": found["over_seeds"][:1]}, {"perplexity": 10.0}, "w4a8")["spread"] is None


def with_training_split(run_folder) -> np.ndarray:
    prepared = run_folder.parents[1] / "prepared" / "abc"
    tokens = np.random.default_rng(1).integers(0, 64, 600).astype("<u2")
    tokens[:400].tofile(prepared / "train-00000.bin")
    tokens[400:].tofile(prepared / "train-00001.bin")
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["train"]["shards"] = [{"file": "train-00000.bin", "tokens": 400}, {"file": "train-00001.bin", "tokens": 200}]
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    return tokens


def test_calibration_windows_come_from_the_training_split(run_folder, tmp_path):
    tokens = with_training_split(run_folder)
    windows = training_windows(find_run(run_folder), 500, 16, seed=3)
    starts = {tuple(tokens[i : i + 16].tolist()): i for i in range(600 - 15)}
    places = [starts[tuple(window)] for window in windows.tolist()]
    assert not any(384 < place < 400 for place in places)  # none across two shards
    assert min(places) < 30 and max(places) > 570 and len(set(places)) > 250
    assert torch.equal(windows, training_windows(find_run(run_folder), 500, 16, seed=3))
    assert not torch.equal(windows, training_windows(find_run(run_folder), 500, 16, seed=4))
    (tmp_path / "text").write_text("abcdefgh")
    texts = file_windows(lambda text: [ord(letter) for letter in text], [str(tmp_path / "text")], 50, 7, seed=0)
    assert {bytes(row).decode() for row in texts.tolist()} == {"abcdefg", "bcdefgh"}
    with pytest.raises(InputError, match="no 9 tokens in a row to calibrate on"):
        file_windows(lambda text: [ord(letter) for letter in text], [str(tmp_path / "text")], 50, 9, seed=0)


def test_the_verb_from_run_to_picture(run_folder, tmp_path, capsys):
    with_training_split(run_folder)
    out = tmp_path / "out"
    both = [str(run_folder), str(run_folder / "checkpoints" / "step-00000000")]
    assert main(["quantization", *both, "--tokens", "100", "--seeds", "2", "--calibration-batches", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "quantization.json").read_text())
    assert (out / "quantization.png").stat().st_size > 10_000
    assert [checkpoint["name"] for checkpoint in result["checkpoints"]] == ["toy", "toy/step-00000000"]
    first = result["checkpoints"][0]
    assert first["recipes"]["w4a8"] == {"refused": "blocks.0.attention.key: 16 x 16: 16 inputs do not divide into groups of 32"}
    assert "toy, w4a8: blocks.0.attention.key: 16 x 16" in printed
    assert first["recipes"]["w8a8_static"]["spread"] is not None and len(first["recipes"]["w8a8_static"]["over_seeds"]) == 2
    for recipe in RECIPES[:3]:
        found = first["recipes"][recipe]
        assert found["perplexity"] - first["before"]["perplexity"] == pytest.approx(found["perplexity_increase"])
        assert 0 < found["output_kl"] < 1e-3
        assert result["definitions"].keys() >= found.keys() - {"over_seeds", "sites"}
        assert f"{found['perplexity']:.4g}" in printed
    assert result["definitions"].keys() >= set(RECIPES) | {"kurtosis"}
    assert describe(result) in printed


def test_what_is_refused(run_folder, tmp_path, capsys):
    run = find_decoder(run_folder)
    assert main(["quantization", str(run_folder), "--recipes", "w8a8_static", "int3"]) == 2
    assert "error: --recipes int3: expected some of w8a8_static, w8a8_dynamic" in capsys.readouterr().err
    for wrong in ({"tokens": 0}, {"seeds": 0}, {"percentile": 40.0}):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))} "):
            Options(**wrong)
    with pytest.raises(InputError, match=r"manifest\.json: damaged: KeyError: 'shards'"):  # no training data to calibrate on
        analyze_checkpoint(run, Options(tokens=32), progress=False)
    (run_folder / "data.json").rename(tmp_path / "data.json")
    with pytest.raises(InputError, match=r"no data\.json beside the checkpoints, .* give text with --calibration FILES"):
        training_windows(find_run(run_folder), 1, 16, seed=0)
    (tmp_path / "data.json").rename(run_folder / "data.json")
    decoder = network()
    decoder.unembedding.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="toy: a loss of nan nats per token has no finite perplexity"):
        measure_before(decoder, [TOKENS], "toy")
    result = analyze_checkpoint(run, Options(tokens=32, recipes=["w8a8_per_token"]), progress=False)
    assert list(result["recipes"]) == ["w8a8_per_token"]
