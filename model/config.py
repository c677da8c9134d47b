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
# (arXiv 2405.19279, appendix D), and as its authors' released code builds it by default, which differs; and the Shaped Transformer
# (arXiv 2306.17759), whose branches keep variance 1 without norms where init_std is 1 / sqrt(width): lambda^2 + beta^2 = 1.
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
    "shaped_transformer": {
        "attention": "shaped",
        "attention_temperature": 1.0,
        "activation": "shaped_relu",
        "norm_places": [],
        "residual_gain": math.sqrt(1 / 8),
        "skip_gain": math.sqrt(7 / 8),
        "scaled_output_init": False,
    },
}

Block = Literal["pre_norm", "post_norm", "outlier_protected", "simplified", "simplified_parallel"]
Activation = Literal["gelu", "relu", "swiglu", "shaped_relu"]
Parametrization = Literal["standard", "mup", "depth_mup", "complete_p"]
DEPTH_EXPONENTS: dict[Parametrization, float] = {"depth_mup": 0.5, "complete_p": 1.0}  # alpha of arXiv 2505.01618
Norm = Literal["rms_norm", "layer_norm", "simple_rms_norm"]
NormPlace = Literal["query_key", "value", "mlp"]
NORM_PLACES: tuple[NormPlace, ...] = ("query_key", "value", "mlp")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Every field left at None takes the default of its block or its width.

    After construction None means that there is none: of attention_softcap, attention_window, attention_temperature, activation_slopes and
    the base's sizes. No other field is None, and `ModelConfig(**config.to_dict()) == config`.

    Raises `InputError`, naming every wrong field at once.
    """

    width: int
    depth: int
    heads: int
    vocab_size: int
    sequence_length: int  # the longest sequence the model accepts
    kv_heads: int | None = None  # grouped-query attention when below `heads`; default: `heads`
    head_dim: int | None = None  # default: width / heads
    mlp_width: int | None = None  # default: 4 width; SwiGLU: 8/3 width, up to a multiple of 64; with attention_temperature: width
    block: Block = "pre_norm"
    norm: Norm = "rms_norm"  # simple_rms_norm: without a scale
    norm_epsilon: float = 1e-5
    norm_biases: bool | None = None  # of LayerNorm; default: with `biases` all
    positions: Literal["rope", "learned"] = "rope"
    rope_base: float = 10000.0
    activation: Activation = "gelu"
    activation_slopes: tuple[float, float] | None = None  # c+ and c- of shaped_relu: slopes 1 + c / sqrt(width); default: 0, -1
    tied_embeddings: bool = True
    biases: Literal["none", "query_key", "all"] = "none"  # of the linear layers
    init_std: float = 0.02
    attention_softcap: float | None = None  # c: attention scores become c tanh(scores / c); None: as they are
    attention_window: int | None = None  # each query sees itself and the window - 1 keys before it; None: all before it
    attention_gains: Literal["trainable", "fixed"] = "trainable"  # alpha, beta, gamma of shaped attention, each 1 at first
    attention_temperature: float | None = None  # tau0: scores over tau0 sqrt(width head_dim); None: over sqrt(head_dim)
    skip_gain: float = 1.0  # lambda, on what both branches are added to
    # How scales follow the size (model/parametrization.py); mup needs the base width, depth_mup and complete_p the base depth too.
    parametrization: Parametrization = "standard"
    base_width: int | None = None
    base_depth: int | None = None
    base_head_dim: int | None = None  # default: head_dim, so width grows by heads
    first_norm: bool = False  # a norm before the first block's attention, where the block has none
    # The rest default to what the block asks for; `docs/outlier_protected.md` and `docs/signal_propagation.md` say why.
    attention: Literal["softmax", "shaped"] | None = None  # shaped: alpha I + beta softmax - gamma C; default of the simplified blocks
    query_init: Literal["normal", "zero"] | None = None  # zero, of shaped attention without a temperature: softmax starts at C
    norm_places: tuple[NormPlace, ...] | None = None  # what a norm stands before; pre_norm and simplified: all, else none
    qk_norm: Norm | Literal["none"] | None = None  # outlier_protected: rms_norm, or none with an attention_softcap
    qk_norm_gains: Literal["trainable", "frozen"] = "trainable"  # frozen: the scales are 1 and no parameters
    final_norm: bool | None = None  # pre_norm, and simplified with norms
    embedding_multiplier: float | None = None  # blocks without norms: 1 / init_std
    residual_gain: float | None = None  # beta; outlier_protected: 1 / sqrt(depth); simplified, its MLP's: 0.1 sqrt(18 / depth)
    residual_gain_form: Literal["fixed", "scalar", "vector"] | None = None  # outlier_protected, simplified: scalar (trainable)
    mlp_input_scale: float | None = None  # alpha; blocks without norms: pre-activations of unit scale, 1 for ReLU
    scaled_output_init: bool | None = None  # init_std / sqrt(2 depth) for what writes to the residual: pre_norm of gain 1

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise InputError("\n".join(f"model.{problem}" for problem in problems))
        protected, simplified = self.block == "outlier_protected", self.is_simplified
        for name in ("norm_places", "activation_slopes"):  # lists in JSON
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        places = NORM_PLACES if self.block == "pre_norm" or simplified else ()
        places = places if self.norm_places is None else self.norm_places
        unnormed = protected or (simplified and not places)
        # What follows the depth or the width by itself stays at the base's where the parametrization does that instead.
        depth, width = self.base_depth or self.depth, self.base_width or self.width
        unit_scale = 1.0 / (self.init_std * math.sqrt(width))  # MLP input of mean square 1 -> output of mean square 1
        head_dim = self.head_dim or self.width // self.heads
        defaults: dict[str, Any] = {
            "kv_heads": self.heads,
            "head_dim": head_dim,
            "base_head_dim": head_dim if self.base_width else None,
            "mlp_width": self._default_mlp_width(),
            "activation_slopes": (0.0, -1.0) if self.activation == "shaped_relu" else None,
            "attention": "shaped" if simplified else "softmax",
            "query_init": "zero" if self.is_shaped and self.attention_temperature is None else "normal",
            "norm_biases": self.biases == "all",
            "norm_places": places,
            "qk_norm": "rms_norm" if protected and self.attention_softcap is None else "none",
            "final_norm": self.block == "pre_norm" or (simplified and not unnormed),
            "embedding_multiplier": 1.0 / self.init_std if unnormed else 1.0,
            "residual_gain": 1.0 / math.sqrt(depth) if protected else 0.1 * math.sqrt(18 / depth) if simplified else 1.0,
            "residual_gain_form": "scalar" if protected or simplified else "fixed",
            "mlp_input_scale": unit_scale if unnormed and self.activation not in ("relu", "shaped_relu") else 1.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.scaled_output_init is None:
            object.__setattr__(self, "scaled_output_init", self.block == "pre_norm" and self.residual_gain == 1.0)

    @property
    def is_simplified(self) -> bool:
        """SAS or SAS-P: values and projection are the identity."""
        return self.block in ("simplified", "simplified_parallel")

    @property
    def is_shaped(self) -> bool:
        """Attention is shaped: asked for, or by default."""
        return self.attention == "shaped" or (self.attention is None and self.is_simplified)

    @property
    def width_ratio(self) -> float:
        """m_N: width over the base's; 1 in the standard parametrization."""
        return self.width / (self.base_width or self.width)

    @property
    def depth_ratio(self) -> float:
        """m_L: depth over the base's; 1 where the parametrization has no rule for depth."""
        return self.depth / (self.base_depth or self.depth)

    @property
    def depth_exponent(self) -> float:
        """alpha of CompleteP's table: residual branches are multiplied by m_L^-alpha."""
        return DEPTH_EXPONENTS.get(self.parametrization, 0.0)

    def _default_mlp_width(self) -> int:
        if self.attention_temperature is not None:  # the theory of arXiv 2306.17759 has square matrices: variance stays only with them
            return self.width
        return 64 * math.ceil(self.width * 8 / 3 / 64) if self.activation == "swiglu" else 4 * self.width

    def _problems(self) -> list[str]:
        """Every wrong field, as `name: what is wrong`."""
        problems = []
        sizes = ("width", "depth", "heads", "vocab_size", "sequence_length", "kv_heads", "head_dim", "mlp_width", "attention_window")
        for name in (*sizes, "base_width", "base_depth", "base_head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}: {value} is not a positive number")
        scales = ("init_std", "residual_gain", "embedding_multiplier", "mlp_input_scale", "norm_epsilon", "rope_base")
        for name in (*scales, "attention_softcap", "attention_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
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
        if self.norm_places and self.block not in ("pre_norm", "simplified", "simplified_parallel"):
            problems.append(f"norm_places: {self.block} has its norms elsewhere; leave it out, or use block pre_norm")
        if self.block == "simplified_parallel" and self.norm_places and set(self.norm_places) != set(NORM_PLACES):
            problems.append("norm_places: both branches of simplified_parallel share one norm; name all three places, or none: []")
        if self.first_norm and "query_key" in (self.norm_places or (NORM_PLACES if self.block == "pre_norm" else ())):
            problems.append("first_norm: this block has a norm before its attention already; leave it out")
        return problems + self._attention_problems() + self._parametrization_problems()

    def _attention_problems(self) -> list[str]:
        problems = []
        head_dim, kv_heads = self.head_dim or self.width // self.heads, self.kv_heads or self.heads
        if self.is_simplified and (kv_heads != self.heads or kv_heads * head_dim != self.width):
            problems.append(
                f"heads: values of {self.block} are slices of its input, so heads x head_dim has to be width {self.width}, without groups; "
                "leave kv_heads and head_dim out"
            )
        if self.attention_gains == "fixed" and not self.is_shaped:
            problems.append("attention_gains: only shaped attention has them; leave it out, or use attention shaped")
        if self.attention_temperature is not None and self.parametrization != "standard":
            problems.append(f"attention_temperature: {self.parametrization} scales the scores by itself; leave one of the two out")
        if self.activation_slopes is not None and self.activation != "shaped_relu":
            problems.append(f"activation_slopes: {self.activation} has none; leave it out, or use activation shaped_relu")
        if self.activation_slopes is not None and len(self.activation_slopes) != 2:
            problems.append(f"activation_slopes: expected two numbers, c+ and c-, found {list(self.activation_slopes)}")
        return problems

    def _parametrization_problems(self) -> list[str]:
        """A parametrization without its base would silently be the standard one; a base without one would do nothing."""
        needed = {"standard": (), "mup": ("base_width",)}.get(self.parametrization, ("base_width", "base_depth"))
        problems = [
            f"{name}: required with parametrization {self.parametrization}: the size at which it is the standard one"
            for name in needed
            if getattr(self, name) is None
        ]
        if self.depth_exponent and self.is_simplified:
            problems.append(f"parametrization: {self.parametrization} weights both branches by depth, and {self.block} adds one; use mup")
        if self.depth_exponent and self.skip_gain != 1.0:
            problems.append(
                f"skip_gain: under {self.parametrization} branches fall with the depth, so that a skip of {self.skip_gain:g} would leave "
                "nothing of the stream; leave one of the two out"
            )
        allowed = (*needed, "base_head_dim") if needed else ()
        return problems + [
            f"{name}: parametrization {self.parametrization} does not use it; leave it out, or set parametrization"
            for name in ("base_width", "base_depth", "base_head_dim")
            if name not in allowed and getattr(self, name) is not None
        ]

    def warnings(self) -> list[str]:
        """What can be built but is known not to work well, and why: one line each."""
        found = []
        if self.attention_softcap is not None and self.attention == "shaped" and self.query_init == "zero":
            found.append("model.attention_softcap with zero queries: scores start at 0, where a cap does nothing")
        if self.query_init == "zero" and self.qk_norm != "none":
            found.append(
                f"model.query_init zero with qk_norm: a norm's derivative at 0 is {self.norm_epsilon**-0.5:.0f}, so that the first "
                "gradients are nearly all of the queries and attention does not stay near the identity; set query_init: normal"
            )
        if self.is_simplified and self.attention == "softmax":
            found.append(
                f"model.attention softmax in {self.block}: without a skip around it tokens are alike after a few layers "
                "(python -m analysis signal); use shaped"
            )
        if self.width_ratio != 1.0 and self.mlp_width != self._default_mlp_width():
            found.append(
                f"model.mlp_width {self.mlp_width} under {self.parametrization}, which takes it to be as many widths at every width: "
                "let it grow along"
            )
        if self.block != "outlier_protected":
            return found
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


SMALLEST_ALPHA = 1.01  # of the sparse sigmoid, above 1: closer to the logistic sigmoid, powers of 1 / (alpha - 1) round too much


@dataclass(frozen=True)
class PruningConfig:
    """What pruning adds to a network.

    Attributes:
        rank: r, of the interaction queries and keys.
        normalize: RMSNorm of Q_int and K_int, with a trainable gain a dimension.
        scale: that gain at first: products of unrelated vectors scatter by scale^2.
        rope: rotate Q_int and K_int by position, so that a decision can depend on the distance.
        age_slope: at first, of a trainable multiple of log(k - j) that is added to each product, so that a decision depends on how long
            ago a token was; None: none, as in the paper.
        bias: beta at first.
        sinks: tokens at the start of a text that are always kept.
        window: the nearest so many tokens, a token itself included, are always kept.
        propagate_in_depth: what a layer drops, all later layers drop.
    """

    rank: int = 64
    normalize: bool = True
    scale: float = 1.0
    rope: bool = False
    age_slope: float | None = None
    bias: float = 4.0
    sinks: int = 1
    window: int = 8
    propagate_in_depth: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("sinks", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise InputError(f"context_pruning.{name}: {getattr(self, name)}, expected at least {least}")
        if self.rope and self.rank % 2:
            raise InputError(f"context_pruning.rank: {self.rank} is odd, and rope rotates pairs")
