"""`ModelConfig`, which says everything about a network's shape, and the table of named sizes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from model.errors import InputError

# width, depth, heads: what a size name stands for. Names follow the non-embedding parameters 12 width^2 depth,
# but for 130m and 320m, which the outlier literature names with their embeddings.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"width": 128, "depth": 4, "heads": 4},
    "10m": {"width": 320, "depth": 8, "heads": 5},
    "130m": {"width": 768, "depth": 12, "heads": 12},
    "320m": {"width": 1024, "depth": 24, "heads": 16},
    "1b": {"width": 2048, "depth": 24, "heads": 16},
    "7b": {"width": 4096, "depth": 32, "heads": 32},
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Every field left at None takes the default of its block or its width.

    After construction no field is None: `ModelConfig(width=128, depth=4, heads=4, ...)` is complete, and
    `ModelConfig(**config.to_dict()) == config`.

    Raises `InputError`, naming every wrong field at once.
    """

    width: int
    depth: int
    heads: int
    vocab_size: int
    sequence_length: int  # the longest sequence the model accepts
    kv_heads: int | None = None  # grouped-query attention when below `heads`; default: `heads`
    head_dim: int | None = None  # default: width / heads
    mlp_width: int | None = None  # default: 4 width; SwiGLU: 8/3 width, up to a multiple of 64
    block: Literal["pre_norm", "outlier_protected"] = "pre_norm"
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_epsilon: float = 1e-5
    positions: Literal["rope", "learned"] = "rope"
    rope_base: float = 10000.0
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    tied_embeddings: bool = True
    biases: bool = False
    init_std: float = 0.02
    # The rest default to what the block asks for; `docs/outlier_protected.md` says why.
    qk_norm: Literal["none", "rms_norm", "layer_norm"] | None = None  # outlier_protected: rms_norm
    final_norm: bool | None = None  # outlier_protected: no
    embedding_multiplier: float | None = None  # outlier_protected: 1 / init_std
    residual_gain: float | None = None  # beta; outlier_protected: 1 / sqrt(depth)
    residual_gain_form: Literal["fixed", "scalar", "vector"] | None = None  # outlier_protected: scalar (trainable)
    mlp_input_scale: float | None = None  # alpha; outlier_protected: pre-activations of unit scale, 1 for ReLU

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise InputError("\n".join(f"model.{problem}" for problem in problems))
        protected = self.block == "outlier_protected"
        unit_scale = 1.0 / (self.init_std * math.sqrt(self.width))  # MLP input of mean square 1 -> output of mean square 1
        defaults: dict[str, Any] = {
            "kv_heads": self.heads,
            "head_dim": self.width // self.heads,
            "mlp_width": 64 * math.ceil(self.width * 8 / 3 / 64) if self.activation == "swiglu" else 4 * self.width,
            "qk_norm": "rms_norm" if protected else "none",
            "final_norm": not protected,
            "embedding_multiplier": 1.0 / self.init_std if protected else 1.0,
            "residual_gain": 1.0 / math.sqrt(self.depth) if protected else 1.0,
            "residual_gain_form": "scalar" if protected else "fixed",
            "mlp_input_scale": unit_scale if protected and self.activation != "relu" else 1.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _problems(self) -> list[str]:
        """Every wrong field, as `name: what is wrong`."""
        problems = []
        for name in ("width", "depth", "heads", "vocab_size", "sequence_length", "kv_heads", "head_dim", "mlp_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}: {value} is not a positive number")
        if problems:
            return problems
        if self.head_dim is None and self.width % self.heads:
            problems.append(f"heads: width {self.width} does not divide by {self.heads} heads; set head_dim or another number")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            problems.append(f"kv_heads: {self.heads} heads do not divide into {self.kv_heads} groups")
        if self.positions == "rope" and (self.head_dim or self.width // self.heads) % 2:
            problems.append("head_dim: RoPE rotates pairs, so it must be even")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `ModelConfig(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)
