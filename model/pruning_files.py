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
import math
import os
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.context_pruning import settings_of, structure_of
from model.errors import InputError, one_line
from model.hub import open_decoder
from model.pretrained import Gather, LoraShape, add_lora, linear_maps, weights_of
from model.pruning_hooks import attach

DESCRIPTION, TENSORS = "context_pruning.json", "context_pruning.safetensors"
NUMBERS = 8  # of each tensor that a description says, by which to know the model again


def save(model: Any, folder: str | Path, base: str | None = None, lora: LoraShape | None = None, alone: bool = False) -> None:
    """Write a model with context pruning.

    Args:
        model: of transformers, `attach`ed.
        base: where the model came from: a name that `model.hub.locate` takes.
        lora: the shape of its LoRA adapters, if it has any; for `alone`.
        alone: the adapters alone; else the whole model, LoRA added to its weights.

    Raises:
        InputError: the model has no pruning, a threshold that is no number, or adapters that the files have no place for, or the folder
            cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__}: expected the model of transformers that attach() was given; of a peft model, model.get_base_model()"
        )
    folder, settings = Path(folder), settings_of(model)
    if not math.isfinite(settings.threshold):
        raise InputError(f"threshold: {settings.threshold}, expected a finite number: settings_of(model).threshold is saved too")
    if alone and base is None:
        raise InputError("adapters alone need `base`: the name of the model that they go with")
    if base is not None and Path(base).expanduser().exists():
        base = str(Path(base).expanduser().resolve())  # whatever folder it is loaded from
    _check_adapters(model, lora, alone)
    own, merged = base_weights(model), _merged(model)
    trained = {name: weight.detach().cpu().contiguous() for name, weight in merged.items() if ".context_pruning." in name}
    if alone:
        trained |= {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if _is_lora(name)}
    whole = {name: weight for name, weight in merged.items() if name in own}
    if not alone and any(weight.is_meta for weight in whole.values()):
        raise InputError("some weights of the model are not in memory (offloaded to disk): load it whole to save it")
    description = {"format": 2, **settings.describe(), "base": base, "lora": asdict(lora) if alone and lora is not None else None}
    known = {"weights": first_numbers(own if alone else whole)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not alone:
            model.config.context_pruning = description
            model.save_pretrained(folder, state_dict=whole)
        _write_pair(folder, trained, description | known)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{folder}: transformers does not save this model: {one_line(error)}") from None


def _write_pair(folder: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Both files, each written beside and renamed; the description last, with the digest by which a mixed pair is known."""
    beside = folder / f".{TENSORS}.writing", folder / f".{DESCRIPTION}.writing"
    try:
        save_file(tensors, beside[0], metadata={"format": "pt"})
        beside[1].write_text(json.dumps({**description, "tensors": _digest(beside[0])}, indent=2) + "\n")
        os.replace(beside[0], folder / TENSORS)
        os.replace(beside[1], folder / DESCRIPTION)
    finally:
        for path in beside:
            path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder that `save` wrote, in evaluation mode, pruning as it generates.

    Raises:
        InputError: a folder of another kind, damaged files, or a base that is not there or is another one.
    """
    folder = Path(folder)
    description = read_description(folder)
    source = str(folder) if (folder / "config.json").exists() else description["base"]
    if source is None:
        raise InputError(f"{folder}: no config.json there, and {DESCRIPTION} names no base: expected the whole folder that save() wrote")
    try:
        loaded = open_decoder(source, dtype)
    except InputError as error:
        raise InputError(f"{folder}: the model that its adapters go with: {error}") from None
    switch_on(loaded, folder)
    return loaded.eval()


def switch_on(model: Any, folder: str | Path | None = None) -> None:
    """Give a model as transformers loaded it the pruning of a folder; default: the folder that it was loaded from.

    Raises:
        InputError: no such files there, damaged ones, adapters that were trained on another model, or a model that prunes already.
    """
    if getattr(model, "context_pruning_settings", None) is not None:
        raise InputError("the model has context pruning already: load() has switched it on")
    folder = Path(folder or model.config.name_or_path)
    description = read_description(folder)
    check_base(folder, weights_of(model))
    if description["lora"] is not None:
        add_lora(model, LoraShape(**description["lora"]))
    settings = attach(model, structure_of(description))
    try:
        settings.take(description)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    fill({name: p for name, p in model.named_parameters() if ".context_pruning." in name or _is_lora(name)}, folder)


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


def check_base(folder: str | Path, weights: dict[str, Tensor]) -> None:
    """Raises InputError unless the pruning of a folder was trained on a model of these weights, of `weights_of`, in whatever precision.

    Where that cannot be told, of weights that are quantised or not in memory, it is said in a warning.
    """
    description = read_description(Path(folder))
    same = _is_same(description, weights)
    if same is None:
        warnings.warn(f"{folder}: whether its adapters were trained on this model is not checked: its weights cannot be read", stacklevel=2)
    elif not same:
        raise InputError(
            f"{folder}: its adapters were trained on {description['base'] or 'another model'}, and this model has other weights"
        )


def _is_same(description: dict[str, Any], weights: dict[str, Tensor]) -> bool | None:
    """Whether these are the weights of which a description says; None: that cannot be told."""
    if "fingerprint" in description:  # of the first format, which knows parameters alone
        weights = {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
        if all(_can_be_read(weight) for weight in weights.values()) and fingerprint(weights) == description["fingerprint"]:
            return True
        rounded = any(weight.dtype == torch.float16 or not _can_be_read(weight) for weight in weights.values())
        return None if rounded else False
    known, found = description["weights"], first_numbers(weights)
    if known is None or found is None:
        return None
    if known.keys() != found.keys():
        return False
    for name, line in known.items():
        (shape, numbers), (own_shape, own_numbers) = _parsed(line), _parsed(found[name])
        # what was rounded to bf16, there or here, is within 2^-8; fp16 has nothing between 0 and 6e-8
        if shape != own_shape or any(abs(a - b) > 0.01 * abs(a) + 1e-7 for a, b in zip(numbers, own_numbers, strict=False)):
            return False
    return True


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], folder: Path, gather: Gather = lambda parameter: nullcontext()) -> None:
    """Copy a folder's tensors into the parameters of the same names.

    Raises InputError unless they are those of the description, each has one, of its shape, and none is left over.
    """
    origin, recorded = folder / TENSORS, read_description(folder).get("tensors")  # older folders have no digest
    try:
        tensors = load_file(origin)
        found = _digest(origin) if recorded is not None else None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{origin}: cannot be read: {error}") from None
    if found != recorded:
        raise InputError(
            f"{origin}: not the tensors that {DESCRIPTION} was saved with: saving was cut off, or a file replaced; save it again"
        )
    for name, parameter in parameters.items():
        with gather(parameter):
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = tuple(tensors[name].shape) if name in tensors else "none"
                raise InputError(f"{origin}: {name}: expected a tensor {tuple(parameter.shape)}, found {found}")
            parameter.copy_(tensors[name])
    if surplus := sorted(tensors.keys() - parameters.keys()):
        raise InputError(f"{origin}: {surplus[0]}: no such tensor is in the model: saved with adapters that {DESCRIPTION} does not name")


def read_description(folder: Path) -> dict[str, Any]:
    """What context_pruning.json says. Raises InputError where it is not one that `save` writes."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        structure_of(description)
        known = {"fingerprint": str} if description["format"] == 1 else {"weights": (dict, type(None))}
        for key, kind in {**known, "base": (str, type(None)), "lora": (dict, type(None))}.items():
            if not isinstance(description[key], kind):
                raise TypeError(f"{key} is {str(description[key])[:40]}")
        for line in (description.get("weights") or {}).values():
            _parsed(str(line))
        if description["lora"] is not None:
            lora = LoraShape(**description["lora"])
            if not (isinstance(lora.rank, int) and lora.rank > 0 and all(isinstance(n, int | float) for n in (lora.alpha, lora.dropout))):
                raise ValueError(f"lora is {description['lora']}")
    except FileNotFoundError:
        raise InputError(f"{folder}: no {DESCRIPTION} there: expected a folder that save() or `analysis export` wrote") from None
    except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a description of context pruning: {type(error).__name__}: {error}") from None
    return description


