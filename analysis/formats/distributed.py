"""torch.distributed.checkpoint: a folder of `.metadata` and `__RANK_N.distcp` files.

`.metadata` is a pickle that says where each block of each tensor lies: a file, a byte range, offsets within the tensor. A block is a
torch.save archive of its own, inside the file at that range, uncompressed, so its elements can be mapped where they are.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from analysis.checkpoint import Checkpoint, Kind, Segment, block_segments, precision_of
from analysis.files import map_file, mapped_tensor, some
from model.errors import InputError

_DTYPE_NAMES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_METADATA = "torch.distributed.checkpoint.metadata"
# Everything that torch puts into `.metadata`; they are dataclasses and enumerations, which run no code.
_ALLOWED = {
    (_METADATA, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
_PREFIXES = ("state_dict.", "model.", "module.", "app.")
_MOMENT = re.compile(r"^(?:.*\.)?(?:optim|optimizer)(?:izer)?\.(?:state\.)?(.+)\.(exp_avg|exp_avg_sq|step)$")


def is_distributed(path: Path) -> bool:
    return path.is_dir() and (path / ".metadata").is_file()


class _Unpickler(pickle.Unpickler):
    """Makes what torch's own metadata consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and name in _DTYPE_NAMES) or (module, name) == ("torch", "strided"):
            return super().find_class(module, name)
        raise InputError(f"refused: it asks to run {module}.{name}, which no checkpoint has need of")


