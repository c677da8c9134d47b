"""A run with context pruning as a Hugging Face folder: the model, LoRA merged, and the files of model/pruning_files.py; or those alone.

A run that began with a pretrained model and has no pruning: the model, LoRA merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from analysis.checkpoint import Checkpoint
from analysis.export import copy_tokenizer, sample
from analysis.pruned import build
from analysis.runs import Run
from model import pruning_files
from model.context_pruning import dense
from model.errors import InputError
from model.hub import open_decoder
from model.pretrained import PretrainedDecoder, pretrained_weights


def write_pruned(run: Run, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, compare: bool, adapters: bool) -> list[str]:
    """Fill an empty folder; what to say about it.

    Args:
        adapters: what training added alone, for the pretrained model that the run began with.

    Raises:
        InputError: adapters alone of a network that has no such model, or whose own weights were trained too.
    """
    network, _ = build(checkpoint)
    lines: list[str] = []
    end: dict[str, Any] = {}
    if adapters:
        _check_adapters_suffice(network)
    else:
        token, line = _copy_tokenizer(run, folder)
        lines.append(line)
        end = {} if token is None else {"eos_token_id": token, "pad_token_id": token}
    base = lora = None
    if isinstance(network, PretrainedDecoder):
        live, base, lora = network.model, network.config.source, network.config.lora
    else:
        from model.huggingface import BurnishForCausalLM, transformers_config

        live: Any = BurnishForCausalLM(transformers_config(network.config, **end))
        live.network, live.context_pruning_settings = network, network.context_pruning_settings
        live.eval()
    expected = _logits(live) if compare else None
    live.to(dtype)
    pruning_files.save(live, folder, base=base, lora=lora, alone=adapters)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lines.insert(0, f"{'what pruning added' if adapters else 'the whole model and what pruning added'}, {size:,} bytes")
    if expected is not None:
        lines += _compare(live, folder, expected, strict=dtype == torch.float32)
    return lines


def write_pretrained(run: Run, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, compare: bool) -> list[str]:
    """The same of a run that began with a pretrained model and has no context pruning: the whole model, LoRA added to its weights."""
    network, _ = build(checkpoint)
    assert isinstance(network, PretrainedDecoder)
    live = network.model
    lines = [_copy_tokenizer(run, folder)[1]]
    expected = _logits(live)[0] if compare else None
    for layer in live.modules():
        if hasattr(layer, "lora_A"):
            layer.merge()  # pyright: ignore
    live.to(dtype).save_pretrained(folder, state_dict={name: weight.detach() for name, weight in pruning_files.base_weights(live).items()})
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lines.insert(0, f"the whole model, {size:,} bytes")
    if expected is None:
        return lines
    exported = open_decoder(str(folder))
    tokens = _some_tokens(exported)
    with torch.no_grad():
        difference = float((exported(tokens, use_cache=False).logits.float() - expected).abs().max())
    scale = float(expected.abs().max())
    lines.append(
        f"logits of the exported and the live model, {tokens.numel()} random tokens: largest difference {difference:.3g}, "
        f"largest logit {scale:.3g}"
    )
    if dtype == torch.float32 and not difference <= 1e-4 * max(scale, 1.0):
        raise RuntimeError(f"the exported model does not compute what the checkpoint's does: {lines[-1]}")
    return [*lines, sample(exported, folder, tokens, tokens.shape[1])]


def _copy_tokenizer(run: Run, folder: Path) -> tuple[int | None, str]:
    tokenizer = run.folder / "tokenizer" if run.folder else None
    if tokenizer is None or not tokenizer.is_dir():
        return None, "no tokenizer/ beside the checkpoints: the folder has none"
    return copy_tokenizer(tokenizer, folder)


def _check_adapters_suffice(network: Any) -> None:
    if not isinstance(network, PretrainedDecoder):
        raise InputError("--adapters: the run began with no pretrained model that they could be added to; export it whole")
    source = network.config.source
    own, theirs = pruning_files.base_weights(network.model), pretrained_weights(source)
    # in bf16, to which a run may have rounded what it did not train
    if own.keys() != theirs.keys() or any(not torch.equal(own[name].bfloat16(), theirs[name].bfloat16()) for name in own):
        raise InputError(f"--adapters: the run trained the weights of {source} too; export it whole")


@torch.no_grad()
def _logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some random tokens, (without pruning, with it), float32."""
    tokens = _some_tokens(model)
    with dense(model):
        without = model(tokens, use_cache=False).logits.float()
    return without, model(tokens, use_cache=False).logits.float()


def _some_tokens(model: Any) -> torch.Tensor:
    """The same for a model and its copy, (2, length)."""
    vocabulary, longest = model.get_output_embeddings().weight.shape[0], getattr(model.config, "max_position_embeddings", None) or 64
    return torch.randint(vocabulary, (2, min(64, longest)), generator=torch.Generator().manual_seed(0))


def _compare(live: Any, folder: Path, expected: tuple[torch.Tensor, torch.Tensor], strict: bool) -> list[str]:
    """What was written, read back as transformers reads it, against the live network.

    Raises:
        RuntimeError: what pruning added differs, or with `strict` the logits do by more than rounding can make them, where the weights of
            the base are the same (of adapters alone they are read from the base itself, which a bf16 run has rounded).
    """
    exported = pruning_files.load(folder)
    added = {name: value for name, value in exported.named_parameters() if ".context_pruning." in name}
    own = dict(live.named_parameters())
    if any(not torch.equal(value, own[name].float()) for name, value in added.items()):
        raise RuntimeError("what pruning added was not written as it was read")
    found = _logits(exported)
    differences = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
    scale = float(expected[0].abs().max())
    alone = not (folder / "config.json").exists()
    same = not alone or all(torch.equal(value, own[name].float()) for name, value in exported.named_parameters())
    lines = [
        f"logits of the exported and the live model, {expected[0][..., 0].numel()} random tokens, largest logit {scale:.3g}: largest "
        f"difference {differences[0]:.3g} without pruning, {differences[1]:.3g} with it"
        + ("" if same else "; the run held the base's weights rounded, and the adapters go to them as they are")
    ]
    if strict and same and not differences[0] <= 1e-4 * max(scale, 1.0):
        raise RuntimeError(f"the exported model does not compute what the checkpoint's does: {lines[0]}")
    tokens = torch.arange(4)[None] % exported.get_output_embeddings().weight.shape[0]
    return [*lines, sample(exported, folder, tokens, int(getattr(exported.config, "max_position_embeddings", None) or 64))]
