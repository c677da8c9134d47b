"""Saving what pruning adds, alone and with the model, and loading it again; and every way in which the files can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.config import PruningConfig
from model.context_pruning import dense, settings_of
from model.errors import InputError
from model.pretrained import LoraShape, add_lora
from model.pruning_files import DESCRIPTION, TENSORS, begin_with, check_base, load, save, switch_on
from model.pruning_hooks import attach

transformers.logging.set_verbosity_error()
LORA = LoraShape(rank=3, alpha=6.0)


def tokens_of() -> torch.Tensor:
    return torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens_of(), use_cache=False).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model on disk, a GPT-2 whose maps are transposed."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=24, n_layer=3, n_head=4, n_positions=64, vocab_size=97)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path) -> Any:
    """That model with LoRA adapters and pruning, all of it moved away from where it begins."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    add_lora(model, LORA)
    settings = attach(model, PruningConfig(rank=5, bias=0.7, sinks=2, window=3))
    settings.threshold, settings.standards = 0.1, {0: (0.1, 1.2), 2: (-0.3, 0.9)}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or ".context_pruning." in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "adapters"])
def test_round_trip(base: Path, trained: Any, alone: bool, tmp_path: Path) -> None:
    save(trained, tmp_path / "saved", base=str(base), lora=LORA, alone=alone)
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {DESCRIPTION, TENSORS} <= files and ("model.safetensors" in files) != alone
    found = load(tmp_path / "saved")
    torch.testing.assert_close(logits(found), logits(trained), rtol=0, atol=1e-5)
    assert (settings_of(found).threshold, settings_of(found).config) == (0.1, settings_of(trained).config)
    prompt = tokens_of()[:, :20]
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        assert found.generate(prompt, max_new_tokens=20, pad_token_id=0, **options).tolist() == (
            trained.generate(prompt, max_new_tokens=20, pad_token_id=0, **options).tolist()
        )
    with dense(found), dense(trained):
        torch.testing.assert_close(logits(found), logits(trained), rtol=0, atol=1e-5)


def test_a_whole_folder_is_an_ordinary_model_that_one_call_switches_to_pruning(base: Path, trained: Any, tmp_path: Path) -> None:
    save(trained, tmp_path, base=str(base), lora=LORA)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("lora" in name or "context_pruning" in name for name, _ in model.named_parameters())
    assert model.config.context_pruning["structure"]["rank"] == 5  # the configuration says that it can
    with dense(trained):
        torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-5)
    switch_on(model)
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-5)


def test_adapters_are_small_and_load_in_bf16(base: Path, trained: Any, tmp_path: Path) -> None:
    save(trained, tmp_path, base=str(base), lora=LORA, alone=True)
    tensors = load_file(tmp_path / TENSORS)
    assert all(".lora_" in name or ".context_pruning." in name for name in tensors)
    found = load(tmp_path, torch.bfloat16)  # the base is known by its weights, in whatever dtype
    assert next(found.parameters()).dtype == torch.bfloat16
    assert (logits(found).float() - logits(trained)).abs().median() < 0.1


def test_adapters_of_another_base_are_refused(base: Path, trained: Any, tmp_path: Path) -> None:
    save(trained, tmp_path / "saved", base=str(base), lora=LORA, alone=True)
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[0, 3] += 0.5
    with pytest.raises(InputError, match=r"its adapters were trained on .* and this model has other weights"):
        switch_on(other, tmp_path / "saved")


def test_another_network_begins_with_the_decisions(base: Path, trained: Any, tmp_path: Path) -> None:
    """Its own initial gain and bias do not count, what it is trained with is its own affair, and its parameters stay trainable."""
    save(trained, tmp_path / "saved")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    check_base(tmp_path / "saved", dict(whole.named_parameters(remove_duplicate=False)))
    attach(whole, PruningConfig(rank=5, bias=9.0, scale=0.5, sinks=2, window=3), seed=7)
    begin_with(whole, tmp_path / "saved")
    assert settings_of(whole).threshold == 0.1
    torch.testing.assert_close(logits(whole), logits(load(tmp_path / "saved")), rtol=0, atol=0)
    assert all(p.requires_grad for p in whole.parameters())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 6}, "has rank 5, and here it is 6"),
        ({"normalize": False}, "has normalize True, and here it is False"),
        ({"age_slope": -1.0}, "has age_slope none, and here it is given"),
        ({"sinks": 0, "window": 1}, "has sinks 2, and here it is 0\n.*has window 3, and here it is 1"),
    ],
)
def test_decisions_of_another_structure_are_no_beginning(
    base: Path, trained: Any, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    save(trained, tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    attach(model, PruningConfig(**{"rank": 5, "sinks": 2, "window": 3, **changed}))
    with pytest.raises(InputError, match=message):
        begin_with(model, tmp_path / "saved")


def test_what_was_learned_with_lora_begins_on_the_whole_model(base: Path, trained: Any, tmp_path: Path) -> None:
    save(trained, tmp_path / "alone", base=str(base), lora=LORA, alone=True)
    save(trained, tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(InputError, match="this model has other weights"):
        check_base(tmp_path / "whole", dict(model.named_parameters(remove_duplicate=False)))
    attach(model, PruningConfig(rank=5, sinks=2, window=3))
    with pytest.raises(InputError, match="LoRA adapters too"):
        begin_with(model, tmp_path / "alone")


def test_damaged_files_are_one_clear_line(base: Path, trained: Any, tmp_path: Path) -> None:
    good = tmp_path / "good"
    save(trained, good, base=str(base), lora=LORA, alone=True)
    description = json.loads((good / DESCRIPTION).read_text())

    def refused(change: Any, message: str) -> None:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(InputError, match=message) as raised:
            load(folder)
        assert "\n" not in str(raised.value)

    def describe(**changes: Any) -> Any:
        return lambda folder: (folder / DESCRIPTION).write_text(json.dumps({**description, **changes}))

    refused(lambda folder: (folder / DESCRIPTION).unlink(), "no context_pruning.json there")
    refused(lambda folder: (folder / DESCRIPTION).write_text("{"), "not a description of context pruning")
    refused(describe(structure={"rank": 5, "unheard_of": 1}), "unheard_of")
    refused(describe(structure={**description["structure"], "window": 0}), "context_pruning.window: 0")
    refused(describe(threshold="high"), "threshold is high")
    refused(describe(standards=[[0, 1.0, -1.0]]), "standards are no numbers")
    refused(describe(base=str(tmp_path / "gone")), "does not exist")
    refused(describe(layers=[0, 2]), "prunes layers")
    refused(lambda folder: (folder / TENSORS).write_bytes((good / TENSORS).read_bytes()[:500]), "cannot be read")
    tensors = load_file(good / TENSORS)
    name = next(name for name in tensors if name.endswith("bias"))

    def retensor(folder: Path) -> None:
        save_file({n: t for n, t in tensors.items() if n != name}, folder / TENSORS)

    refused(retensor, f"{name}: expected a tensor .* found none")
    refused(lambda folder: save_file({**tensors, name: torch.zeros(2)}, folder / TENSORS), r"expected a tensor \(1,\), found \(2,\)")


def test_what_cannot_be_saved_is_refused(base: Path, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no context pruning"):
        save(AutoModelForCausalLM.from_pretrained(base), tmp_path / "x")
    with pytest.raises(InputError, match="need `base`"):
        save(trained, tmp_path / "x", alone=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(trained, tmp_path / "file", base=str(base), lora=LORA)
