"""Outlier features: how unevenly the channels of the residual stream are used, layer by layer, over a run's checkpoints.

`model/activation_statistics.py` says what is measured and where; training logs the same measures on its own batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from analysis.runs import Run, read_json
from analysis.shards import Checkpoint
from model import activation_statistics
from model.activation_statistics import watch_residuals
from model.config import ModelConfig
from model.errors import InputError
from model.transformer import Transformer

DEFINITIONS = {
    **activation_statistics.DEFINITIONS,
    "loss": "mean cross-entropy over these tokens, nats per token, of the model as read from the checkpoint",
}


@torch.no_grad()
def measure(model: Transformer, tokens: Tensor, batch_tokens: int = 8192) -> dict[str, Any]:
    """The measures at every place, and the loss, over sequences of tokens (sequences, length + 1), int64.

    Returns:
        {"places": {place: measures}, "loss": nats per token}
    """
    device = next(model.parameters()).device
    length = tokens.shape[1] - 1
    loss, model = 0.0, model.eval()
    with watch_residuals(model) as moments:
        for batch in tokens.split(max(1, batch_tokens // length)):
            batch = batch.to(device)
            logits = model(batch[:, :-1]).float()
            loss += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    loss /= tokens.shape[0] * length
    return {"places": {place: sums.measures() for place, sums in moments.items()}, "loss": loss if math.isfinite(loss) else None}


def build_model(checkpoint: Checkpoint) -> Transformer:
    """The network of model_config.json, filled from the shards, float32, on the GPU where there is one."""
    path = checkpoint.path / "model_config.json"
    if not path.exists():
        raise InputError(f"{path}: missing, so the network cannot be built; this verb reads checkpoints that train.py wrote")
    try:
        config = ModelConfig(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path}: not a model configuration: {error}") from None
    model = Transformer(config)
    checkpoint.load_into(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def validation_tokens(run: Run, count: int, length: int) -> tuple[Tensor, str]:
    """The first tokens of the run's validation split, (sequences, length + 1) int64, and where they came from."""
    data = run.read_json("data.json")
    if data is None:
        raise InputError(f"{run.path}: no data.json beside the checkpoints, so it is not known what to read: give text with --data FILES")
    prepared = Path(str(data.get("prepared")))
    if not (prepared / "manifest.json").exists():
        raise InputError(f"{prepared}: the run's prepared data are gone: give text with --data FILES")
    manifest = read_json(prepared / "manifest.json")
    try:
        shards = [(prepared / shard["file"], int(shard["tokens"])) for shard in manifest["validation"]["shards"]]
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{prepared / 'manifest.json'}: damaged: {type(error).__name__}: {error}") from None
    parts: list[np.ndarray] = []
    for path, tokens in shards:
        if not path.exists() or path.stat().st_size != tokens * dtype.itemsize:
            raise InputError(f"{path}: missing or truncated; expected {tokens} tokens of {dtype.itemsize} bytes")
        if sum(map(len, parts)) <= count + length:
            parts.append(np.memmap(path, dtype, "r")[: count + length + 1].astype(np.int64) if tokens else np.empty(0, np.int64))
    return _sequences(np.concatenate(parts) if parts else np.empty(0, np.int64), count, length, prepared), f"validation split of {prepared}"


def file_tokens(run: Run, files: list[str], count: int, length: int) -> tuple[Tensor, str]:
    """The first tokens of text files in the run's tokenizer, (sequences, length + 1) int64, and where they came from."""
    encode = _load_tokenizer(run)
    tokens: list[int] = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(f"{file}: cannot be read: {reason}") from None
        # a token is rarely longer than a dozen characters, so this is enough text, and never a huge file at once
        tokens += encode(text[: 64 * (count + length)])
    return _sequences(np.asarray(tokens, np.int64), count, length, files[0]), ", ".join(files)


