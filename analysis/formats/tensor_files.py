"""Files of named tensors: safetensors and torch's .pt/.bin, one or many with an index, and Hugging Face folders of either.

A safetensors file is a u64 header length, a JSON header {name: {dtype, shape, data_offsets}}, and the raw rows. It is mapped, never
read whole. Names that a header's `__metadata__` gives to other names are tied weights (safetensors.torch.save_model's convention).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.checkpoint import Checkpoint, Kind, Segment, precision_of
from analysis.files import load_file, map_file, mapped_tensor, some
from model.errors import InputError

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
BURNISH_PREFIX = "network."  # of model/huggingface.py's class, which wraps the network whose names we want

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Old releases of transformers saved the causal mask (1, 1, length, length) and the number that stood for minus infinity.
_MASK = re.compile(r"(attn|attention)\.(masked_)?bias$")
# Where training code keeps the weights in a dictionary with other things in it.
_NESTED = ("model", "module", "state_dict", "model_state_dict")
_STEP = ("step", "global_step", "global_steps", "iteration")
_SHARD = re.compile(r"(?:model|pytorch_model)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
_DEEPSPEED_PART = re.compile(r".*[_-](?:model|optim)_states\.pt")


def is_tensor_file(path: Path) -> bool:
    """A safetensors file, a torch file, or a folder with model.safetensors, pytorch_model.bin, or shards, with their index or without."""
    if path.is_dir():
        return any((path / name).exists() for name in (*INDEX_FILES, *SINGLE_FILES)) or bool(_shards_in(path))
    return path.is_file() and path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def refuse_part(path: Path) -> None:
    """Raises InputError where a path is one file of a checkpoint of several, which read alone would pass for all of it."""
    if not path.is_file():
        return
    if _DEEPSPEED_PART.fullmatch(path.name):
        raise InputError(f"{path}: one file of a DeepSpeed checkpoint: name its folder")
    if (shard := _SHARD.fullmatch(path.name)) and int(shard[2]) > 1:
        raise InputError(f"{path}: one of the {int(shard[2])} files of a checkpoint: name its folder")


def is_buffer(name: str, dtype: torch.dtype, dimensions: int) -> bool:
    """Whether a stored tensor is no weight: whole numbers and booleans (a position, a mask), rotary tables, masks of attention."""
    mask = _MASK.search(name)
    return not dtype.is_floating_point or name.endswith(".inv_freq") or (mask is not None and (bool(mask[2]) or dimensions == 4))


class TensorFiles(Checkpoint):
    """Whole tensors by name, each in one file."""

    def __init__(self, path: Path) -> None:
        refuse_part(path)
        super().__init__(path)
        self._files, index = _files_of(path)
        self._tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for file in self._files:
            tensors, extra = (read_safetensors if file.suffix == ".safetensors" else _read_torch)(file)
            twice = sorted(self._tensors.keys() & tensors.keys())
            if twice:
                raise InputError(f"{file}: {some(twice)} is in another file too")
            self._tensors |= tensors
            metadata |= extra
        if index is not None and (absent := sorted(index - self._tensors.keys())):
            raise InputError(f"{path}: the index lists {some(absent)}, which no file holds")
        config = _config(path)
        if config.get("model_type") == "burnish":
            self._tensors = {name.removeprefix(BURNISH_PREFIX): tensor for name, tensor in self._tensors.items()}
            metadata = {key.removeprefix(BURNISH_PREFIX): value.removeprefix(BURNISH_PREFIX) for key, value in metadata.items()}
        stored_buffers = set(json.loads(metadata.get("buffers", "[]")))
        buffers = {name for name, tensor in self._tensors.items() if is_buffer(name, tensor.dtype, tensor.dim()) or name in stored_buffers}
        self.buffers = {name: self._tensors.pop(name) for name in buffers}
        self.aliases = {alias: owner for alias, owner in metadata.items() if owner in self._tensors and alias not in self._tensors}
        if config.get("tie_word_embeddings"):
            self.aliases |= _tied_head(self._tensors.keys() | self.aliases.keys())
        self._join_tied_copies()
        if metadata.get("step", "").isdigit():
            self.step, self.step_is_said = int(metadata["step"]), True
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        if not self.shapes:
            raise InputError(f"{path}: no weights in it")
        self.precision = precision_of(self._tensors.values())
        kind = "safetensors" if self._files[0].suffix == ".safetensors" else "torch"
        self.format = f"Hugging Face folder, {kind}" if config else f"{kind} files" if len(self._files) > 1 else f"{kind} file"

    def _segments(self, name: str, kind: Kind) -> list[Segment]:
        if kind != "weight":
            raise InputError(f"{self.path}: no Adam moments for {name!r}: {self.format} holds weights alone")
        return [Segment(0, self._tensors[name].reshape(-1))]

    def files(self) -> list[Path]:
        return self._files

    def _join_tied_copies(self) -> None:
        """Names that share one storage are one parameter: the first keeps it."""
        owners: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
        for name, tensor in list(self._tensors.items()):
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            owner = owners.setdefault(key, name) if tensor.numel() else name
            if owner != name:
                self.aliases[name] = owner
                del self._tensors[name]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({name: memory-mapped tensor}, `__metadata__`) of a safetensors file.

    Raises:
        InputError: truncated, or a header that does not describe the bytes that follow: each byte exactly once.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            raise InputError(f"{path}: truncated or damaged: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
            entries = sorted((*map(int, e["data_offsets"]), name, DTYPES[e["dtype"]], torch.Size(e["shape"])) for name, e in header.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: its header is damaged: {type(error).__name__}: {error}") from None
    end = 0
    for begin, stop, name, dtype, shape in entries:
        if begin != end or min(shape, default=0) < 0 or stop - begin != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{path}: its header is damaged: {name} {tuple(shape)} of {dtype} cannot be bytes {begin} to {stop}")
        end = stop
    if 8 + length + end != size:
        kind = "truncated" if size < 8 + length + end else "damaged"
        raise InputError(f"{path}: {kind}: {size} bytes, and its header describes {8 + length + end}")
    mapped = map_file(path)
    tensors = {name: mapped_tensor(mapped, 8 + length + begin, dtype, shape) for begin, _, name, dtype, shape in entries}
    return {name: tensors[name] for name in header}, metadata


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({name: tensor}, {"step"}) of a torch file: of the state dict in it, where there are other things beside."""
    content: Any = load_file(path)
    step = next((content[key] for key in _STEP if content.get(key) is not None), None)
    if isinstance(step, Tensor):
        step = step.item() if step.numel() == 1 else None
    # tensors may lie beside the state dict too: a loss, the random state
    while (inner := next((content[key] for key in _NESTED if _holds_tensors(content.get(key))), None)) is not None:
        content = inner
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not any(value.dim() and value.is_floating_point() for value in tensors.values()):
        raise InputError(f"{path}: no weights in it; it holds {some([str(key) for key in content])}")
    return tensors, {} if step is None else {"step": str(int(step))}


