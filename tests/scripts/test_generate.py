"""scripts/generate.py on a tiny pruned model: what it prints, and that wrong input is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Lfm2Config

from analysis.__main__ import main
from model.config import ModelConfig, PruningConfig
from model.context_pruning import dense
from model.huggingface import BurnishForCausalLM, transformers_config
from model.pruning_files import save
from model.pruning_hooks import attach
from scripts import benchmark_generation, generate
from tests.analysis import tiny_pruned
from tests.training.tiny_pretrained import save_tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and adapters that leave 6 tokens of its context."""
    base, adapters = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapters")
    save_tiny_llama(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    attach(model, PruningConfig(rank=4, bias=-100.0, sinks=1, window=5))
    save(model, adapters, base=str(base), alone=True)
    return base, adapters


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["generate", *map(str, arguments)])
    return generate.main()


def test_a_path_that_is_too_long_is_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert call(monkeypatch, "x" * 300) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "File name too long" in line


def test_text_and_figures(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    prompt = "the quick brown fox " * 3
    assert call(monkeypatch, folders[1], "--prompt", prompt, "--max-new-tokens", 20, "--compare") == 0
    out, error = capsys.readouterr()
    assert out
    pruned, dense = re.findall(r"(pruned|dense): 20 tokens, .*; cache ([\d.]+) MiB, at most ([\d.]+); ([\d.]+)% of the context kept", error)
    assert pruned[0] == "pruned" and dense == ("dense", dense[1], dense[2], "100.0") and float(pruned[3]) < 40
    # without a compare only the pruned text, the same one
    assert call(monkeypatch, folders[1], "--prompt", prompt, "--max-new-tokens", 20, "--sample") == 0
    assert call(monkeypatch, folders[0], "--prompt", prompt, "--max-new-tokens", 3) == 0
    assert "dense: 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("pruned", [False, True])
def test_our_own_networks(tmp_path: Path, pruned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    model = BurnishForCausalLM(transformers_config(ModelConfig(width=32, depth=2, heads=4, vocab_size=len(tokenizer), sequence_length=400)))
    if pruned:
        attach(model, PruningConfig(rank=4, bias=-100.0, sinks=1, window=5))
        save(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = "the quick brown fox " * 90
    assert len(tokenizer(prompt)["input_ids"]) > generate.PREFILL_CHUNK
    assert call(monkeypatch, tmp_path, "--prompt", prompt, "--max-new-tokens", 9, *["--compare"] * pruned) == 0
    found = re.findall(r"(pruned|dense): \d+ tokens, .*; ([\d.]+)% of the context kept", capsys.readouterr().err)
    assert [name for name, _ in found] == ["pruned", "dense"][not pruned :]
    assert found[-1][1] == "100.0" and (not pruned or float(found[0][1]) < 10)


@pytest.mark.parametrize("place", ["", "checkpoints/step-00000005"])
def test_a_run_is_to_be_exported_first(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tiny_pruned.write_own_run(tmp_path)
    assert call(monkeypatch, tmp_path / place) == 2
    assert f": a run: export it first: python -m analysis export {tmp_path / place} --out X" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothere", "some/where", "no name"])
def test_a_name_that_is_nowhere_is_said_at_once(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Where the hub cannot be reached, transformers itself would ask for a minute."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    for module in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{module}.from_pretrained", lambda *_, **__: pytest.fail("too late"))
    assert call(monkeypatch, name) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: no such folder or file here, and")
    assert main(["context", name, "--data", "LICENSE"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: no such folder or file here, and")


def test_an_interruption_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", interrupt)
    assert call(monkeypatch, "x") == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NOWHERE/x/y"], "no such file or folder"),
        (["ADAPTERS", "--prompt", ""], "the prompt has no token"),
        (["ADAPTERS", "--max-new-tokens", "0"], "--max-new-tokens: 0"),
        (["BASE", "--sample", "--temperature", "0"], "--temperature: 0.0, expected a number above 0"),
        (["BASE", "--sample", "--temperature", "-1"], "--temperature: -1.0"),
        (["BASE", "--sample", "--temperature", "nan"], "--temperature: nan"),
        (["BASE", "--seed", "99999999999999999999"], "--seed: 99999999999999999999"),
        (["BASE", "--seed", "-1"], "--seed: -1"),
        (["ADAPTERS", "--max-new-tokens", "200"], "go beyond the 128 of the model"),
        (["ADAPTERS", "--prompt-file", "gone.txt"], "gone.txt: cannot be read"),
        (["BASE", "--threshold", "1"], "has no context pruning"),
        (["ADAPTERS", "--threshold", "nan"], "--threshold: nan"),
    ],
)
def test_wrong_input_is_one_line(
    folders: tuple[Path, Path],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    places = {"ADAPTERS": str(folders[1]), "BASE": str(folders[0])}
    assert call(monkeypatch, *(places.get(argument, argument) for argument in arguments)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_network_with_convolutions_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Their state is in the cache as well, and has no keys."""
    tokenizer = tiny_tokenizer()
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
    )
    model = AutoModelForCausalLM.from_config(config)
    attach(model, PruningConfig(rank=4, bias=-100.0, sinks=1, window=5))
    save(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert call(monkeypatch, tmp_path, "--prompt", "the quick brown fox", "--max-new-tokens", 3, "--compare") == 0
    assert re.findall(r"(pruned|dense): ", capsys.readouterr().err) == ["pruned", "dense"]
    cache = DynamicCache(config=model.config)
    with dense(model), torch.no_grad():
        model(torch.ones(1, 50, dtype=torch.int64), past_key_values=cache)
    assert generate.cache_bytes(cache) == 32 * 3 * 4 + 2 * 2 * 8 * 50 * 4  # what the convolution looks back on; keys and values


def test_the_benchmark_counts_a_smaller_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = "--lengths 600 --batches 2 --layers 2 --width 36 --heads 6 --kv-heads 2 --rank 4 --decode 20 --rounds 1"
    rows = []
    for more in ([], ["--bytes"], ["--bytes", "--chunk", "100"]):
        monkeypatch.setattr("sys.argv", ["benchmark", *options.split(), *more, "--out", str(tmp_path / "b.json")])
        assert benchmark_generation.main() == 0
        rows += json.loads((tmp_path / "b.json").read_text())["results"]
    row, alone, in_chunks = rows
    dense = 2 * 2 * 2 * 6 * 4 * 2 * 620  # batch, keys and values, kv_heads, head_dim, bytes, layers, tokens
    assert abs(row["largest_cache_bytes"]["dense"] - dense) < 0.01 * dense
    assert 0.1 < row["kept share"] < 0.35
    assert row["largest cache, pruned / dense"] < 0.75
    # the formula of --bytes is what the dense cache measured
    assert (
        alone["largest_cache_bytes"]["dense"] == in_chunks["largest_cache_bytes"]["dense"] == row["largest_cache_bytes"]["dense"] == dense
    )
    ratios = [r["largest cache, pruned / dense"] for r in (row, alone, in_chunks)]
    assert abs(ratios[0] - ratios[1]) < 0.1 and ratios[2] < ratios[1] - 0.05
    assert torch.isfinite(torch.tensor(list(row["tokens_per_second"].values()))).all()
