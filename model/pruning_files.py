"""Save and load what context pruning adds to a model: two small files, alone or beside the model itself.

    save(model, "pruned")                       # a folder for AutoModelForCausalLM, LoRA merged, and the two files
    save(model, "adapters", alone=True)         # the two files, with LoRA's tensors, for the model that they were trained on
    model = load("pruned")                      # either; generate() then prunes
    model = AutoModelForCausalLM.from_pretrained("pruned")     # the network without pruning ...
    switch_on(model)                                           # ... and with it

context_pruning.json says what was trained and on what; context_pruning.safetensors has the tensors by transformers' names.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.context_pruning import settings_of, structure_of
from model.errors import InputError
from model.hub import open_decoder
from model.pretrained import Gather, LoraShape, add_lora
from model.pruning_hooks import attach

DESCRIPTION, TENSORS = "context_pruning.json", "context_pruning.safetensors"


def save(model: Any, folder: str | Path, base: str | None = None, lora: LoraShape | None = None, alone: bool = False) -> None:
    """Write a model with context pruning.

    Args:
        model: of transformers, `attach`ed.
        base: where the model came from: a name that `model.hub.locate` takes.
        lora: the shape of its LoRA adapters, if it has any.
        alone: the adapters alone; else the whole model, LoRA added to its weights.

    Raises:
        InputError: the model has no pruning, or the folder cannot be written.
    """
    folder, settings = Path(folder), settings_of(model)
    if alone and base is None:
        raise InputError("adapters alone need `base`: the name of the model that they go with")
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if ".context_pruning." in name or (alone and ".lora_" in name)
    }
    whole = _merged(model)
    description = {
        "format": 1,
        **settings.describe(),
        "base": base,
        "fingerprint": fingerprint(_base(model) if alone else whole),
        "lora": asdict(lora) if alone and lora is not None else None,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not alone:
            model.config.context_pruning = description
            model.save_pretrained(folder, state_dict=whole)
        save_file(trained, folder / TENSORS, metadata={"format": "pt"})
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder that `save` wrote, in evaluation mode, pruning as it generates.

    Raises:
        InputError: a folder of another kind, damaged files, or a base that is not there or is another one.
    """
    folder = Path(folder)
    description = read_description(folder)
    source = str(folder) if (folder / "config.json").exists() else description["base"]
    try:
        loaded = open_decoder(source, dtype)
    except InputError as error:
        raise InputError(f"{folder}: the model that its adapters go with: {error}") from None
    switch_on(loaded, folder)
    return loaded.eval()


def switch_on(model: Any, folder: str | Path | None = None) -> None:
    """Give a model as transformers loaded it the pruning of a folder; default: the folder that it was loaded from.

    Raises:
        InputError: no such files there, damaged ones, or adapters that were trained on another model.
    """
    folder = Path(folder or model.config.name_or_path)
    description = read_description(folder)
    check_base(folder, dict(model.named_parameters(remove_duplicate=False)))
    if description["lora"] is not None:
        add_lora(model, LoraShape(**description["lora"]))
    settings = attach(model, structure_of(description))
    try:
        settings.take(description)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    fill({name: p for name, p in model.named_parameters() if ".context_pruning." in name or ".lora_" in name}, folder)


def begin_with(model: Any, folder: str | Path, gather: Gather = lambda parameter: nullcontext()) -> None:
    """Have a model that was just `attach`ed begin with the decisions of a folder, its threshold among them.

    Whether they were learned on the same weights is for `check_base` to say, once the model has any.

    Args:
        gather: wraps a parameter while it is written, so that a sharded one is whole inside.

    Raises:
        InputError: no such files there, damaged ones, LoRA adapters among them, or another structure.
    """
    folder, settings = Path(folder), settings_of(model)
    description = read_description(folder)
    if description["lora"] is not None:
        raise InputError(f"{folder}: has LoRA adapters too: export the run whole, and begin with that on itself as model.pretrained")
    there, here = asdict(structure_of(description)), asdict(settings.config)
    for structure in (there, here):
        structure["age_slope"] = "none" if structure["age_slope"] is None else "given"  # its value, too, is learned
    if problems := [
        f"{folder}: has {name} {there[name]}, and here it is {here[name]}"
        for name in there
        if name not in ("scale", "bias") and there[name] != here[name]
    ]:
        raise InputError("\n".join(problems))
    settings.take(description)
    fill({name: p for name, p in model.named_parameters() if ".context_pruning." in name}, folder, gather)


def check_base(folder: str | Path, weights: dict[str, Any]) -> None:
    """Raises InputError unless the pruning of a folder was trained on a model of these weights."""
    description = read_description(Path(folder))
    if description["fingerprint"] != fingerprint(weights):
        raise InputError(
            f"{folder}: its adapters were trained on {description['base'] or 'another model'}, and this model has other weights"
        )


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], folder: Path, gather: Gather = lambda parameter: nullcontext()) -> None:
    """Copy a folder's tensors into the parameters of the same names. Raises InputError unless each has one, of its shape."""
    origin = folder / TENSORS
    try:
        tensors = load_file(origin)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{origin}: cannot be read: {error}") from None
    for name, parameter in parameters.items():
        with gather(parameter):
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = tuple(tensors[name].shape) if name in tensors else "none"
                raise InputError(f"{origin}: {name}: expected a tensor {tuple(parameter.shape)}, found {found}")
            parameter.copy_(tensors[name])


def read_description(folder: Path) -> dict[str, Any]:
    """What context_pruning.json says. Raises InputError where it is not one that `save` writes."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        structure_of(description)
        for key, kind in {"fingerprint": str, "base": (str, type(None)), "lora": (dict, type(None))}.items():
            if not isinstance(description[key], kind):
                raise TypeError(f"{key} is {str(description[key])[:40]}")
    except FileNotFoundError:
        raise InputError(f"{folder}: no {DESCRIPTION} there: expected a folder that save() or `analysis export` wrote") from None
    except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a description of context pruning: {type(error).__name__}: {error}") from None
    return description


def fingerprint(weights: dict[str, Any]) -> str:
    """What tells one model's weights from another's: a hash of the first numbers of each tensor, in bf16, whatever they are kept in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        if ".context_pruning." not in name and ".lora_" not in name:
            tensor = weights[name].detach().flatten()[:64].to("cpu", torch.float32).to(torch.bfloat16)
            digest.update(f"{name} {tuple(weights[name].shape)}".encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _base(model: nn.Module) -> dict[str, Tensor]:
    """The weights that adapters are added to, by their own names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", "."): p for name, p in named if ".context_pruning." not in name and ".lora_" not in name}


def _merged(model: nn.Module) -> dict[str, Tensor]:
    """The weights with what LoRA adds to them."""
    weights = {name: parameter.detach() for name, parameter in _base(model).items()}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            for adapter in layer.lora_A:  # pyright: ignore
                delta = layer.get_delta_weight(adapter)  # pyright: ignore
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta.to(weights[f"{name}.weight"].dtype)
    return weights
