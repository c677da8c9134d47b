"""The cache of a layer that drops its own context: what no later token will need is taken out of memory, layer by layer.

A layer keeps its live tokens in the first `used` slots of buffers; which slot a token has says nothing, since its place in the text is kept
beside it. Dropped tokens leave holes, which are closed when a twelfth of the slots is dead, and the buffers then shrink. transformers
sees the length of the text, as if nothing had been dropped, so that positions and masks stay right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from model.errors import InputError

CHECK_EVERY = 16  # tokens between looks at how many slots are dead: each look waits for the device
DEAD_SHARE = 1 / 12
HEADROOM = 1 / 16  # slots allocated beyond those in use, as a share, so that not every token allocates


class PrunedLayer(DynamicLayer):
    """Of one layer. Buffers have C slots, of which the first `used` hold tokens.

    Attributes:
        keys, values: (batch, kv_heads, C, head_dim).
        interaction_keys: (batch, C, rank).
        positions: (batch, C), int64: where in the text each token stands, padding counted.
        log_keep: (batch, C), float32: log of how much of the token is left, log I of arXiv 2305.15805; -inf: dropped.
        seen: tokens of the text so far.
    """

    is_croppable = False
    is_compileable = False
    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]  # theirs are None at first
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self) -> None:
        super().__init__()
        self.used = self.seen = 0
        self._since_check = 0
        self.staged: Tensor | None = None  # interaction keys of the tokens that `update` is about to be given

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append tokens; returns keys and values of all slots in use, (batch, kv_heads, used, head_dim)."""
        if self.staged is None:
            raise InputError("past_key_values: a cache that shrinks, and the model's pruning is off: begin with a new cache")
        new = key_states.shape[2]
        if not self.is_initialized:
            self._allocate(key_states, value_states, new)
        elif self.used + new > self.keys.shape[2]:
            self._resize(None, self.used + new + int(HEADROOM * (self.used + new)))
        slots = slice(self.used, self.used + new)
        self.keys[:, :, slots], self.values[:, :, slots] = key_states, value_states
        self.interaction_keys[:, slots] = self.staged
        self.positions[:, slots] = self.seen if new == 1 else torch.arange(self.seen, self.seen + new, device=self.positions.device)
        self.log_keep[:, slots] = 0.0
        self.used, self.seen, self.staged = self.used + new, self.seen + new, None
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def release(self, log_keep: Tensor | None, new: int) -> None:
        """Say what is left of each slot in use, (batch, used), after `new` tokens (None: `log_keep` says it already); frees the memory of
        what is dropped."""
        if log_keep is not None:
            self.log_keep[:, : self.used] = log_keep
        self._since_check += new
        if self._since_check < CHECK_EVERY:
            return
        self._since_check = 0
        live = self.log_keep[:, : self.used] > -torch.inf
        most = max(1, int(live.sum(1).max()))
        if most <= (1 - DEAD_SHARE) * self.used or most + CHECK_EVERY + 2 * HEADROOM * most < self.keys.shape[2]:
            # the live first, in their order
            order = torch.sort(live, dim=1, descending=True, stable=True).indices[:, :most]
            self._resize(order, most + CHECK_EVERY + int(HEADROOM * most))

    def bytes(self) -> int:
        """Of all buffers as they are allocated."""
        if not self.is_initialized:
            return 0
        buffers = (self.keys, self.values, self.interaction_keys, self.positions, self.log_keep)
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def live(self) -> Tensor:
        """Tokens that are left, (batch,)."""
        return (self.log_keep[:, : self.used] > -torch.inf).sum(1)

    def _allocate(self, keys: Tensor, values: Tensor, slots: int) -> None:
        assert self.staged is not None
        batch, heads = keys.shape[:2]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys = keys.new_empty(batch, heads, slots, keys.shape[3])
        self.values = values.new_empty(batch, heads, slots, values.shape[3])
        self.interaction_keys = self.staged.new_empty(batch, slots, self.staged.shape[2])
        self.positions = torch.zeros(batch, slots, dtype=torch.int64, device=keys.device)
        self.log_keep = torch.full((batch, slots), -torch.inf, device=keys.device)

    def _resize(self, order: Tensor | None, slots: int) -> None:
        """New buffers of so many slots, which hold the slots `order` (batch, kept) of the old, or all in use; one buffer at a time."""
        kept = self.used if order is None else order.shape[1]

        def moved(old: Tensor, dim: int) -> Tensor:
            shape = list(old.shape)
            shape[dim] = slots
            new = old.new_empty(shape)
            if order is None:
                source = old.narrow(dim, 0, kept)
            elif dim == 2:
                source = old.gather(2, order[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3]))
            elif old.ndim == 3:
                source = old.gather(1, order[:, :, None].expand(-1, -1, old.shape[2]))
            else:
                source = old.gather(1, order)
            new.narrow(dim, 0, kept).copy_(source)
            return new

        self.keys = moved(self.keys, 2)
        self.values = moved(self.values, 2)
        self.interaction_keys = moved(self.interaction_keys, 1)
        self.positions = moved(self.positions, 1)
        self.log_keep = moved(self.log_keep, 1)
        self.used = kept

    # What transformers asks of a layer's cache.

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.__init__()

    def _rows(self, take) -> None:
        if self.is_initialized:
            for name in ("keys", "values", "interaction_keys", "positions", "log_keep"):
                setattr(self, name, take(getattr(self, name)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda buffer: buffer[indices])

    # What model/attention.py and model/cache.py call these.
    extend = update
    reorder = reorder_cache

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to remove is fine; else a token that those dropped would have to come back."""
        if tokens_to_remove != 0:
            raise InputError("a pruned cache cannot be cut back (assisted or prompt look-up decoding): what was dropped is gone")

    def offload(self) -> None:
        raise InputError("cache_implementation='offloaded' does not go with context pruning: use the default")
