"""Causal self-attention: projections, RoPE, QK-norm, the softmax core, and shaped attention around it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.cache import LayerCache
from model.config import ModelConfig
from model.shaped_attention import causal_mean, shape, shape_by_blocks


class Linear(nn.Linear):
    """`nn.Linear` whose weight is left as allocated: `parametrization.initialize` fills every parameter."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """`nn.Embedding` whose weight is left as allocated, as in `Linear`."""

    def reset_parameters(self) -> None:
        pass


def make_norm(kind: str, width: int, config: ModelConfig, scaled: bool = True) -> nn.Module:
    """The norm of that kind ("rms_norm", "layer_norm", "simple_rms_norm" or "none") over the last dimension.

    Its trainable scale starts at 1; `simple_rms_norm` (arXiv 2307.14995) and any norm that is not `scaled` have none.
    """
    scaled = scaled and kind != "simple_rms_norm"
    if kind in ("rms_norm", "simple_rms_norm"):
        return nn.RMSNorm(width, eps=config.norm_epsilon, elementwise_affine=scaled)
    if kind == "layer_norm":
        assert config.norm_biases is not None
        return nn.LayerNorm(width, eps=config.norm_epsilon, elementwise_affine=scaled, bias=config.norm_biases)
    return nn.Identity()


class Context(NamedTuple):
    """What the tokens of a forward pass may look at, and where they stand; all blocks share it.

    rotary: cosines and sines of RoPE, from `rotary_tables`; None without RoPE.
    mask: (batch or 1, 1, tokens, keys), added to the scores: 0 where a query may look, -inf elsewhere, in the dtype of the
        network; or the same block by block, on a GPU; None: causal attention over all keys.
    starts: (batch or 1, tokens), the first key that each query may look at; None: key 0. The keys up to the query follow it.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    mask: Tensor | BlockMask | None = None
    starts: Tensor | None = None


