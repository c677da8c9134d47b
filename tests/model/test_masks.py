"""Masks by blocks against masks by pairs of tokens, and networks under one against networks under the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask

from model.config import ModelConfig
from model.masks import BLOCK, attention_mask, block_mask, first_keys
from model.parametrization import initialize
from model.transformer import Transformer


def documents(batch: int, length: int, share_of_ends: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < share_of_ends).cumsum(dim=1)


@pytest.mark.parametrize("length", [5, BLOCK, 300, 4 * BLOCK])
@pytest.mark.parametrize(
    ("share_of_ends", "window"), [(0.0, None), (0.003, None), (0.01, None), (0.5, None), (None, 1), (None, 130), (None, 256), (0.005, 200)]
)
def test_the_blocks_are_those_that_the_whole_mask_has(length: int, share_of_ends: float | None, window: int | None) -> None:
    ids = None if share_of_ends is None else documents(3, length, share_of_ends)
    starts = first_keys(0, length, ids, window, torch.device("cpu"))
    allowed = (attention_mask(0, length, starts, torch.float32, torch.device("cpu")) == 0).expand(3, 1, length, length)
    found = block_mask(starts, 3)
    expected = create_block_mask(lambda b, h, q, k: allowed[b, h, q, k], 3, 1, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    assert found.shape == expected.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for counts, names in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        few = torch.arange(getattr(found, names).shape[-1]) < getattr(found, counts)[..., None]  # those behind the count mean nothing
        assert torch.equal(getattr(found, names)[few], getattr(expected, names)[few]), names
    pairs = torch.meshgrid(*(torch.arange(n) for n in (3, length, length)), indexing="ij")
    assert torch.equal(found.mask_mod(pairs[0], torch.tensor(0), pairs[1], pairs[2]), allowed[:, 0])


NETWORKS: list[dict[str, Any]] = [
    {"block": "pre_norm", "kv_heads": 2},
    {"block": "outlier_protected", "attention": "shaped"},
    {"block": "pre_norm", "attention_window": 150},
]


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"), [("cpu", torch.float64, 1e-10), pytest.param("cuda", torch.float32, 1e-4, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("more", NETWORKS, ids=["grouped", "shaped", "window"])
def test_a_network_under_blocks_is_the_network_under_pairs(
    more: dict[str, Any], device: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients. On a CPU, which has a kernel for the forward alone, with flex_attention's own unfused mathematics."""
    config = ModelConfig(vocab_size=50, width=64, depth=2, heads=4, sequence_length=300, **more)
    model = Transformer(config)
    initialize(model, seed=0)
    model.to(device, dtype)
    tokens, ids = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(1)).to(device), documents(2, 300, 0.01).to(device)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *ignored: None)
    losses, gradients = [], []
    for blocks in (False, True):
        monkeypatch.setattr("model.transformer.has_block_kernel", lambda *ignored, blocks=blocks: blocks)
        context = model._context(0, 300, ids, model.embedding(tokens))
        assert isinstance(context.mask, flex_attention.BlockMask) == blocks
        model.zero_grad()
        loss = model(tokens, tokens, ids)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=tolerance / 100)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max()), msg=name)


def test_other_documents_do_not_compile_a_block_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is another function over other tensors in each step; and the forward's kernel gives what pairs give."""
    monkeypatch.setattr("model.transformer.has_block_kernel", lambda *ignored: True)
    config = ModelConfig(vocab_size=50, width=32, depth=2, heads=2, sequence_length=256)
    model = Transformer(config)
    initialize(model, seed=0)
    tokens = torch.randint(50, (2, 256), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile()
    with torch.no_grad():
        found = [model(tokens, document_ids=documents(2, 256, 0.01, seed)) for seed in (0, 1)]
        with torch._dynamo.config.patch(error_on_recompile=True):  # monkeypatch would leave the setting hidden from torch
            found += [model(tokens, document_ids=documents(2, 256, 0.03, seed)) for seed in (2, 3)]
        torch._dynamo.reset()
        monkeypatch.setattr("model.transformer.has_block_kernel", lambda *ignored: False)
        plain = Transformer(config)
        plain.load_state_dict({name.replace("_orig_mod.", ""): p for name, p in model.state_dict().items()})
        for seed, logits in enumerate(found):
            expected = plain(tokens, document_ids=documents(2, 256, 0.01 if seed < 2 else 0.03, seed))
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
