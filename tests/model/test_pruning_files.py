"""Saving what pruning adds, alone and with the model, and loading it again; and every way in which the files can be wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import pruning_files
from model.config import PruningConfig
from model.context_pruning import dense, settings_of
from model.errors import InputError
from model.pretrained import LoraShape, PretrainedDecoder, add_lora, describe, pretrained_weights, weights_of
from model.pretrained import load as fill_decoder
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
    with pytest.raises(InputError, match="the model has context pruning already"):
        switch_on(model)


def test_adapters_are_small_and_load_in_bf16(base: Path, trained: Any, tmp_path: Path) -> None:
    save(trained, tmp_path, base=str(base), lora=LORA, alone=True)
    tensors = load_file(tmp_path / TENSORS)
    assert all(".lora_" in name or ".context_pruning." in name for name in tensors)
    found = load(tmp_path, torch.bfloat16)  # the base is known by its weights, in whatever dtype
    assert next(found.parameters()).dtype == torch.bfloat16
    assert (logits(found).float() - logits(trained)).abs().median() < 0.1


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16])
def test_a_base_is_known_again_in_every_precision(base: Path, trained: Any, alone: bool, saved_in: torch.dtype, tmp_path: Path) -> None:
    save(copy.deepcopy(trained).to(saved_in), tmp_path, base=str(base), lora=LORA, alone=alone)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = load(tmp_path, dtype)
        assert next(found.parameters()).dtype == dtype
        assert (logits(found).float() - logits(trained)).abs().median() < 0.1


def test_the_first_format_is_still_read(base: Path, trained: Any, tmp_path: Path) -> None:
    """It had a hash of the first 64 numbers of each parameter, rounded to bf16, which fp16 cannot give."""
    save(trained, tmp_path, base=str(base), lora=LORA, alone=True)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    assert description.pop("weights").keys() == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
    digest = hashlib.sha256()
    for name, weight in sorted(AutoModelForCausalLM.from_pretrained(base).named_parameters(remove_duplicate=False)):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:64].bfloat16().view(torch.uint8).numpy().tobytes())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**description, "format": 1, "fingerprint": digest.hexdigest()}))
    torch.testing.assert_close(logits(load(tmp_path)), logits(trained), rtol=0, atol=1e-5)
    load(tmp_path, torch.bfloat16)
    with pytest.warns(UserWarning, match="is not checked: its weights cannot be read"):
        load(tmp_path, torch.float16)
    (tmp_path / DESCRIPTION).write_text(json.dumps({**description, "format": 1, "fingerprint": "0"}))
    with pytest.raises(InputError, match="this model has other weights"):
        load(tmp_path)


def test_weights_that_cannot_be_read_are_not_checked(base: Path, trained: Any, tmp_path: Path) -> None:
    """Those that wait on disk until they are needed, here of one layer."""
    save(trained, tmp_path / "saved")
    places = dict.fromkeys(("wte", "wpe", "h.0", "h.2", "ln_f"), "cpu") | {"h.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        device_map={"lm_head": "cpu", **{f"transformer.{name}": place for name, place in places.items()}},
        offload_folder=tmp_path / "disk",
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    with pytest.warns(UserWarning, match="is not checked: its weights cannot be read"):
        switch_on(model)
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="not in memory"):
        save(model, tmp_path / "again")


def test_buffers_that_are_saved_go_along(tmp_path: Path) -> None:
    """A router's correction, which is no parameter: from one folder to another, and into training."""
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        vocab_size=97,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    plain, corrections = logits(model), [buffer for name, buffer in model.named_buffers() if "correction" in name]
    for buffer in corrections:
        buffer.copy_(torch.randn(buffer.shape))
    untouched = logits(model)
    assert corrections and (untouched - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "base")
    decoder = PretrainedDecoder(describe(str(tmp_path / "base")))
    fill_decoder(decoder, pretrained_weights(str(tmp_path / "base")))
    with torch.no_grad():
        torch.testing.assert_close(decoder.eval()(tokens_of()), untouched, rtol=0, atol=1e-5)
    attach(model, PruningConfig(rank=4))
    save(model, tmp_path / "whole")
    torch.testing.assert_close(logits(load(tmp_path / "whole")), logits(model), rtol=0, atol=1e-5)
    save(model, tmp_path / "alone", base=str(tmp_path / "base"), alone=True)
    load(tmp_path / "alone")
    corrections[0].zero_()
    with pytest.raises(InputError, match="this model has other weights"):
        check_base(tmp_path / "alone", weights_of(model))


