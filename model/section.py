"""The `model` section of a recipe: the network as a person writes it down. `ModelSection.config` makes the `ModelConfig` of it."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from model.config import PRESETS, SIZES, Activation, Block, ModelConfig, Norm, NormPlace, Parametrization
from model.errors import InputError


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_is_a_number(cls, value: Any, field: ValidationInfo) -> Any:
        """To pydantic true is 1, also inside a list; where a number is meant it is a slip."""
        kinds = _kinds(cls.model_fields[str(field.field_name)].annotation)
        if kinds & {int, float} and bool not in kinds and any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise PydanticCustomError("number", "Input should be a number")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Every type that an annotation names."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation) if isinstance(part, type) or get_args(part)))


class ModelSection(Section):
    """The network: a size and a preset of the tables in model/config.py, or neither; any other field overrides theirs."""

    size: str | None = Field(default=None, description=f"Width, depth and heads: one of {', '.join(SIZES)}.")
    preset: Literal["paper", "released_code", "shaped_transformer"] | None = Field(
        default=None,
        description="The Outlier-Protected network as its paper has it for CodeParrot, or as its authors' code builds it; "
        "or the Shaped Transformer, with init_std 1 / sqrt(width) and embeddings of variance 1.",
    )
    pretrained: str | None = Field(
        default=None,
        description="Start from a decoder of Hugging Face instead: a hub name, a folder, a GGUF file, or package:NAME for the GGUF file "
        "in an installed Python package. No other field but sequence_length goes with it.",
    )
    width: int | None = Field(default=None, ge=1, description="Width of the residual stream.")
    depth: int | None = Field(default=None, ge=1, description="Number of blocks.")
    heads: int | None = Field(default=None, ge=1, description="Number of query heads.")
    sequence_length: int | None = Field(
        default=None, ge=1, description="Longest sequence the model accepts; default: training.sequence_length."
    )
    kv_heads: int | None = Field(default=None, ge=1, description="Key and value heads, for grouped-query attention; default: heads.")
    head_dim: int | None = Field(default=None, ge=1, description="Width of a head; default: width / heads.")
    mlp_width: int | None = Field(
        default=None,
        ge=1,
        description="Hidden width of the MLP; default: 4 width, 8/3 width for SwiGLU, or width with attention_temperature.",
    )
    block: Block = Field(
        default="pre_norm", description="simplified: SAS, no attention skip, values and projection are the identity; _parallel: SAS-P."
    )
    norm: Norm = Field(default="rms_norm", description="simple_rms_norm has no scale.")
    norm_epsilon: float = Field(default=1e-5, gt=0)
    norm_biases: bool | None = Field(default=None, description="Of LayerNorm; default: with biases all.")
    norm_places: list[NormPlace] | None = Field(
        default=None, description="pre_norm, simplified: which inputs a norm stands before; default: all of query_key, value and mlp."
    )
    first_norm: bool = Field(default=False, description="A norm before the first block's attention, where the block has none.")
    positions: Literal["rope", "learned"] = "rope"
    rope_base: float = Field(default=10000.0, gt=0)
    activation: Activation = "gelu"
    activation_slopes: tuple[float, float] | None = Field(
        default=None, description="c+ and c- of shaped_relu, whose slopes are 1 + c / sqrt(width); default: 0 and -1."
    )
    tied_embeddings: bool = Field(default=True, description="The unembedding shares the embedding's weight.")
    biases: Literal["none", "query_key", "all"] = Field(default="none", description="Of the linear layers.")
    init_std: float = Field(default=0.02, gt=0, description="Standard deviation of the initial weights.")
    scaled_output_init: bool | None = Field(
        default=None, description="What writes to the residual stream starts at init_std / sqrt(2 depth); default: pre_norm of gain 1."
    )
    qk_norm: Norm | Literal["none"] | None = Field(
        default=None, description="Norm of queries and keys; outlier_protected: rms_norm, or none with attention_softcap."
    )
    qk_norm_gains: Literal["trainable", "frozen"] = Field(default="trainable", description="frozen: the scales of QK-norm stay at 1.")
    attention_softcap: float | None = Field(
        default=None, gt=0, description="c: attention scores become c tanh(scores / c), and are held whole; default: as they are."
    )
    attention: Literal["softmax", "shaped"] | None = Field(
        default=None,
        description="shaped: alpha I + beta softmax - gamma C, C the softmax of equal scores; default of the simplified blocks.",
    )
    attention_gains: Literal["trainable", "fixed"] = Field(
        default="trainable", description="alpha, beta and gamma of shaped attention, one each a head, 1 at first."
    )
    attention_temperature: float | None = Field(
        default=None, gt=0, description="tau0: scores over tau0 sqrt(width head_dim) instead of sqrt(head_dim)."
    )
    query_init: Literal["normal", "zero"] | None = Field(
        default=None, description="Initial query weights; default: zero for shaped attention without a temperature, so that softmax is C."
    )
    attention_window: int | None = Field(
        default=None,
        ge=1,
        description="Each token attends to itself and the attention_window - 1 tokens before it; default: all previous tokens.",
    )
    skip_gain: float = Field(default=1.0, description="lambda: factor on the residual stream before a branch is added.")
    parametrization: Parametrization = Field(
        default="standard",
        description="How scales follow the size: mup by width, depth_mup and complete_p by depth too; these need the base.",
    )
    base_width: int | None = Field(default=None, ge=1, description="Width at which the parametrization is the standard one.")
    base_depth: int | None = Field(default=None, ge=1, description="Depth at which it is: depth_mup, complete_p.")
    base_head_dim: int | None = Field(
        default=None, ge=1, description="Scores over head_dim / sqrt(base_head_dim); default: head_dim, so that width grows by heads."
    )
    final_norm: bool | None = Field(
        default=None,
        description="Norm before the unembedding; default: true for pre_norm and for simplified blocks with norms, else false.",
    )
    embedding_multiplier: float | None = Field(
        default=None, gt=0, description="Factor on the embeddings; blocks without norms: 1 / init_std."
    )
    residual_gain: float | None = Field(
        default=None,
        gt=0,
        description="beta, on both branches; outlier_protected: 1 / sqrt(depth); simplified, its MLP alone: 0.1 sqrt(18 / depth).",
    )
    residual_gain_form: Literal["fixed", "scalar", "vector"] | None = Field(
        default=None, description="A constant, a trainable number or a trainable vector; outlier_protected, simplified: scalar."
    )
    mlp_input_scale: float | None = Field(
        default=None,
        gt=0,
        description="alpha, on the MLP's input; blocks without norms: what gives pre-activations unit scale, 1 for ReLU.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, fields: Any) -> Any:
        """Add what the preset and the size stand for, where the recipe itself says nothing."""
        if isinstance(fields, dict):
            fields = dict(fields)
            for field, (_, value) in stands_for(fields.get("preset"), fields.get("size")).items():
                fields.setdefault(field, value)
            width = fields.get("width")
            if fields.get("preset") == "shaped_transformer" and isinstance(width, int) and width > 0:  # what its theory is about
                std = fields.setdefault("init_std", width**-0.5)
                if isinstance(std, int | float) and std > 0:
                    fields.setdefault("embedding_multiplier", 1.0 / std)
        return fields

    def config(self, vocab_size: int, sequence_length: int) -> ModelConfig:
        """The network that this asks for; `sequence_length` is what it accepts where the section does not say. Raises InputError."""
        fields = self.model_dump(exclude={"size", "preset", "pretrained"}, exclude_none=True)
        return ModelConfig(vocab_size=vocab_size, **{"sequence_length": sequence_length, **fields})


def stands_for(preset: Any, size: Any) -> dict[str, tuple[str, Any]]:
    """Field -> (which name brings it, value): what a preset and a size of model/config.py say; unknown names say nothing."""
    found: dict[str, tuple[str, Any]] = {}
    for origin, name, table in (("size", size, SIZES), ("preset", preset, PRESETS)):
        if isinstance(name, str):
            found.update({field: (f"{origin} {name}", value) for field, value in table.get(name, {}).items()})
    return found


def resizing(section: ModelSection, depth: int | None = None, width: int | None = None) -> dict[str, int]:
    """What changes in a section that names its width for another size: heads keep their width and grow in number, a given MLP width
    grows along. Raises InputError where that leaves no whole number."""
    changes = {} if depth is None else {"depth": depth}
    if width is not None:
        assert section.width is not None
        for field in ("heads", "kv_heads", "mlp_width"):
            value = getattr(section, field)
            if value is not None:
                changes[field], rest = divmod(value * width, section.width)
                if rest or not changes[field]:
                    raise InputError(f"model.width: {width} does not make whole {field}: {value} at width {section.width}")
        changes["width"] = width
    return changes
