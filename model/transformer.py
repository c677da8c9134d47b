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

IGNORED_TARGET = -100  # a target with this value is not predicted and not counted


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
        self.unembedding = Linear(config.width, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.unembedding.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Logits, or the summed loss.

        Args:
            tokens: (batch, length), int64.
            targets: (batch, length), int64; `IGNORED_TARGET` where nothing is to be predicted.
            document_ids: (batch, length), int: attention stays within equal ids.

        Returns:
            Without targets: logits (batch, length, vocab_size) in the model's dtype. With targets: the sum (not the mean) over
            valid targets of the cross-entropy in nats, a float32 scalar, so that any split of a batch adds up to the same loss.

        Raises:
            InputError: the sequence is longer than the model accepts.
        """
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
        logits = self.unembedding(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Who may look at whom when documents are packed: causal, and within the same document.

    document_ids (batch, length) -> (batch, 1, length, length) of `dtype`: 0 where the query (row) sees the key (column), -inf
    elsewhere. Additive, since every block would turn a boolean mask into this anew, and keep it.
    """
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    allowed = (document_ids[:, :, None] == document_ids[:, None, :]) & causal
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)[:, None]
