"""The tokens that an analysis runs through a model: of the run's own prepared data, or of text files in the model's tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.decoders import Pretrained
from analysis.runs import Run, read_json
from model.errors import InputError

BATCH_TOKENS = 4096  # of one forward pass
LARGEST_LOGITS = 2**27  # numbers: 512 MiB, of which a few exist at a time


def held_out_tokens(source: Run | Pretrained, files: list[str] | None, count: int, length: int) -> tuple[Tensor, str]:
    """What a model is measured on, (sequences, length + 1) int64, and where it came from: text files, or the run's validation split."""
    if files:
        return file_tokens(encoder(source), files, count, length)
    if isinstance(source, Run):
        return validation_tokens(source, count, length)
    raise InputError(f"{source.path}: a pretrained model does not say what text to measure it on: give --data FILES")


def validation_tokens(run: Run, count: int, length: int) -> tuple[Tensor, str]:
    """The first tokens of the run's validation split, (sequences, length + 1) int64, and where they came from."""
    prepared, shards = _split(run, "validation")
    parts: list[np.ndarray] = []
    for shard in shards:
        if sum(map(len, parts)) <= count + length:
            parts.append(shard[: count + length + 1].astype(np.int64))
    return _sequences(np.concatenate(parts) if parts else np.empty(0, np.int64), count, length, prepared), f"validation split of {prepared}"


def training_windows(run: Run, sequences: int, length: int, seed: int) -> Tensor:
    """Windows at random places of the run's training split, (sequences, length) int64. A window lies within one shard."""
    prepared, shards = _split(run, "train")
    return _windows([shard for shard in shards if len(shard) >= length], sequences, length, seed, prepared)


def file_tokens(encode: Callable[[str], list[int]], files: list[str], count: int, length: int) -> tuple[Tensor, str]:
    """The first tokens of text files, (sequences, length + 1) int64, and where they came from."""
    # a token is rarely longer than a dozen characters, so this is enough text, and never a huge file at once
    tokens = [token for file in files for token in encode(read_text(file, 64 * (count + length)))]
    return _sequences(np.asarray(tokens, np.int64), count, length, files[0]), ", ".join(files)


def file_windows(encode: Callable[[str], list[int]], files: list[str], sequences: int, length: int, seed: int) -> Tensor:
    """Windows at random places of text files, (sequences, length) int64."""
    texts = [np.asarray(encode(read_text(file, 256 * sequences * length)), np.int64) for file in files]
    return _windows([text for text in texts if len(text) >= length], sequences, length, seed, ", ".join(files))


class Tokenizer(NamedTuple):
    """Text to tokens, and what each token stands for.

    pieces: of tokens, the text of each, a space before a word with it; U+FFFD where a token is a part of a character.
    """

    encode: Callable[[str], list[int]]
    pieces: Callable[[Sequence[int]], list[str]]


def encoder(source: Run | Pretrained) -> Callable[[str], list[int]]:
    """What turns text into the model's tokens. Raises InputError when there is no tokenizer."""
    return source.encoder() if isinstance(source, Pretrained) else run_tokenizer(source).encode


def run_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer of a run. Raises InputError when there is none."""
    folder = run.folder / "tokenizer" if run.folder else None
    if folder is None or not folder.is_dir():
        raise InputError(f"{run.path}: no tokenizer/ beside the checkpoints, so text files cannot be encoded")
    if (folder / "tokenizer.model").exists():
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))  # pyright: ignore
        except (OSError, RuntimeError) as error:
            raise InputError(f"{folder / 'tokenizer.model'}: not a SentencePiece model: {error}") from None
        return Tokenizer(processor.encode, lambda tokens: [_sentencepiece_text(processor, token) for token in tokens])
    from transformers import AutoTokenizer

    try:
        return tokenizer_of_transformers(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a tokenizer: {error}") from None


def tokenizer_of_transformers(tokenizer: Any) -> Tokenizer:
    def text(token: int) -> str:
        decoded = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        known = tokenizer.convert_ids_to_tokens(token)
        # some decoders take the space off the first word of a text
        return f" {decoded}" if known is not None and known.startswith("\u2581") and not decoded.startswith(" ") else decoded

    return Tokenizer(lambda words: tokenizer.encode(words, add_special_tokens=False), lambda tokens: [text(int(token)) for token in tokens])


def _sentencepiece_text(processor: Any, token: int) -> str:
    token = int(token)
    if processor.is_byte(token):
        return bytes([int(processor.id_to_piece(token)[3:-1], 16)]).decode("utf-8", errors="replace")
    return processor.id_to_piece(token).replace("\u2581", " ")


def check_vocabulary(tokens: Tensor, vocab_size: int, source: str) -> None:
    """Raises InputError when a token is none of the model's."""
    if tokens.max() >= vocab_size:
        raise InputError(f"{source}: token {int(tokens.max())} is outside the model's vocabulary of {vocab_size}")


