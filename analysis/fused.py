"""Where query, key and value lie in a tensor that holds all three.

query_key_value, linear_qkv    by group of heads: (kv_heads, [queries of the group, key, value], head_dim) rows: GPT-NeoX, Pythia,
                               BLOOM, Falcon, Megatron. Cutting the rows into thirds would mix the three.
qkv_proj, Wqkv, in_proj        all queries, then all keys, then all values: Phi-3, MPT; in_proj of attention alone, because state-space
                               and convolution layers have one too
c_attn                         the same, along the columns: GPT-2, whose matrices are (in, out)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Size

from analysis.checkpoint import Checkpoint
from model.errors import InputError

_BY_GROUP = re.compile(r"(query_key_value|linear_qkv)\.(weight|bias)$")
_STACKED = re.compile(r"(qkv_proj|Wqkv|(attn|attention)\.in_proj)\.(weight|bias)$")
_COLUMNS = re.compile(r"c_attn\.(weight|bias)$")
_NAMES = ("query", "key", "value")

Runs = list[tuple[int, int]]


class Heads(NamedTuple):
    """Attention heads, and heads of keys and values (fewer where they are shared)."""

    heads: int
    kv_heads: int
    guessed: bool = False  # from a configuration, which need not speak of every tensor


def parts_of(checkpoint: Checkpoint, name: str, heads: Heads | None) -> Iterator[tuple[str, Runs]]:
    """(part, runs of the flattened tensor) of a tensor of a checkpoint: see `parts_of_shape`."""
    return parts_of_shape(str(checkpoint.path), name, checkpoint.shapes[name], heads)


def parts_of_shape(source: str, name: str, shape: Size, heads: Heads | None) -> Iterator[tuple[str, Runs]]:
    """(part, runs of the flattened tensor) of a tensor: itself whole, or query, key and value of a fused one.

    A fused tensor stays whole where `heads` is None: they are not known (see `heads_of`); and one that heads of config.json do not
    divide, because its name may mean something else there.

    Raises:
        InputError: heads that were given do not fit the tensor; `source` says of what.
    """
    numel = shape.numel()
    fused = _BY_GROUP.search(name) or _STACKED.search(name) or _COLUMNS.search(name)
    if heads is None or fused is None or not numel:
        yield name, [(0, numel)]
        return
    along_columns = bool(_COLUMNS.search(name)) and shape[-1] > shape[0]  # of a bias it is the same
    rows = shape[-1] if along_columns else shape[0]
    head_dim, rest = divmod(rows, heads.heads + 2 * heads.kv_heads)
    if rest or heads.heads % heads.kv_heads:
        if heads.guessed:
            yield name, [(0, numel)]
            return
        raise InputError(f"{source}: {name} has {rows} rows, which {heads.heads} heads and {heads.kv_heads} of keys do not divide")
    groups = heads.kv_heads if _BY_GROUP.search(name) else 1
    sizes = [heads.heads // groups * head_dim, heads.kv_heads // groups * head_dim, heads.kv_heads // groups * head_dim]
    inner = 1 if along_columns else numel // rows  # elements a row
    repeats = numel // rows if along_columns else groups  # how often the three follow each other
    period = sum(sizes) * inner
    begin = 0
    for part, size in zip(_NAMES, sizes, strict=True):
        yield f"{name}[{part}]", [(r * period + begin * inner, r * period + (begin + size) * inner) for r in range(repeats)]
        begin += size


def heads_of(checkpoint: Checkpoint) -> Heads | None:
    """From config.json of a Hugging Face folder; None where it does not say."""
    path = checkpoint.named / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return heads_in(config.get) if isinstance(config, dict) else None


def heads_in(read: Callable[[str], Any]) -> Heads | None:
    """From a configuration of transformers, whose fields `read` gives by name, None where there is none; None where it does not say."""
    try:
        heads = int(read("num_attention_heads") or read("n_head"))
        # Falcon's, which has num_kv_heads = heads beside it and uses that in its new architecture alone
        multi_query = read("multi_query") and not read("new_decoder_architecture")
        kv_heads = 1 if multi_query else int(read("num_key_value_heads") or read("num_kv_heads") or heads)
    except (ValueError, TypeError):
        return None
    return Heads(heads, kv_heads, guessed=True) if heads > 0 and kv_heads > 0 else None


def parse_heads(text: str | None) -> Heads | None:
    """`32` or `32,8` of the command line. Raises InputError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:,([1-9]\d*))?", text)
    if match is None:
        raise InputError(f"--heads {text}: expected the number of heads, and of key and value heads if they are fewer: 32 or 32,8")
    return Heads(int(match[1]), int(match[2] or match[1]))
