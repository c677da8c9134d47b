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

# The Outlier-Protected network as its paper describes it for CodeParrot, the one setting that it gives in full
# (arXiv 2405.19279, appendix D), and as its authors' released code builds it by default, which differs.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "block": "outlier_protected",
        "activation": "relu",
        "positions": "learned",
        "tied_embeddings": False,
        "residual_gain": 0.3,
        "residual_gain_form": "fixed",
    },
    "released_code": {
        "block": "outlier_protected",
        "norm": "layer_norm",
        "norm_biases": True,
        "activation": "relu",
        "positions": "learned",
        "biases": "query_key",
        "residual_gain": 0.2,
        "residual_gain_form": "fixed",
        "first_norm": True,
        "final_norm": True,
        "embedding_multiplier": 1.0,
    },
}

Norm = Literal["rms_norm", "layer_norm", "simple_rms_norm"]
NormPlace = Literal["query_key", "value", "mlp"]
NORM_PLACES: tuple[NormPlace, ...] = ("query_key", "value", "mlp")


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
    block: Literal["pre_norm", "post_norm", "outlier_protected"] = "pre_norm"
    norm: Norm = "rms_norm"  # simple_rms_norm: without a scale
    norm_epsilon: float = 1e-5
    norm_biases: bool | None = None  # of LayerNorm; default: with `biases` all
    positions: Literal["rope", "learned"] = "rope"
    rope_base: float = 10000.0
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    tied_embeddings: bool = True
    biases: Literal["none", "query_key", "all"] = "none"  # of the linear layers
    init_std: float = 0.02
    attention_softcap: float | None = None  # c: attention scores become c tanh(scores / c); None: as they are
    first_norm: bool = False  # a norm before the first block's attention, where the block has none
    # The rest default to what the block asks for; `docs/outlier_protected.md` says why.
    norm_places: tuple[NormPlace, ...] | None = None  # what a norm stands before; pre_norm: all, else none
    qk_norm: Norm | Literal["none"] | None = None  # outlier_protected: rms_norm, or none with an attention_softcap
    qk_norm_gains: Literal["trainable", "frozen"] = "trainable"  # frozen: the scales are 1 and no parameters
    final_norm: bool | None = None  # pre_norm alone
    embedding_multiplier: float | None = None  # outlier_protected: 1 / init_std
    residual_gain: float | None = None  # beta; outlier_protected: 1 / sqrt(depth)
    residual_gain_form: Literal["fixed", "scalar", "vector"] | None = None  # outlier_protected: scalar (trainable)
    mlp_input_scale: float | None = None  # alpha; outlier_protected: pre-activations of unit scale, 1 for ReLU
    scaled_output_init: bool | None = None  # init_std / sqrt(2 depth) for what writes to the residual: pre_norm of gain 1

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise InputError("\n".join(f"model.{problem}" for problem in problems))
        protected = self.block == "outlier_protected"
        if self.norm_places is not None:  # a list in JSON
            object.__setattr__(self, "norm_places", tuple(self.norm_places))
        unit_scale = 1.0 / (self.init_std * math.sqrt(self.width))  # MLP input of mean square 1 -> output of mean square 1
        defaults: dict[str, Any] = {
            "kv_heads": self.heads,
            "head_dim": self.width // self.heads,
            "mlp_width": 64 * math.ceil(self.width * 8 / 3 / 64) if self.activation == "swiglu" else 4 * self.width,
            "norm_biases": self.biases == "all",
            "norm_places": NORM_PLACES if self.block == "pre_norm" else (),
            "qk_norm": "rms_norm" if protected and self.attention_softcap is None else "none",
            "final_norm": self.block == "pre_norm",
            "embedding_multiplier": 1.0 / self.init_std if protected else 1.0,
            "residual_gain": 1.0 / math.sqrt(self.depth) if protected else 1.0,
            "residual_gain_form": "scalar" if protected else "fixed",
            "mlp_input_scale": unit_scale if protected and self.activation != "relu" else 1.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.scaled_output_init is None:
            object.__setattr__(self, "scaled_output_init", self.block == "pre_norm" and self.residual_gain == 1.0)

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
        if self.norm_places and len(set(self.norm_places)) < len(self.norm_places):
            problems.append(f"norm_places: {list(self.norm_places)} names a place twice")
        if self.norm_places and self.block != "pre_norm":
            problems.append(f"norm_places: {self.block} has its norms elsewhere; leave it out, or use block pre_norm")
        if self.first_norm and "query_key" in (self.norm_places or (NORM_PLACES if self.block == "pre_norm" else ())):
            problems.append("first_norm: this block has a norm before its attention already; leave it out")
        return problems

    def warnings(self) -> list[str]:
        """What can be built but is known not to work well, and why: one line each."""
        if self.block != "outlier_protected":
            return []
        found = []
        if self.qk_norm == "none" and self.attention_softcap is None:
            found.append(
                "model.qk_norm none without model.attention_softcap: nothing keeps attention's entropy up, and the paper's 130M network "
                "failed to train so (arXiv 2405.19279, appendix E.2); set qk_norm: rms_norm, or attention_softcap: 30"
            )
        assert self.residual_gain is not None
        if self.residual_gain >= 1.0:
            found.append(
                f"model.residual_gain {self.residual_gain:g}: without norms the branches must be weighted down, by about 1 / sqrt(depth) = "
                f"{1 / math.sqrt(self.depth):.2g}, or the residual stream grows with every block"
            )
        if self.activation == "swiglu":
            found.append(
                "model.activation swiglu: its product of two projections makes outliers of its own; the paper's block has none (gelu)"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `ModelConfig(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)
