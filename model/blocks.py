"""The blocks: pre-norm, post-norm, Outlier-Protected (arXiv 2405.19279, appendix B), and simplified (SAS and SAS-P, arXiv 2311.01906).

The first three are two residual branches in sequence, and differ in what stands around them:

    pre_norm               X + MHA(Norm(X))               Xhat + MLP(Norm(Xhat))
    post_norm              Norm(X + MHA(X))               Norm(Xhat + MLP(Xhat))
    outlier_protected      X + beta MHA(X)                Xhat + beta MLP(alpha Xhat)        with QK-norm inside MHA
    simplified             MHA(Norm(X))                   Xhat + beta MLP(Norm(Xhat))        MHA shaped, values and projection = I
    simplified_parallel    MHA(Norm(X)) + beta MLP(Norm(X))                                  likewise; one norm serves both

so one class holds them: `ModelConfig` sets norms to none and gains to one where a block has none. The norms stand on three inputs, of
queries and keys, of values and of the MLP, and `norm_places` takes any of them away. `skip_gain` is a factor on the skips, and a
parametrization that follows the depth multiplies the branches by a plain number.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.activation_checkpointing import keep_products_and_attention
from model.attention import Attention, Context, Linear, make_norm
from model.cache import LayerCache
from model.config import ModelConfig


def shaped_relu(x: Tensor, slopes: tuple[float, float], width: int) -> Tensor:
    """s+ max(x, 0) + s- min(x, 0), s = 1 + c / sqrt(width) (arXiv 2306.17759), over its root mean square at x ~ N(0, 1)."""
    positive, negative = (1.0 + c / math.sqrt(width) for c in slopes)
    scale = math.sqrt(2.0 / (positive**2 + negative**2))
    return scale * negative * x + scale * (positive - negative) * F.relu(x)


class MLP(nn.Module):
    """One hidden layer with GELU, ReLU or the shaped ReLU, or SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mlp_width is not None
        self.activation, self.slopes, self.width = config.activation, config.activation_slopes, config.width
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
        elif self.slopes is not None:
            hidden = shaped_relu(hidden, self.slopes, self.width)
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
        self.simplified, self.parallel = config.is_simplified, config.block == "simplified_parallel"
        self.normed_query_key, self.normed_value = "query_key" in places, "value" in places
        self.attention_norm = make_norm(config.norm if self.normed_query_key or self.normed_value else "none", config.width, config)
        self.attention = Attention(config, first)
        self.mlp_norm = make_norm(config.norm if "mlp" in places and not self.parallel else "none", config.width, config)
        self.mlp = MLP(config)
        after = config.norm if config.block == "post_norm" else "none"
        self.after_attention_norm = make_norm(after, config.width, config)
        self.after_mlp_norm = make_norm(after, config.width, config)
        self.mlp_input_scale = config.mlp_input_scale  # alpha
        self.skip_gain = config.skip_gain  # lambda
        self.multiplier = config.depth_ratio**-config.depth_exponent  # m_L^-alpha
        # beta: a plain number, one trainable number, or a trainable number a channel (LayerScale)
        if config.residual_gain_form == "fixed":
            self.attention_gain = self.mlp_gain = config.residual_gain
        else:
            size = 1 if config.residual_gain_form == "scalar" else config.width
            self.attention_gain = None if self.simplified else nn.Parameter(torch.empty(size))
            self.mlp_gain = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None, selective: bool = False) -> Tensor:
        """x (batch, tokens, width) -> (batch, tokens, width); `selective`: model/activation_checkpointing.py, here so that compiling a
        block compiles the recomputing too."""
        if selective:
            return checkpoint(self._forward, x, context, use_reentrant=False, context_fn=keep_products_and_attention)
        return self._forward(x, context, cache)

    def _forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        normed = self.attention_norm(x)
        mixed = self.attention(normed if self.normed_query_key else x, normed if self.normed_value else x, context, cache)
        if self.simplified:
            x, mlp_input = mixed, normed if self.parallel else self.mlp_norm(mixed)
        else:
            x = self.after_attention_norm(self._add(x, mixed, self.attention_gain))
            mlp_input = self.mlp_norm(x)
        return self.after_mlp_norm(self._add(x, self.mlp(_scaled(mlp_input, self.mlp_input_scale)), self.mlp_gain))

    def _add(self, x: Tensor, branch: Tensor, gain: Tensor | float | None) -> Tensor:
        """lambda x + m_L^-alpha gain branch, the sum in one pass over memory."""
        assert gain is not None  # simplified blocks have none for attention, and do not add it
        x = _scaled(x, self.skip_gain)
        if isinstance(gain, Tensor):
            return torch.addcmul(x, branch, gain, value=self.multiplier)
        return torch.add(x, branch, alpha=self.multiplier * gain)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor
