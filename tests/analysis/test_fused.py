"""Which rows of a fused matrix are queries, keys and values: against the attention that cuts them, and where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.decoders import huggingface_decoder
from analysis.fused import Heads, heads_of, parts_of, parts_of_shape
from analysis.shards import open_checkpoint
from analysis.signal import query_key_value
from model.errors import InputError

FALCONS = {
    "one key for all heads": {"multi_query": True},  # transformers saves num_kv_heads = 4 beside it
    "a key for each head": {"multi_query": False},
    "new architecture": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


@pytest.mark.parametrize("kind", FALCONS)
def test_falcons_rows_are_those_that_its_attention_reads(tmp_path: Path, kind: str) -> None:
    from transformers import FalconConfig, FalconForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "pad_token_id": 0}
    model = FalconForCausalLM(FalconConfig(**shape, **FALCONS[kind]))
    model.save_pretrained(tmp_path)
    attention: Any = model.transformer.h[0].self_attention
    rows = attention.query_key_value.weight.shape[0]
    numbered = torch.arange(rows)[None, None]
    expected = {part: cut.unique().tolist() for part, cut in zip(("query", "key", "value"), attention._split_heads(numbered), strict=True)}

    checkpoint = open_checkpoint(tmp_path)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    for part, runs in parts_of(checkpoint, name, heads_of(checkpoint)):
        found = sorted({i // 32 for a, b in runs for i in range(a, b)})
        assert found == expected[part.removeprefix(name)[1:-1]], part
    decoder = huggingface_decoder(model, "falcon")
    for part, places in query_key_value(decoder, "falcon")[0].items():
        found = sorted({i // 32 for _, runs in places for a, b in runs for i in range(a, b)})
        assert found == expected[part], part


def test_state_space_and_convolution_layers_stay_whole(tmp_path: Path) -> None:
    """They have an `in_proj` too: Bamba's rows do not divide by the heads, LFM2's do."""
    from transformers import BambaConfig, BambaForCausalLM, Lfm2Config, Lfm2ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 6, "mamba_n_groups": 1, "attn_layer_indices": [1]}
    for model in (
        BambaForCausalLM(BambaConfig(**shape, **mamba, num_key_value_heads=2)),
        Lfm2ForCausalLM(Lfm2Config(**shape, num_key_value_heads=4, layer_types=["conv", "full_attention"])),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        assert any(name.endswith("in_proj.weight") for name in checkpoint.shapes)
        for name, size in checkpoint.shapes.items():
            assert list(parts_of(checkpoint, name, heads_of(checkpoint))) == [(name, [(0, size.numel())])]


def test_heads_that_do_not_divide() -> None:
    """A configuration's may be another tensor's; those of the command line are an error."""
    size = torch.Size([30, 8])
    for name in ("layers.0.attn.in_proj.weight", "layers.0.attn.qkv_proj.weight"):
        assert list(parts_of_shape("x", name, size, Heads(4, 4, guessed=True))) == [(name, [(0, 240)])]
        with pytest.raises(InputError, match=f"x: {name} has 30 rows, which 4 heads and 4 of keys do not divide"):
            list(parts_of_shape("x", name, size, Heads(4, 4)))
        assert [part.rpartition("[")[2] for part, _ in parts_of_shape("x", name, size, Heads(5, 5))] == ["query]", "key]", "value]"]
