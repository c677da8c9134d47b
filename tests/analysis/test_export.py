"""Exported checkpoints against safetensors' and transformers' own readers, and against the live network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import model.huggingface
from analysis.__main__ import main
from analysis.shards import open_checkpoint
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from tests.analysis.conftest import CONFIG, write_checkpoint

VARIANTS = {
    "pre_norm": {},
    "untied_learned": {"tied_embeddings": False, "positions": "learned", "norm": "layer_norm", "biases": True},
    "outlier_protected": {"block": "outlier_protected", "activation": "swiglu", "heads": 4, "kv_heads": 2, "residual_gain_form": "vector"},
}


def network(seed: int = 0, **fields) -> Transformer:
    built = Transformer(ModelConfig(**{"width": 32, "depth": 2, "heads": 2, "vocab_size": 64, "sequence_length": 24, **fields}))
    initialize(built, seed)
    return built.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_loads_as_a_transformers_model_and_reads_back(tmp_path, capsys, variant):
    live = network(3, **VARIANTS[variant])
    write_checkpoint(tmp_path / "step-00000007", live, 7)
    assert main(["export", str(tmp_path / "step-00000007"), "--out", str(tmp_path / "folder"), "--shard-gigabytes", "1e-5"]) == 0
    assert "largest difference 0," in capsys.readouterr().out
    files = sorted((tmp_path / "folder").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for file in files for tensor in load_file(file).values())  # no headers
    assert sum("unembedding.weight" in name for file in files for name in load_file(file)) == (0 if live.config.tied_embeddings else 1)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(exported(tokens).logits, live(tokens))
    assert (exported.network.unembedding.weight is exported.network.embedding.weight) == live.config.tied_embeddings

    back = open_checkpoint(tmp_path / "folder")
    assert (back.step, back.format, back.precision) == (7, "Hugging Face folder, safetensors", "fp32")
    assert back.aliases == ({"unembedding.weight": "embedding.weight"} if live.config.tied_embeddings else {})
    filled = Transformer(live.config)
    back.load_into(filled)
    assert all(torch.equal(value, live.state_dict()[name]) for name, value in filled.state_dict().items())


def test_generate_is_greedy_decoding_and_padding_changes_nothing(tmp_path):
    live = network(1, tied_embeddings=False, init_std=0.3)  # tied and barely trained, it would repeat a token
    model_ = model.huggingface.BurnishForCausalLM(model.huggingface.transformers_config(live.config))
    model_.network.load_state_dict(live.state_dict())
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))  # transformers takes 0 for padding
    expected = tokens
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, live(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model_.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
    assert expected[:, 9:].unique().numel() > 2
    for shown in (slice(3, 9), slice(0, 6)):  # padded on the left, then on the right
        mask = torch.zeros_like(tokens)
        mask[:, shown] = 1
        torch.testing.assert_close(model_(tokens, attention_mask=mask).logits[:, shown], live(tokens[:, shown]), rtol=0, atol=1e-5)
    labels = tokens.clone()
    labels[0, :5] = -100
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    torch.testing.assert_close(model_(tokens, labels=labels).loss, live(tokens, targets) / 12)
    learned = model.huggingface.BurnishForCausalLM(model.huggingface.transformers_config(network(positions="learned").config))
    with pytest.raises(InputError, match="padding on the left shifts learned positions"):
        learned(tokens, attention_mask=torch.tensor([[0] + [1] * 8, [1] * 9]))


CACHED = [
    {},
    {"attention": "shaped", "kv_heads": 1, "parametrization": "mup", "base_width": 16},
    {"block": "simplified_parallel"},
    {"block": "outlier_protected", "attention_window": 4},
]


@pytest.mark.parametrize("fields", CACHED)
def test_generating_with_the_cache_is_generating_without(fields):
    """Greedy, beams, sampling with one seed, and a batch padded on the left, against its texts alone."""
    live = network(1, init_std=0.3, tied_embeddings=False, **fields)
    model_ = model.huggingface.BurnishForCausalLM(model.huggingface.transformers_config(live.config)).eval()
    model_.network.load_state_dict(live.state_dict())
    tokens = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(model_.generate(tokens, max_new_tokens=7, pad_token_id=0, use_cache=use_cache, **options))
        assert torch.equal(*found) and found[0].shape == (2, 14)
    calls = []
    handle = model_.network.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    model_.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    handle.remove()
    assert calls == [7, 1, 1, 1, 1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens[:1, :4]], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    both = model_.generate(torch.cat([padded, tokens[1:]]), attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = model_.generate(tokens[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(both[0, 7:], alone[0, 4:])
    with pytest.raises(InputError, match="on one side of a text"):
        model_(tokens, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1] * 7]))
    with pytest.raises(InputError, match="padding on the right"):
        model_.generate(tokens, attention_mask=mask.flip(1), max_new_tokens=2, pad_token_id=0)


def test_a_new_model_is_initialized_and_a_partial_one_refused(tmp_path):
    config = model.huggingface.transformers_config(CONFIG)
    made, expected = AutoModelForCausalLM.from_config(config), Transformer(CONFIG)
    initialize(expected, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(made.network.parameters(), expected.parameters(), strict=True))
    made.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["network.blocks.0.mlp.up.weight"]
    made.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"not all there: network.blocks.0.mlp.up"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_one_file_of_a_sharded_checkpoint(deepspeed_checkpoints, tmp_path, capsys):
    """Tied, frozen, buffer: what safetensors' own reader finds is what DeepSpeed gathered."""
    for layout in ("stage1-bf16-optimizer", "stage2-round-robin", "stage3-bf16"):
        source = deepspeed_checkpoints / "3" / layout
        truth = torch.load(source / "truth-2.pt")
        out = tmp_path / f"{layout}.safetensors"
        assert main(["export", str(source), "--out", str(out)]) == 0
        found = load_file(out)
        expected = {**truth["parameters"], **truth["frozen"], **truth["buffers"]}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)
        back = open_checkpoint(out)
        assert (back.step, back.aliases, set(back.buffers)) == (2, {"head.weight": "embedding.weight"}, {"offset"})
        rounded = tmp_path / f"{layout}-bf16.safetensors"
        assert main(["export", str(source), "--out", str(rounded), "--precision", "bf16"]) == 0
        assert torch.equal(load_file(rounded)["first.weight"], expected["first.weight"].bfloat16())
        assert open_checkpoint(rounded).precision == "bf16"
    largest = [float(text) for text in re.findall(r"rounding changed an element by at most (\S+) of it", capsys.readouterr().out)]
    assert len(largest) == 3
    assert 2**-9 < max(largest) <= 2**-8  # half a unit in the last of bf16's 8 bits