def _holds_tensors(value: Any) -> bool:
    """Whether it is a dictionary with a tensor in it, at any depth."""
    return isinstance(value, dict) and any(isinstance(item, Tensor) or _holds_tensors(item) for item in value.values())


def _files_of(path: Path) -> tuple[list[Path], set[str] | None]:
    """(files, names that the index lists). Raises InputError for a damaged index, a missing file, or one outside the folder."""
    if path.is_file():
        return [path], None
    index = next((path / name for name in INDEX_FILES if (path / name).exists()), None)
    if index is None:
        whole = next((path / name for name in SINGLE_FILES if (path / name).exists()), None)
        return ([whole] if whole else _all_shards(path)), None
    try:
        weight_map = {str(name): str(file) for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise InputError(f"{index}: damaged: {type(error).__name__}: {error}") from None
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".."):
            raise InputError(f"{index}: refused: it lists {name!r}, which is not a plain file name")
        if not (path / name).is_file():
            raise InputError(f"{path / name}: missing; {index.name} lists it")
    return [path / name for name in sorted(set(weight_map.values()))], set(weight_map)


def _shards_in(folder: Path) -> list[Path]:
    """The numbered files of a Hugging Face checkpoint, safetensors where there are both kinds."""
    found = sorted(file for file in folder.iterdir() if _SHARD.fullmatch(file.name))
    return [file for file in found if file.suffix == ".safetensors"] or found


def _all_shards(folder: Path) -> list[Path]:
    """`_shards_in`, where their index is missing. Raises InputError unless each is there once."""
    files = _shards_in(folder)
    numbers = [(int(match[1]), int(match[2])) for file in files if (match := _SHARD.fullmatch(file.name))]
    count = max(of for _, of in numbers)
    if numbers != [(number, count) for number in range(1, count + 1)]:
        raise InputError(f"{folder}: {some([file.name for file in files])}: not all of one checkpoint's files, and no index lists them")
    return files


def _tied_head(names: set[str]) -> dict[str, str]:
    """The head that transformers leaves out of the file when it is the embedding: {its name: the embedding's}."""
    embeddings = [name for name in names if re.search(r"(embed_tokens|embed_in|wte|word_embeddings)\.weight$", name)]
    if len(embeddings) != 1 or any(re.search(r"lm_head|embed_out|unembedding", name) for name in names):
        return {}
    return {"lm_head.weight": embeddings[0]}


def _config(path: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder; empty where there is none."""
    file = path / "config.json"
    if not path.is_dir() or not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except (ValueError, OSError) as error:
        raise InputError(f"{file}: damaged: {error}") from None
