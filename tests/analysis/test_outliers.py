"""Outlier measures against float64 brute force and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from analysis.decoders import build_model, run_decoder, watch
from analysis.outliers import ActivationMoments, analyze_outliers, measure
from analysis.runs import find_run
from analysis.shards import open_checkpoint
from analysis.tokens import validation_tokens
from model.errors import InputError
from tests.analysis.conftest import CONFIG


def brute_force(x: np.ndarray) -> dict[str, float]:
    """Equations 1 and 2 of arXiv 2405.19279 in float64, all positions (n, d) at once."""
    s = np.sqrt((x**2).mean(axis=0))
    ratios = [max(abs(row)) / np.median(abs(row)) for row in x]
    return {
        "kurtosis": (s**4).mean() / (s**2).mean() ** 2,
        "kurtosis_minus_one": (s**4).mean() / (s**2).mean() ** 2 - 1,
        "max_median_ratio_mean": float(np.mean(ratios)),
        "max_median_ratio_max": float(np.max(ratios)),
        "activation_rms": math.sqrt((x**2).mean()),
    }


@pytest.mark.parametrize("width", [7, 8])
def test_sums_over_batches_equal_brute_force(width):
    x = torch.randn(3, 50, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, width)
    moments = ActivationMoments()
    for part in x.flatten(0, 1).split([1, 70, 79]):  # any split: sums come before ratios
        moments.add(part)
    for key, expected in brute_force(x.flatten(0, 1).double().numpy()).items():
        assert moments.measures()[key] == pytest.approx(expected, rel=1e-12), key


def test_closed_forms():
    alike = ActivationMoments()
    alike.add(torch.randn(1000, 4).sign() * 3)
    assert alike.measures()["kurtosis"] == 1.0
    assert alike.measures()["max_median_ratio_max"] == 1.0
    assert alike.measures()["activation_rms"] == pytest.approx(3.0)
    one = ActivationMoments()
    x = torch.zeros(10, 32)
    x[:, 5] = 2.0
    one.add(x)
    assert one.measures()["kurtosis"] == pytest.approx(32.0)
    independent = ActivationMoments()
    independent.add(torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0)))
    assert independent.measures()["kurtosis"] == pytest.approx(1.0, abs=1e-3)  # 1, not the textbook's 3
    silent = ActivationMoments()
    silent.add(torch.zeros(3, 8))
    assert silent.measures()["kurtosis"] is None


def test_identity_between_kurtosis_and_correlations():
    """n^2 d Kurt + sum_(i != j) (X^T X)_ij^2 = sum_ab (X X^T)_ab^2 where the mean square is 1: equations 4 and 5."""
    x = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 12)
    x /= x.square().mean().sqrt()
    moments = ActivationMoments()
    moments.add(x)
    features, inputs = x.T @ x, x @ x.T
    off_diagonal = features.square().sum() - features.diagonal().square().sum()
    kurtosis = moments.measures()["kurtosis"]
    assert kurtosis is not None
    assert 40**2 * 12 * kurtosis + off_diagonal.item() == pytest.approx(inputs.square().sum().item(), rel=1e-10)


def test_places_are_the_residual_entering_attention_and_the_unembedding(run_folder):
    model = build_model(open_checkpoint(run_folder / "checkpoints" / "step-00000020")).cpu().eval()
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    moments: dict[str, ActivationMoments] = {}
    with torch.no_grad(), watch(run_decoder(model), lambda place, x: moments.setdefault(place, ActivationMoments()).add(x)):
        logits = model(tokens)
        x = model.embedding(tokens)
        x_1 = model.blocks[0](x, *rotary_and_mask(model, tokens))
        final = model.final_norm(model.blocks[1](x_1, *rotary_and_mask(model, tokens)))
    assert torch.allclose(model.unembedding.weight @ final.mT, logits.mT, atol=1e-5)
    assert list(moments) == ["layer 0", "layer 1", "unembedding"]
    # the calls above passed through the watched blocks once more, which no ratio of sums notices
    for place, expected in (("layer 0", x), ("layer 1", x_1), ("unembedding", final)):
        assert moments[place].measures()["kurtosis"] == pytest.approx(
            brute_force(expected.flatten(0, 1).double().numpy())["kurtosis"], rel=1e-9
        )
    with torch.no_grad():
        model(tokens)
    assert moments["unembedding"].positions == 32  # watching has ended


def rotary_and_mask(model, tokens):
    from model.attention import rotary_tables

    return rotary_tables(tokens.shape[1], CONFIG.head_dim, CONFIG.rope_base, tokens.device), None


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
