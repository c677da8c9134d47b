"""Where documents come from: installed Python code, local files, Hugging Face data sets.

`open_source` picks the source that a recipe names. A source tells quickly what identifies its content (`identity`) and
streams its texts in a fixed order (`texts`). `read_documents` hashes them, drops duplicates and stops at the text limit.
Held are at most one block of a file, and the hash of each document, about 110 bytes in Python's set of them: 1.1 GB for ten million.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import InputError, one_line
from training.tokenizer import cut_position

if TYPE_CHECKING:
    from training.recipe import DataSection

WHOLE_FILE_BYTES = 1 << 20  # a text file up to this size is one document; a larger one is a collection, cut at line ends
PIECE_BYTES = 1 << 16  # size of the documents that a larger text file is cut into
BLOCK_BYTES = 1 << 20
ZSTD_BLOCK_BYTES = 1 << 12  # of compressed content: a byte of Zstandard may stand for 32 KiB
LINE_BYTES = 64 << 20  # the longest line of a .jsonl: a few kilobytes of gzip may hold one that fills the memory


@dataclass(frozen=True, slots=True)
class Document:
    """One text: valid UTF-8 bytes, never empty, and the 16-byte BLAKE2b hash that names it."""

    text: bytes
    digest: bytes

    def held_out(self, fraction: float) -> bool:
        """Whether this document is in the validation split. Its own hash decides, so no other document can move it."""
        # The last half of the hash: python_source is ordered by the hash, so the first half says where in the corpus a text is.
        return int.from_bytes(self.digest[8:], "big") < fraction * 2**64


@dataclass
class ReadCounts:
    """What was read and what was left out."""

    documents: int = 0
    bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    unreadable: int = 0


def content_digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns: what tells that a file's content is still the same."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def listing_digest(rows: list[tuple[str, int, int]]) -> str:
    """Hex digest of a list of (name, size, mtime in ns)."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- python_source


