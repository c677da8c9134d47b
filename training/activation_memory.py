"""How much of a forward pass is kept for the backward pass: tensor by tensor, in bytes a token."""

from __future__ import annotations

from dataclasses import dataclass

from model.activation_checkpointing import ActivationCheckpointing
from model.config import ModelConfig


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes a token that the backward pass keeps."""

    block: int  # of a block that keeps everything
    selective: int  # of one that keeps its input, products and attention
    full: int  # of one that keeps its input
    head: int  # what is there once: the mask, and what lies between blocks and logits

    def kept(self, depth: int, checkpointing: ActivationCheckpointing) -> int:
        """Of the whole network."""
        full, selective = checkpointing
        return full * self.full + selective * self.selective + (depth - full - selective) * self.block + self.head

    def kept_by_last(self, depth: int, checkpointing: ActivationCheckpointing) -> int:
        """Of what `kept` counts, what the last block does not need beside all that its backward pass has."""
        full, selective = checkpointing
        if full + selective < depth:
            return self.block
        return self.selective - self.full if selective else 0

    def at_recomputing(self, checkpointing: ActivationCheckpointing) -> int:
        """Of the blocks that are recomputed and those before, beside one block's backward pass, at most."""
        full, selective = checkpointing
        return full * self.full + max(0, selective - 1) * self.selective + (self.full if selective else 0)


def activation_bytes(
    config: ModelConfig, sequence_length: int, compute: int, masked: bool, cuda: bool, compiled: bool = False
) -> ActivationBytes:
    """What a network keeps for its backward pass, in bytes a token.

    Counted over the tensors that autograd saves, each once, with the flash form of scaled_dot_product_attention, which keeps
    queries, keys, values, its output and one float32 a head, and no scores.

    Args:
        compute: bytes of an activation: 4 in fp32, 2 in bf16.
        masked: document masks, one additive (length, length) mask a sequence that all blocks share; a window has one for all sequences.
        cuda: RMSNorm is one kernel that keeps its input, not several that keep two float32 tensors; masks are kept by blocks, next to
            nothing.
        compiled: the blocks are, which has norms as on a GPU, and the parts of an activation function made anew from products.
    """
    assert config.kv_heads is not None and config.head_dim is not None and config.mlp_width is not None
    width, queries, keys, hidden = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim, config.mlp_width
    one_kernel = cuda or compiled

    def norm(kind: str | None, size: int, vectors: int, scaled: bool = True, one_kernel: bool = one_kernel) -> int:
        """Kept by a norm of `vectors` vectors with `size` elements in all, besides its output."""
        if kind == "layer_norm":
            return compute * size + 8 * vectors  # input, mean and inverse deviation
        if kind in ("rms_norm", "simple_rms_norm"):
            several = 8 * size if scaled and kind == "rms_norm" else 4 * size  # without a scale only the float32 input
            return (compute * size if one_kernel else several) + 4 * vectors
        return 0

    def norm_on(*places: str) -> str:
        return config.norm if set(places) & set(config.norm_places or ()) else "none"

    after_norm = config.norm if config.block == "post_norm" else "none"
    gain = 0 if config.residual_gain_form == "fixed" else compute * width  # a trainable gain keeps what it multiplies
    scaled = config.qk_norm_gains == "trainable"
    attention = (
        norm(norm_on("query_key", "value"), width, 1)
        + compute * width  # input of the projections
        + norm(config.qk_norm, queries, config.heads, scaled)
        + norm(config.qk_norm, keys, config.kv_heads, scaled)
        + compute * (2 * queries + keys)  # query, output, key
        + (0 if config.is_simplified else compute * keys + gain)  # value, which is the projections' input where it has no map
        + norm(after_norm, width, 1)
    )
    if len({"query_key", "value"} & set(config.norm_places or ())) == 1 and config.norm != "layer_norm" and not one_kernel and compute < 4:
        attention += compute * width  # what is not normed, beside the norm's float32 copy of it
    if config.attention_softcap is None:
        attention += 4 * config.heads  # log-sum-exp
    else:  # the scores' tanh and softmax in float32, the softmax again in the compute dtype; grouped keys and values repeated
        a_score = 8 if compute == 4 else 4 if compiled else 8 + compute
        attention += config.heads * sequence_length * a_score
        attention += 2 * compute * (queries - keys)
    masked = masked or config.attention_window is not None
    if config.attention == "shaped":
        attention += 0 if config.is_simplified else compute * queries  # the sum of the three, which the projection is given
        if config.attention_gains == "trainable":  # the mean, and grouped values repeated
            attention += compute * queries + (compute * queries if keys < queries else 0)
        attention += 8 * keys if masked else 0  # where in the running sum each mean begins
    kept_hidden = {"gelu": 2, "relu": 1, "shaped_relu": 2, "swiglu": 3 if compiled else 4}[config.activation]
    mlp = compute * kept_hidden * hidden + gain + norm(after_norm, width, 1)
    if config.activation == "relu" and compiled:
        mlp += hidden  # one byte for where it is positive
    if config.block != "simplified_parallel" or config.mlp_input_scale != 1.0:  # else it has the projections' input
        mlp += norm(norm_on("mlp"), width, 1) + compute * width
    head = norm(config.norm if config.final_norm else "none", width, 1, one_kernel=cuda) + compute * width
    head += compute * sequence_length if masked and config.attention_softcap is None and not cuda else 0
    head += compute * keys if config.is_simplified else 0  # the first block's values
    if config.first_norm:
        head += norm(config.norm, width, 1)
    # Selective checkpointing: every product, of which the last has no use but where its gain is trained, and is kept unless compiled
    products = queries + keys + hidden * (2 if config.activation == "swiglu" else 1) + (width if gain or not compiled else 0)
    products += 0 if config.is_simplified else keys + width  # values, and the projection
    attended = compute * queries + 4 * config.heads if config.attention_softcap is None else 0
    return ActivationBytes(attention + mlp, compute * (width + products) + attended, compute * width, head)


def pruning_bytes(config: ModelConfig, sequence_length: int, compute: int, fixed: bool) -> int:
    """Bytes a token that a block keeps more of with context pruning: per pair of tokens, the mask in the compute dtype.

    Where decisions are learned it has a gradient: four float32 numbers and a flag that made it; and, as no fused kernel gives a mask its
    gradient, each head's scores.
    """
    if fixed:
        return sequence_length * compute
    return sequence_length * (17 + compute + config.heads * compute)
