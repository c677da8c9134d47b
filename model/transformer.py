"""The decoder: embed, blocks, head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Embedding, Linear, make_norm, rotary_tables
from model.blocks import Block
from model.config import ModelConfig
from model.errors import InputError
from model.linear_cross_entropy import IGNORED_TARGET as IGNORED_TARGET
from model.linear_cross_entropy import FrozenHead, linear_product


class Unembedding(Linear):
    """The map from hidden states to logits; or, with the loss's derivative at the logits given, what gives its gradient."""

    def forward(self, hidden: Tensor, frozen: FrozenHead | None = None) -> Tensor:
        """hidden (batch, length, width) -> logits (batch, length, vocabulary), or with `frozen` a scalar: see `linear_product`.

        Both happen here, and not outside, since ZeRO-3 gathers a weight for the time of its module's forward and backward.
        """
        return super().forward(hidden) if frozen is None else linear_product(hidden, self.weight, frozen)


class Transformer(nn.Module):
    """A decoder-only language model. Weights are unset until `parametrization.initialize` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.embedding_multiplier is not None and config.head_dim is not None
        self.config = config
        self.activation_checkpointing = False  # set by training
        self.watch: Callable[[str, Tensor], None] | None = None  # sees the residual stream: see model/activation_statistics.py
        self.embedding = Embedding(config.vocab_size, config.width)
        self.position_embedding = Embedding(config.sequence_length, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.depth))
        self.final_norm = make_norm(config.norm if config.final_norm else "none", config.width, config)
        self.unembedding = Unembedding(config.width, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.unembedding.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, document_ids: Tensor | None = None, frozen: FrozenHead | None = None
    ) -> Tensor:
        """Logits, or the summed loss.

        Args:
            tokens: (batch, length), int64.
            targets: (batch, length), int64; `IGNORED_TARGET` where nothing is to be predicted.
            document_ids: (batch, length), int: attention stays within equal ids.
            frozen: the loss's derivative at the logits, taken at other weights; what is returned is then `linear_product`.

        Returns:
            Without targets: logits (batch, length, vocab_size) in the model's dtype. With targets: the sum (not the mean) over
            valid targets of the cross-entropy in nats, a float32 scalar, so that any split of a batch adds up to the same loss.

        Raises:
            InputError: the sequence is longer than the model accepts.
        """
        hidden = self.hidden_states(tokens, document_ids)
        if frozen is not None:
            return self.unembedding(hidden, frozen)
        logits = self.unembedding(hidden)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")

    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """What the unembedding is given, (batch, length, width); arguments as in `forward`."""
        length = tokens.shape[1]
        if length > self.config.sequence_length:
            raise InputError(
                f"sequence of {length} tokens: this model accepts at most {self.config.sequence_length} (model.sequence_length)"
            )
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(length, device=tokens.device))
        if self.config.embedding_multiplier != 1.0:
            x = x * self.config.embedding_multiplier
        rotary = None
        if self.config.positions == "rope":
            assert self.config.head_dim is not None
            rotary = rotary_tables(length, self.config.head_dim, self.config.rope_base, tokens.device)
        mask = None if document_ids is None else document_mask(document_ids, x.dtype)
        for i, block in enumerate(self.blocks):
            if self.watch is not None:
                self.watch(f"layer {i}", x)
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
            else:
                x = block(x, rotary, mask)
        x = self.final_norm(x)
        if self.watch is not None:
            self.watch("unembedding", x)
        return x


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Who may look at whom when documents are packed: causal, and within the same document.

    document_ids (batch, length) -> (batch, 1, length, length) of `dtype`: 0 where the query (row) sees the key (column), -inf
    elsewhere. Additive, since every block would turn a boolean mask into this anew, and keep it.
    """
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    allowed = (document_ids[:, :, None] == document_ids[:, None, :]) & causal
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)[:, None]
