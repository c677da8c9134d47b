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
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from analysis.checkpoint import Checkpoint, Kind, Segment, block_segments, precision_of
from analysis.files import check_archive, map_file, mapped_tensor, named_member, some
from analysis.formats.tensor_files import is_buffer
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
_PREFIXES = ("state_dict.", "app.model.", "app.module.", "model.", "module.", "app.")
# Of a key that belongs to the optimizer, what follows: a parameter and what is kept of it, or a setting.
_OPTIMIZER = re.compile(r"(?:^|\.)(?:optim|optimizer)s?(?:_states?(?:_dict)?)?\.(?:state\.)?(.+)$")
_EMBEDDING = re.compile(r"(^|\.)(embeddings?|embed_tokens|embed_in|wte|(tok|token|word)_embeddings?)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|head|embed_out|unembedding|output|output_layer)\.weight$")


def is_distributed(path: Path) -> bool:
    return path.is_dir() and (path / ".metadata").is_file()


class _Unpickler(pickle.Unpickler):
    """Makes what torch's own metadata consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and name in _DTYPE_NAMES) or (module, name) == ("torch", "strided"):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return named_member
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
        states = {name: rest for name in tensors if (rest := _optimizer_part(name, tensors.keys())) is not None}
        own = {name: value for name, value in tensors.items() if name not in states}
        buffers = {name for name, value in own.items() if is_buffer(name, value.properties.dtype, len(value.size))}
        weights = [name for name in own if name not in buffers]
        prefix = next((p for p in _PREFIXES if weights and all(name.startswith(p) for name in weights)), "")
        self.shapes = {name.removeprefix(prefix): torch.Size(tensors[name].size) for name in weights}
        self._stored: dict[tuple[str, str], str] = {(name.removeprefix(prefix), "weight"): name for name in weights}
        for stored, rest in states.items():
            name, _, kind = rest.rpartition(".")
            self._stored.setdefault((name if name in self.shapes else name.removeprefix(prefix), kind), stored)
        self.buffers = {name.removeprefix(prefix): self._assemble(name) for name in buffers}
        dtypes = {name: tensors[name].properties.dtype for name in weights}
        self.precision = precision_of(torch.empty(tensors[n].size, dtype=dtype, device="meta") for n, dtype in dtypes.items())
        ranks = {int(match[1]) for file in self.files() if (match := re.match(r"__(\d+)_", file.name))}
        self.world_size = max(ranks, default=0) + 1
        if not self.shapes:
            raise InputError(f"{path}: no tensors in it")
        self._join_tied_head()

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
                window = _Window(self._window(where)[1])
                check_archive(cast(IO[bytes], window), f"{self.path / where.relative_path}: the block of {name}")

    def _segments(self, name: str, kind: Kind) -> list[Segment]:
        if (name, kind) not in self._stored:
            raise InputError(f"{self.path}: no {kind} for {name!r} in it")
        stored = self._stored[name, kind]
        size, dtype = torch.Size(self._meta[stored].size), self._meta[stored].properties.dtype
        segments = []
        for offsets, sizes, where in self._blocks[stored]:
            segments += block_segments(size, offsets, self._block(where, sizes, dtype, stored))
        return sorted(segments, key=lambda segment: segment.offset)

    def _join_tied_head(self) -> None:
        """The head counts as the embedding where its values are the same: the format keeps both and does not say that they are tied."""
        trained = {name for name, kind in self._stored if kind != "weight"}  # the optimizer knows a tied weight by one of its names
        for embedding in [name for name in self.shapes if _EMBEDDING.search(name)]:
            for head in [name for name in self.shapes if _HEAD.search(name) and self.shapes[name] == self.shapes[embedding]]:
                if {embedding, head} <= trained or not _equal(self._segments(embedding, "weight"), self._segments(head, "weight")):
                    continue
                self.aliases[head] = embedding
                del self.shapes[head]
                for kind in ("exp_avg", "exp_avg_sq"):
                    if (head, kind) in self._stored:
                        self._stored[embedding, kind] = self._stored[head, kind]

    def _assemble(self, stored: str) -> Tensor:
        """A buffer, put together."""
        size, dtype = torch.Size(self._meta[stored].size), self._meta[stored].properties.dtype
        value = torch.empty(size, dtype=dtype)
        for offsets, sizes, where in self._blocks[stored]:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            value[place] = self._block(where, sizes, dtype, stored)
        return value


def _optimizer_part(name: str, names: Collection[str]) -> str | None:
    """What follows the optimizer's prefix in a key; None where the key is not the optimizer's. `names`: all keys."""
    if match := _OPTIMIZER.search(name):
        return match[1]
    rest = name.removeprefix("state.")  # get_state_dict's flattened state, saved beside the weights without a prefix
    return rest if rest != name and rest.rpartition(".")[0] in names else None


def _equal(first: list[Segment], second: list[Segment]) -> bool:
    """Whether two flattened tensors of one length hold the same values of one dtype, up to the first run that differs."""
    position = i = j = 0
    while i < len(first) and j < len(second):
        one, other = first[i], second[j]
        ends = one.offset + one.values.numel(), other.offset + other.values.numel()
        stop = min(ends)
        runs = one.values[position - one.offset : stop - one.offset], other.values[position - other.offset : stop - other.offset]
        if one.values.dtype != other.values.dtype or not torch.equal(*runs):
            return False
        position, i, j = stop, i + (stop == ends[0]), j + (stop == ends[1])
    return True


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
