"""The cache of a layer that shrinks, by itself: against a dictionary a row, and how much memory it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.pruned_cache import CHECK_EVERY, PrunedLayer, room

HEADS, WIDTH, RANK = 2, 3, 4


def append(layer: PrunedLayer, batch: int, new: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, into the cache: keys and values (batch, HEADS, new, WIDTH), interaction keys (batch, new, RANK)."""
    keys, values = (torch.randn(batch, HEADS, new, WIDTH, generator=generator) for _ in range(2))
    layer.staged = staged = torch.randn(batch, new, RANK, generator=generator)
    layer.update(keys, values)
    return keys, values, staged


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_kept_stays_what_it_was_wherever_it_goes(batch: int) -> None:
    """Each row drops other tokens, a few or nearly all at once, after prompts, chunks and single tokens."""
    generator = torch.Generator().manual_seed(batch)
    layer, seen, closed = PrunedLayer(), 0, 0
    rows: list[dict[int, tuple[Tensor, Tensor, Tensor]]] = [{} for _ in range(batch)]  # place in the text -> what is cached of it
    for step, new in enumerate([90, *[1] * 60, 3, 40, *[1] * 90, 20]):
        keys, values, staged = append(layer, batch, new, generator)
        for b, row in enumerate(rows):
            row.update({seen + i: (keys[b, :, i], values[b, :, i], staged[b, i]) for i in range(new)})
        seen += new
        used = layer.used
        kept = torch.rand(batch, used, generator=generator) < torch.tensor([0.97, 0.9, 0.2 if step % 50 == 0 else 1.0])[:batch, None]
        kept[:, -1] = True
        log_keep = layer.log_keep[:, :used].masked_fill(~kept, -torch.inf)
        for b, row in enumerate(rows):
            places = layer.positions[b, :used][log_keep[b] > -torch.inf].tolist()
            rows[b] = {place: row[place] for place in places}
        layer.release(log_keep, new)
        closed += layer.used < used
        assert layer.get_seq_length() == seen and layer.live().tolist() == [len(row) for row in rows]
        for b, row in enumerate(rows):
            slots = (layer.log_keep[b, : layer.used] > -torch.inf).nonzero()[:, 0].tolist()
            assert sorted(layer.positions[b, slots].tolist()) == sorted(row)
            for slot in slots:
                key, value, interaction_key = row[int(layer.positions[b, slot])]
                assert torch.equal(layer.keys[b, :, slot], key) and torch.equal(layer.values[b, :, slot], value)
                assert torch.equal(layer.interaction_keys[b, slot], interaction_key)
    assert closed > 5


@torch.no_grad()
def test_a_chunk_of_a_prompt_takes_no_slot_more_than_it_has_tokens() -> None:
    generator, layer = torch.Generator().manual_seed(0), PrunedLayer()
    for _ in range(5):
        before = layer.used
        append(layer, 2, 200, generator)
        assert layer.keys.shape[2] == before + 200
        kept = torch.rand(2, layer.used, generator=generator) < 0.3
        layer.release(layer.log_keep[:, : layer.used].masked_fill(~kept, -torch.inf), 200)
        assert layer.keys.shape[2] <= int(layer.live().max()) + room(layer.used)


@torch.no_grad()
def test_while_decoding_buffers_stay_near_what_is_live() -> None:
    """A fifth of the tokens stays; each is decided on when eight others have come."""
    generator, layer, worst = torch.Generator().manual_seed(0), PrunedLayer(), 0.0
    append(layer, 2, 300, generator)
    layer.release(torch.where(torch.rand(2, 300, generator=generator) < 0.8, 0.0, -torch.inf), 300)
    moved, buffer = 0, layer.keys.data_ptr()
    for _ in range(500):
        append(layer, 2, 1, generator)
        old = layer.seen - 1 - layer.positions[:, : layer.used] == 8
        dropped = old & (torch.rand(old.shape, generator=generator) < 0.8)
        layer.release(layer.log_keep[:, : layer.used].masked_fill(dropped, -torch.inf), 1)
        worst = max(worst, (layer.keys.shape[2] - CHECK_EVERY - 8) / float(layer.live().max()))
        moved, buffer = moved + (layer.keys.data_ptr() != buffer), layer.keys.data_ptr()
    assert worst < 1.06
    assert moved < 15  # and are not allocated anew for every few tokens
