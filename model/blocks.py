"""The blocks: pre-norm, post-norm, and Outlier-Protected (arXiv 2405.19279, appendix B).

All are two residual branches in sequence, and differ in what stands around them:

    pre_norm             X + MHA(Norm(X))               Xhat + MLP(Norm(Xhat))
    post_norm            Norm(X + MHA(X))               Norm(Xhat + MLP(Xhat))
    outlier_protected    X + beta MHA(X)                Xhat + beta MLP(alpha Xhat)        with QK-norm inside MHA

so one class holds them: `ModelConfig` sets norms to none and gains to one where a block has none. The norms of pre_norm stand
on three inputs, of queries and keys, of values and of the MLP, and `norm_places` takes any of them away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention, Linear, make_norm
from model.config import ModelConfig


class MLP(nn.Module):
    """One hidden layer with GELU or ReLU, or SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mlp_width is not None
        self.activation = config.activation
        self.up = Linear(config.width, config.mlp_width, bias=config.biases == "all")
        self.gate = Linear(config.width, config.mlp_width, bias=config.biases == "all") if config.activation == "swiglu" else None
        self.down = Linear(config.mlp_width, config.width, bias=config.biases == "all")

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, width) -> (batch, length, width)."""
        hidden = self.up(x)
        if self.gate is not None:
            hidden = F.silu(self.gate(x)) * hidden
        elif self.activation == "relu":
            hidden = F.relu(hidden)
        else:
            hidden = F.gelu(hidden)
        return self.down(hidden)


class Block(nn.Module):
    """One layer. Its input is the residual stream that enters attention: the place where outliers are measured."""

    def __init__(self, config: ModelConfig, first: bool = False) -> None:
        super().__init__()
        assert config.residual_gain is not None and config.mlp_input_scale is not None and config.norm_places is not None
        places = config.norm_places
        if first and config.first_norm:
            places = ("query_key", "value", *places)
        self.normed_query_key, self.normed_value = "query_key" in places, "value" in places
        self.attention_norm = make_norm(config.norm if self.normed_query_key or self.normed_value else "none", config.width, config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config.norm if "mlp" in places else "none", config.width, config)
        self.mlp = MLP(config)
        after = config.norm if config.block == "post_norm" else "none"
        self.after_attention_norm = make_norm(after, config.width, config)
        self.after_mlp_norm = make_norm(after, config.width, config)
        self.mlp_input_scale = config.mlp_input_scale  # alpha
        # beta: a plain number, one trainable number, or a trainable number a channel (LayerScale)
        if config.residual_gain_form == "fixed":
            self.attention_gain = self.mlp_gain = config.residual_gain
        else:
            size = 1 if config.residual_gain_form == "scalar" else config.width
            self.attention_gain = nn.Parameter(torch.empty(size))
            self.mlp_gain = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """x (batch, length, width) -> (batch, length, width); `rotary` and `mask` as in `Attention`."""
        normed = self.attention_norm(x)
        mixed = self.attention(normed if self.normed_query_key else x, normed if self.normed_value else x, rotary, mask)
        x = self.after_attention_norm(_add(x, mixed, self.attention_gain))
        return self.after_mlp_norm(_add(x, self.mlp(_scaled(self.mlp_norm(x), self.mlp_input_scale)), self.mlp_gain))


def _add(x: Tensor, branch: Tensor, gain: Tensor | float) -> Tensor:
    """x + gain branch, in one pass over memory."""
    return torch.addcmul(x, branch, gain) if isinstance(gain, Tensor) else torch.add(x, branch, alpha=gain)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor
