"""Causal self-attention: projections, RoPE, QK-norm and the softmax core."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


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


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (arXiv 2104.09864), each (length, 1, head_dim / 2), float32.

    Made anew in each forward pass rather than kept as buffers: a buffer would be cast to bf16 with the model, and positions
    above 256 are not representable there.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (batch, length, heads, head_dim) by its positions; pairs are (i, i + head_dim / 2), the Hugging Face convention."""
    cosines, sines = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1).type_as(x)


def softcapped_attention(query: Tensor, key: Tensor, value: Tensor, cap: float, mask: Tensor | None) -> Tensor:
    """softmax(c tanh(Q K^T / (c sqrt(d_k))) + M) V, with the scores whole and in float32: no fused kernel caps them.

    query (batch, heads, length, head_dim), key and value (batch, kv_heads, length, head_dim), `mask` as in `Attention.forward`
    -> (batch, heads, length, head_dim).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() / math.sqrt(query.shape[-1])
    scores = cap * torch.tanh(scores / cap)
    if mask is None:
        length = query.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    else:
        scores = scores + mask
    return scores.softmax(dim=-1).type_as(value) @ value


class Attention(nn.Module):
    """Multi-head (or grouped-query) causal attention: concat_h softmax(Norm(X W_Q) Norm(X W_K)^T / sqrt(d_k) + M) X W_V, times W_P."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.kv_heads is not None and config.head_dim is not None and config.qk_norm is not None
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        all_biases = config.biases == "all"
        self.query = Linear(config.width, self.heads * self.head_dim, bias=config.biases != "none")
        self.key = Linear(config.width, self.kv_heads * self.head_dim, bias=config.biases != "none")
        self.value = Linear(config.width, self.kv_heads * self.head_dim, bias=all_biases)
        self.output = Linear(self.heads * self.head_dim, config.width, bias=all_biases)
        # QK-norm comes before RoPE, which keeps norms: the order of the Hugging Face ports.
        self.query_norm = make_norm(config.qk_norm, self.head_dim, config, config.qk_norm_gains == "trainable")
        self.key_norm = make_norm(config.qk_norm, self.head_dim, config, config.qk_norm_gains == "trainable")
        self.softcap = config.attention_softcap

    def forward(self, x: Tensor, x_value: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """x (batch, length, width), from which queries and keys are made, and x_value, from which values -> (batch, length, width).

        `mask` (batch, 1, length, length) is added to the scores: 0 where a query may look, -inf elsewhere, in the dtype of x;
        None means plain causal attention.
        """
        batch, length, _ = x.shape
        query = self.query_norm(self.query(x).view(batch, length, self.heads, self.head_dim))
        key = self.key_norm(self.key(x).view(batch, length, self.kv_heads, self.head_dim))
        value = self.value(x_value).view(batch, length, self.kv_heads, self.head_dim)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if self.softcap is not None:
            mixed = softcapped_attention(query, key, value, self.softcap, mask)
        else:
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv_heads != self.heads
            )
        return self.output(mixed.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))