def test_a_local_base_is_found_from_another_folder(base: Path, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    save(trained, tmp_path / "saved", base=base.name, lora=LORA, alone=True)
    monkeypatch.chdir(tmp_path)
    load("saved")


def test_pefts_own_adapters_are_added_to_what_decides_too(base: Path, trained: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save(trained, tmp_path / "first")
    wrapped = get_peft_model(load(tmp_path / "first"), LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert any(".context_pruning." in name and ".lora_" in name for name, _ in wrapped.named_parameters())
    with pytest.raises(InputError, match=r"PeftModel\w*: expected the model of transformers .* model.get_base_model\(\)"):
        save(wrapped, tmp_path / "x")
    model = wrapped.get_base_model()
    save(model, tmp_path / "second")
    torch.testing.assert_close(logits(load(tmp_path / "second")), logits(model), rtol=0, atol=1e-5)


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
    refused(describe(base=str(tmp_path / "gone")), "no such file or folder")
    refused(describe(base=None), "no config.json there, and context_pruning.json names no base")
    refused(describe(lora={"rankk": 3}), "unexpected keyword argument 'rankk'")
    refused(describe(lora={"rank": "3"}), "lora is {'rank': '3'}")
    refused(describe(lora=None), "lora_A.default.weight: no such tensor is in the model")
    refused(describe(weights={"lm_head.weight": "x"}), "not a description of context pruning")
    refused(describe(weights={**description["weights"], "more": "1: 1"}), "this model has other weights")
    refused(describe(layers=[0, 2]), "prunes layers")
    refused(lambda folder: (folder / TENSORS).write_bytes((good / TENSORS).read_bytes()[:500]), "cannot be read")
    tensors = load_file(good / TENSORS)
    name = next(name for name in tensors if name.endswith("bias"))

    def hold(tensors: dict[str, torch.Tensor], digest: str | None = None) -> Any:
        def change(folder: Path) -> None:
            save_file(tensors, folder / TENSORS)
            describe(tensors=digest)(folder)

        return change

    refused(hold({n: t for n, t in tensors.items() if n != name}), f"{name}: expected a tensor .* found none")
    refused(hold({**tensors, name: torch.zeros(2)}), r"expected a tensor \(1,\), found \(2,\)")
    refused(hold({**tensors, name: torch.zeros(1)}, description["tensors"]), "not the tensors that context_pruning.json was saved with")


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_a_save_over_another_is_the_old_the_new_or_refused(
    calls: int, base: Path, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before each of the steps: writing the one, the other, and renaming them."""
    other, folder = copy.deepcopy(trained), tmp_path / "saved"
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".context_pruning." in name:
                parameter += 1.0
    settings_of(other).threshold = 0.3
    save(trained, folder, base=str(base), lora=LORA, alone=True)
    steps = 0

    def cut(function: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == calls:
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return step

    with monkeypatch.context() as patched:
        for owner, name in ((pruning_files, "save_file"), (Path, "write_text"), (pruning_files.os, "replace")):
            patched.setattr(owner, name, cut(getattr(owner, name)))
        with pytest.raises(InputError, match="No space left"):
            save(other, folder, base=str(base), lora=LORA, alone=True)
    assert {path.name for path in folder.iterdir()} == {DESCRIPTION, TENSORS}
    if calls < 4:
        found = load(folder)
        assert settings_of(found).threshold == 0.1
        torch.testing.assert_close(logits(found), logits(trained), rtol=0, atol=1e-5)
    else:
        with pytest.raises(InputError, match=r"not the tensors that context_pruning\.json was saved with"):
            load(folder)
    save(other, folder, base=str(base), lora=LORA, alone=True)
    assert settings_of(load(folder)).threshold == 0.3


def test_a_folder_without_a_digest_still_loads(base: Path, trained: Any, tmp_path: Path) -> None:
    save(trained, tmp_path, base=str(base), lora=LORA, alone=True)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    assert description.pop("tensors") == hashlib.sha256((tmp_path / TENSORS).read_bytes()).hexdigest()
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    torch.testing.assert_close(logits(load(tmp_path)), logits(trained), rtol=0, atol=1e-5)


def test_what_cannot_be_saved_is_refused(base: Path, trained: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with pytest.raises(InputError, match="no context pruning"):
        save(AutoModelForCausalLM.from_pretrained(base), tmp_path / "x")
    with pytest.raises(InputError, match="need `base`"):
        save(trained, tmp_path / "x", alone=True)
    with pytest.raises(InputError, match="has LoRA adapters: say their shape"):
        save(trained, tmp_path / "x", base=str(base), alone=True)
    with pytest.raises(InputError, match=r"not those that add_lora makes of LoraShape\(rank=4"):
        save(trained, tmp_path / "x", base=str(base), alone=True, lora=LoraShape(rank=4))
    other = AutoModelForCausalLM.from_pretrained(base)
    attach(other, PruningConfig(rank=4))
    with pytest.raises(InputError, match="not those that add_lora makes"):
        save(other, tmp_path / "x", base=str(base), alone=True, lora=LORA)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["c_fc"], use_dora=True, fan_in_fan_out=True), other)
    with pytest.raises(InputError, match=r"lora_magnitude_vector.* an adapter other than LoRA on a linear map"):
        save(other, tmp_path / "x")
    settings_of(other).threshold = float("inf")
    with pytest.raises(InputError, match="threshold: inf, expected a finite number"):
        save(other, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(trained, tmp_path / "file", base=str(base), lora=LORA)
