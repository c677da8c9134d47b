"""The network against independent truth: transformers' own models, the papers' formulas in float64, and properties."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from model.activation_checkpointing import ActivationCheckpointing
from model.attention import Context, rotary_tables, rotate, softcapped_attention
from model.config import PRESETS, SIZES, ModelConfig
from model.errors import InputError
from model.parametrization import initialize, is_decayed, owned_parameters
from model.section import ModelSection
from model.transformer import IGNORED_TARGET, Transformer

SMALL = {"width": 48, "depth": 3, "heads": 4, "vocab_size": 97, "sequence_length": 32}


def make(seed: int = 0, **fields: object) -> Transformer:
    model = Transformer(ModelConfig(**{**SMALL, **fields}))
    initialize(model, seed)
    return model


def tokens_of(model: Transformer, batch: int = 2, length: int = 32) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def test_equals_llama() -> None:
    """RMSNorm, RoPE, SwiGLU, grouped queries, untied: the logits of transformers' Llama with the same weights."""
    ours = make(activation="swiglu", kv_heads=2, tied_embeddings=False, mlp_width=80).double()
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=32, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False, attention_bias=False,
        )
    ).double()  # fmt: skip
    names = {"embedding": "model.embed_tokens", "unembedding": "lm_head", "final_norm": "model.norm", "blocks": "model.layers"}
    inner = {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
        "mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    renamed = {}
    for name, value in ours.state_dict().items():
        first, _, rest = name.partition(".")
        new = f"{names[first]}.{rest}"
        for old, replacement in inner.items():
            new = new.replace(f".{old}.", f".{replacement}.")
        renamed[new] = value
    missing = theirs.load_state_dict(renamed, strict=True)
    assert not missing.missing_keys
    tokens = tokens_of(ours)
    # the rotary tables are float32 in both
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-6)


def test_equals_gpt2() -> None:
    """LayerNorm, learned positions, GELU, biases, tied: the logits of transformers' GPT-2 with the same weights."""
    ours = make(norm="layer_norm", positions="learned", biases="all").double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, activation_function="gelu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    theirs = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        theirs.transformer.wte.weight.copy_(ours.embedding.weight)
        assert ours.position_embedding is not None
        theirs.transformer.wpe.weight.copy_(ours.position_embedding.weight)
        theirs.transformer.ln_f.load_state_dict(ours.final_norm.state_dict())
        for block, layer in zip(ours.blocks, theirs.transformer.h, strict=True):
            layer.ln_1.load_state_dict(block.attention_norm.state_dict())
            layer.ln_2.load_state_dict(block.mlp_norm.state_dict())
            attention = block.attention
            layer.attn.c_attn.weight.copy_(torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]).T)
            layer.attn.c_attn.bias.copy_(torch.cat([attention.query.bias, attention.key.bias, attention.value.bias]))
            for linear, conv in ((attention.output, layer.attn.c_proj), (block.mlp.up, layer.mlp.c_fc), (block.mlp.down, layer.mlp.c_proj)):
                conv.weight.copy_(linear.weight.T)
                conv.bias.copy_(linear.bias)
    tokens = tokens_of(ours)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-9)


def test_outlier_protected_block_is_the_papers_equation() -> None:
    """Eq 12 and 13 of arXiv 2405.19279, written out head by head in float64."""
    model = make(block="outlier_protected", positions="learned", depth=1, mlp_input_scale=0.7, residual_gain=0.3).double()
    block, config = model.blocks[0], model.config
    x = torch.randn(2, 10, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert config.head_dim is not None

    def norm(v: torch.Tensor) -> torch.Tensor:
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    heads = []
    for h in range(4):
        rows = slice(h * config.head_dim, (h + 1) * config.head_dim)
        query = norm(x @ block.attention.query.weight[rows].T)
        key = norm(x @ block.attention.key.weight[rows].T)
        scores = query @ key.transpose(1, 2) / math.sqrt(config.head_dim)
        scores = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ (x @ block.attention.value.weight[rows].T))
    x_hat = x + 0.3 * torch.cat(heads, dim=-1) @ block.attention.output.weight.T
    expected = x_hat + 0.3 * F.gelu(0.7 * x_hat @ block.mlp.up.weight.T) @ block.mlp.down.weight.T
    torch.testing.assert_close(block(x, Context()), expected, rtol=0, atol=1e-7)  # gains and alpha pass through float32