def _load_tokenizer(run: Run) -> Callable[[str], list[int]]:
    folder = run.folder / "tokenizer" if run.folder else None
    if folder is None or not folder.is_dir():
        raise InputError(f"{run.path}: no tokenizer/ beside the checkpoints, so --data cannot be encoded")
    if (folder / "tokenizer.model").exists():
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode  # pyright: ignore
        except (OSError, RuntimeError) as error:
            raise InputError(f"{folder / 'tokenizer.model'}: not a SentencePiece model: {error}") from None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a tokenizer: {error}") from None
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _sequences(tokens: np.ndarray, count: int, length: int, source: object) -> Tensor:
    """Consecutive windows of length + 1 tokens that overlap by one, so that every token but the first is a target once."""
    if len(tokens) < 2:
        raise InputError(f"{source}: {len(tokens)} tokens, too few to measure anything")
    length = min(length, len(tokens) - 1)
    sequences = min(math.ceil(count / length), (len(tokens) - 1) // length)
    starts = torch.arange(sequences)[:, None] * length
    return torch.from_numpy(tokens)[starts + torch.arange(length + 1)]


def analyze_outliers(
    run: Run, tokens: int = 8192, data: list[str] | None = None, verify: bool = True, progress: bool = True
) -> dict[str, Any]:
    """What outliers.json holds: the measures for every checkpoint of the run, on the same tokens.

    Raises:
        InputError: damaged checkpoints, no model_config.json, no data, or tokens outside the model's vocabulary.
    """
    if tokens < 1:
        raise InputError(f"--tokens {tokens}: expected a positive number")
    checkpoints = run.open(verify)
    config = build_model(checkpoints[-1]).config
    read = (
        (lambda: file_tokens(run, data, tokens, config.sequence_length))
        if data
        else (lambda: validation_tokens(run, tokens, config.sequence_length))
    )
    sequences, source = read()
    if sequences.max() >= config.vocab_size:
        raise InputError(f"{source}: token {int(sequences.max())} is outside the model's vocabulary of {config.vocab_size}")
    results = []
    for checkpoint in tqdm(checkpoints, desc="outliers", unit="checkpoint", mininterval=1.0, disable=not progress):
        results.append({"step": checkpoint.step, "precision": checkpoint.precision, **measure(build_model(checkpoint), sequences)})
    return {
        "format": 1,
        "verb": "outliers",
        "run": run.name,
        "path": str(run.path),
        "definitions": DEFINITIONS,
        "null_values": {"kurtosis": {"all channels alike": 1.0, "one channel alone": float(config.width)}},
        "data": source,
        "tokens": sequences.shape[0] * (sequences.shape[1] - 1),
        "sequence_length": sequences.shape[1] - 1,
        "width": config.width,
        "places": list(results[0]["places"]),
        "steps": [result["step"] for result in results],
        "checkpoints": results,
    }


def largest_kurtosis(result: dict[str, Any]) -> tuple[float | None, str, int]:
    """(kurtosis, place, step) where it is largest over the run; (None, "", 0) when it is nowhere defined."""
    found = [
        (measures["kurtosis"], place, checkpoint["step"])
        for checkpoint in result["checkpoints"]
        for place, measures in checkpoint["places"].items()
        if measures["kurtosis"] is not None
    ]
    return max(found) if found else (None, "", 0)


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal."""
    peak, place, step = largest_kurtosis(result)
    last = result["checkpoints"][-1]
    finals = [(measures["kurtosis"], at) for at, measures in last["places"].items() if measures["kurtosis"] is not None]
    lines = [f"{result['run']}: {len(result['steps'])} checkpoints, {result['tokens']:,} tokens, width {result['width']}"]
    if peak is not None:
        lines.append(f"  largest kurtosis {peak:.2f} at {place}, step {step}   [all channels alike 1, one channel alone {result['width']}]")
    if finals:
        lines.append(f"  at the last step {max(finals)[0]:.2f} at {max(finals)[1]}; loss on these tokens {last['loss']:.4f} nats")
    return "\n".join(lines)
