"""Any checkpoint as one safetensors file or a Hugging Face folder, written a piece of a tensor at a time.

A network of Burnish becomes a folder that `AutoModelForCausalLM.from_pretrained` reads after `import model.huggingface`, with its
tokenizer beside; a Hugging Face folder stays of its own class. Everything is written under a hidden name, read back, compared with
the source, and renamed when it is right.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.checkpoint import Checkpoint
from analysis.decoders import read_config
from analysis.formats.deepspeed import DeepSpeedCheckpoint
from analysis.formats.tensor_files import BURNISH_PREFIX, DTYPES, read_safetensors
from analysis.output import check_writable
from analysis.resharding import reshard
from analysis.runs import Run, read_json
from model.config import ModelConfig
from model.errors import InputError, one_line

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIECE = 1 << 22  # elements read, cast and written at a time: 16 MB of float32
# What a Hugging Face folder holds besides weights, and what of it makes the tokenizer.
_CARRIED = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken")


def export(
    run: Run,
    out: Path,
    precision: str = "fp32",
    shard_gigabytes: float = 5.0,
    compare: bool = True,
    verify: bool = True,
    adapters: bool = False,
) -> str:
    """Write the run's last checkpoint to `out`: one file if it ends in .safetensors, else a Hugging Face folder.

    Args:
        precision: of the written weights: "fp32", "bf16" or "fp16". Buffers keep theirs.
        shard_gigabytes: a folder's files are at most that large (one tensor may be larger).
        compare: load both models and compare their logits; this takes the memory of both. Without it the tensors are still compared.
        verify: compare the source's checksums first.
        adapters: of a run with context pruning, what it added alone.

    Returns:
        What was written and how it compares, to print.

    Raises:
        InputError: `out` exists; no model configuration for a folder; no space.
    """
    check_absent(out)
    checkpoint = run.last(verify=False)
    pruned = checkpoint.path.is_dir() and (checkpoint.path / "context_pruning.json").exists()
    if pruned and (checkpoint.path / "config.json").exists():
        raise InputError(f"{checkpoint.path}: a Hugging Face folder with context pruning already: copy it as it is")
    if adapters and (not pruned or out.suffix == ".safetensors"):
        raise InputError(f"--adapters: for the folder of a run with context pruning, {checkpoint.path} -> {out} is not one")
    if verify:
        checkpoint.verify()

    def write(path: Path) -> list[str]:
        if pruned and out.suffix != ".safetensors":
            from analysis.pruned_export import write_pruned  # transformers takes seconds to import

            path.mkdir()
            return write_pruned(run, checkpoint, path, PRECISIONS[precision], compare, adapters)
        if out.suffix == ".safetensors":
            return [_one_file(checkpoint, path, PRECISIONS[precision])]
        path.mkdir()
        if (checkpoint.path / "pretrained.json").exists():
            from analysis.pruned_export import write_pretrained

            return write_pretrained(run, checkpoint, path, PRECISIONS[precision], compare)
        return _folder(run, checkpoint, path, PRECISIONS[precision], shard_gigabytes, compare)

    return _written(checkpoint, out, write)


def check_absent(out: Path) -> None:
    """Raises InputError where `out` exists, or nothing can be written beside it."""
    if out.exists():
        raise InputError(f"{out}: exists already; give another name or remove it")
    check_writable(out.parent)


def _written(checkpoint: Checkpoint, out: Path, write: Callable[[Path], list[str]]) -> str:
    """Have `write` fill a hidden path, and rename it to `out` when that is done; what was written, to print."""
    writing = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = write(writing)
        os.rename(writing, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        writing.unlink(missing_ok=True) if writing.is_file() else shutil.rmtree(writing, ignore_errors=True)
    return "\n".join([f"{checkpoint.path}: {checkpoint.format}, step {checkpoint.step} -> {out}", *(f"  {line}" for line in lines)])


def export_to_ranks(run: Run, out: Path, ranks: int, verify: bool = True) -> str:
    """Write the run's last checkpoint, which is DeepSpeed's, as `ranks` ranks would have: OUT/TAG, and OUT/latest that names the tag.

    Raises:
        InputError: `out` exists; the checkpoint is not DeepSpeed's own; no space.
    """
    check_absent(out)
    checkpoint = run.last(verify=False)
    if not isinstance(checkpoint, DeepSpeedCheckpoint):
        raise InputError(f"{checkpoint.path}: --ranks is for DeepSpeed's own checkpoints, and this is {checkpoint.format}")
    if verify:
        checkpoint.verify()
    tag = checkpoint.path.resolve().name

    def write(folder: Path) -> list[str]:
        (folder / tag).mkdir(parents=True)
        line = reshard(checkpoint, folder / tag, ranks)
        (folder / "latest").write_text(tag)
        return [line]

    return _written(checkpoint, out, write)


def _one_file(checkpoint: Checkpoint, path: Path, dtype: torch.dtype) -> str:
    names = [*checkpoint.shapes, *checkpoint.buffers]
    write_safetensors(path, checkpoint, names, dtype)
    return f"{len(names)} tensors, {path.stat().st_size:,} bytes; read back: {compare_tensors(checkpoint, [path], dtype)}"


def _folder(run: Run, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, shard_gigabytes: float, compare: bool) -> list[str]:
    """Fill a Hugging Face folder; what to say about it."""
    source = checkpoint.named
    config = read_config(checkpoint) if (checkpoint.path / "model_config.json").exists() else None
    if config is not None:
        prefix = BURNISH_PREFIX
    elif (source / "config.json").exists():
        prefix = BURNISH_PREFIX if read_json(source / "config.json").get("model_type") == "burnish" else ""
    else:
        raise InputError(
            f"{source}: neither model_config.json (train.py writes it) nor config.json, so no model can be built from a folder; "
            "export to a file instead: --out NAME.safetensors"
        )
    parts = _shards([*checkpoint.shapes, *checkpoint.buffers], checkpoint, dtype, shard_gigabytes)
    count = len(parts)
    names = ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, part in zip(names, parts, strict=True):
        write_safetensors(folder / name, checkpoint, part, dtype, prefix)
    if len(parts) > 1:
        sizes = sum(_bytes(checkpoint, name, dtype) for part in parts for name in part)
        index = {
            "metadata": {"total_size": sizes},
            "weight_map": {prefix + tensor: name for name, part in zip(names, parts, strict=True) for tensor in part},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    compared = compare_tensors(checkpoint, [folder / name for name in names], dtype, prefix)
    lines = [f"{sum(map(len, parts))} tensors in {count} file{'s' * (count > 1)}; read back: {compared}"]
    if config is not None:
        lines += _burnish_files(run, config, folder, dtype)
    else:
        for pattern in _CARRIED:
            for file in source.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copy(file, folder / file.name)
    if compare:
        lines += _compare_models(checkpoint, folder)
    return lines


# ---- writing and reading back ----------------------------------------------------------------------------------------


def _written_dtype(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.dtype:
    return checkpoint.buffers[name].dtype if name in checkpoint.buffers else dtype


def _shape(checkpoint: Checkpoint, name: str) -> torch.Size:
    return checkpoint.buffers[name].shape if name in checkpoint.buffers else checkpoint.shapes[name]


def _bytes(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> int:
    return _shape(checkpoint, name).numel() * _written_dtype(checkpoint, name, dtype).itemsize


def _shards(names: Sequence[str], checkpoint: Checkpoint, dtype: torch.dtype, gigabytes: float) -> list[list[str]]:
    """Names in order, cut so that each part stays below the size where a single tensor does not exceed it."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = _bytes(checkpoint, name, dtype)
        if parts[-1] and filled + size > gigabytes * 1e9:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def write_safetensors(path: Path, checkpoint: Checkpoint, names: Sequence[str], dtype: torch.dtype, prefix: str = "") -> None:
    """Write these parameters and buffers of a checkpoint, `PIECE` elements in memory at a time.

    Tied weights are written once; `__metadata__` names the others, and the step, as `analysis.formats.tensor_files` reads them.
    """
    codes = {value: key for key, value in DTYPES.items()}
    metadata = {"format": "pt"} | ({"step": str(checkpoint.step)} if checkpoint.step_is_said else {})
    metadata |= {prefix + alias: prefix + owner for alias, owner in checkpoint.aliases.items() if owner in names}
    if buffers := [prefix + name for name in names if name in checkpoint.buffers]:
        metadata["buffers"] = json.dumps(buffers)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    ordered = sorted(names, key=lambda name: -_written_dtype(checkpoint, name, dtype).itemsize)  # keeps every tensor aligned
    for name in ordered:
        shape, stored = _shape(checkpoint, name), _written_dtype(checkpoint, name, dtype)
        begin, end = end, end + shape.numel() * stored.itemsize
        header[prefix + name] = {"dtype": codes[stored], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc="export", mininterval=1.0) as bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            stored = _written_dtype(checkpoint, name, dtype)
            for piece in _pieces(checkpoint, name, stored):
                _write(file, piece)
                bar.update(piece.numel() * stored.itemsize)
        file.flush()
        os.fsync(file.fileno())