def sequences_at_once(length: int, vocab_size: int) -> int:
    """How many sequences of so many tokens go through a network in one pass, whose whole logits are there at a time."""
    return max(1, min(BATCH_TOKENS, LARGEST_LOGITS // vocab_size) // length)


def _split(run: Run, split: Literal["train", "validation"]) -> tuple[Path, list[np.ndarray]]:
    """The folder of the run's prepared data, and the memory-mapped shards of a split."""
    instead = "give text with --data FILES" if split == "validation" else "give text with --calibration FILES"
    data = run.read_json("data.json")
    if data is None:
        raise InputError(f"{run.path}: no data.json beside the checkpoints, so it is not known what to read: {instead}")
    prepared = Path(str(data.get("prepared")))
    if not (prepared / "manifest.json").exists():
        raise InputError(f"{prepared}: the run's prepared data are gone: {instead}")
    manifest = read_json(prepared / "manifest.json")
    try:
        shards = [(prepared / shard["file"], int(shard["tokens"])) for shard in manifest[split]["shards"]]
        if any(path.parent != prepared for path, _ in shards):
            raise ValueError("a shard lies outside the folder")
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{prepared / 'manifest.json'}: damaged: {type(error).__name__}: {error}") from None
    for path, tokens in shards:
        if not path.exists() or path.stat().st_size != tokens * dtype.itemsize:
            raise InputError(f"{path}: missing or truncated; expected {tokens} tokens of {dtype.itemsize} bytes")
    return prepared, [np.memmap(path, dtype, "r") if tokens else np.empty(0, dtype) for path, tokens in shards]


def read_text(file: str, characters: int = -1) -> str:
    """The first so many characters of a text file, -1 for all; no more of it is read. Raises InputError when it is not UTF-8."""
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read(characters)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{file}: cannot be read: {reason}") from None


def _sequences(tokens: np.ndarray, count: int, length: int, source: object) -> Tensor:
    """Consecutive windows of length + 1 tokens that overlap by one, so that every token but the first is a target once."""
    if len(tokens) < 2:
        raise InputError(f"{source}: {len(tokens)} tokens, too few to measure anything")
    length = min(length, len(tokens) - 1)
    sequences = min(math.ceil(count / length), (len(tokens) - 1) // length)
    starts = torch.arange(sequences)[:, None] * length
    return torch.from_numpy(tokens)[starts + torch.arange(length + 1)]


def _windows(texts: Sequence[np.ndarray], sequences: int, length: int, seed: int, source: object) -> Tensor:
    """Windows of `length` tokens, each possible start equally likely."""
    starts = np.array([len(text) - length + 1 for text in texts])
    if not len(starts):
        raise InputError(f"{source}: no {length} tokens in a row to calibrate on")
    ends = np.cumsum(starts)
    windows = []
    for draw in np.random.default_rng(seed).integers(ends[-1], size=sequences):
        i = int(np.searchsorted(ends, draw, side="right"))
        first = int(draw - (ends[i] - starts[i]))
        windows.append(torch.from_numpy(texts[i][first : first + length].astype(np.int64)))
    return torch.stack(windows)
