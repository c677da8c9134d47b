"""The decoder: embed, blocks, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.activation_checkpointing import ActivationCheckpointing
from model.attention import Context, Embedding, Linear, make_norm, rotary_tables
from model.blocks import Block
from model.cache import Cache
from model.config import ModelConfig
from model.errors import InputError
from model.linear_cross_entropy import IGNORED_TARGET as IGNORED_TARGET
from model.linear_cross_entropy import FrozenHead, linear_cross_entropy, linear_product
from model.masks import attention_mask, block_mask, first_keys, has_block_kernel


class Unembedding(Linear):
    """The map from hidden states to logits, and the loss behind it, which never has all logits at once.

    Attributes:
        kept_logits: where the logits behind a loss are to be put, (batch, length, vocabulary) each; None: nowhere.
        compiled: the loss of a chunk of them is compiled; set by training.
    """

    kept_logits: list[Tensor] | None = None
    compiled = False

    def forward(self, hidden: Tensor, targets: Tensor | None = None, frozen: FrozenHead | None = None) -> Tensor:
        """hidden (batch, length, width) -> logits (batch, length, vocabulary); with targets the summed loss, with `frozen` the scalar of
        `linear_product`.

        All happens here, and not outside, since ZeRO-3 gathers a weight for the time of its module's forward and backward.
        """
        if frozen is not None:
            return linear_product(hidden, self.weight, frozen)
        if targets is None:
            return super().forward(hidden)
        logits = None
        if self.kept_logits is not None:
            logits = hidden.new_empty(*hidden.shape[:-1], self.out_features)
            self.kept_logits.append(logits)
        return linear_cross_entropy(hidden, self.weight, targets, logits, self.compiled)


class Transformer(nn.Module):
    """A decoder-only language model. Weights are unset until `parametrization.initialize` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.embedding_multiplier is not None and config.head_dim is not None
        self.config = config
        self.activation_checkpointing = ActivationCheckpointing()  # set by training
        self.context_pruning_settings: Any = None  # set where model/context_pruning.py is attached
        self.watch: Callable[[str, Tensor], None] | None = None  # sees the residual stream: see model/activation_statistics.py
        self.embedding = Embedding(config.vocab_size, config.width)
        self.position_embedding = Embedding(config.sequence_length, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.depth))
        self.final_norm = make_norm(config.norm if config.final_norm else "none", config.width, config)
        self.unembedding = Unembedding(config.width, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.unembedding.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        frozen: FrozenHead | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits, or the summed loss.

        Args:
            tokens: (batch, length), int64.
            targets: (batch, length), int64; `IGNORED_TARGET` where nothing is to be predicted.
            document_ids: (batch, length), int: attention stays within equal ids, which stand together; with a cache, of all its tokens too.
            frozen: the loss's derivative at the logits, taken at other weights; what is returned is then `linear_product`.
            cache: the tokens follow those that it holds, and are added to it.

        Returns:
            Without targets: logits (batch, length, vocab_size) in the model's dtype. With targets: the sum (not the mean) over
            valid targets of the cross-entropy in nats, a float32 scalar, so that any split of a batch adds up to the same loss.

        Raises:
            InputError: the sequence is longer than the model accepts.
        """
        hidden = self.hidden_states(tokens, document_ids, cache)
        if targets is None or frozen is not None or self.context_pruning_settings is None:
            return self.unembedding(hidden, targets, frozen)
        logits = self.unembedding(hidden)  # whole, since the objective of context pruning looks at them
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
        return self.context_pruning_settings.objective(loss, logits, targets, lambda: self.dense_logits(tokens, document_ids))

    @torch.no_grad()
    def dense_logits(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """Logits of the network without its context pruning."""
        with self.context_pruning_settings.switched_off():
            return self.unembedding(self.hidden_states(tokens, document_ids))

    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the unembedding is given, (batch, length, width); arguments as in `forward`."""
        first = cache.length if cache is not None else 0
        length = first + tokens.shape[1]
        if length > self.config.sequence_length:
            raise InputError(
                f"sequence of {length} tokens: this model accepts at most {self.config.sequence_length} (model.sequence_length)"
            )
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(first, length, device=tokens.device))
        if self.config.embedding_multiplier != 1.0:
            x = x * self.config.embedding_multiplier
        context = self._context(first, length, document_ids, x, cached=cache is not None)
        full, selective = self.activation_checkpointing if self.training else (0, 0)
        for i, block in enumerate(self.blocks):
            if self.watch is not None:
                self.watch(f"layer {i}", x)
            if i < full:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context, cache.layer(i) if cache is not None else None, selective=i < full + selective)
        if cache is not None:
            cache.length = length
        x = self.final_norm(x)
        if self.watch is not None:
            self.watch("unembedding", x)
        # muP's factor 1 / m_N on the logits, put on what they are made of
        return x if self.config.width_ratio == 1.0 else x / self.config.width_ratio

    def _context(self, first: int, length: int, document_ids: Tensor | None, x: Tensor, cached: bool = False) -> Context:
        """For the tokens from position `first` up to `length`."""
        config = self.config
        rotary = None
        assert config.head_dim is not None
        if config.positions == "rope":
            rotary = rotary_tables(first, length - first, config.head_dim, config.rope_base, x.device)
        window = config.attention_window if config.attention_window is not None and config.attention_window < length else None
        starts = None
        if document_ids is not None or window is not None:
            starts = first_keys(first, length, document_ids, window, x.device)
        plain = not cached and config.attention_softcap is None and self.context_pruning_settings is None
        if starts is not None and plain and has_block_kernel(x.device.type, config.head_dim):
            return Context(rotary, block_mask(starts, len(x)), starts)
        # One new token sees all that came before, which needs no mask; several with a cache, some of it.
        several_cached = first > 0 and length - first > 1
        mask = None if starts is None and not several_cached else attention_mask(first, length, starts, x.dtype, x.device)
        return Context(rotary, mask, starts)
