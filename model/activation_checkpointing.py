"""What a block keeps of its forward pass for the backward pass: everything, its products, or its input alone.

Selective checkpointing recomputes what is cheap: norms, activation functions, gains and rotations, which go through memory once, are
made anew in the backward pass, and the matrix products and attention, which take the time, are not.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

_aten = torch.ops.aten
# Batched products are not among them: they make scores, one for each pair of tokens.
PRODUCTS_AND_ATTENTION = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
]

# `context_fn` of torch.utils.checkpoint
keep_products_and_attention = partial(create_selective_checkpoint_contexts, PRODUCTS_AND_ATTENTION)


class ActivationCheckpointing(NamedTuple):
    """The first `full` blocks keep their input alone; the `selective` blocks behind them also what products and attention gave."""

    full: int = 0
    selective: int = 0


NOTHING_RECOMPUTED = ActivationCheckpointing()
