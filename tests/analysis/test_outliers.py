"""Outliers over a run: the right tokens, every checkpoint, and what is refused. The measures: tests/model/test_activation_statistics.py."""

from __future__ import annotations

import json
import math
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.__main__ import main
from analysis.decoders import build_model, run_decoder, watch
from analysis.outliers import analyze_outliers, measure
from analysis.runs import find_run
from analysis.shards import open_checkpoint
from analysis.signal import analyze_signal
from analysis.tokens import encoder, file_windows, held_out_tokens, validation_tokens
from model.activation_statistics import ActivationMoments, add_to, watch_residuals
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from tests.analysis.conftest import CONFIG, write_checkpoint
from training.tokenizer import train_sentencepiece


def test_places_are_those_of_training(run_folder):
    """Hooks on any decoder's modules see what training's own watch sees."""
    model = build_model(open_checkpoint(run_folder / "checkpoints" / "step-00000020")).cpu().eval()
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    moments: dict[str, ActivationMoments] = {}
    with torch.no_grad(), watch_residuals(model) as expected, watch(run_decoder(model), partial(add_to, moments)):
        model(tokens)
    model(tokens)  # watching has ended
    assert list(moments) == ["layer 0", "layer 1", "unembedding"]
    for place, sums in expected.items():
        assert moments[place].measures() == sums.measures() and sums.sums[0] == 32


def test_every_token_but_the_first_is_a_target_once(run_folder):
    run = find_run(run_folder)
    parts = [np.fromfile(path, "<u2") for path in sorted((run_folder.parents[1] / "prepared" / "abc").glob("validation-*.bin"))]
    whole = np.concatenate(parts)
    tokens, source = validation_tokens(run, 160, 16)
    assert tokens.shape == (10, 17)
    assert tokens[:, 1:].flatten().tolist() == whole[1:161].tolist()
    assert tokens[:, 0].tolist() == whole[:160:16].tolist()
    assert "validation split" in source
    assert validation_tokens(run, 10**6, 16)[0].shape == (12, 17)  # all there are


def test_a_run_is_measured_at_every_step_and_its_loss_is_the_models(run_folder):
    result = analyze_outliers(find_run(run_folder), tokens=100, progress=False)
    assert result["steps"] == [0, 10, 20]
    assert result["places"] == ["layer 0", "layer 1", "unembedding"]
    tokens, _ = validation_tokens(find_run(run_folder), 100, 16)
    model = build_model(open_checkpoint(run_folder / "checkpoints" / "step-00000010")).cpu()
    with torch.no_grad():
        expected = model(tokens[:, :-1], tokens[:, 1:]).item() / tokens[:, 1:].numel()
    assert result["checkpoints"][1]["loss"] == pytest.approx(expected, rel=1e-6)
    one_batch, many = (measure(run_decoder(model), tokens, batch_tokens=size) for size in (10**6, 16))
    for place in one_batch["places"]:
        for key, value in one_batch["places"][place].items():
            assert many["places"][place][key] == pytest.approx(value, rel=1e-5), (place, key)
    assert result["definitions"].keys() >= result["checkpoints"][0]["places"]["layer 0"].keys()
    assert result["definitions"].keys() >= result["checkpoints"][0].keys() - {"step", "precision", "places"}


def test_one_network_is_in_memory_whatever_the_number_of_checkpoints(run_folder, monkeypatch):
    alive, most = weakref.WeakSet(), []
    original = Transformer.__init__

    def counted(self, *arguments):
        original(self, *arguments)
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(Transformer, "__init__", counted)
    result = analyze_outliers(find_run(run_folder), tokens=64, progress=False)
    assert len({checkpoint["loss"] for checkpoint in result["checkpoints"]}) == 3 and max(most) == 1
    # a checkpoint of another configuration is its own network all the same
    path = run_folder / "checkpoints" / "step-00000010" / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_window": 1}))
    (path.parent / "manifest.json").unlink()
    other = analyze_outliers(find_run(run_folder), tokens=64, progress=False)
    same = [a["loss"] == b["loss"] for a, b in zip(result["checkpoints"], other["checkpoints"], strict=True)]
    assert same == [True, False, True]


