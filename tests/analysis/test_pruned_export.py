"""Runs with context pruning as folders that transformers reads, and adapters alone, against the live network."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import tests.analysis.tiny_pruned as tiny
from analysis.__main__ import main
from analysis.pruned import open_subject
from model import pruning_files
from model.context_pruning import dense, settings_of

TOKENS = torch.randint(256, (2, 60), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found = model(TOKENS) if not hasattr(model, "generate") else model(TOKENS, use_cache=False)
    return getattr(found, "logits", found)


@pytest.fixture
def base(tmp_path):
    tiny.write_llama(tmp_path / "base")
    return tmp_path / "base"


def test_a_llama_with_lora_whole_and_adapters_alone(tmp_path, base, capsys):
    GenerationConfig(eos_token_id=[256, 5], do_sample=True, temperature=0.6).save_pretrained(base)  # as of an instruct model
    live = tiny.write_llama_run(tmp_path / "run", base).model
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "whole")]) == 0
    assert "tokenizer copied" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "alone"), "--adapters"]) == 0
    assert "0 without pruning, 0 with it" in capsys.readouterr().out  # nothing is added up anew
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"context_pruning.json", "context_pruning.safetensors"}
    for name in ("whole", "alone"):
        loaded = pruning_files.load(tmp_path / name)
        assert settings_of(loaded).threshold == tiny.THRESHOLD
        torch.testing.assert_close(logits(loaded), logits(live), rtol=0, atol=1e-5)
        with dense(loaded), dense(live):
            torch.testing.assert_close(logits(loaded), logits(live), rtol=0, atol=1e-5)
            assert (logits(loaded) - logits(pruning_files.load(tmp_path / name))).abs().max() > 1e-2  # it prunes
        subject = open_subject(str(tmp_path / name))
        assert (subject.prunes, subject.adapted, subject.longest) == (True, name == "alone", 160)
        torch.testing.assert_close(subject.logits(TOKENS), logits(live), rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert (plain.generation_config.eos_token_id, plain.generation_config.temperature) == ([256, 5], 0.6)
    with dense(live):
        torch.testing.assert_close(logits(plain), logits(live), rtol=0, atol=1e-5)
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "again")]) == 2
    assert "a Hugging Face folder with context pruning already" in capsys.readouterr().err


def test_our_own_network(tmp_path, capsys):
    live = tiny.write_own_run(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "whole")]) == 0
    assert "0 without pruning, 0 with it" in capsys.readouterr().out
    loaded = pruning_files.load(tmp_path / "whole")
    assert torch.equal(logits(loaded), logits(live))
    assert loaded.network.unembedding.weight is loaded.network.embedding.weight
    assert json.loads((tmp_path / "whole" / "context_pruning.json").read_text())["base"] is None
    made = loaded.generate(TOKENS[:, :30], max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():  # generating with the cache that shrinks is what the whole text's masks give
        assert torch.equal(live(made[:, :-1])[:, 29:].argmax(-1), made[:, 30:])
    torch.testing.assert_close(open_subject(str(tmp_path / "whole")).logits(TOKENS), logits(live))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "x"), "--adapters"]) == 2
    assert "began with no pretrained model" in capsys.readouterr().err


def test_precision_and_what_is_refused(tmp_path, base, capsys):
    tiny.write_llama_run(tmp_path / "run", base)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "half"), "--precision", "bf16"]) == 0
    loaded = pruning_files.load(tmp_path / "half", dtype=torch.bfloat16)
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
    trained = tiny.write_llama_run(tmp_path / "trained", base, lora=False)
    step = tmp_path / "trained" / "checkpoints" / "step-00000005"
    state = torch.load(step / "mp_rank_00_model_states.pt", weights_only=True)
    state["module"]["model.model.layers.0.mlp.up_proj.weight"] += 0.5
    torch.save(state, step / "mp_rank_00_model_states.pt")
    before = sorted(tmp_path.iterdir())
    assert main(["export", str(tmp_path / "trained"), "--out", str(tmp_path / "x"), "--adapters"]) == 2
    assert "the run trained the weights of" in capsys.readouterr().err
    tiny.write_llama_run(tmp_path / "dense", base, pruned=False)
    assert main(["export", str(tmp_path / "dense"), "--out", str(tmp_path / "x"), "--adapters"]) == 2
    assert "--adapters: for the folder of a run with context pruning" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "dense"])
    assert trained is not None


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_without_pruning_that_began_with_a_pretrained_model(tmp_path, base, capsys, lora):
    """What runs a network says that it has to be exported first; then it runs."""
    live = tiny.write_llama_run(tmp_path / "run", base, pruned=False, lora=lora).model
    step, text = tmp_path / "run" / "checkpoints" / "step-00000005", tmp_path / "text.txt"
    text.write_text("some text of no great length " * 40)
    for verb in ("outliers", "quantization", "signal"):
        assert main([verb, str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
        advice = f"began with model.pretrained: `python -m analysis export {step} --out X`, then this verb on X with --data"
        assert advice in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")]) == 0
    assert "no outliers: " in (tmp_path / "page" / "report.html").read_text()
    assert "began with model.pretrained" in (tmp_path / "page" / "report.html").read_text()
    assert main(["export", str(step), "--out", str(tmp_path / "X")]) == 0
    assert "tokenizer copied" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "X")
    assert not any("lora" in name or "context_pruning" in name for name, _ in loaded.named_parameters())
    assert not list((tmp_path / "X").glob("context_pruning*"))
    torch.testing.assert_close(logits(loaded), logits(live), rtol=0, atol=1e-5)
    if lora:
        assert (logits(loaded) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    assert main(["export", str(step), "--out", str(tmp_path / "half"), "--precision", "bf16"]) == 0
    options = ["--data", str(text), "--tokens", "64", "--out", str(tmp_path / "out")]
    assert main(["outliers", str(tmp_path / "X"), *options]) == 0


def test_a_file_written_wrong_is_a_fault(tmp_path, base, monkeypatch):
    tiny.write_llama_run(tmp_path / "run", base)
    original = pruning_files.save_file
    monkeypatch.setattr(pruning_files, "save_file", lambda tensors, *a, **k: original({n: t + 1 for n, t in tensors.items()}, *a, **k))
    with pytest.raises(RuntimeError, match="was not written as it was read"):
        main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
