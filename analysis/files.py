"""A checkpoint's files: which there are, whether they are the ones that were saved, and how to open one without running code."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import re
import zipfile
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch

from model.errors import InputError

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def is_deepspeed(folder: Path) -> bool:
    """Whether DeepSpeed's files lie in this folder."""
    return folder.is_dir() and any(file.name.endswith("_states.pt") for file in folder.iterdir())  # glob would pass over what is locked


def latest_tag(folder: Path) -> str | None:
    """The folder inside that `latest`, which DeepSpeed writes beside its folders, names; None without that file, or where it names none."""
    file = folder / "latest"
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        tag = stream.read(256).decode(errors="replace").strip()
    return tag if tag not in ("", "..") and "\0" not in tag and Path(tag).name == tag else None


def checkpoint_files(folder: Path) -> tuple[list[Path], dict[int, Path]]:
    """(model-states files by rank, {rank: optimizer-states file}) of a folder."""
    if not folder.exists():
        raise InputError(f"{folder}: no such file or folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a checkpoint folder, found a file")
    model_files: dict[int, Path] = {}
    optimizer_files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _MODEL_FILE.fullmatch(path.name):
            target, rank = model_files, int(match[1] or 0)
        elif match := _OPTIMIZER_FILE.fullmatch(path.name):
            target, rank = optimizer_files, int(match[1])
        elif path.name.endswith("_states.pt"):
            raise InputError(f"{path}: a pipeline- or expert-parallel checkpoint, which this reader does not take apart")
        else:
            continue
        if int(match[2]) != 0:
            raise InputError(f"{path}: a tensor-parallel checkpoint, which this reader does not take apart")
        if rank in target:
            raise InputError(f"{folder}: {target[rank].name} and {path.name} both claim to be rank {rank}'s; one is left over")
        target[rank] = path
    if not model_files:
        raise InputError(f"{folder}: no DeepSpeed checkpoint here (expected *_model_states.pt)")
    if 0 not in model_files:
        name = next(iter(model_files.values())).name
        raise InputError(f"{folder}: {re.sub(r'pp_rank_[0-9]+', 'pp_rank_0', name)} is missing")
    return [model_files[rank] for rank in sorted(model_files)], dict(sorted(optimizer_files.items()))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json, after comparing the files' sizes with it."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: int(recorded["size"]) for name, recorded in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    for name, expected in sizes.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path}: damaged: it lists {name!r}, which lies outside the checkpoint")
        if not file.is_file():
            raise InputError(f"{file}: missing; manifest.json lists it with {expected} bytes")
        found = file.stat().st_size
        if found != expected:
            kind = "truncated" if found < expected else "altered"
            raise InputError(f"{file}: {kind}: {found} bytes, and manifest.json expects {expected}")
    return manifest


class StandIn:
    """Stands for an object in a checkpoint that is not run: DeepSpeed's, or Megatron's arguments. It keeps the attributes."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


_ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


def named_member(enumeration: Any, name: str) -> Any:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 write an enumeration's member; later ones write its value.

    Of an enumeration that `int` stands in for: of DeepSpeed's stages the number, of others the name. Raises InputError where it is none.
    """
    if enumeration is int:
        return _ZERO_STAGES.get(name, name)
    if isinstance(enumeration, type) and issubclass(enumeration, Enum):
        return enumeration[name]
    raise InputError(f"refused: it asks for {name!r} of {enumeration!r}, which no checkpoint has need of")


