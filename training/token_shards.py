"""Building tokenised shards: sample the text, train or load the tokenizer, encode in parallel, write, count, describe.

`build` fills an empty folder; `training.data.prepare` calls it under a lock and gives the folder its name when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from tqdm import tqdm

from training.recipe import DataSection
from training.run_folder import sync
from training.sources import Document, HuggingFaceSource, ReadCounts, Source, read_documents
from training.tokenizer import Tokenizer, cut_position, encode_in_parallel, pretrained_tokenizer, token_dtype, train_sentencepiece

FORMAT = 1  # of the prepared folder; part of the fingerprint, so raise it when the same recipe would prepare other tokens
SHARD_BYTES = 256 << 20
BATCH_BYTES = 1 << 20  # text that a worker gets at once
SAMPLE_CHUNK_BYTES = 1 << 14
STREAM_SAMPLE_FACTOR = 8  # a streamed data set's tokenizer sample is drawn from its first 8 * sample_megabytes
SPLITS: tuple[Literal["train"], Literal["validation"]] = ("train", "validation")

Split = Literal["train", "validation"]


def build(data: DataSection, source: Source, folder: Path) -> dict[str, Any]:
    """Make the tokenizer, the shards and the manifest in `folder`, which is empty, and return the manifest.

    All is on the disk when this returns.
    """
    total = _expected_bytes(data, source)
    if data.tokenizer.kind == "sentencepiece":
        counts = ReadCounts()
        sample = sample_text(data, source, counts)
        if not isinstance(source, HuggingFaceSource):
            total = counts.bytes
        size = sum(map(len, sample)) / 1e6
        print(f"training a SentencePiece model of {data.tokenizer.vocab_size} pieces on {size:.1f} MB", file=sys.stderr, flush=True)
        tokenizer: Tokenizer = train_sentencepiece(sample, data.tokenizer.vocab_size)
        del sample
    else:
        assert data.tokenizer.path is not None
        tokenizer = pretrained_tokenizer(data.tokenizer.path)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    content = tokenize(data, source, tokenizer, folder, total)
    manifest = {
        "format": FORMAT,
        **source.identity(),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "tokenizer": data.tokenizer.model_dump(),
        "validation_fraction": data.validation_fraction,
        "max_megabytes": data.max_megabytes,
        **content,
    }
    with (folder / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=2)
        _sync(file)
    for path in (*(folder / "tokenizer").iterdir(), folder / "tokenizer", folder):
        sync(path)
    return manifest


def sample_text(data: DataSection, source: Source, counts: ReadCounts) -> list[bytes]:
    """At most `sample_megabytes` of the training documents, spread evenly: the chunks of text with the smallest hashes.

    Holds no more than the sample. The order of the documents does not matter.
    """
    limit = data.tokenizer.sample_megabytes * 1e6
    readable = STREAM_SAMPLE_FACTOR * limit if isinstance(source, HuggingFaceSource) else np.inf
    heap: list[tuple[int, bytes]] = []  # (minus the hash, chunk): the largest hash leaves first
    held = 0
    with _progress("reading", _expected_bytes(data, source)) as bar:
        for document in read_documents(source, data.max_megabytes, counts):
            bar.update(len(document.text))
            if counts.bytes > readable:
                break
            if document.held_out(data.validation_fraction):
                continue
            for chunk in _chunks(document.text):
                key = -int.from_bytes(hashlib.blake2b(chunk, digest_size=8, key=b"sample").digest(), "big")
                if held + len(chunk) > limit and heap and key < heap[0][0]:
                    continue
                heapq.heappush(heap, (key, chunk))
                held += len(chunk)
                while held > limit and len(heap) > 1:
                    held -= len(heapq.heappop(heap)[1])
    return [chunk for _, chunk in sorted(heap, reverse=True)]


def _chunks(text: bytes) -> Iterator[bytes]:
    start = 0
    while len(text) - start > SAMPLE_CHUNK_BYTES:
        window = text[start : start + SAMPLE_CHUNK_BYTES + 1]
        length = cut_position(window, SAMPLE_CHUNK_BYTES)
        yield window[:length]
        start += length
    yield text[start:]


def tokenize(data: DataSection, source: Source, tokenizer: Tokenizer, folder: Path, total: int | None) -> dict[str, Any]:
    """Write the shards of all documents into `folder`, which has the tokenizer, and return their part of the manifest.

    `total` is how much text is expected, in bytes, for the progress bar. The result does not depend on `data.workers`.
    """
    counts = ReadCounts()
    content = hashlib.sha256()
    writers = {split: _ShardWriter(folder, split, tokenizer) for split in SPLITS}
    workers = data.workers or len(os.sched_getaffinity(0))
    sizes: list[int] = []  # text bytes of the batches under way, oldest first

    def batches() -> Iterator[list[list[bytes]]]:
        for batch in _document_batches(read_documents(source, data.max_megabytes, counts)):
            groups: dict[str, list[bytes]] = {split: [] for split in SPLITS}
            for document in batch:
                content.update(document.digest)
                groups["validation" if document.held_out(data.validation_fraction) else "train"].append(document.text)
            for split in SPLITS:
                writers[split].documents += len(groups[split])
            sizes.append(sum(len(document.text) for document in batch))
            yield [groups[split] for split in SPLITS]

    results = encode_in_parallel(folder / "tokenizer", batches(), workers)
    with _progress("tokenising", total) as bar, contextlib.closing(results), contextlib.ExitStack() as stack:
        for split in SPLITS:
            stack.enter_context(contextlib.closing(writers[split]))
        for result in results:
            for split, tokens in zip(SPLITS, result, strict=True):
                writers[split].write(tokens)
            bar.update(sizes.pop(0))
    return {
        "content_hash": content.hexdigest(),
        **asdict(counts),
        "dtype": token_dtype(tokenizer.vocab_size).name,
        **{split: writers[split].description() for split in SPLITS},
        "validation_unigram_loss": unigram_loss(writers["train"].counts, writers["validation"].counts),
    }


def _document_batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def unigram_loss(train: np.ndarray, validation: np.ndarray) -> float | None:
    """Mean nats a token of the model p(i) = (train[i] + 1) / (sum(train) + vocabulary) over the validation counts."""
    if validation.sum() == 0:
        return None
    log_probability = np.log(train + 1.0) - np.log(train.sum() + float(len(train)))
    return float(-(validation * log_probability).sum() / validation.sum())


class _ShardWriter:
    """Writes the tokens of one split to shards of at most SHARD_BYTES and counts them."""

    def __init__(self, folder: Path, split: Split, tokenizer: Tokenizer) -> None:
        self.folder, self.split = folder, split
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.documents = 0
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.shards: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()

    def write(self, tokens: np.ndarray) -> None:
        capacity = SHARD_BYTES // self.dtype.itemsize
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        while len(tokens):
            if self._file is None:
                name = f"{self.split}-{len(self.shards):05d}.bin"
                self._file = (self.folder / name).open("wb")
                self._digest = hashlib.sha256()
                self.shards.append({"file": name, "tokens": 0})
            shard = self.shards[-1]
            part = tokens[: capacity - shard["tokens"]].tobytes()
            self._file.write(part)
            self._digest.update(part)
            written = len(part) // self.dtype.itemsize
            shard["tokens"] += written
            tokens = tokens[written:]
            if shard["tokens"] == capacity:
                self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._file is not None
        _sync(self._file)
        self._file.close()
        self._file = None
        self.shards[-1]["sha256"] = self._digest.hexdigest()

    def close(self) -> None:
        if self._file is not None:
            self._finish_shard()

    def description(self) -> dict[str, Any]:
        return {"tokens": int(self.counts.sum()), "documents": self.documents, "shards": self.shards}


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _expected_bytes(data: DataSection, source: Source) -> int | None:
    """How much text there is at most, for progress bars; None when that shows only by reading."""
    limit = None if data.max_megabytes is None else int(data.max_megabytes * 1e6)
    return min((size for size in (source.size, limit) if size is not None), default=None)


def _progress(label: str, total: int | None) -> tqdm:
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, mininterval=1.0, file=sys.stderr)