def test_outlier_protected_defaults_have_unit_scale() -> None:
    """At init the embedded input and the MLP's pre-activations have mean square one, and there is no norm but QK-norm."""
    model = make(block="outlier_protected", width=256, vocab_size=4000)
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.update(residual=inputs[0]))
    model.blocks[0].mlp.up.register_forward_hook(lambda module, inputs, output: seen.update(pre_activation=output))
    model(tokens_of(model))
    assert seen["residual"].pow(2).mean().item() == pytest.approx(1.0, rel=0.05)
    assert seen["pre_activation"].pow(2).mean().item() == pytest.approx(1.0, rel=0.35)  # the attention branch has added to the residual
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.RMSNorm)]
    assert norms and all(name.endswith(("query_norm", "key_norm")) for name in norms)
    assert model.config.residual_gain == 1 / math.sqrt(3)


def test_post_norm_is_torchs_encoder_layer() -> None:
    """LayerNorm after each residual sum, ReLU and biases: torch's own layer with the same weights and a causal mask, in float64."""
    model = make(block="post_norm", norm="layer_norm", positions="learned", activation="relu", biases="all", depth=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    block = model.blocks[0]
    theirs = torch.nn.TransformerEncoderLayer(48, 4, 192, dropout=0.0, norm_first=False, batch_first=True, dtype=torch.float64)
    attention = block.attention
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key.bias, attention.value.bias]))
    theirs.self_attn.out_proj.load_state_dict(attention.output.state_dict())
    theirs.linear1.load_state_dict(block.mlp.up.state_dict())
    theirs.linear2.load_state_dict(block.mlp.down.state_dict())
    theirs.norm1.load_state_dict(block.after_attention_norm.state_dict())
    theirs.norm2.load_state_dict(block.after_mlp_norm.state_dict())
    x = torch.randn(2, 10, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(10, dtype=torch.float64)
    torch.testing.assert_close(block(x, Context()), theirs(x, src_mask=mask, is_causal=True), rtol=0, atol=1e-12)
    assert isinstance(model.final_norm, torch.nn.Identity)


@pytest.mark.parametrize("places", [[], ["query_key"], ["value"], ["mlp"], ["query_key", "value"], ["query_key", "value", "mlp"]])
def test_norms_stand_only_where_they_are_placed(places: list[str]) -> None:
    """The placements of the paper's table 4: what queries and keys, values, and the MLP read is X or X / rms(X)."""
    model = make(norm="simple_rms_norm", norm_places=places, positions="learned", qk_norm="none").double()
    block = model.blocks[0]
    x = 3 * torch.randn(2, 6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    for name, module in {"query": block.attention.query, "value": block.attention.value, "mlp": block.mlp.up}.items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
    added = []
    block.attention.register_forward_hook(lambda module, inputs, output: added.append(output))
    block(x, Context())

    def normed(v: torch.Tensor) -> torch.Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    for name, place, read in (("query", "query_key", x), ("value", "value", x), ("mlp", "mlp", x + added[0])):
        torch.testing.assert_close(seen[name], normed(read) if place in places else read, rtol=1e-12, atol=0)
    assert sum(p.numel() for n, p in model.named_parameters() if "norm" in n) == 0  # this norm has no scale


def test_softcap_is_its_formula_and_vanishes_when_large() -> None:
    """c tanh(Q K^T / (c sqrt(d_k))) before the mask, with grouped keys and packed documents; c to infinity is plain attention."""
    fields = {"block": "outlier_protected", "kv_heads": 2, "init_std": 0.4}
    plain, capped, loose = (make(**fields, qk_norm="none", attention_softcap=cap).double() for cap in (None, 2.0, 1e6))
    tokens, ids = tokens_of(plain), torch.arange(32).ge(13).long().repeat(2, 1)
    for document_ids in (None, ids):
        expected = plain(tokens, document_ids=document_ids)
        scale = expected.abs().max().item()
        torch.testing.assert_close(loose(tokens, document_ids=document_ids), expected, rtol=0, atol=1e-3 * scale)  # float32 scores inside
        assert not torch.allclose(capped(tokens, document_ids=document_ids), expected, rtol=0, atol=0.1 * scale)
    query, key, value = (torch.randn(1, h, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    mixed = softcapped_attention(3 * query, 3 * key, value, 2.0, 1 / math.sqrt(query.shape[-1]), None)
    for head in range(4):
        for t in range(5):
            scores = 9 * query[0, head, t] @ key[0, head // 2, : t + 1].T / math.sqrt(8)
            weights = (2 * torch.tanh(scores / 2)).softmax(-1)
            torch.testing.assert_close(mixed[0, head, t], weights @ value[0, head // 2, : t + 1], rtol=0, atol=1e-6)


def test_rotating_is_a_product_of_complex_numbers_and_its_gradient_turns_back() -> None:
    """(x_i + j x_{i + d/2}) exp(j position base^(-2i/d)), in complex128; the gradient of a rotation is the inverse rotation."""
    x, incoming = (torch.randn(2, 7, 3, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    positions, pairs = torch.arange(5, 12, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    turn = torch.polar(torch.ones(7, 4, dtype=torch.float64), torch.outer(positions, 100.0 ** (-pairs / 4)))[:, None]

    def turned(y: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        z = torch.complex(*y.double().chunk(2, -1)) * by
        return torch.cat((z.real, z.imag), -1).float()

    rotated = rotate(x.requires_grad_(), rotary_tables(5, 7, 8, 100.0, x.device))
    torch.testing.assert_close(rotated, turned(x, turn), rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(rotated, x, incoming)[0], turned(incoming, turn.conj()), rtol=0, atol=2e-6)


def test_qk_norm_comes_before_rope() -> None:
    """The order shows once the scales differ between the two halves that RoPE mixes: Norm, then rotate, in float64."""
    attention = make(block="outlier_protected").double().blocks[0].attention
    with torch.no_grad():
        for norm in (attention.query_norm, attention.key_norm):
            norm.weight.copy_(torch.linspace(0.5, 2.0, 12))
    x = torch.randn(1, 6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = rotary_tables(0, 6, 12, 10000.0, x.device)
    seen: list[torch.Tensor] = []
    attention.output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    attention(x, x, Context(rotary))

    def heads(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).view(1, 6, 4, 12)

    def normed(v: torch.Tensor) -> torch.Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * torch.linspace(0.5, 2.0, 12, dtype=torch.float64)

    query, key = (rotate(normed(heads(linear.weight)), rotary).transpose(1, 2) for linear in (attention.query, attention.key))
    scores = (query @ key.mT / math.sqrt(12)).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    expected = (scores.softmax(-1) @ heads(attention.value.weight).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)  # rotation is in float32


def preset(name: str) -> Transformer:
    """A preset at the paper's CodeParrot shape but for the width, weights drawn."""
    model = Transformer(ModelConfig(**{**SMALL, "width": 96, "depth": 2}, **PRESETS[name]))
    initialize(model, 0)
    return model


def describe(model: Transformer) -> dict[str, tuple[tuple[int, ...], float]]:
    """name -> (shape, standard deviation for a matrix and the value for a vector)."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.ndim == 2 or (parameter == parameter[0]).all()
        found[name] = (tuple(parameter.shape), parameter.std().item() if parameter.ndim == 2 else parameter[0].item())
    return found


def test_preset_paper_is_the_papers_description_parameter_by_parameter() -> None:
    """Appendix B and D, CodeParrot: no norm but QK-norm, beta 0.3 fixed, ReLU, learned positions, untied, all N(0, 0.02), x 50."""
    model, expected = preset("paper"), {}
    for i in range(2):
        for name in ("query", "key", "value", "output"):
            expected[f"blocks.{i}.attention.{name}.weight"] = ((96, 96), 0.02)
        expected[f"blocks.{i}.attention.query_norm.weight"] = expected[f"blocks.{i}.attention.key_norm.weight"] = ((24,), 1.0)
        expected[f"blocks.{i}.mlp.up.weight"], expected[f"blocks.{i}.mlp.down.weight"] = ((384, 96), 0.02), ((96, 384), 0.02)
    expected |= dict.fromkeys(("embedding.weight", "unembedding.weight"), ((97, 96), 0.02))
    expected["position_embedding.weight"] = ((32, 96), 0.02)
    found = describe(model)
    assert found.keys() == expected.keys()
    for name, (shape, value) in expected.items():
        assert found[name] == (shape, pytest.approx(value, rel=0.05)), name
    config, block = model.config, model.blocks[0]
    assert (config.embedding_multiplier, block.attention_gain, block.mlp_gain, block.mlp_input_scale) == (50, 0.3, 0.3, 1.0)
    assert config.warnings() == []


def test_preset_released_code_is_what_the_authors_script_builds() -> None:
    """simplified_transformers' op.yaml: a LayerNorm before the first attention and at the end, tied, beta 0.2, biases on Q and K alone."""
    model, expected = preset("released_code"), {}
    for i in range(2):
        for name in ("query", "key", "value", "output"):
            expected[f"blocks.{i}.attention.{name}.weight"] = ((96, 96), 0.02)
        expected |= {f"blocks.{i}.attention.{name}.bias": ((96,), 0.0) for name in ("query", "key")}
        expected[f"blocks.{i}.attention.query_norm.weight"] = expected[f"blocks.{i}.attention.key_norm.weight"] = ((24,), 1.0)
        expected[f"blocks.{i}.mlp.up.weight"], expected[f"blocks.{i}.mlp.down.weight"] = ((384, 96), 0.02), ((96, 384), 0.02)
    for norm in ("blocks.0.attention_norm", "final_norm"):
        expected |= {f"{norm}.weight": ((96,), 1.0), f"{norm}.bias": ((96,), 0.0)}
    expected |= {"embedding.weight": ((97, 96), 0.02), "position_embedding.weight": ((32, 96), 0.02)}
    found = describe(model)
    assert found.keys() == expected.keys()
    for name, (shape, value) in expected.items():
        assert found[name] == (shape, pytest.approx(value, rel=0.05, abs=1e-9)), name

    # and its forward pass: the first block reads LN(x) in attention but adds to x itself
    model.double()
    tokens = tokens_of(model)
    x = model.embedding.weight[tokens] + model.position_embedding.weight[:32]
    for i, block in enumerate(model.blocks):
        read = F.layer_norm(x, (96,)) if i == 0 else x
        x = x + 0.2 * block.attention(read, read, Context())
        x = x + 0.2 * F.relu(x @ block.mlp.up.weight.T) @ block.mlp.down.weight.T
    torch.testing.assert_close(model(tokens), F.layer_norm(x, (96,)) @ model.embedding.weight.T, rtol=0, atol=1e-7)


def test_pre_norm_with_a_residual_gain() -> None:
    """The comparison of appendix C: norms kept, a trainable gain of 0.1 on each branch, and no second scaling at init."""
    model = make(residual_gain=0.1, residual_gain_form="scalar", width=192)
    assert model.blocks[1].mlp_gain.tolist() == pytest.approx([0.1])
    assert model.blocks[1].mlp.down.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert isinstance(model.blocks[1].mlp_norm, torch.nn.RMSNorm)


def test_frozen_qk_gains_are_no_parameters() -> None:
    for kind in ("rms_norm", "layer_norm"):
        frozen, trained = (make(block="outlier_protected", qk_norm=kind, qk_norm_gains=g) for g in ("frozen", "trainable"))
        assert not [n for n, _ in frozen.named_parameters() if "query_norm" in n or "key_norm" in n]
        assert [n for n, _ in trained.named_parameters() if "query_norm" in n]
        assert torch.equal(frozen(tokens_of(frozen)), trained(tokens_of(trained)))  # gains start at one


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"qk_norm": "none"}, "entropy"),
        ({"residual_gain": 1.0}, "weighted down"),
        ({"activation": "swiglu"}, "outliers of its own"),
    ],
)
def test_combinations_that_do_not_work_warn(fields: dict, reason: str) -> None:
    (warning,) = ModelConfig(**SMALL, block="outlier_protected", **fields).warnings()
    assert reason in warning
    assert ModelConfig(**SMALL, **{**fields, "block": "pre_norm"}).warnings() == []
    assert ModelConfig(**SMALL, block="outlier_protected", attention_softcap=30.0).warnings() == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"block": "outlier_protected", "attention": "shaped"}, "query_init zero with qk_norm"),
        ({"block": "simplified", "attention": "softmax", "activation": "relu"}, "tokens are alike after a few layers"),
        ({"parametrization": "mup", "base_width": 16, "mlp_width": 48}, "let it grow along"),
    ],
)
def test_what_is_known_not_to_work_warns_in_any_block(fields: dict, reason: str) -> None:
    (warning,) = ModelConfig(**SMALL, **fields).warnings()
    assert reason in warning


def test_norm_places_that_cannot_be_are_refused() -> None:
    for fields, reason in (
        ({"block": "post_norm", "norm_places": ["mlp"]}, "norms elsewhere"),
        ({"norm_places": ["mlp", "mlp"]}, "twice"),
        ({"first_norm": True}, "already"),
    ):
        with pytest.raises(InputError, match=reason):
            ModelConfig(**SMALL, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block": "outlier_protected"},
        {"positions": "learned", "activation": "relu", "qk_norm": "layer_norm"},
        {"block": "post_norm"},
        {"block": "outlier_protected", "attention_softcap": 30.0},
    ],
)
def test_no_token_sees_the_future(fields: dict) -> None:
    model = make(**fields)
    tokens = tokens_of(model)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 97
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_packed_documents_do_not_see_each_other() -> None:
    """With document ids, each document's logits are those it has when it stands alone (RoPE is relative)."""
    model = make()
    tokens = tokens_of(model, batch=1)
    ids = torch.tensor([[0] * 11 + [1] * 15 + [2] * 6])
    packed = model(tokens, document_ids=ids)
    alone = torch.cat([model(part) for part in tokens.split([11, 15, 6], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, model(tokens), atol=1e-3)


def test_loss_is_a_sum_over_valid_targets() -> None:
    model = make()
    tokens = tokens_of(model, batch=4)
    targets = tokens.roll(-1, dims=1)
    targets[0, 5:] = IGNORED_TARGET
    targets[3, :2] = IGNORED_TARGET
    log_probabilities = model(tokens).detach().double().log_softmax(-1)
    expected = -float(sum(log_probabilities[b, t, targets[b, t]] for b in range(4) for t in range(32) if targets[b, t] != IGNORED_TARGET))
    assert model(tokens, targets).item() == pytest.approx(expected, rel=1e-6)
    parts = sum(model(tokens[i : i + 1], targets[i : i + 1]) for i in range(4))
    assert float(parts.detach()) == pytest.approx(expected, rel=1e-6)


CHECKPOINTED: list[dict[str, Any]] = [
    {"block": "outlier_protected"},
    {"activation": "swiglu", "biases": "all", "kv_heads": 2, "qk_norm": "rms_norm"},
    {"block": "post_norm", "norm": "layer_norm", "attention_softcap": 20.0},
    {"block": "simplified", "activation": "relu"},
    {"attention": "shaped", "attention_window": 8},
]


@pytest.mark.parametrize("fields", CHECKPOINTED)
@pytest.mark.parametrize("documents", [False, True])
def test_activation_checkpointing_changes_nothing(fields: dict[str, Any], documents: bool) -> None:
    """Of no block, of the first one in full and of the second selectively, of all in full, of all selectively: bit for bit."""
    gradients = []
    for chosen in ((0, 0), (1, 1), (3, 0), (0, 3)):
        model = make(depth=3, **fields)
        model.activation_checkpointing = ActivationCheckpointing(*chosen)
        tokens = tokens_of(model)
        model(tokens, tokens, torch.arange(32).expand_as(tokens) // 12 if documents else None).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, *others in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in others)


def test_selective_checkpointing_takes_no_product_again() -> None:
    """Counted below what keeps and gives back: products and attention as often as without it, GELU twice."""

    class Carried(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.out: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.out[func.__name__] += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for chosen in (ActivationCheckpointing(), ActivationCheckpointing(selective=2), ActivationCheckpointing(full=2)):
        model = make(depth=2, norm="layer_norm")
        model.activation_checkpointing = chosen
        with Carried() as carried:
            model(tokens_of(model), tokens_of(model)).backward()
        counts.append(carried.out)
    plain, selective, full = counts
    attention = "_scaled_dot_product_flash_attention_for_cpu.default"
    assert selective["mm.default"] == plain["mm.default"] < full["mm.default"]
    assert selective[attention] == plain[attention] == 2 and full[attention] == 4
    assert selective["gelu.default"] == full["gelu.default"] == 2 * plain["gelu.default"] == 4


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    small, deep = make(depth=2, block="outlier_protected"), make(depth=5, block="outlier_protected")
    other = dict(make(seed=1, depth=2, block="outlier_protected").named_parameters())
    for name, parameter in small.named_parameters():
        if not name.endswith("_gain"):  # 1 / sqrt(depth)
            assert torch.equal(parameter, dict(deep.named_parameters())[name])
        if name.endswith("up.weight"):
            assert not torch.equal(parameter, other[name])
    assert small.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    plain = make(width=192)
    assert plain.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)


def test_weight_decay_is_for_matrices() -> None:
    model = make(block="outlier_protected", positions="learned", biases="all")
    decayed = {name for name, module, _ in owned_parameters(model) if is_decayed(name, module)}
    assert decayed == {n for n, p in model.named_parameters() if p.ndim == 2 and n != "position_embedding.weight"}
    assert any(name.endswith("attention_gain") for name, _, _ in owned_parameters(model))


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [("nano", 0.7e6, 1.1e6), ("10m", 9e6, 11e6), ("130m", 110e6, 140e6), ("320m", 300e6, 360e6), ("1b", 1.1e9, 1.4e9), ("7b", 6e9, 7e9)],
)
def test_sizes_mean_what_they_say(size: str, low: float, high: float) -> None:
    vocab_size = 1024 if size in ("nano", "10m") else 32768
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=vocab_size, sequence_length=1024, **SIZES[size]))
    assert low < sum(p.numel() for p in model.parameters()) < high


def test_a_sequence_that_is_too_long_is_refused() -> None:
    model = make()
    with pytest.raises(InputError, match=r"33 tokens.*at most 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_scales_that_are_not_positive_are_refused_as_in_a_recipe(value: float) -> None:
    bounded = {name for name, field in ModelSection.model_fields.items() if any(hasattr(bound, "gt") for bound in field.metadata)}
    assert {"residual_gain", "init_std"} <= bounded
    with pytest.raises(InputError) as error:
        ModelConfig(**SMALL, **dict.fromkeys(bounded, value))
    assert sorted(str(error.value).splitlines()) == sorted(f"model.{name}: {value} is not a positive number" for name in bounded)


def test_wrong_shapes_are_named_together() -> None:
    with pytest.raises(InputError) as error:
        ModelConfig(width=50, depth=2, heads=4, vocab_size=10, sequence_length=8, kv_heads=3)
    assert "model.heads" in str(error.value) and "model.kv_heads" in str(error.value)
