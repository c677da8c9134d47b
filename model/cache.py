"""What cached decoding keeps of the tokens that were read before: keys, values, and for shaped attention the sum of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.shaped_attention import running_sums


@dataclass
class LayerCache:
    """Of one layer. keys and values: (batch, kv_heads, tokens, head_dim); value_sum: (batch, kv_heads x head_dim), at least float32."""

    keys: Tensor | None = None
    values: Tensor | None = None
    value_sum: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns those of all tokens so far."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=2)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=2)
        return self.keys, self.values

    def running_sum(self, values: Tensor) -> Tensor:
        """Sum of the values (batch, tokens, kv_heads x head_dim) up to each of the new tokens, at least float32; kept for the next call."""
        sums = running_sums(values.to(torch.promote_types(values.dtype, torch.float32)))
        if self.value_sum is not None:
            sums += self.value_sum[:, None]
        self.value_sum = sums[:, -1].clone()
        return sums

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order: what beam search asks for."""
        for name in ("keys", "values", "value_sum"):
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, kept.index_select(0, rows))


@dataclass
class Cache:
    """Of a whole network, layer by layer; `Transformer.forward` fills it."""

    is_compileable = is_croppable = False  # transformers asks these of whatever cache `generate` is given

    make_layer: Callable[[], Any] = LayerCache  # or PrunedLayer, where layers drop tokens (model/pruned_cache.py)
    layers: list[Any] = field(default_factory=list)
    length: int = 0  # tokens so far

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """`length`, by transformers' name."""
        return self.length

    def layer(self, number: int) -> Any:
        if number == len(self.layers):
            self.layers.append(self.make_layer())
        return self.layers[number]

    def reorder(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.reorder(rows)
