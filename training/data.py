"""Data for training: tokenised shards on disk, built once, and the order in which windows of them are read.

`prepare` builds the shards of a data section (or finds them built), `open_prepared` opens them, `Sequences` cuts a split
into windows. Position is a pure function: the window with global number s, that is after s * sequence_length tokens, follows
from (seed, s) alone. Nothing is stored to resume, and the number of ranks does not change what a step reads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.errors import InputError
from model.transformer import IGNORED_TARGET
from training.distributed import Ranks
from training.recipe import DataSection
from training.run_folder import sync
from training.run_lock import NO_LOCKS
from training.sources import Source, file_state, listing_digest, open_source
from training.token_shards import FORMAT, SPLITS, Split, build
from training.tokenizer import token_dtype

# ---------------------------------------------------------------------------------------------------------- opened shards


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder: token shards of two splits, the tokenizer, and the manifest that says what they are."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def end_of_text(self) -> int:
        return self.manifest["end_of_text"]

    @property
    def train_tokens(self) -> int:
        return self.manifest["train"]["tokens"]

    @property
    def validation_tokens(self) -> int:
        return self.manifest["validation"]["tokens"]

    @property
    def validation_unigram_loss(self) -> float:
        """Nats a token of the add-one-smoothed unigram model of train on validation; NaN when validation is empty."""
        loss = self.manifest["validation_unigram_loss"]
        return float("nan") if loss is None else loss

    def shards(self, split: Split) -> list[tuple[Path, int]]:
        """(file, tokens) of each shard of a split, in order."""
        return [(self.folder / shard["file"], shard["tokens"]) for shard in self.manifest[split]["shards"]]

    def copy_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer into a run folder; nothing is done when it is there."""
        if not folder.exists():
            temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
            shutil.copytree(self.folder / "tokenizer", temporary)
            temporary.rename(folder)


def open_prepared(folder: Path | str) -> PreparedData:
    """Open a prepared folder, checking that it is whole.

    Sizes are checked each time, checksums of the shards whose size or time of change is not the one last verified.
    Raises InputError that names the missing, truncated or altered file.
    """
    folder = Path(folder).resolve()
    advice = f"delete {folder} and prepare it again"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise InputError(f"{folder} was prepared in format {manifest['format']}, this version reads {FORMAT}: {advice}")
        _require_plain_manifest(manifest)
        prepared = PreparedData(folder, manifest)
        itemsize = np.dtype(manifest["dtype"]).itemsize
        expected = [(path, tokens * itemsize) for split in SPLITS for path, tokens in prepared.shards(split)]
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a prepared data folder: it has no manifest.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/manifest.json cannot be read ({error}): {advice}") from error
    for path, size in expected:
        if not path.is_file():
            raise InputError(f"shard {path} is missing: {advice}")
        if path.stat().st_size != size:
            raise InputError(f"shard {path} is truncated or altered: {path.stat().st_size} bytes, the manifest says {size}: {advice}")
    if not (folder / "tokenizer").is_dir():
        raise InputError(f"{folder} has no tokenizer: {advice}")
    for path in (folder / "tokenizer").rglob("*"):
        if not path.resolve().is_relative_to(folder):  # it would be copied into the run
            raise InputError(f"{path} leads out of the folder: {advice}")
    if _verified(prepared) != _shard_states(prepared):
        verify_checksums(prepared)
    return prepared