class DistributedCheckpoint(Checkpoint):
    """A folder that torch.distributed.checkpoint.save wrote."""

    format = "torch.distributed.checkpoint"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        metadata = self._metadata()
        self._maps: dict[str, mmap.mmap] = {}
        tensors = {str(name): value for name, value in metadata.state_dict_metadata.items() if hasattr(value, "chunks")}
        self._blocks: dict[str, list[tuple[tuple[int, ...], torch.Size, Any]]] = {name: [] for name in tensors}
        self._meta = tensors
        for index, where in metadata.storage_data.items():
            if index.fqn in tensors:
                offsets = tuple(index.offset or ())
                chunk = next(c for c in tensors[index.fqn].chunks if tuple(c.offsets) == offsets)
                self._blocks[index.fqn].append((offsets, torch.Size(chunk.sizes), where))
        for name, value in tensors.items():
            covered = sum(sizes.numel() for _, sizes, _ in self._blocks[name])
            if covered != value.size.numel():
                raise InputError(f"{path}: the blocks of {name} hold {covered} elements, and it has {value.size.numel()}")
        self._check_files(metadata)
        moments = {name: match for name in tensors if (match := _MOMENT.match(name))}
        weights = [name for name in tensors if name not in moments and tensors[name].properties.dtype.is_floating_point]
        prefix = next((p for p in _PREFIXES if weights and all(name.startswith(p) for name in weights)), "")
        self._stored: dict[tuple[str, str], str] = {(name.removeprefix(prefix), "weight"): name for name in weights}
        for name, match in moments.items():
            self._stored[match[1].removeprefix(prefix), match[2]] = name
        self.shapes = {name.removeprefix(prefix): torch.Size(tensors[name].size) for name in weights}
        self.buffers = {
            name.removeprefix(prefix): self._assemble(name)
            for name in tensors
            if name not in moments and not tensors[name].properties.dtype.is_floating_point
        }
        dtypes = {name: tensors[name].properties.dtype for name in weights}
        self.precision = precision_of(torch.empty(tensors[n].size, dtype=dtype, device="meta") for n, dtype in dtypes.items())
        ranks = {int(match[1]) for file in self.files() if (match := re.match(r"__(\d+)_", file.name))}
        self.world_size = max(ranks, default=0) + 1
        if not self.shapes:
            raise InputError(f"{path}: no tensors in it")

    def _metadata(self) -> Any:
        file = self.path / ".metadata"
        try:
            content = _Unpickler(io.BytesIO(file.read_bytes())).load()
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except Exception as error:  # a damaged pickle can fail anywhere
            raise InputError(f"{file}: truncated or damaged: {type(error).__name__}: {error}") from None
        if not hasattr(content, "state_dict_metadata") or not hasattr(content, "storage_data"):
            raise InputError(f"{file}: not the metadata of torch.distributed.checkpoint")
        return content

    def _check_files(self, metadata: Any) -> None:
        ends: dict[str, int] = {}
        for where in metadata.storage_data.values():
            name = str(where.relative_path)
            if Path(name).name != name:
                raise InputError(f"{self.path / '.metadata'}: refused: it lists {name!r}, which is not a plain file name")
            if getattr(where, "transform_descriptors", None):
                raise InputError(f"{self.path}: written through {some(list(where.transform_descriptors))}, which this reader does not undo")
            ends[name] = max(ends.get(name, 0), where.offset + where.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise InputError(f"{file}: missing; .metadata lists it")
            if file.stat().st_size < end:
                raise InputError(f"{file}: truncated: {file.stat().st_size} bytes, and .metadata expects {end}")

    def _window(self, where: Any) -> tuple[mmap.mmap, memoryview]:
        """The mapped file that a block is in, and the block's byte range of it."""
        if where.relative_path not in self._maps:
            self._maps[where.relative_path] = map_file(self.path / where.relative_path)
        mapped = self._maps[where.relative_path]
        return mapped, memoryview(mapped)[where.offset : where.offset + where.length]

    def _block(self, where: Any, sizes: torch.Size, dtype: torch.dtype, name: str) -> Tensor:
        """The block stored at a byte range, mapped."""
        file = self.path / where.relative_path
        mapped, window = self._window(where)
        try:
            described = torch.load(cast(IO[bytes], _Window(window)), map_location="meta", weights_only=True)
            with zipfile.ZipFile(cast(IO[bytes], _Window(window))) as archive:
                (record,) = [record for record in archive.infolist() if re.fullmatch(r"[^/]+/data/\d+", record.filename)]
            header = window[record.header_offset : record.header_offset + 30]
            skipped = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")  # names, and padding
        except Exception as error:  # a damaged archive can fail anywhere inside torch
            text = " ".join(str(error).split())[:150]
            raise InputError(f"{file}: the block of {name} is damaged: {type(error).__name__}: {text}") from None
        start = record.header_offset + skipped + described.storage_offset() * dtype.itemsize
        fits = start + sizes.numel() * dtype.itemsize <= where.length and described.is_contiguous()
        if (described.shape, described.dtype) != (sizes, dtype) or not fits or record.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{file}: the block of {name} is {tuple(described.shape)} of {described.dtype}, expected {tuple(sizes)}")
        return mapped_tensor(mapped, where.offset + start, dtype, sizes)

    def check_contents(self) -> None:
        super().check_contents()
        for name, blocks in self._blocks.items():
            for _, _, where in blocks:
                with zipfile.ZipFile(cast(IO[bytes], _Window(self._window(where)[1]))) as archive:
                    if archive.testzip() is not None:
                        raise InputError(f"{self.path / where.relative_path}: the block of {name} was altered: its CRC-32 does not fit")

    def _segments(self, name: str, kind: Kind) -> list[Segment]:
        if (name, kind) not in self._stored:
            raise InputError(f"{self.path}: no {kind} for {name!r} in it")
        stored = self._stored[name, kind]
        size, dtype = torch.Size(self._meta[stored].size), self._meta[stored].properties.dtype
        segments = []
        for offsets, sizes, where in self._blocks[stored]:
            segments += block_segments(size, offsets, self._block(where, sizes, dtype, stored))
        return sorted(segments, key=lambda segment: segment.offset)

    def _assemble(self, stored: str) -> Tensor:
        """A small tensor of whole numbers, put together."""
        size, dtype = torch.Size(self._meta[stored].size), self._meta[stored].properties.dtype
        value = torch.empty(size, dtype=dtype)
        for offsets, sizes, where in self._blocks[stored]:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            value[place] = self._block(where, sizes, dtype, stored)
        return value


class _Window(io.RawIOBase):
    """A mapped byte range as a file to read from, without copying it."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
