"""The cache of a layer that drops its own context: what no later token will need is taken out of memory, layer by layer.

A layer keeps its live tokens in the first `used` slots of buffers; which slot a token has says nothing, since its place in the text is kept
beside it. Dropped tokens leave holes, which the tokens of the last slots are moved into, and the buffers then shrink. transformers
sees the length of the text, as if nothing had been dropped, so that positions and masks stay right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from model.errors import InputError

CHECK_EVERY = 16  # tokens between looks at how many slots are dead: each look waits for the device
DEAD_SHARE = 1 / 32  # of the slots in use, from which on holes are filled
HEADROOM = 1 / 32  # slots allocated beyond those in use and CHECK_EVERY, as a share, so that not every token allocates
BUFFERS = {"keys": 2, "values": 2, "interaction_keys": 1, "positions": 1, "log_keep": 1}  # name -> dimension of the slots


def room(tokens: int) -> int:
    """Slots to allocate beyond those that so many tokens take."""
    return CHECK_EVERY + int(HEADROOM * tokens)


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
            raise InputError("past_key_values: this is a pruning cache, but the model's pruning is switched off; start with a new cache")
        new = key_states.shape[2]
        if not self.is_initialized:
            self._allocate(key_states, value_states, new)
        elif self.used + new > self.keys.shape[2]:
            self._fill_holes(self._most_live())
            if self.used + new + CHECK_EVERY // 2 > self.keys.shape[2]:
                # of a prompt not a slot more than it takes, since `release` looks at the buffers right after
                self._resize(self.used + new + (0 if new >= CHECK_EVERY else room(self.used)))
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
        most = self._most_live()
        shrinks = most + room(most) * (1 if new >= CHECK_EVERY else 2) < self.keys.shape[2]
        if shrinks or most <= (1 - DEAD_SHARE) * self.used:
            self._fill_holes(most)
        if shrinks:
            self._resize(most + room(most))

    def bytes(self) -> int:
        """Of all buffers as they are allocated."""
        if not self.is_initialized:
            return 0
        buffers = (getattr(self, name) for name in BUFFERS)
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

    def _most_live(self) -> int:
        """Live tokens of the fullest row; waits for the device."""
        self._since_check = 0
        return max(1, int(self.live().max()))

    def _fill_holes(self, most: int) -> None:
        """Have each row's live tokens, of which the fullest row has `most`, in the first so many slots: those behind move into holes."""
        moves = min(most, self.used - most)  # at most
        if moves == 0:
            return
        live = (self.log_keep[:, : self.used] > -torch.inf).to(torch.uint8)
        holes = live[:, :most].topk(moves, dim=1, largest=False).indices
        found, behind = live[:, most:].topk(moves, dim=1)
        source = torch.where(found > 0, behind + most, holes)  # a row with fewer to move copies slots onto themselves
        for name, dim in BUFFERS.items():
            buffer = getattr(self, name)
            slots = buffer.view(-1, buffer.shape[-1] if buffer.ndim > 2 else 1)  # of all rows, and heads: copied whole, not by number
            texts = slots.shape[0] // buffer.shape[dim]
            begin = torch.arange(texts, device=buffer.device)[:, None] * buffer.shape[dim]
            to, origin = ((begin + part.repeat_interleave(texts // len(part), dim=0)).flatten() for part in (holes, source))
            # for a gradient to come, what is in the buffer now may have been saved
            copy = Tensor.index_copy if torch.is_grad_enabled() else Tensor.index_copy_
            setattr(self, name, copy(slots, 0, to, slots.index_select(0, origin)).view(buffer.shape))
        self.used = most

    def _resize(self, slots: int) -> None:
        """New buffers of so many slots, which begin with those in use; one buffer at a time."""
        for name, dim in BUFFERS.items():
            old = getattr(self, name)
            shape = list(old.shape)
            shape[dim] = slots
            new = old.new_empty(shape)
            new.narrow(dim, 0, self.used).copy_(old.narrow(dim, 0, self.used))
            setattr(self, name, new)

    # What transformers asks of a layer's cache.

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.__init__()

    def _rows(self, take) -> None:
        if self.is_initialized:
            for name in BUFFERS:
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
