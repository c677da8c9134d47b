"""The paper's static int8, against formulas written anew in numpy float64, and the unrounded forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis.decoders import projection_groups
from analysis.fake_quantization import (
    StaticRanges,
    _Attention,
    asymmetric,
    calibrate,
    check_sites,
    intercept,
    percentile_range,
    quantise_weight,
    quantise_weights,
    symmetric,
)
from model.errors import InputError
from tests.analysis.test_decoders import TOKENS, ours


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_grid(bits):
    x = torch.linspace(-4, 6, 4001)
    low, high = -3.0, 4.5
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    integers = np.clip(np.round(x.double().numpy() / scale) + zero, 0, 2**bits - 1)
    found = asymmetric(x, low, high, bits)
    assert found.numpy() == pytest.approx(scale * (integers - zero), abs=1e-5)
    assert len(found.unique()) == 2**bits
    grid_low, grid_high = scale * (0 - zero), scale * (2**bits - 1 - zero)
    inside = (x > grid_low) & (x < grid_high)
    assert (found - x)[inside].abs().max() <= scale / 2 * (1 + 1e-4)
    assert asymmetric(torch.zeros(1), low, high, bits) == 0  # exactly on the grid
    assert torch.allclose(asymmetric(found, low, high, bits), found)


def test_a_range_is_widened_to_hold_zero_and_more_bits_mean_less_error():
    x = torch.linspace(5, 6, 1000)
    assert (asymmetric(x, 5, 6) - x).abs().max() <= 6 / 255 / 2 * (1 + 1e-4)
    assert asymmetric(-x, -6, -5).max() <= -5 + 6 / 255
    errors = [(asymmetric(random(1000), -5, 5, bits) - random(1000)).abs().max().item() for bits in (4, 8, 12, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
    assert asymmetric(torch.zeros(3), 0, 0).tolist() == [0, 0, 0]


def test_symmetric_grid():
    x = random(1000)
    scale = 2.0 / 127
    assert symmetric(x, 2.0).numpy() == pytest.approx(scale * np.clip(np.round(x.double().numpy() / scale), -128, 127), abs=1e-5)


def test_values_on_a_grid_lose_nothing():
    weight = torch.randint(-127, 128, (20, 30), generator=torch.Generator().manual_seed(0)).float()
    weight[0, 0] = 127
    assert torch.equal(quantise_weight(weight), weight)
    activations = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).sub(100).float() / 4
    ranges = StaticRanges(percentile=100)
    assert torch.allclose(ranges("here", activations), activations)


def test_weight_range_is_the_best_of_a_hundred():
    weight = random(40, 50) ** 3  # heavy tails: clipping pays
    errors = []
    for i in range(1, 101):
        scale = weight.abs().max().double().item() * i / 100 / 127
        integers = np.clip(np.round(weight.double().numpy() / scale), -128, 127)
        errors.append(((integers * scale - weight.double().numpy()) ** 2).sum())
    found = (quantise_weight(weight) - weight).double().square().sum().item()
    assert found == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) < errors[-1]


@pytest.mark.parametrize("percentile", [100, 99.999, 99.9, 90])
@pytest.mark.parametrize("count", [3, 1000, 30_000])
def test_percentiles_are_numpys(percentile, count):
    x = random(count)
    expected = np.percentile(x.double().numpy(), [100 - percentile, percentile])
    assert percentile_range(x, percentile) == pytest.approx(tuple(expected), rel=1e-5)


def test_ranges_are_a_running_mean_then_frozen():
    ranges = StaticRanges(percentile=100)
    ranges("a", torch.tensor([-1.0, 2.0]))
    ranges("a", torch.tensor([-3.0, 7.0]), torch.tensor([True, False]))  # 7 may not be seen
    assert ranges.ranges["a"] == pytest.approx((-0.9 + 0.1 * -3, 0.9 * 2 + 0.1 * -3))
    ranges.frozen = True
    ranges("a", torch.tensor([100.0]))
    assert ranges.ranges["a"][1] < 2


BLOCKS = [
    {},
    {"activation": "swiglu", "kv_heads": 1, "positions": "learned", "norm": "layer_norm"},
    {"block": "outlier_protected"},
    {"block": "outlier_protected", "residual_gain_form": "vector", "tied_embeddings": False, "activation": "relu"},
    {"block": "post_norm", "norm": "layer_norm", "biases": "all"},
    {"block": "outlier_protected", "attention_softcap": 5.0, "kv_heads": 1, "first_norm": True},
    {"norm": "simple_rms_norm", "norm_places": ["value"], "qk_norm": "rms_norm"},
    {"norm": "layer_norm", "norm_places": ["query_key", "mlp"], "qk_norm": "layer_norm", "qk_norm_gains": "frozen"},
]


@pytest.mark.parametrize("changes", BLOCKS, ids=lambda changes: "-".join(map(str, changes.values())) or "pre_norm")
def test_interception_without_rounding_is_the_forward_pass(changes):
    decoder = ours(**changes)
    groups = projection_groups(decoder, "toy")
    check_sites(decoder, groups, "toy")
    sites: list[str] = []

    def look(site, x, counted):
        sites.append(site)
        return x

    with torch.no_grad():
        expected = decoder.logits(TOKENS)
        with intercept(decoder, groups, look):
            found = decoder.logits(TOKENS)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(decoder.logits(TOKENS), expected)  # it has ended
    config, names = decoder.network.config, ["attention.query output", "attention.key output", "attention.value output"]
    names += ["attention_norm output"] if {"query_key", "value"} & set(config.norm_places) else []
    names += ["attention.query_norm output", "attention.key_norm output"] if config.qk_norm != "none" else []
    names += ["scores 1", "softmax 1", "context 1", "attention.output output", "residual sum 1"]
    names += ["mlp_norm output"] if "mlp" in config.norm_places else []
    names += ["mlp.down input", "mlp.down output", "residual sum 2"]
    names += ["after_attention_norm output", "after_mlp_norm output"] if config.block == "post_norm" else []
    in_block = [site for site in sites if site.startswith(("layer 1", "blocks.1"))]
    assert sorted(site.removeprefix("layer 1 ").removeprefix("blocks.1.") for site in in_block) == sorted(names)
    assert len(set(sites)) == len(sites) == 2 * len(names) + 1 + config.final_norm + config.first_norm
    assert ("final_norm output" in sites) == config.final_norm


def test_what_is_rounded_is_what_the_block_computes():
    """Each site's tensor, recomputed from the block's own modules: nothing is missed and nothing is taken for another."""
    decoder = ours()
    seen: dict[str, torch.Tensor] = {}
    visible: dict[str, torch.Tensor | None] = {}

    def look(site, x, counted):
        seen[site], visible[site] = x.clone(), counted
        return x

    with torch.no_grad(), intercept(decoder, projection_groups(decoder, "toy"), look):
        decoder.logits(TOKENS)
    network = decoder.network
    with torch.no_grad():
        from model.attention import rotary_tables, rotate

        block, x = network.blocks[0], network.embedding(TOKENS)
        rotary = rotary_tables(0, 16, 8, 10000.0, TOKENS.device)
        normed = block.attention_norm(x)
        query, key, value = (getattr(block.attention, name)(normed).view(3, 16, 2, 8) for name in ("query", "key", "value"))
        query, key = (rotate(y, rotary).transpose(1, 2) for y in (query, key))
        scores = query @ key.mT / 8**0.5
        mask = torch.ones(16, 16, dtype=torch.bool).tril()
        softmax = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        context = softmax @ value.transpose(1, 2)
        attended = block.attention.output(context.transpose(1, 2).reshape(3, 16, 16))
        middle = x + attended
        hidden = F.gelu(block.mlp.up(block.mlp_norm(middle)))
        expected = {
            "embeddings": x,
            "blocks.0.attention_norm output": normed,
            "blocks.0.attention.value output": value.flatten(2),
            "layer 0 scores 1": scores,
            "layer 0 softmax 1": softmax,
            "layer 0 context 1": context,
            "blocks.0.attention.output output": attended,
            "layer 0 residual sum 1": middle,
            "blocks.0.mlp.down input": hidden,
            "blocks.0.mlp.down output": block.mlp.down(hidden),
            "layer 0 residual sum 2": middle + block.mlp.down(hidden),
        }
    for site, value in expected.items():
        assert torch.allclose(seen[site], value, rtol=1e-4, atol=1e-5), site
    for site in ("layer 0 scores 1", "layer 0 softmax 1"):
        assert torch.equal(visible[site], mask)
    assert not any("unembedding" in site or "mlp.up" in site for site in seen)
    assert "final_norm output" in seen


def test_masked_scores_do_not_widen_a_range():
    """A score that only a look ahead could give is enormous, and leaves no trace."""
    query = torch.zeros(1, 1, 4, 2)
    query[0, 0, 0] = 1000.0
    key = torch.zeros(1, 1, 4, 2)
    key[0, 0, 3] = 1000.0  # position 0 would look at position 3
    ranges = StaticRanges()
    mode = _Attention(ranges)
    mode.enter(0)
    with mode:
        causal = F.scaled_dot_product_attention(query, key, key, is_causal=True)
    assert ranges.ranges["layer 0 scores 1"] == (0.0, 0.0)
    additive = torch.zeros(4, 4).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    for mask in (additive, additive == 0):
        mode.enter(0)
        with mode:
            assert torch.allclose(F.scaled_dot_product_attention(query, key, key, attn_mask=mask), causal)
    assert ranges.ranges["layer 0 scores 1"] == (0.0, 0.0)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"attn_mask": random(1, 2, 5, 5)}, {"enable_gqa": True}, {"is_causal": True}, {}])
def test_attention_without_rounding_is_pytorchs(options):
    heads = 1 if options.get("enable_gqa") else 2
    query, key, value = random(3, 2, 5, 4), random(3, heads, 5, 4, seed=1), random(3, heads, 5, 4, seed=2)
    mode = _Attention(lambda site, x, counted: x)
    mode.enter(0)
    with mode:
        found = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.allclose(found, F.scaled_dot_product_attention(query, key, value, **options), rtol=1e-5, atol=1e-6)


def test_attention_that_cannot_be_seen_is_refused():
    decoder = ours()
    attention = decoder.layers[0].attention
    attention.forward = lambda x, x_value, rotary, mask: attention.output(attention.query(x) + attention.key(x) + attention.value(x))
    with pytest.raises(InputError, match="toy: layer 0 computes its scores in a way that cannot be seen"):
        check_sites(decoder, projection_groups(decoder, "toy"), "toy")


def test_weights_of_the_layers_are_rounded_and_a_tied_unembedding_is_not():
    decoder = ours()
    quantised = quantise_weights(decoder, projection_groups(decoder, "toy"))
    assert torch.equal(quantised.unembedding.weight, decoder.unembedding.weight)
    assert torch.equal(quantised.network.embedding.weight, quantise_weight(decoder.network.embedding.weight))
    for name, weight in decoder.network.named_parameters():
        if name.startswith("blocks") and weight.dim() == 2:
            assert torch.equal(quantised.network.get_parameter(name), quantise_weight(weight)), name
    assert decoder.network.embedding.weight is decoder.unembedding.weight  # the original is as it was


def test_sixteen_bits_cost_nothing():
    decoder = ours()
    groups = projection_groups(decoder, "toy")
    expected = decoder.logits(TOKENS)
    distance = {}
    for bits in (8, 16):
        quantised = quantise_weights(decoder, groups, bits)
        quantised_groups = projection_groups(quantised, "toy")
        ranges = calibrate(quantised, quantised_groups, [TOKENS], percentile=100, bits=bits)
        with torch.no_grad(), intercept(quantised, quantised_groups, ranges):
            calibrated = dict(ranges.ranges)
            quantised.logits(TOKENS.flip(1))  # what is measured does not move a range
            assert ranges.ranges == calibrated
            distance[bits] = (quantised.logits(TOKENS) - expected).square().mean().sqrt().item()
    assert distance[16] < distance[8] / 100