def spoil(folder: Path, name: str) -> None:
    """Make a weight of a checkpoint not a number, as after a divergence."""
    states = torch.load(folder / "mp_rank_00_model_states.pt")
    states["module"][name][:] = math.nan
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("name", ["blocks.0.mlp.up.weight", "embedding.weight"])
@pytest.mark.parametrize("step", [10, 20])
def test_a_checkpoint_that_diverged_takes_nothing_from_the_others(run_folder, tmp_path, capsys, name, step):
    sound = analyze_outliers(find_run(run_folder), tokens=64, progress=False)
    spoil(run_folder / "checkpoints" / f"step-000000{step}", name)
    assert main(["outliers", str(run_folder), "--tokens", "64", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "outliers.json").read_text())
    for before, after in zip(sound["checkpoints"], found["checkpoints"], strict=True):
        assert (before == after) == (after["step"] != step)
    printed = capsys.readouterr().out
    assert f"have no value: step {step}" in printed
    assert ("loss on these tokens -" in printed) == (step == 20)
    assert (tmp_path / "out" / "outliers.png").stat().st_size > 10_000


def test_text_is_read_as_far_as_it_is_needed(run_folder, tmp_path):
    """Behind the characters that are asked for a file may hold anything: it is not touched."""
    (run_folder / "tokenizer").mkdir()
    train_sentencepiece([Path(__file__).read_bytes()], 380).save(run_folder / "tokenizer")
    model, path = Transformer(ModelConfig(**{**CONFIG.to_dict(), "vocab_size": 380})), run_folder / "checkpoints" / "step-00000040"
    initialize(model, seed=0)
    write_checkpoint(path, model, 40)
    file = tmp_path / "text.txt"
    file.write_bytes(b"def f(x):\n    return x\n" * 10_000 + b"\xff")
    run = find_run(path)
    tokens, _ = held_out_tokens(run, [str(file)], 32, 16)
    assert tokens.shape == (2, 17)
    assert file_windows(encoder(run), [str(file)], 2, 16, 0).shape == (2, 16)
    with pytest.raises(InputError, match="it is not UTF-8"):
        held_out_tokens(run, [str(file)], 10_000, 16)
    assert analyze_signal([str(path)], files=[str(file)], tokens=32, progress=False)["networks"][0]["tokens"] == 32


def test_own_text_with_the_runs_tokenizer(run_folder, tmp_path):
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"def function_{i}(x):\n    return x + {i}" for i in range(200)))
    (run_folder / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(run_folder / "tokenizer" / "tokenizer"), vocab_size=60, model_type="bpe", minloglevel=2
    )
    result = analyze_outliers(find_run(run_folder), tokens=64, data=[str(corpus)], progress=False)
    assert result["tokens"] == 64
    assert result["data"] == str(corpus)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary: cannot be read: it is not UTF-8"):
        analyze_outliers(find_run(run_folder), data=[str(tmp_path / "binary")], progress=False)


def test_what_is_refused(run_folder):
    run = find_run(run_folder)
    prepared = run_folder.parents[1] / "prepared" / "abc"
    shard = prepared / "validation-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"validation-00001.bin: missing or truncated"):
        analyze_outliers(run, progress=False)
    shard.write_bytes(np.full(80, 64, "<u2").tobytes())
    with pytest.raises(InputError, match="token 64 is outside the model's vocabulary of 64"):
        analyze_outliers(run, tokens=200, progress=False)
    (prepared / "manifest.json").unlink()
    with pytest.raises(InputError, match="prepared data are gone: give text with --data"):
        analyze_outliers(run, progress=False)
    (run_folder / "data.json").unlink()
    with pytest.raises(InputError, match=r"no data\.json"):
        analyze_outliers(run, progress=False)
    with pytest.raises(InputError, match="expected a positive number"):
        analyze_outliers(run, tokens=0, progress=False)


def test_a_checkpoint_without_its_model_configuration_says_so(run_folder):
    folder = run_folder / "checkpoints" / "step-00000020"
    (folder / "manifest.json").unlink()
    (folder / "model_config.json").write_text(json.dumps({"depths": 3}))
    with pytest.raises(InputError, match=r"model_config\.json: not a model configuration"):
        build_model(open_checkpoint(folder))
    (folder / "model_config.json").unlink()
    with pytest.raises(InputError, match=r"model_config\.json: missing"):
        build_model(open_checkpoint(folder))