def _pieces(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """The flattened tensor in runs of at most `PIECE` elements, cast to dtype."""
    numel = _shape(checkpoint, name).numel()
    for start in range(0, numel, PIECE):
        length = min(PIECE, numel - start)
        if name in checkpoint.buffers:
            yield checkpoint.buffers[name].reshape(-1)[start : start + length]
        else:
            piece = torch.empty(length)
            checkpoint.read(name, start, piece)
            yield piece.to(dtype)


def _write(file: BinaryIO, values: Tensor) -> None:
    file.write(values.contiguous().view(torch.uint8).numpy().data)


def compare_tensors(checkpoint: Checkpoint, files: Sequence[Path], dtype: torch.dtype, prefix: str = "") -> str:
    """Read what was written and compare it with the checkpoint, piece by piece, bit for bit after the cast; in words.

    Raises:
        RuntimeError: they differ, which is a fault of the disk or ours.
    """
    written: dict[str, Tensor] = {}
    for file in files:
        written |= read_safetensors(file)[0]
    largest = 0.0
    for name in [*checkpoint.shapes, *checkpoint.buffers]:
        stored = _written_dtype(checkpoint, name, dtype)
        flat, start = written.pop(prefix + name).reshape(-1), 0
        for piece in _pieces(checkpoint, name, stored):
            same = flat[start : start + piece.numel()]
            if not torch.equal(same.view(torch.uint8), piece.contiguous().view(torch.uint8)):
                raise RuntimeError(f"{name} was not written as it was read, from element {start} on")
            if stored != torch.float32 and name not in checkpoint.buffers:
                exact = torch.empty(piece.numel())
                checkpoint.read(name, start, exact)
                largest = max(largest, float(((piece.float() - exact).abs() / exact.abs().clamp(min=torch.finfo(stored).tiny)).max()))
            start += piece.numel()
    assert not written
    if dtype == torch.float32:
        return "equal, bit for bit"
    return f"equal to the rounded weights; rounding changed an element by at most {largest:.2g} of it"


# ---- a Burnish network as a transformers model -----------------------------------------------------------------------


def _burnish_files(run: Run, network: ModelConfig, folder: Path, dtype: torch.dtype) -> list[str]:
    """config.json, generation_config.json and the tokenizer of a Burnish network."""
    from transformers import GenerationConfig

    from model.huggingface import transformers_config

    end: dict[str, int] = {}
    lines = ["no tokenizer/ beside the checkpoints: the folder has none"]
    tokenizer = run.folder / "tokenizer" if run.folder else None
    if tokenizer is not None and tokenizer.is_dir():
        ids, line = copy_tokenizer(tokenizer, folder)
        end, lines = ({"eos_token_id": ids, "pad_token_id": ids} if ids is not None else {}), [line]
    transformers_config(network, dtype, **end).save_pretrained(folder)
    GenerationConfig(**end).save_pretrained(folder)
    return lines


def copy_tokenizer(source: Path, folder: Path) -> tuple[int | None, str]:
    """Put a run's tokenizer beside the weights as transformers reads it: (id that ends a text, what was done)."""
    from transformers import AutoTokenizer

    if not (source / "tokenizer.model").exists():
        for pattern in _CARRIED:
            for file in source.glob(pattern):
                if file.name != "description.json":
                    shutil.copy(file, folder / file.name)
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).eos_token_id, "tokenizer copied"
    import sentencepiece

    from analysis.sentencepiece_tokenizer import as_transformers, first_difference

    shutil.copy(source / "tokenizer.model", folder / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))  # pyright: ignore[reportCallIssue]
    tokenizer = as_transformers(processor)
    difference = first_difference(tokenizer, processor)
    if difference is None:
        tokenizer.save_pretrained(folder)
        return processor.eos_id(), "tokenizer: tokenizer.model as a transformers tokenizer, the same tokens on every sample; both are there"
    return processor.eos_id(), (
        f"tokenizer: a transformers tokenizer would cut {difference!r} otherwise, so only tokenizer.model was copied: "
        "sentencepiece.SentencePieceProcessor(model_file='tokenizer.model')"
    )