def python_roots() -> list[Path]:
    """The folders of this interpreter's library and installed packages."""
    paths = sysconfig.get_paths()
    return sorted({Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")})


def _python_files(folder: str, roots: set[str]) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                # Packages of another environment lie inside the library's folder when this interpreter is a virtual one's.
                if entry.path not in roots and entry.name not in ("__pycache__", "site-packages", "dist-packages"):
                    yield from _python_files(entry.path, roots)
            elif entry.name.endswith(".py") and entry.is_file(follow_symlinks=False):
                yield entry


class PythonSource:
    """The `.py` files of this interpreter's library and installed packages, ordered by content hash.

    The order makes any prefix (`max_megabytes`) a uniform sample of the files, whatever packages they belong to.
    Files that are not UTF-8 text are skipped and counted; symbolic links are ignored.
    """

    name = "source python_source"

    def __init__(self) -> None:
        roots = {str(root) for root in python_roots()}
        self.rows: list[tuple[str, int, int]] = []  # name relative to its root, size, mtime
        self.paths: list[str] = []
        for root in sorted(roots):
            found = sorted(_python_files(root, roots), key=lambda entry: entry.path) if Path(root).is_dir() else []
            for entry in found:
                status = entry.stat(follow_symlinks=False)
                self.rows.append((os.path.relpath(entry.path, root), status.st_size, status.st_mtime_ns))
                self.paths.append(entry.path)
        self.size: int | None = sum(row[1] for row in self.rows)

    def identity(self) -> dict[str, Any]:
        return {"source": "python_source", "listing": listing_digest(self.rows)}

    @cached_property
    def _ordered(self) -> tuple[list[tuple[bytes, str]], int]:
        """(content hash, path) sorted, and how many files are not text."""
        ordered: list[tuple[bytes, str]] = []
        unreadable = 0
        for path in self.paths:
            text = _python_text(path)
            if text is None:
                unreadable += 1
            else:
                ordered.append((content_digest(text), path))
        return sorted(ordered), unreadable

    def texts(self, counts: ReadCounts) -> Iterator[bytes]:
        ordered, counts.unreadable = self._ordered
        for digest, path in ordered:
            text = _python_text(path)
            if text is None or content_digest(text) != digest:
                raise InputError(f"{path} changed while the data was being prepared: run again when no packages are being installed")
            yield text


def _python_text(path: str) -> bytes | None:
    try:
        text = Path(path).read_bytes()
        text.decode()
    except (OSError, UnicodeDecodeError):
        return None
    return None if b"\0" in text else text


# ----------------------------------------------------------------------------------------------------------------- files


def _expand(pattern: str) -> list[Path]:
    """The files that one entry of `data.paths` means: a file, a folder (all visible files below it) or a glob."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
    if glob.has_magic(str(path)):
        # Path.glob takes no absolute pattern.
        return [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    raise InputError(f"data.paths: {pattern} does not exist: give a file, a folder or a glob")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


class FilesSource:
    """Local files, in the order of their paths.

    `.jsonl` and `.ndjson` (one object a line) and `.parquet` have a document a row, in the text field; any other file is
    text. Text and jsonl may be compressed (`.gz`, `.zst`). A text file above 1 MiB is cut at line ends into documents of
    at most 64 KiB: it is a collection rather than one text, and no corpus has to fit in memory.
    """

    name = "the files of data.paths"

    def __init__(self, paths: list[str], text_field: str) -> None:
        if not paths:
            raise InputError("data.paths is empty: source files needs at least one file, folder or glob")
        self.text_field = text_field
        found: set[Path] = set()
        for pattern in paths:
            files = _expand(pattern)
            if not files:
                raise InputError(f"data.paths: no file in {pattern}: give a file, a folder or a glob that has files")
            found.update(file.resolve() for file in files)
        self.files = sorted(found)
        self.rows = [(file.as_posix(), *file_state(file)) for file in self.files]
        compressed = any(file.suffix in (".gz", ".zst", ".parquet") for file in self.files)
        self.size: int | None = None if compressed else sum(row[1] for row in self.rows)

    def identity(self) -> dict[str, Any]:
        return {"source": "files", "listing": listing_digest(self.rows), "text_field": self.text_field}

    def texts(self, counts: ReadCounts) -> Iterator[bytes]:
        for file in self.files:
            inner = file.with_suffix("") if file.suffix in (".gz", ".zst") else file
            try:
                if file.suffix == ".parquet":
                    yield from _parquet_texts(file, self.text_field)
                elif inner.suffix in (".jsonl", ".ndjson"):
                    yield from _jsonl_texts(file, self.text_field)
                else:
                    yield from _plain_texts(file)
            except OSError as error:
                raise InputError(f"cannot read {file}: {error.strerror or error}") from error


def _blocks(file: Path) -> Iterator[bytes]:
    """Decompressed content in blocks of about 1 MiB."""
    if file.suffix == ".gz":
        try:
            with gzip.open(file, "rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    yield block
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{file} is not a whole gzip file ({error}): copy it again") from error
        return
    with file.open("rb") as raw:
        if file.suffix == ".zst":
            yield from _zstd_blocks(file, raw)
            return
        while block := raw.read(BLOCK_BYTES):
            yield block


def _zstd_blocks(file: Path, raw: Any) -> Iterator[bytes]:
    import zstandard

    # zstandard's own stream reader ends a truncated frame without an error, hence the frame by frame reading.
    frame = zstandard.ZstdDecompressor().decompressobj()
    whole = False
    pending = b""
    try:
        while pending or (pending := raw.read(ZSTD_BLOCK_BYTES)):
            if whole:
                frame = zstandard.ZstdDecompressor().decompressobj()
            block = frame.decompress(pending)
            whole = frame.eof
            pending = frame.unused_data if whole else b""
            if block:
                yield block
    except zstandard.ZstdError as error:
        raise InputError(f"{file} is not a Zstandard file ({error}): copy it again") from error
    if not whole:
        raise InputError(f"{file} is not a whole Zstandard file (it ends inside a frame): copy it again")


def _plain_texts(file: Path) -> Iterator[bytes]:
    buffer = bytearray()
    offset = 0  # of the buffer's start in the decompressed file
    collection = False
    for block in _blocks(file):
        buffer += block
        collection = collection or len(buffer) > WHOLE_FILE_BYTES
        start = 0
        while collection and len(buffer) - start > PIECE_BYTES:
            # A view of one byte more than a piece: the cut looks at the byte after it.
            window = bytes(memoryview(buffer)[start : start + PIECE_BYTES + 1])
            piece = window[: cut_position(window, PIECE_BYTES)]
            yield _checked_text(piece, file, offset + start)
            start += len(piece)
        del buffer[:start]
        offset += start
    if buffer or offset == 0:
        yield _checked_text(bytes(buffer), file, offset)


def _checked_text(text: bytes, file: Path, offset: int) -> bytes:
    zero = text.find(b"\0")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if zero < 0 or error.start < zero:
            raise InputError(f"{file} is not UTF-8 text: byte {offset + error.start} is invalid; give text files or convert it") from error
    if zero >= 0:
        raise InputError(f"{file} is a binary file: byte {offset + zero} is NUL; give UTF-8 text files")
    return text


def _jsonl_texts(file: Path, field: str) -> Iterator[bytes]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig") if number == 1 else line.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{file}:{number}: not UTF-8 text: byte {error.start} of the line is invalid") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{file}:{number}: not a JSON object on one line ({error})") from error
        if not isinstance(row, dict) or field not in row:
            fields = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise InputError(f"{file}:{number}: no field {field!r} (found: {fields}): set data.text_field")
        yield _encoded(row[field], f"{file}:{number}: field {field!r}")


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file. Raises InputError for one of more than `LINE_BYTES`."""
    parts: list[bytes] = []
    length, number = 0, 1  # of the line that `parts` are of
    for block in _blocks(file):
        for i, part in enumerate(block.split(b"\n")):
            if i > 0:
                yield b"".join(parts)
                parts, length, number = [], 0, number + 1
            parts.append(part)
            length += len(part)
            if length > LINE_BYTES:
                limit = f"{LINE_BYTES / (1 << 20):g} MiB"
                raise InputError(f"{file}:{number}: a line of more than {limit}; expected one JSON object: cut its text into several")
    yield b"".join(parts)


def _encoded(text: Any, where: str) -> bytes:
    """UTF-8 of a row's text; null means empty."""
    if text is None:
        return b""
    if not isinstance(text, str):
        raise InputError(f"{where} is not text but {type(text).__name__}: set data.text_field")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is not valid text: character {error.start} is half of a surrogate pair") from error


def _parquet_texts(file: Path, field: str) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                raise InputError(f"{file}: no column {field!r} (found: {', '.join(table.schema_arrow.names)}): set data.text_field")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _encoded(text, f"{file}: row {number}, column {field!r}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a whole parquet file of text ({one_line(error)})") from error


# ----------------------------------------------------------------------------------------------------------- huggingface


class HuggingFaceSource:
    """A Hugging Face data set, streamed in its own order: a hub name, a folder of data files or a `save_to_disk` folder.

    A hub data set is identified by its name, subset and split: one that changed on the hub is not noticed.
    """

    name = "the Hugging Face data set"
    size: int | None = None

    def __init__(self, dataset: str, subset: str | None, split: str, text_field: str) -> None:
        self.dataset, self.subset, self.split, self.text_field = dataset, subset, split, text_field
        self.folder = Path(dataset).expanduser() if Path(dataset).expanduser().exists() else None
        if self.folder is not None and self.folder.is_file():
            raise InputError(f"data.dataset: {dataset} is a file: use source files with data.paths")
        if self.folder is None and dataset.startswith((".", "/", "~")):
            raise InputError(f"data.dataset: {dataset} does not exist: give a folder or the name of a data set on the Hugging Face hub")

    def identity(self) -> dict[str, Any]:
        listing = None
        if self.folder is not None:
            files = sorted(file for file in self.folder.rglob("*") if file.is_file() and not _hidden(file.relative_to(self.folder)))
            listing = listing_digest([(file.resolve().as_posix(), *file_state(file)) for file in files])
        name = self.dataset if listing is None else "local"
        return {
            "source": "huggingface",
            "dataset": name,
            "subset": self.subset,
            "split": self.split,
            "text_field": self.text_field,
            "listing": listing,
        }

    def _load(self) -> Any:
        import datasets

        if self.folder is not None and ((self.folder / "state.json").exists() or (self.folder / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(str(self.folder))
            if isinstance(loaded, datasets.DatasetDict):
                if self.split not in loaded:
                    raise ValueError(f"no split {self.split!r} (found: {', '.join(map(str, loaded))})")
                loaded = loaded[self.split]
            return loaded
        return datasets.load_dataset(str(self.folder or self.dataset), self.subset, split=self.split, streaming=True)

    def texts(self, counts: ReadCounts) -> Iterator[bytes]:
        number = 0
        try:
            for batch in self._load().iter(batch_size=256):
                if self.text_field not in batch:
                    fields = ", ".join(batch)
                    raise InputError(f"data.dataset {self.dataset}: no field {self.text_field!r} (found: {fields}): set data.text_field")
                for text in batch[self.text_field]:
                    number += 1
                    yield _encoded(text, f"data.dataset {self.dataset}: row {number}, field {self.text_field!r}")
        except InputError:
            raise
        # The hub client and the readers of its many formats raise exceptions of many libraries, all of which mean the same here.
        except Exception as error:
            raise InputError(
                f"data.dataset {self.dataset}: cannot read row {number + 1} ({one_line(error)}): "
                "check the name, the split and the connection, or give a local folder"
            ) from error


# ------------------------------------------------------------------------------------------------------------------- all

Source = PythonSource | FilesSource | HuggingFaceSource


def open_source(data: DataSection) -> Source:
    """The source that a recipe's data section names. Raises InputError for a missing file or folder; reads no text yet."""
    if data.source == "python_source":
        return PythonSource()
    if data.source == "files":
        return FilesSource(data.paths, data.text_field)
    if not data.dataset:
        raise InputError("data.dataset is missing: source huggingface needs a hub name or a local folder")
    return HuggingFaceSource(data.dataset, data.subset, data.split, data.text_field)


def read_documents(source: Source, max_megabytes: float | None, counts: ReadCounts) -> Iterator[Document]:
    """Distinct documents in the source's order, until the next one would pass `max_megabytes` (10^6 bytes) of text.

    `counts` is filled while reading. Raises InputError when there is no document at all.
    """
    limit = float("inf") if max_megabytes is None else max_megabytes * 1e6
    seen: set[bytes] = set()
    for text in source.texts(counts):
        if not text:
            counts.empty += 1
            continue
        digest = content_digest(text)
        if digest in seen:
            counts.duplicates += 1
            continue
        if counts.bytes + len(text) > limit:
            if counts.documents == 0:
                size = len(text) / 1e6
                raise InputError(f"data.max_megabytes = {max_megabytes} is less than the first document ({size:.6g} MB): raise it")
            break
        seen.add(digest)
        counts.documents += 1
        counts.bytes += len(text)
        yield Document(text, digest)
    if counts.documents == 0:
        raise InputError(f"the corpus is empty: no text in {source.name}: check the paths or the data set")