# The only classes outside torch that DeepSpeed's own state and Megatron's refer to. Anything else in a pickle is refused.
_STAND_INS = [
    (named_member, "builtins.getattr"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
    (StandIn, "argparse.Namespace"),
    (StandIn, "_io.BytesIO"),  # TransformerEngine's _extra_state
    (int, "megatron.core.enums.ModelType"),
    (int, "megatron.core.transformer.enums.AttnBackend"),
]


def load_file(path: Path) -> dict[str, Any]:
    """The dictionary of a torch file, as `load_tensor_or_dict` reads it."""
    content = load_tensor_or_dict(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, expected a dictionary")
    return content


def load_tensor_or_dict(path: Path) -> Any:
    """What a torch file holds, its tensors memory-mapped (read whole in torch's format before 1.6). Runs no code from the file.

    Raises:
        InputError: truncated, damaged, or asking for more memory than it has bytes, or for anything but tensors and plain values.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        _check_stored(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):  # pyright: ignore[reportArgumentType]
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can fail anywhere inside torch
        text = " ".join(str(error).split())
        if match := re.search(r"GLOBAL ([\w.]+)", text):
            raise InputError(f"{path}: refused: it asks to run {match[1]}, which no checkpoint has need of") from None
        raise InputError(f"{path}: truncated or damaged ({path.stat().st_size} bytes): {text[:200]}") from None
    _check_claims(path, content)
    return content


def _check_stored(path: Path) -> None:
    """torch never compresses, so a record that is compressed, or records that overlap, would unpack into more than the file holds.

    Raises:
        InputError: a zip bomb, or no zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: truncated or damaged ({path.stat().st_size} bytes): {error}") from None
    packed = next((record.filename for record in records if record.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise InputError(f"{path}: refused: {packed} is compressed, which torch never does; unpacked it may fill the memory")
    total = sum(record.file_size for record in records)
    if total > path.stat().st_size:
        raise InputError(f"{path}: refused: its records claim {total} bytes, and the file has {path.stat().st_size}")


def check_crc(path: Path) -> None:
    """Read a torch file whole and compare each record with its CRC-32. Raises InputError; a file of another kind passes."""
    with contextlib.suppress(zipfile.BadZipFile):  # its end alone is damaged: `check_archive` says so
        if not zipfile.is_zipfile(path):
            return
    check_archive(path, str(path))


def check_archive(file: Path | IO[bytes], what: str) -> None:
    """Read a torch archive whole and compare each record with its CRC-32. Raises InputError, which names it by `what`."""
    try:
        with zipfile.ZipFile(file) as archive:
            altered = archive.testzip()
    except Exception as error:  # a damaged archive can fail anywhere inside zipfile
        raise InputError(f"{what}: truncated or damaged: {type(error).__name__}: {error}") from None
    if altered is not None:
        raise InputError(f"{what}: altered since it was saved: the CRC-32 of {altered} does not fit; restore the file")


def _check_claims(path: Path, value: Any, name: str = "") -> None:
    """Every tensor's elements must lie in the file: one that claims more (a stride of 0 repeats an element) would fill the memory.

    Raises:
        InputError: naming the tensor.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"{path}: refused: {name} claims shape {tuple(value.shape)}, more than the file holds")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_claims(path, item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and not all(isinstance(item, int | float | str) for item in value):
        for i, item in enumerate(value):
            _check_claims(path, item, f"{name}[{i}]")


def map_file(path: Path) -> mmap.mmap:
    """A file as memory that is read when it is touched. Writing to it changes no file."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def mapped_tensor(mapped: mmap.mmap, start: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """A tensor at a byte offset of a mapped file; it need not be aligned."""
    if shape.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=shape.numel(), offset=start).view(shape)


_madvise = getattr(ctypes.CDLL(None), "madvise", None) if os.name == "posix" else None
_SEQUENTIAL = 2  # MADV_SEQUENTIAL of Linux, macOS and the BSDs


def read_in_order(values: torch.Tensor) -> None:
    """Say that the memory-mapped storage behind a tensor is about to be read from front to back. Of no effect on other memory.

    The system then reads ahead while what is there is used; as it stands, a disk is idle between two faults.
    """
    storage = values.untyped_storage()
    if _madvise is not None and storage.nbytes():
        begin = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = storage.data_ptr() + storage.nbytes() - begin
        _madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _SEQUENTIAL)  # a hint: whether it was taken does not matter


def some(names: list[str]) -> str:
    """`a, b, c, d and 4 more`, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