@torch.no_grad()
def _compare_models(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Logits of the written folder against the live network's, and a sample of text.

    Raises:
        RuntimeError: the logits differ by more than rounding can make them.
    """
    from transformers import AutoModelForCausalLM

    import model.huggingface  # noqa: F401  # makes the class known to transformers

    exported: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, dtype=torch.float32
    ).eval()
    vocabulary = int(exported.config.get_text_config().vocab_size)
    length = min(64, int(getattr(exported.config, "max_position_embeddings", 64) or 64))
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    live = _live_model(checkpoint)
    expected = live(tokens)
    expected = getattr(expected, "logits", expected).float()
    found = exported(tokens).logits.float()
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    lines = [
        f"logits of the exported and the live model, {tokens.numel()} random tokens: largest difference {difference:.3g}, "
        f"largest logit {scale:.3g}"
    ]
    exact = all(torch.equal(a, b) for a, b in zip(exported.parameters(), live.parameters(), strict=True))
    if not math.isfinite(difference) or (exact and difference > 1e-4 * max(scale, 1.0)):
        raise RuntimeError(f"the exported model does not compute what the checkpoint's does: {lines[0]}")
    return [*lines, sample(exported, folder, tokens, length)]


def sample(model: Any, folder: Path, tokens: Tensor, longest: int) -> str:
    """What a model goes on with, in words where the folder has a tokenizer; else after some of `tokens` (1, any)."""
    from transformers import AutoTokenizer

    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        prompt = tokenizer("The", return_tensors="pt", add_special_tokens=False)["input_ids"]
        text = model.generate(prompt, max_new_tokens=min(24, longest - prompt.shape[1]), do_sample=False)
        return f"a sample: {tokenizer.decode(text[0])!r}"
    text = model.generate(tokens[:1, :4], max_new_tokens=min(12, longest - 4), do_sample=False)
    return f"a sample, token ids: {text[0].tolist()}"


def _live_model(checkpoint: Checkpoint) -> Any:
    """The network filled from the source itself."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from model.transformer import Transformer

    if (checkpoint.path / "model_config.json").exists():
        network = Transformer(read_config(checkpoint))
        checkpoint.load_into(network)
        return network.eval()
    if checkpoint.named != checkpoint.path:  # a trainer's folder: what lies beside, if anything, is rounded
        config = AutoConfig.from_pretrained(str(checkpoint.named), local_files_only=True, trust_remote_code=False)
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
        checkpoint.load_into(network)
        return network.eval()
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path), local_files_only=True, trust_remote_code=False, dtype=torch.float32
        ).eval()
    except OSError as error:  # shards whose index is missing, which we can read and transformers cannot
        raise InputError(
            f"{checkpoint.path}: transformers cannot load it, so the logits cannot be compared: {one_line(error)}; give --skip-comparison"
        ) from None