def fingerprint(weights: dict[str, Tensor]) -> str:
    """What the first format tells one model's weights from another's by: a hash of the first numbers of each tensor, in bf16."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        if ".context_pruning." not in name and not _is_lora(name):
            tensor = weights[name].detach().flatten()[:64].to("cpu", torch.float32).to(torch.bfloat16)
            digest.update(f"{name} {tuple(weights[name].shape)}".encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_numbers(weights: dict[str, Tensor]) -> dict[str, str] | None:
    """Name -> shape and first numbers of each tensor, "576x576: 0.0123 -0.5 ..."; None: not all of them can be read."""
    if not all(_can_be_read(weight) for weight in weights.values()):
        return None
    lines = {}
    for name, weight in sorted(weights.items()):
        numbers = weight.detach().flatten()[:NUMBERS].tolist()
        lines[name] = f"{'x'.join(map(str, weight.shape))}: {' '.join(f'{number:.4g}' for number in numbers)}"
    return lines


def _parsed(line: str) -> tuple[str, list[float]]:
    shape, numbers = line.split(":")
    return shape, [float(number) for number in numbers.split()]


def _can_be_read(weight: Tensor) -> bool:
    """Not offloaded, and not quantised: packed numbers, or a tensor of a library's own."""
    plain = weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
    return plain and not weight.is_meta and type(weight) in (Tensor, nn.Parameter)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that adapters are added to, by their own names."""
    return {name: weight for name, weight in _without_adapters(model).items() if ".context_pruning." not in name}


def _without_adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".base_layer.", "."): weight for name, weight in weights_of(model).items() if ".lora_" not in name}


def _merged(model: nn.Module) -> dict[str, Tensor]:
    """The weights, those that decide among them, with what LoRA adds to them."""
    weights = {name: weight.detach() for name, weight in _without_adapters(model).items()}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            for adapter in set(layer.active_adapters) - set(layer.merged_adapters):  # pyright: ignore
                delta = layer.get_delta_weight(adapter)  # pyright: ignore
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta.to(weights[f"{name}.weight"].dtype)
    return weights


def _is_lora(name: str) -> bool:
    """Of adapters that are saved as such: those on what decides about the context are added to it."""
    return ".lora_" in name and ".context_pruning." not in name


def _check_adapters(model: Any, lora: LoraShape | None, alone: bool) -> None:
    """Raises InputError unless the model's adapters can be added to its weights or, `alone`, are those that `add_lora` makes of `lora`."""
    for name, _ in model.named_parameters():
        if any(part in name for part in (".lora_embedding_", ".lora_magnitude_vector", ".modules_to_save.")):
            raise InputError(f"{name}: of an adapter other than LoRA on a linear map: merge it first, model.merge_and_unload() of peft")
    if not alone:
        return
    found = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A") and _is_lora(f"{name}.lora_")}
    if lora is None:
        if found:
            raise InputError("the model has LoRA adapters: say their shape, lora=LoraShape(...), or save it whole")
        return
    shapes = [(layer.r, layer.scaling) for layer in found.values()]
    if found.keys() != linear_maps(model) or any(s != ({"default": lora.rank}, {"default": lora.alpha / lora.rank}) for s in shapes):
        raise InputError(f"the model's LoRA adapters are not those that add_lora makes of {lora}: say their shape, or save it whole")