@pytest.mark.parametrize("tags", [("step4", "final"), ("epoch0_step900", "epoch1_step100")])
def test_the_last_checkpoint_is_the_one_of_most_steps_whatever_its_name(tmp_path, capsys, tags):
    run = tmp_path / "ds"
    for seed, (tag, step) in enumerate(zip(tags, (4, 8), strict=True)):
        write_checkpoint(run / tag, network(seed), step)
    assert main(["export", str(run), "--out", str(tmp_path / "out.safetensors")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "folder"), "--skip-comparison"]) == 0
    assert main(["weights", str(run), "--compare", str(run), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("step 8") == 3
    newest = network(1).state_dict()
    for file in ("out.safetensors", "folder/model.safetensors"):
        assert torch.equal(load_file(tmp_path / file)[f"{'network.' * ('/' in file)}embedding.weight"], newest["embedding.weight"])
    written = json.loads((tmp_path / "weights.json").read_text())
    assert (written["step"], written["compared_with"], written["difference_norm"]) == (8, str(run / tags[1]), 0.0)


def test_checkpoints_of_other_names_below_checkpoints(tmp_path, capsys):
    write_checkpoint(tmp_path / "run" / "checkpoints" / "global_step4", network(0), 4)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("global_step4")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out.safetensors")]) == 0
    assert "step 4" in capsys.readouterr().out


def test_damage_to_an_older_checkpoint_of_a_run_does_not_hinder_the_last(run_folder, tmp_path, capsys):
    (run_folder / "checkpoints" / "step-00000010" / "mp_rank_00_model_states.pt").write_bytes(b"")
    assert main(["export", str(run_folder), "--out", str(tmp_path / "out.safetensors")]) == 0
    assert "step 20" in capsys.readouterr().out


@pytest.mark.distributed
def test_ranks_take_the_checkpoint_of_most_steps(deepspeed_checkpoints, tmp_path):
    run = tmp_path / "ds"
    for tag, step in (("step4", 1), ("final", 2)):
        shutil.copytree(deepspeed_checkpoints / "2" / "stage2-fp32" / f"step-{step:08d}", run / tag)
    assert main(["export", str(run), "--ranks", "3", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "latest").read_text() == "final"
    assert open_checkpoint(tmp_path / "out" / "final").step == 2
    assert main(["step", str(run), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "step.json").read_text())["step"] == 2


def test_the_tokenizer_goes_along_and_cuts_text_the_same(run_folder, tmp_path, capsys):
    import sentencepiece

    from training.tokenizer import train_sentencepiece

    texts = [Path(__file__).read_bytes(), "naïve 東京 \u00a0".encode() * 3]
    trained = train_sentencepiece(texts, 380)
    (run_folder / "tokenizer").mkdir()
    trained.save(run_folder / "tokenizer")
    live = network(vocab_size=380)
    for folder in (run_folder / "checkpoints").iterdir():
        if folder.name != ".writing-step-00000030":
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    write_checkpoint(run_folder / "checkpoints" / "step-00000030", live, 30)
    assert main(["export", str(run_folder), "--out", str(tmp_path / "folder")]) == 0
    assert "a sample: 'The" in capsys.readouterr().out
    loaded = AutoTokenizer.from_pretrained(tmp_path / "folder")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "folder" / "tokenizer.model"))
    for file in (*Path("model").glob("*.py"), Path("README.md")):
        text = file.read_text()
        assert loaded.encode(text) == processor.encode(text) == trained.encode(text).tolist()
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token_id == trained.end_of_text


def test_a_folder_of_another_library_keeps_its_class(tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(tmp_path / "llama")
    assert main(["export", str(tmp_path / "llama"), "--out", str(tmp_path / "copy")]) == 0
    assert "largest difference 0," in capsys.readouterr().out
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["model_type"] == "llama"
    # shards whose index is missing are read, and get one again
    assert main(["export", str(tmp_path / "llama"), "--out", str(tmp_path / "parts"), "--shard-gigabytes", "1e-6"]) == 0
    (tmp_path / "parts" / "model.safetensors.index.json").unlink()
    assert main(["export", str(tmp_path / "parts"), "--out", str(tmp_path / "whole")]) == 2
    assert "transformers cannot load it, so the logits cannot be compared" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "parts"), "--out", str(tmp_path / "whole"), "--skip-comparison"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.model_type == "llama"


@pytest.mark.parametrize(
    ("name", "configured", "step", "said"),
    [
        ("gpt2", True, 0, False),
        ("qwen3", True, 0, False),
        ("Llama-3", True, 3, False),
        ("checkpoint-1000", True, 1000, True),
        ("step20", True, 20, True),
        ("iter_0000020", True, 20, True),
        ("20", True, 20, True),
        ("toy3", False, 3, False),
        ("step20", False, 20, True),
    ],
)
def test_a_number_in_a_models_name_is_no_step(tmp_path, name, configured, step, said):
    folder = tmp_path / name
    folder.mkdir()
    save_file({"a": torch.randn(4, 3)}, folder / "model.safetensors")
    if configured:
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert open_checkpoint(folder).step == step
    assert main(["export", str(folder), "--out", str(tmp_path / "weights.safetensors")]) == 0
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert file.metadata().get("step") == (str(step) if said else None)


def test_what_is_refused_and_that_nothing_is_left(run_folder, tmp_path, monkeypatch, capsys):
    step = run_folder / "checkpoints" / "step-00000010"
    (tmp_path / "taken").mkdir()
    (tmp_path / "a file").touch()
    torch.save({"a": torch.randn(4, 3)}, tmp_path / "weights.pt")
    for arguments, problem in (
        (["export", str(step)], "needs --out"),
        (["export", str(step), str(step), "--out", str(tmp_path / "x")], "takes one"),
        (["export", str(step), "--out", str(tmp_path / "taken")], "exists already"),
        (["export", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "x")], "neither model_config.json"),
        (["export", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "a file" / "x")], "a file: cannot be written"),
    ):
        assert main(arguments) == 2
        assert problem in capsys.readouterr().err
    import analysis.export

    original = analysis.export._write
    monkeypatch.setattr(analysis.export, "_write", lambda file, values: original(file, values * 2))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="was not written as it was read"):
        main(["export", str(step), "--out", str(tmp_path / "x.safetensors")])
    assert sorted(tmp_path.iterdir()) == before