def rotary_tables(first: int, length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (arXiv 2104.09864) at positions from `first` on, each (length, 1, head_dim), float32.

    As `rotate` takes them: both for either half of a head, and the first half's sines negative. Made anew in each forward pass rather
    than kept as buffers: a buffer would be cast to bf16 with the model, and positions above 256 are not representable there.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(first, first + length, device=device, dtype=torch.float32), frequencies)[:, None]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (batch, length, heads, head_dim) by its positions; pairs are (i, i + head_dim / 2), the Hugging Face convention.

    Each number by its cosine, and its partner by its sine: three passes over memory whose rows are whole heads, not halves of them.
    """
    cosines, sines = rotary
    wide = x.float()
    return torch.addcmul(wide * cosines, wide.roll(x.shape[-1] // 2, dims=-1), sines).type_as(x)


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """flex_attention as one kernel: as it stands it makes all scores."""
    return torch.compile(flex_attention)


def block_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """softmax(scale Q K^T + M) V that skips the blocks that M hides whole; shapes as in `softcapped_attention`."""
    attend = flex_attention if torch.compiler.is_compiling() or not query.is_cuda else compiled_flex_attention()
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=key.shape[1] != query.shape[1])  # pyright: ignore


def softcapped_attention(query: Tensor, key: Tensor, value: Tensor, cap: float, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(c tanh(scale Q K^T / c) + M) V, with the scores whole and in float32: no fused kernel caps them.

    query (batch, heads, length, head_dim), key and value (batch, kv_heads, length, head_dim), `mask` as in `Context`
    -> (batch, heads, length, head_dim).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    scores = cap * torch.tanh(scores / cap)
    if mask is None:
        length = query.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    else:
        scores = scores + mask
    return scores.softmax(dim=-1).type_as(value) @ value


def attention_scale(config: ModelConfig) -> float:
    """What scores are multiplied by: 1 / sqrt(d_k), 1 / (tau0 sqrt(n d_k)) with a temperature, or sqrt(base d_k) / d_k under muP."""
    assert config.head_dim is not None
    if config.attention_temperature is not None:
        return 1.0 / (config.attention_temperature * math.sqrt(config.width * config.head_dim))
    if config.base_head_dim not in (None, config.head_dim):
        return math.sqrt(config.base_head_dim) / config.head_dim
    return 1.0 / math.sqrt(config.head_dim)


class Attention(nn.Module):
    """Multi-head (or grouped-query) causal attention: concat_h A_h X W_V, times W_P.

    A = softmax(scale Norm(X W_Q) Norm(X W_K)^T + M), or shaped (arXiv 2306.17759, 2311.01906 eq. 5), alpha I + beta A - gamma C, where C
    is A at equal scores: the mean over what a token may look at. That is linear in the values, so any kernel for A serves:
    alpha V + beta A V - gamma C V. Blocks with `simplified` have no W_P, and W_V in the first layer alone (2311.01906, section 4).
    """

    def __init__(self, config: ModelConfig, first: bool = False) -> None:
        super().__init__()
        assert config.kv_heads is not None and config.head_dim is not None and config.qk_norm is not None
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        all_biases, full = config.biases == "all", not config.is_simplified
        self.query = Linear(config.width, self.heads * self.head_dim, bias=config.biases != "none")
        self.key = Linear(config.width, self.kv_heads * self.head_dim, bias=config.biases != "none")
        self.value = Linear(config.width, self.kv_heads * self.head_dim, bias=all_biases) if full or first else nn.Identity()
        self.output = Linear(self.heads * self.head_dim, config.width, bias=all_biases) if full else nn.Identity()
        # QK-norm comes before RoPE, which keeps norms: the order of the Hugging Face ports.
        self.query_norm = make_norm(config.qk_norm, self.head_dim, config, config.qk_norm_gains == "trainable")
        self.key_norm = make_norm(config.qk_norm, self.head_dim, config, config.qk_norm_gains == "trainable")
        self.softcap, self.scale = config.attention_softcap, attention_scale(config)
        self.context_pruning: Any = None  # an Interaction, where model/context_pruning.py has attached one
        self.shaped = config.attention == "shaped"
        if self.shaped and config.attention_gains == "trainable":
            self.identity_gain = nn.Parameter(torch.empty(self.heads))  # alpha
            self.softmax_gain = nn.Parameter(torch.empty(self.heads))  # beta
            self.centering_gain = nn.Parameter(torch.empty(self.heads))  # gamma
        else:
            self.identity_gain = self.softmax_gain = self.centering_gain = None

    def forward(self, x: Tensor, x_value: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """x (batch, tokens, width), from which queries and keys are made, and x_value, from which values -> (batch, tokens, width).

        With a cache the tokens follow those that it holds, and are added to it.
        """
        batch, tokens, _ = x.shape
        query = self.query_norm(self.query(x).view(batch, tokens, self.heads, self.head_dim))
        key = self.key_norm(self.key(x).view(batch, tokens, self.kv_heads, self.head_dim))
        value = self.value(x_value).view(batch, tokens, self.kv_heads, self.head_dim)
        if context.rotary is not None:
            query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        new = value
        if cache is not None:
            key, value = cache.extend(key, value)
        if isinstance(context.mask, BlockMask):
            mixed = block_attention(query, key, value, context.mask, self.scale)
        elif self.context_pruning is not None and self.context_pruning.current is not None:
            mixed = self.context_pruning.mix(query, key, value, context.mask, self.scale)
        elif self.softcap is not None:
            mixed = softcapped_attention(query, key, value, self.softcap, self.scale, context.mask)
        else:
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=context.mask,
                is_causal=context.mask is None and tokens == key.shape[2],
                scale=self.scale,
                enable_gqa=self.kv_heads != self.heads,
            )
        mixed = self._shape(mixed, new, value, context, cache) if self.shaped else mixed.transpose(1, 2).flatten(2)
        return self.output(mixed)

    def _shape(self, mixed: Tensor, new: Tensor, value: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        """alpha V + beta A V - gamma C V: `mixed` is A V (batch, heads, tokens, head_dim), `new` the tokens' own values, `value` all
        -> (batch, tokens, heads x head_dim)."""
        tokens, keys = new.shape[2], value.shape[2]
        mixed, new, value = (x.transpose(1, 2).flatten(2) for x in (mixed, new, value))
        gains = None
        if self.identity_gain is not None and self.softmax_gain is not None and self.centering_gain is not None:
            alpha, beta, gamma = self.identity_gain, self.softmax_gain, self.centering_gain
            gains = alpha.repeat_interleave(self.head_dim), beta.repeat_interleave(self.head_dim), gamma.repeat_interleave(self.head_dim)
        new_of_all = self._for_every_head(new)
        if cache is None and context.starts is None:
            by_blocks = shape_by_blocks(new_of_all, mixed, gains)
            if by_blocks is not None:
                return by_blocks
        if cache is not None and context.starts is None:
            mean = cache.running_sum(new) / torch.arange(keys - tokens + 1, keys + 1, device=new.device)[:, None]
        else:
            mean = causal_mean(value, context.starts, tokens)
        return shape(new_of_all, mixed, self._for_every_head(mean.type_as(mixed)), gains)

    def _for_every_head(self, x: Tensor) -> Tensor:
        """(batch, tokens, kv_heads x head_dim) -> (batch, tokens, heads x head_dim): queries in groups share a head of values."""
        if self.kv_heads == self.heads:
            return x
        return x.unflatten(2, (self.kv_heads, self.head_dim)).repeat_interleave(self.heads // self.kv_heads, dim=2).flatten(2)