def _require_plain_manifest(manifest: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for a manifest that `build` would not write: it may come from a stranger."""
    vocab_size, end_of_text, loss = (manifest[key] for key in ("vocab_size", "end_of_text", "validation_unigram_loss"))
    if type(vocab_size) is not int or type(end_of_text) is not int or not 0 <= end_of_text < vocab_size <= 2**32:
        raise ValueError(f"vocab_size is {str(vocab_size)[:40]} and end_of_text {str(end_of_text)[:40]}")
    if manifest["dtype"] != token_dtype(vocab_size).name:
        raise ValueError(f"dtype is {str(manifest['dtype'])[:40]!r}, expected {token_dtype(vocab_size).name}")
    if not isinstance(manifest["content_hash"], str) or not isinstance(loss, float | int | None):
        raise TypeError("content_hash or validation_unigram_loss is of a wrong kind")
    for split in SPLITS:
        counted = 0
        for shard in manifest[split]["shards"]:
            if Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"shard {str(shard['file'])[:80]!r} is not a file of this folder")
            if type(shard["tokens"]) is not int or shard["tokens"] < 0 or not isinstance(shard["sha256"], str):
                raise ValueError(f"shard {shard['file']} has no count or no checksum")
            counted += shard["tokens"]
        if counted != manifest[split]["tokens"]:
            raise ValueError(f"{split} has {manifest[split]['tokens']} tokens, and its shards have {counted}")


def verify_checksums(prepared: PreparedData) -> None:
    """Compare the SHA-256 of each shard with the manifest, and its tokens with the vocabulary, and remember that it was done.

    Raises InputError naming a bad shard.
    """
    for split in SPLITS:
        for shard in prepared.manifest[split]["shards"]:
            path = prepared.folder / shard["file"]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise InputError(
                    f"shard {path} is altered: its checksum is not the manifest's: delete {prepared.folder} and prepare it again"
                )
            if (
                shard["tokens"]
                and (largest := int(np.memmap(path, np.dtype(prepared.manifest["dtype"]), "r").max())) >= prepared.vocab_size
            ):
                raise InputError(f"shard {path} has token {largest}, outside the vocabulary of {prepared.vocab_size}")
    _remember_verified(prepared)


def _shard_states(prepared: PreparedData) -> dict[str, list[int]]:
    return {path.name: list(file_state(path)) for split in SPLITS for path, _ in prepared.shards(split)}


def _verified(prepared: PreparedData) -> dict[str, list[int]] | None:
    """Size and time of change of each shard when its checksum was last found right."""
    try:
        return json.loads((prepared.folder / ".verified.json").read_text())
    except (OSError, ValueError):
        return None


def _remember_verified(prepared: PreparedData) -> None:
    temporary = prepared.folder / f".verified.{os.getpid()}"
    # A folder that is read-only is verified each time instead.
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(_shard_states(prepared)))
        temporary.replace(prepared.folder / ".verified.json")


def require_step(prepared: PreparedData, tokens_per_step: int, sequence_length: int) -> None:
    """Raise InputError unless train has one whole step of windows and validation one window."""
    needed = tokens_per_step // sequence_length * sequence_length + 1
    if prepared.train_tokens < needed:
        raise InputError(
            f"the corpus is smaller than one batch: {prepared.train_tokens} training tokens, a step of {tokens_per_step} needs {needed}: "
            "give more text or lower training.tokens_per_step"
        )
    if prepared.validation_tokens < sequence_length + 1:
        raise InputError(
            f"the validation split has {prepared.validation_tokens} tokens of {prepared.manifest['validation']['documents']} documents, "
            f"a sequence needs {sequence_length + 1}: give more text or raise data.validation_fraction"
        )


# -------------------------------------------------------------------------------------------------------------- preparing


def prepare(data: DataSection, sequence_length: int | None = None) -> PreparedData:
    """Tokenised shards of this data section, built once, in `data.prepared`/<fingerprint>; or `data.prepared` itself where it is one.

    Safe to call from any number of processes and launches at the same time: one builds, the others wait. The folder
    appears when it is whole. With `sequence_length`, also checks that each split has at least one window.
    Raises InputError for anything wrong with the source, the tokenizer, the folder or the disk.
    """
    folder = Path(data.prepared).expanduser().resolve()
    if not (folder / "manifest.json").exists():
        source = open_source(data)
        folder /= fingerprint(data, source)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent / f".{folder.name}.lock", folder):
                if not folder.exists():
                    _build_and_rename(data, source, folder)
        except OSError as error:
            where = f"in {folder.parent} ({error.strerror})"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise InputError(f"no room to prepare data {where}: free space or set data.prepared") from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
                raise InputError(f"cannot prepare data {where}: set data.prepared to a folder that can be written") from error
            raise
    prepared = open_prepared(folder)
    if sequence_length is not None:
        require_step(prepared, sequence_length, sequence_length)
    return prepared


def fingerprint(data: DataSection, source: Source) -> str:
    """Name of the prepared folder: a hash of everything that its content follows from. Reads no text, so it is quick."""
    tokenizer = data.tokenizer.model_dump(include={"kind", "vocab_size", "sample_megabytes"})
    if data.tokenizer.kind == "sentencepiece":
        import sentencepiece

        tokenizer |= {"version": sentencepiece.__version__}
    else:
        if not data.tokenizer.path:
            raise InputError("data.tokenizer.path is missing: kind pretrained needs a local folder or a hub name")
        path = Path(data.tokenizer.path).expanduser()
        weights = (".safetensors", ".bin", ".pt", ".pth")
        files = sorted(file for file in path.glob("*") if file.is_file() and file.suffix not in weights) if path.is_dir() else []
        listing = listing_digest([(file.name, *file_state(file)) for file in files])
        tokenizer = {"kind": "pretrained", "path": data.tokenizer.path, "listing": listing}
    parts = {
        "format": FORMAT,
        **source.identity(),
        "max_megabytes": data.max_megabytes,
        "validation_fraction": data.validation_fraction,
        "tokenizer": tokenizer,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path, folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file. The kernel releases it when the process ends, however it ends.

    It saves work, and nothing depends on it: where a disk has no locks, or they end at a host, several build side by side.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if os.environ.get("RANK", "0") == "0":
                print(f"waiting for another process that prepares {folder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _build_and_rename(data: DataSection, source: Source, folder: Path) -> None:
    """Build beside the folder, under a name that no other process has, and rename: the first one's stays."""
    mine = f".{folder.name}.building.{socket.gethostname()}."
    for left in folder.parent.glob(f"{mine}*"):  # by builders of this host that were killed
        if not Path("/proc", left.name.removeprefix(mine)).exists():
            shutil.rmtree(left, ignore_errors=True)
    building = folder.parent / f"{mine}{os.getpid()}"
    try:
        building.mkdir()
        _remember_verified(PreparedData(building, build(data, source, building)))
        try:
            building.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(building)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


# ---------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Batch:
    """Windows of one split. `tokens` and `targets` are int64 (count, sequence_length); a target of -100 is not counted.

    `document_ids`, int32 of the same shape, tells the documents of a window apart; None without document masks.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor | None

    @property
    def valid_tokens(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED_TARGET).sum())

    def pinned(self) -> Batch:
        return Batch(*(None if t is None else t.pin_memory() for t in (self.tokens, self.targets, self.document_ids)))  # pyright: ignore


class Sequences:
    """A split as windows of `sequence_length` + 1 tokens; a window's last token is the next one's first.

    The window with global number s is window permutation(s mod n) of the n windows of an epoch, with another permutation
    for each epoch s div n; without `shuffle` it is window s mod n. The tokens read before it are s * sequence_length.
    Raises InputError when the split has no whole window.
    """

    def __init__(
        self, prepared: PreparedData, split: Split, sequence_length: int, seed: int, shuffle: bool, document_masks: bool = False
    ) -> None:
        self.sequence_length, self.seed, self.shuffle = sequence_length, seed, shuffle
        self.end_of_text = prepared.end_of_text if document_masks else None
        dtype = np.dtype(prepared.manifest["dtype"]).newbyteorder("<")
        self._shards = [np.memmap(path, dtype=dtype, mode="r", shape=(tokens,)) for path, tokens in prepared.shards(split)]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        total = int(self._ends[-1]) if self._shards else 0
        self._windows = max(total - 1, 0) // sequence_length
        if self._windows == 0:
            raise InputError(f"the {split} split has {total} tokens, a sequence needs {sequence_length + 1}: give more text")

    def __len__(self) -> int:
        """Windows in one epoch."""
        return self._windows

    def batch(self, first: int, count: int) -> Batch:
        """The windows with global numbers first ... first + count - 1."""
        return self.rows(np.arange(first, first + count, dtype=np.int64))

    def rows(self, numbers: np.ndarray) -> Batch:
        """The windows with these global numbers (any integers >= 0), in this order."""
        tokens = np.empty((len(numbers), self.sequence_length + 1), dtype=np.int64)
        for row, window in zip(tokens, self.windows(numbers), strict=True):
            self._read(int(window) * self.sequence_length, row)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
        if self.end_of_text is None:
            return Batch(torch.from_numpy(inputs.copy()), torch.from_numpy(targets), None)
        ends = inputs == self.end_of_text
        # A document has its end-of-text: the id rises after it.
        document_ids = np.cumsum(ends, axis=1, dtype=np.int32) - ends
        targets[ends] = IGNORED_TARGET
        return Batch(torch.from_numpy(inputs.copy()), torch.from_numpy(targets), torch.from_numpy(document_ids.astype(np.int32)))

    def valid_targets(self, numbers: np.ndarray) -> int:
        """Targets that count in the windows with these global numbers: every rank can know the whole step's without asking the others."""
        if self.end_of_text is None:
            return len(numbers) * self.sequence_length
        row, ends = np.empty(self.sequence_length, dtype=self._shards[0].dtype), 0
        for window in self.windows(numbers):
            self._read(int(window) * self.sequence_length, row)
            ends += int(np.count_nonzero(row == self.end_of_text))
        return len(numbers) * self.sequence_length - ends

    def windows(self, numbers: np.ndarray) -> np.ndarray:
        """Index in the split (int64, in [0, len(self))) of the window with each global number."""
        epochs, positions = np.divmod(np.asarray(numbers, dtype=np.int64), self._windows)
        if not self.shuffle:
            return positions
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = permutation(positions[chosen], self._windows, self.seed, int(epoch))
        return windows

    def _read(self, start: int, out: np.ndarray) -> None:
        """Copy len(out) tokens of the concatenated shards, from `start` on, into `out`."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        offset = start - (int(self._ends[shard - 1]) if shard else 0)
        filled = 0
        while filled < len(out):
            part = self._shards[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard, offset = shard + 1, 0


class Feed:
    """A rank's micro-batches, step by step, read by a thread one step ahead of the training.

    Attributes:
        waited: seconds that the training has waited for them.
    """

    def __init__(self, sequences: Sequences, sequences_per_step: int, ranks: Ranks, micro_batch_size: int, pinned: bool) -> None:
        """`pinned`: in memory that a GPU copies from by itself. Raises InputError when the sequences do not divide."""
        self._sequences, self._per_step, self._pinned = sequences, sequences_per_step, pinned
        self._of_step = lambda step: step_rows(step, sequences_per_step, ranks.rank, ranks.world_size, micro_batch_size)
        self._of_step(0)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: dict[int, Future[tuple[list[Batch], int]]] = {}
        self.waited = 0.0

    def step(self, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of a step (counted from 0), and how many targets count over all ranks."""
        started = time.perf_counter()
        reading = self._ahead.pop(step, None) or self._reader.submit(self._read, step)
        found = reading.result()
        self._ahead = {step + 1: self._reader.submit(self._read, step + 1)}  # after a rewind another step is asked for than the next
        self.waited += time.perf_counter() - started
        return found

    def _read(self, step: int) -> tuple[list[Batch], int]:
        batches = [self._sequences.rows(numbers) for numbers in self._of_step(step)]
        if self._pinned:
            batches = [batch.pinned() for batch in batches]
        first = step * self._per_step
        return batches, self._sequences.valid_targets(np.arange(first, first + self._per_step, dtype=np.int64))

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(cancel_futures=True)


def permutation(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `positions` (integers in [0, size)) under the permutation of [0, size) that (seed, epoch) names.

    A Feistel network is a permutation of [0, 2^(2h)) whatever its round function is; repeating it on what falls outside
    until it falls inside ("cycle walking") makes it one of [0, size). Needs no memory beyond the positions.
    Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    values = np.asarray(positions).astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def step_rows(step: int, sequences_per_step: int, rank: int, world_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Global numbers (int64) of the windows of each of this rank's micro-batches in step `step` (counted from 0).

    Over all ranks and micro-batches they are step * sequences_per_step ... (step + 1) * sequences_per_step - 1, each once.
    """
    together = world_size * micro_batch_size
    if sequences_per_step % together:
        raise InputError(
            f"{sequences_per_step} sequences a step do not divide by {world_size} ranks x {micro_batch_size} sequences a micro-batch: "
            "change training.tokens_per_step or training.micro_batch_size"
        )
    first = step * sequences_per_step + rank * micro_batch_size
    starts = range(first, first + sequences_per_step, together)
    return [np.arange(start, start + micro_batch_size, dtype=np.int64) for start in starts]
