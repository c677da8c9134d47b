"""Context pruning: decisions against loops over tokens, and the shrinking cache against the masked dense forward, for every family."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from model.activation_checkpointing import ActivationCheckpointing, keep_products_and_attention
from model.cache import Cache
from model.config import ModelConfig, PruningConfig
from model.context_pruning import (
    Decided,
    Settings,
    attend,
    dense,
    find_threshold,
    interactions,
    log_kept,
    measuring_products,
    observing,
    settings_of,
    standards_of,
)
from model.errors import InputError
from model.huggingface import BurnishForCausalLM, transformers_config
from model.parametrization import initialize
from model.pretrained import PretrainedDecoder, PretrainedModel, load, longest_text, weights_of
from model.pruned_cache import PrunedLayer
from model.pruning_hooks import attach
from model.transformer import IGNORED_TARGET, Transformer

transformers.logging.set_verbosity_error()

LENGTH, VOCABULARY = 80, 97
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "vocab_size": 97,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, intermediate_size=48, **SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(num_key_value_heads=2, intermediate_size=48, **SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(num_key_value_heads=2, head_dim=16, intermediate_size=48, **SHAPE),
    "mistral": lambda: transformers.MistralConfig(num_key_value_heads=1, sliding_window=None, intermediate_size=48, **SHAPE),
    "phi3": lambda: transformers.Phi3Config(num_key_value_heads=2, pad_token_id=0, intermediate_size=48, **SHAPE),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=160, vocab_size=97),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(intermediate_size=48, **SHAPE),
    "opt": lambda: transformers.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SHAPE),
    "burnish": lambda: transformers_config(ModelConfig(width=32, depth=3, heads=4, kv_heads=2, vocab_size=97, sequence_length=160)),
}
DROPS = PruningConfig(rank=8, bias=0.9, sinks=2, window=3)


def make(family: str, config: PruningConfig = DROPS, seed: int = 1) -> Any:
    """A small random model whose layers drop most of their context, in evaluation mode."""
    torch.manual_seed(seed)
    made = FAMILIES[family]()
    model = BurnishForCausalLM(made) if family == "burnish" else AutoModelForCausalLM.from_config(made)
    model.generation_config.eos_token_id = None  # texts of one length
    attach(model, config)
    return model.eval()


def fields_of(config: Any) -> dict[str, Any]:
    """As `describe` has them."""
    return {name: value for name, value in config.to_dict().items() if name not in ("dtype", "architectures", "transformers_version")}


def tokens_of(batch: int = 2, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def whole(model: Any, tokens: Tensor, **arguments: Any) -> Tensor:
    """Logits of the masked dense forward."""
    with torch.no_grad():
        return model(tokens, use_cache=False, **arguments).logits


def new_cache(model: Any) -> Any:
    return Cache(PrunedLayer) if isinstance(model, BurnishForCausalLM) else DynamicCache(config=model.config)


def in_pieces(model: Any, tokens: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    """Logits of the same tokens, so many at a time, with a cache; and the cache."""
    cache, logits = new_cache(model), []
    with torch.no_grad():
        for piece in tokens.split(sizes, dim=1):
            logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1), cache


# -------------------------------------------------------------------------------------------------------------- decisions


def by_loops(
    query: Tensor, key: Tensor, beta: float, config: PruningConfig, keep: Callable[[float], float], starts: list[int], slope: float = 0.0
) -> Tensor:
    """I[b, k, j] as section 3 of the paper defines it, a pair at a time; and with a slope on the log of the age."""
    batch, length, rank = query.shape
    result = torch.ones(batch, length, length, dtype=torch.float64)
    for b in range(batch):
        for j in range(length):
            left = 1.0
            for k in range(j + 1, length):
                if k - j >= config.window and j - starts[b] >= config.sinks:
                    left *= keep(float(query[b, k] @ key[b, j]) / math.sqrt(rank) + beta + slope * math.log(k - j))
                result[b, k, j] = left
    return result


@pytest.mark.parametrize("slope", [None, -0.6])
@pytest.mark.parametrize("alpha", [1.0, 2.0, math.inf])
def test_decisions_are_those_of_the_paper(alpha: float, slope: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 14, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    config, beta, threshold = PruningConfig(rank=6, sinks=1, window=2, age_slope=slope), 1.2, 0.2
    sigma = {
        1.0: lambda x: 1 / (1 + math.exp(-x)),
        2.0: lambda x: min(1.0, max(0.0, (1 + x) / 2)),
        math.inf: lambda x: float(x > 0),
    }[alpha]
    settings = Settings(config, [0], alpha=alpha, threshold=threshold)
    starts = torch.tensor([[0] * 14, [3] * 14])
    places = torch.arange(14)
    offsets = torch.tensor([beta] if slope is None else [beta, slope], dtype=torch.float64)
    found = log_kept(query, key, offsets, places, places[None], starts, None, settings).exp()
    expected = by_loops(query, key, beta - threshold, config, sigma, [0, 3], slope or 0.0)
    lower = torch.ones(14, 14).tril().bool()
    expected = expected.clamp_min(1e-9)[:, lower] if alpha == 2.0 else expected[:, lower]
    torch.testing.assert_close(found.double()[:, lower], expected, rtol=1e-5, atol=1e-7)
    if math.isinf(alpha):
        assert 0.1 < expected.mean() < 0.9  # something is dropped and something is kept


def test_a_one_layer_model_is_the_same_model_with_that_mask() -> None:
    """The mask as transformers' own attention takes it, where the layer's decisions follow from the embeddings alone."""
    for family in ("llama", "gpt2", "gpt_neox", "phi3", "qwen3"):
        config = FAMILIES[family]()
        config.num_hidden_layers = 1
        torch.manual_seed(2)
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        pruned, tokens, decided = copy.deepcopy(plain), tokens_of(), []
        attach(pruned, DROPS)
        with observing(pruned, decided.append):
            found = whole(pruned, tokens)
        assert [d.layer for d in decided] == [0]
        expected = whole(plain, tokens, attention_mask=decided[0].log_keep[:, None])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=family)
        assert (found - whole(plain, tokens)).abs().max() > 1e-2, family  # the mask does something


@pytest.mark.parametrize("family", ["llama", "burnish"])
def test_weights_learn_under_hard_decisions_as_under_a_constant_mask(family: str) -> None:
    """The gradient is that of plain attention under the same masks as constants; decisions have none, and what is kept is counted."""
    model, tokens, decided = make(family), tokens_of(length=24), []
    settings = settings_of(model)
    settings.recording = True

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        F.cross_entropy(model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    with observing(model, decided.append):
        found = gradients()
    assert not any(".context_pruning." in name for name in found)
    for layer, one in enumerate(decided):
        kept, pairs = settings.kept[layer]
        assert kept == settings.kept_hard[layer] == (one.log_keep.tril(-1) == 0).sum() - 2 * 24 * 25 / 2
        assert 0.1 < kept / pairs < 0.9
    masks = iter(decided)

    def plain(query: Tensor, key: Tensor, value: Tensor, scale: float | None, allowed: Tensor) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * (scale or query.shape[-1] ** -0.5)
        mixed = (scores + next(masks).log_keep[:, None]).softmax(-1) @ value.repeat_interleave(groups, 1)
        return mixed, allowed.sum(-1)

    settings.policy = plain
    expected = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_soft_decisions_have_the_gradient_of_finite_differences() -> None:
    network = Transformer(ModelConfig(width=16, depth=2, heads=2, vocab_size=31, sequence_length=12)).double()
    initialize(network, 0)
    settings = attach(network, PruningConfig(rank=4, bias=1.0, window=2, sinks=1, scale=0.8))
    network.double()
    settings.alpha, settings.recording = 1.5, True
    tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(0))

    def objective() -> Tensor:
        """Cross-entropy and gamma x the kept share, in float64 throughout."""
        loss = F.cross_entropy(network(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")
        return loss + 20.0 * torch.stack([kept / pairs for kept, pairs in settings.kept.values()]).mean()

    names, parameters = zip(*((n, p) for n, p in network.named_parameters() if ".context_pruning." in n), strict=True)
    gradients = torch.autograd.grad(objective(), parameters)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * 1e-4 * direction
                values.append(objective().item())
                parameter -= sign * 1e-4 * direction
        assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5, abs=1e-5), name


def test_a_levelled_gradient_moves_no_layer_as_a_whole() -> None:
    """It is the gradient less its mean over the pairs within the support, and changes no value."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 14, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    places, weights = torch.arange(14), torch.rand(2, 14, 14, generator=generator, dtype=torch.float64)
    found = []
    for level in (False, True):
        settings = Settings(PruningConfig(rank=6, sinks=1, window=2), [0], alpha=2.0, level=level)
        beta, query_ = torch.tensor([1.1], dtype=torch.float64, requires_grad=True), query.clone().requires_grad_()
        kept = log_kept(query_, key, beta, places, places[None], None, None, settings)
        ((kept * weights).sum()).backward()
        found.append((kept.detach(), float(beta.grad), query_.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert abs(found[0][1]) > 1 and abs(found[1][1]) < 1e-9  # beta moves all pairs together
    # written out: the gradient at x, from the one of the query, less its mean
    x = (query @ key.mT / math.sqrt(6) + 1.1).requires_grad_()
    old = (places[:, None] - places >= 2) & (places >= 1)
    keep = torch.where(old, ((1 + x) / 2).clamp(0, 1), 1.0).clamp(min=1e-9)
    (gradient,) = torch.autograd.grad((keep.log().cumsum(1) * weights).sum(), x)
    inside = (x.abs() < 1) & old
    gradient = torch.where(inside, gradient - gradient[inside].mean(), 0.0)
    torch.testing.assert_close(found[1][2], gradient @ key / math.sqrt(6))


# -------------------------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_untouched_model_bit_for_bit(family: str) -> None:
    model, tokens = make(family), tokens_of()
    torch.manual_seed(1)
    config = FAMILIES[family]()
    untouched = BurnishForCausalLM(config) if family == "burnish" else AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    parameters = dict(model.named_parameters())
    for name, parameter in untouched.named_parameters():
        parameter.data.copy_(parameters[name])
    mask = torch.ones_like(tokens)
    if family != "burnish":
        mask[0, :9] = 0
    with dense(model), torch.no_grad():
        assert torch.equal(model(tokens, attention_mask=mask).logits, untouched.eval()(tokens, attention_mask=mask).logits)
        assert torch.equal(
            model.generate(tokens[:, :20], max_new_tokens=9, do_sample=False, pad_token_id=0),
            untouched.generate(tokens[:, :20], max_new_tokens=9, do_sample=False, pad_token_id=0),
        )
    assert (whole(model, tokens) - whole(untouched, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[40] + [1] * 40, [13, 1, 1, 30, 5, 30], [80]], ids=["token by token", "in chunks", "whole"])
def test_the_shrinking_cache_gives_the_logits_of_the_masked_dense_forward(family: str, sizes: list[int]) -> None:
    model, tokens = make(family), tokens_of()
    expected = whole(model, tokens)
    found, cache = in_pieces(model, tokens, sizes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for layer in cache.layers:  # and it did shrink, more than once where it grew a token at a time
        assert isinstance(layer, PrunedLayer)
        assert layer.used < 40 and layer.keys.shape[2] < 60 and int(layer.live().max()) < 30


@pytest.mark.parametrize("family", ["llama", "gpt2", "burnish"])
@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(rank=8, bias=0.9, rope=True),
        PruningConfig(rank=8, bias=0.9, normalize=False, sinks=0, window=1),
        PruningConfig(rank=8, bias=1.6, propagate_in_depth=True),
        PruningConfig(rank=8, bias=2.5, age_slope=-0.6),
    ],
    ids=["rope", "bare", "in depth", "age"],
)
def test_every_option_decodes_as_it_trains(family: str, config: PruningConfig) -> None:
    model, tokens = make(family, config), tokens_of()
    plain = whole(model, tokens)
    settings_of(model).standards = {0: (0.3, 1.4), 1: (-0.2, 0.8)}
    expected = whole(model, tokens)
    for sizes in ([30] + [1] * 50, [11] * 7 + [3]):
        torch.testing.assert_close(in_pieces(model, tokens, sizes)[0], expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3  # the standards of a layer act


def test_standards_are_mean_and_deviation_over_pairs() -> None:
    model, tokens, seen = make("llama"), tokens_of(), {}
    for interaction in interactions(model).values():
        interaction.register_forward_hook(lambda module, _, output: seen.__setitem__(module.layer, output[:2]))
    with measuring_products(model) as sums:
        whole(model, tokens[:1])
        whole(model, tokens[1:])
        seen.clear()
        whole(model, tokens)
    # each text was counted twice, which changes neither
    lower = torch.ones(LENGTH, LENGTH).tril(-1).bool()
    for layer, (mean, deviation) in standards_of(sums).items():
        query, key = (x.double() for x in seen[layer])
        products = torch.stack([query[b] @ key[b].T / math.sqrt(8) for b in range(2)])[:, lower]
        assert (mean, deviation) == pytest.approx((float(products.mean()), float(products.std(correction=0))), rel=1e-9)


def test_soft_decisions_decode_as_they_train() -> None:
    model, tokens = make("llama"), tokens_of()
    settings_of(model).alpha = 2.0
    expected = whole(model, tokens)
    torch.testing.assert_close(in_pieces(model, tokens, [7, 20] + [1] * 53)[0], expected, rtol=0, atol=1e-5)


def test_long_prompts_are_decided_on_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import model.context_pruning as module

    for config in (DROPS, PruningConfig(rank=8, bias=1.6, propagate_in_depth=True)):
        model, tokens = make("llama", config), tokens_of()
        expected = whole(model, tokens)
        monkeypatch.setattr(module, "ROWS", 7)
        torch.testing.assert_close(whole(model, tokens), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(in_pieces(model, tokens, [50, 1, 29])[0], expected, rtol=0, atol=1e-5)
        monkeypatch.undo()


def test_propagation_in_depth_keeps_dropped_what_a_layer_before_dropped() -> None:
    decided: list[Decided] = []
    model = make("llama", PruningConfig(rank=8, bias=1.6, propagate_in_depth=True))
    with observing(model, decided.append):
        whole(model, tokens_of())
    for above, below in itertools.pairwise(decided):
        assert (below.log_keep[above.log_keep == -torch.inf] == -torch.inf).all()
        assert (below.log_keep == -torch.inf).sum() > (above.log_keep == -torch.inf).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_batches_pads_beams_and_prefills_in_chunks(family: str) -> None:
    model, prompts = make(family), tokens_of(2, 30)
    arguments = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    together = model.generate(prompts, **arguments)
    one_by_one = [model.generate(prompts[i : i + 1], **arguments)[0, 30:] for i in range(2)]
    assert together[:, 30:].tolist() == [row.tolist() for row in one_by_one]
    # without a cache at all, each step is the masked dense forward
    assert model.generate(prompts, use_cache=False, **arguments).tolist() == together.tolist()
    # rows of different lengths, padded on the left
    padded, mask = torch.zeros(2, 37, dtype=torch.int64), torch.zeros(2, 37, dtype=torch.int64)
    padded[0, 7:], mask[0, 7:], padded[1, 18:], mask[1, 18:] = prompts[0], 1, prompts[1, :19], 1
    found = model.generate(padded, attention_mask=mask, **arguments)[:, 37:]
    short = model.generate(prompts[1:, :19], **arguments)[:, 19:]
    assert found.tolist() == [one_by_one[0].tolist(), short[0].tolist()]
    beams = model.generate(prompts, num_beams=3, **arguments)
    assert beams.tolist() == model.generate(prompts, num_beams=3, use_cache=False, **arguments).tolist()
    torch.manual_seed(0)
    sampled = model.generate(prompts, max_new_tokens=12, do_sample=True, pad_token_id=0)
    torch.manual_seed(0)
    assert sampled.tolist() == model.generate(prompts, max_new_tokens=12, do_sample=True, pad_token_id=0, use_cache=False).tolist()
    assert model.generate(prompts, prefill_chunk_size=7, **arguments).tolist() == together.tolist()
    assert model.generate(padded, attention_mask=mask, prefill_chunk_size=7, **arguments)[:, 37:].tolist() == found.tolist()
    # a second turn, after what the cache of the first holds
    cache = new_cache(model)
    said = model.generate(prompts, past_key_values=cache, **arguments)
    assert said.tolist() == together.tolist()
    turns = torch.cat((said, tokens_of(2, 9, seed=4)), dim=1)
    answer = model.generate(turns, past_key_values=cache, **arguments)
    assert answer.tolist() == model.generate(turns, use_cache=False, **arguments).tolist()


def test_a_padded_batch_is_each_text_by_itself() -> None:
    for family in ("llama", "gpt2"):
        model, tokens = make(family), tokens_of()
        mask = torch.ones_like(tokens)
        mask[1, 60:] = 0
        found = whole(model, tokens, attention_mask=mask)
        torch.testing.assert_close(found[1, :60], whole(model, tokens[1:, :60])[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0], whole(model, tokens[:1])[0], rtol=0, atol=1e-5)


def test_decoding_after_a_batch_padded_on_the_right_is_each_text_by_itself() -> None:
    """Padding looks at the text before it, and decides nothing about it. Window and age count places, padding too, hence neither here."""
    model, tokens, new = make("llama", PruningConfig(rank=8, bias=0.9, sinks=2, window=1)), tokens_of(2, 60), tokens_of(2, 20, seed=11)
    mask = torch.ones_like(tokens)
    mask[1, 40:] = 0
    cache = new_cache(model)
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
        mask = torch.cat((mask, torch.ones_like(new)), dim=1)
        places = torch.stack((torch.arange(60, 80), torch.arange(40, 60)))
        found = model(new, attention_mask=mask, position_ids=places, past_key_values=cache).logits
    for row, length in enumerate((60, 40)):
        alone = whole(model, torch.cat((tokens[row, :length], new[row]))[None])[0, length:]
        torch.testing.assert_close(found[row], alone, rtol=0, atol=1e-5)


def test_packed_documents_are_each_text_by_itself() -> None:
    network = make("burnish").network
    tokens = tokens_of(1)
    documents = (torch.arange(LENGTH)[None] >= 33).long()
    with torch.no_grad():
        packed = network(tokens, document_ids=documents)
        apart = torch.cat((network(tokens[:, :33]), network(tokens[:, 33:])), dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)  # sinks count from each document's start


WINDOWED: dict[str, Callable[[], Any]] = {
    "every other layer": lambda: transformers.Gemma3TextConfig(
        head_dim=8,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **SHAPE,
    ),
    "the last layers": lambda: transformers.Qwen2Config(
        num_key_value_heads=2, intermediate_size=48, use_sliding_window=True, sliding_window=8, max_window_layers=1, **SHAPE
    ),
    "all layers": lambda: transformers.MistralConfig(num_key_value_heads=2, intermediate_size=48, sliding_window=8, **SHAPE),
    "a convolution": lambda: transformers.Lfm2Config(
        num_key_value_heads=2, intermediate_size=48, layer_types=["conv", "full_attention", "full_attention"], **SHAPE
    ),
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_packed_documents_of_a_pretrained_network_are_seen_through_its_windows(kind: str) -> None:
    config = WINDOWED[kind]()
    torch.manual_seed(1)
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), tokens_of()
    decoder = PretrainedDecoder(PretrainedModel("tiny", fields_of(config), LENGTH))
    load(decoder.eval(), weights_of(model))
    documents = (torch.arange(LENGTH) >= 33).long().expand(2, -1)
    with torch.no_grad():
        if kind == "a convolution":
            with pytest.raises(InputError, match=r"data.document_masks: lfm2 has layers of conv"):
                decoder(tokens, document_ids=documents)
            return
        apart = torch.cat([whole(model, tokens[:, :33]), whole(model, tokens[:, 33:])], dim=1)
        torch.testing.assert_close(decoder(tokens, document_ids=documents), apart, rtol=0, atol=1e-5)


def test_bf16_decodes_close_to_its_dense_forward() -> None:
    """Rounding can turn a decision over, so this is about most tokens, not all."""
    model, tokens = make("llama").to(torch.bfloat16), tokens_of()
    found, _ = in_pieces(model, tokens, [40] + [1] * 40)
    difference = (found.float() - whole(model, tokens).float()).abs().amax(-1)
    assert difference.median() < 0.1


def test_memory_of_dropped_tokens_is_given_back() -> None:
    model, tokens = make("llama", PruningConfig(rank=8, bias=-100.0, sinks=1, window=4)), tokens_of(1, 150)
    peaks = []
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in tokens.split(25, dim=1):
            model(piece, past_key_values=cache)
            peaks.append(max(layer.bytes() for layer in cache.layers))
            assert all(layer.live().tolist() == [5] for layer in cache.layers)
    assert max(peaks) == peaks[0]  # a longer text takes no more
    per_token = 2 * 2 * 8 * 4 + 8 * 4 + 8 + 4  # keys and values of two heads of 8, the interaction key, position and log I
    assert peaks[0] <= (5 + 16 + 8) * per_token


def test_attend_is_softmax_attention_for_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 2, 9, 8, generator=generator) for _ in range(2))
    bias = torch.randn(2, 1, 1, 9, generator=generator)
    for queries in (1, 4):
        query = torch.randn(2, 6, queries, 8, generator=generator)
        repeated = [x.repeat_interleave(3, dim=1) for x in (key, value)]
        scores = query @ repeated[0].mT * 0.3 + bias
        torch.testing.assert_close(attend(query, key, value, bias.expand(2, 1, queries, 9), 0.3), scores.softmax(-1) @ repeated[1])


# --------------------------------------------------------------------------------------------------------------- training


def test_kept_shares_are_counted_over_pairs_that_see_each_other() -> None:
    model, tokens, decided = make("llama"), tokens_of(), []
    mask = torch.ones_like(tokens)
    mask[0, 70:] = 0
    settings = settings_of(model)
    settings.recording = True
    with observing(model, decided.append), torch.no_grad():
        model(tokens, attention_mask=mask, use_cache=False)
    valid = mask.bool()
    pairs = torch.ones(LENGTH, LENGTH).tril(-1).bool() & valid[:, :, None] & valid[:, None, :]
    for d in decided:
        kept, count = settings.kept[d.layer]
        assert int(count) == int(pairs.sum())
        assert float(kept) == float(((d.log_keep == 0) & pairs).sum()) == float(settings.kept_hard[d.layer])


def test_the_objective_has_the_value_of_the_loss_and_the_gradient_of_what_is_added() -> None:
    network = make("burnish").network
    settings, tokens = settings_of(network), tokens_of()
    settings.alpha = 2.0
    targets = torch.where(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.2, IGNORED_TARGET, tokens)
    plain = network(tokens, targets)
    settings.recording, settings.sparsity_weight, settings.distillation_weight = True, 3.0, 0.25
    steered = network(tokens, targets)
    torch.testing.assert_close(steered, plain)
    parameter = next(iter(interactions(network).values())).bias
    (found,) = torch.autograd.grad(steered, parameter)
    # written out
    settings.distillation_weight = 0.0
    logits = network(tokens)
    with dense(network):
        teacher = network(tokens).log_softmax(-1).detach()
    counted = targets != IGNORED_TARGET
    student = logits.log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)[counted].sum()
    network(tokens)
    share = torch.stack([kept / pairs for kept, pairs in settings.kept.values()]).mean()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
    objective = 0.75 * loss + 0.25 * divergence + 3.0 * counted.sum() * share
    (expected,) = torch.autograd.grad(objective, parameter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_changes_no_gradient() -> None:
    for config in (PruningConfig(rank=8, bias=1.0), PruningConfig(rank=8, bias=1.5, propagate_in_depth=True)):
        model, tokens = make("llama", config).train(), tokens_of()
        settings = settings_of(model)
        settings.alpha, settings.recording = 2.0, True

        def gradients(model: Any = model, tokens: Tensor = tokens, settings: Settings = settings) -> list[Tensor]:
            model.zero_grad()
            loss = model(tokens, labels=tokens, use_cache=False).loss + torch.stack([k / n for k, n in settings.kept.values()]).mean()
            loss.backward()
            return [p.grad.clone() for p in model.parameters()]

        plain = gradients()
        for options in ({}, {"context_fn": keep_products_and_attention}):
            model.gradient_checkpointing_enable({"use_reentrant": False, **options})
            for found, expected in zip(gradients(), plain, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_cache_that_nobody_reads_changes_no_gradient() -> None:
    """transformers makes one in training as well, unless it is told not to."""
    for config in (DROPS, PruningConfig(rank=8, bias=1.6, propagate_in_depth=True)):
        model, tokens, found = make("llama", config), tokens_of(), []
        for use_cache in (False, True):
            model.zero_grad()
            model(tokens, labels=tokens, use_cache=use_cache).loss.backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_a_teachers_pass_in_between_changes_no_gradient() -> None:
    """Activation checkpointing runs the layers again after it, and propagation in depth needs what the layers before had left."""
    config = FAMILIES["llama"]()
    torch.manual_seed(1)
    weights = weights_of(AutoModelForCausalLM.from_config(config))
    tokens, found = tokens_of(), []
    for checkpointed in (ActivationCheckpointing(), ActivationCheckpointing(full=3), ActivationCheckpointing(selective=3)):
        decoder = PretrainedDecoder(PretrainedModel("tiny", fields_of(config), LENGTH))
        load(decoder, weights)
        settings = attach(decoder, PruningConfig(rank=8, bias=1.5, propagate_in_depth=True))
        settings.alpha, settings.recording, settings.distillation_weight, settings.sparsity_weight = 2.0, True, 0.5, 1.0
        decoder.activation_checkpointing = checkpointed
        decoder.train()(tokens, tokens).backward()
        found.append([parameter.grad for parameter in decoder.parameters()])
    plain, *others = found
    for other in others:
        for ours, expected in zip(other, plain, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97),
            "not called through transformers' attention",
        ),
        (lambda: transformers.Gemma2Config(head_dim=8, num_key_value_heads=2, intermediate_size=48, **SHAPE), "soft-capped"),
        (
            lambda: transformers.MistralConfig(sliding_window=8, num_key_value_heads=2, intermediate_size=48, **SHAPE),
            "no layer whose context",
        ),
        (
            lambda: transformers_config(ModelConfig(width=32, depth=2, heads=4, vocab_size=97, sequence_length=99, attention="shaped")),
            "shaped",
        ),
    ],
)
def test_models_that_cannot_be_pruned_are_refused_with_the_reason(config: Callable[[], Any], message: str) -> None:
    made = config()
    model = BurnishForCausalLM(made) if made.model_type == "burnish" else AutoModelForCausalLM.from_config(made)
    with pytest.raises(InputError, match=message):
        attach(model)


def test_layers_with_a_window_stay_as_they_are() -> None:
    config = transformers.Qwen2Config(
        num_key_value_heads=2, intermediate_size=48, use_sliding_window=True, sliding_window=16, max_window_layers=1, **SHAPE
    )
    torch.manual_seed(0)
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), tokens_of()
    assert attach(model, DROPS).layers == [0]
    torch.testing.assert_close(in_pieces(model, tokens, [40] + [1] * 40)[0], whole(model, tokens), rtol=0, atol=1e-5)


def test_a_window_that_no_text_is_longer_than_is_none() -> None:
    """Phi-3.5 and Phi-4-mini say 262,144 tokens, and 131,072 positions; transformers makes another cache for it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        transformers.Phi3Config(num_key_value_heads=2, pad_token_id=0, intermediate_size=48, sliding_window=320, **SHAPE)
    ).eval()
    model.generation_config.eos_token_id = None
    assert attach(model, DROPS).layers == [0, 1, 2]
    tokens = tokens_of()
    found, cache = in_pieces(model, tokens, [40] + [1] * 40)
    torch.testing.assert_close(found, whole(model, tokens), rtol=0, atol=1e-5)
    assert all(isinstance(layer, PrunedLayer) and layer.used < 40 for layer in cache.layers)


def test_only_learned_positions_come_to_an_end() -> None:
    """YaRN runs past the positions of the configuration, as it does without pruning; padding takes none."""
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160, "rope_theta": 1e4}
    torch.manual_seed(1)
    config = transformers.Qwen3Config(num_key_value_heads=2, head_dim=16, intermediate_size=48, rope_parameters=scaled, **SHAPE)
    assert longest_text(config) == 640
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), tokens_of(1, 300)
    model.generation_config.eos_token_id = None
    attach(model, DROPS)
    torch.testing.assert_close(in_pieces(model, tokens, [150, 150])[0], whole(model, tokens), rtol=0, atol=1e-5)
    model, tokens = make("gpt2"), tokens_of(2, 155)
    mask = torch.ones_like(tokens)
    mask[:, :100] = 0
    arguments = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, attention_mask=mask, **arguments)
    assert found[:, 155:].tolist() == model.generate(tokens[:, 100:], **arguments)[:, 55:].tolist()
    with pytest.raises(InputError, match="161 tokens: this model takes at most 160"):
        whole(model, tokens_of(1, 161))


def test_another_attention_implementation_is_no_silently_unpruned_model() -> None:
    model = make("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="acted in 0 of 3 layers"):
        whole(model, tokens_of())


def test_after_a_pass_that_was_broken_off_dense_is_dense() -> None:
    model, tokens = make("llama"), tokens_of()
    with dense(model):
        expected = whole(model, tokens)
    with pytest.raises(InputError, match="4 masks, one a head"):
        whole(model, tokens, attention_mask=torch.ones(2, 4, LENGTH, LENGTH).tril().bool())
    with dense(model):
        assert torch.equal(whole(model, tokens), expected)


def test_dense_logits_leave_pruning_as_it_was() -> None:
    """Switched on or off; of our network, and of a pretrained one."""
    ours = make("burnish")
    pretrained = PretrainedDecoder(PretrainedModel("tiny", fields_of(FAMILIES["llama"]()), LENGTH))
    attach(pretrained, DROPS)
    ours.network.context_pruning_settings = settings_of(ours)
    for network in (ours.network, pretrained):
        for enabled in (True, False):
            settings_of(network).enabled = enabled
            network.dense_logits(tokens_of(), None)
            assert settings_of(network).enabled is enabled


def test_other_caches_are_refused() -> None:
    model, tokens = make("llama"), tokens_of()
    with pytest.raises(InputError, match="holds every token"):
        model.generate(tokens, max_new_tokens=3, cache_implementation="static", pad_token_id=0)
    filled = DynamicCache(config=model.config)
    with dense(model), torch.no_grad():
        model(tokens, past_key_values=filled)
    with pytest.raises(InputError, match="filled without context pruning"):
        model(tokens[:, :1], past_key_values=filled)
    with pytest.raises(InputError, match="already"):
        attach(model)
    cache = new_cache(model)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    with pytest.raises(InputError, match="what was dropped is gone"):
        cache.crop(-3)
    with pytest.raises(InputError, match=r"context_pruning\.rank: 5 is odd"):
        PruningConfig(rank=5, rope=True)


@pytest.mark.parametrize("start", [-3.0, 0.0, 2.0])
def test_the_threshold_of_a_budget_is_found(start: float) -> None:
    def keeps(threshold: float) -> float:
        return 0.1 + 1.05 / (1 + math.exp(2 * threshold))

    known: dict[float, float] = {}
    passes = []

    def share(threshold: float) -> float:
        passes.append(threshold)
        return keeps(threshold)

    for budget in (0.5, 0.25, 0.2, 0.9):
        found, reached = find_threshold(share, budget, start, known)
        assert reached and keeps(found) == pytest.approx(budget, rel=0.01)
    found, reached = find_threshold(share, 0.05, start, known)
    assert not reached and keeps(found) == pytest.approx(0.1)  # as little as it can
    assert len(passes) == len(set(passes)) == len(known) < 60
    assert find_threshold(keeps, 0.5, start)[0] == find_threshold(keeps, 0.5, start, {})[0]


def test_a_threshold_far_away_is_found_where_the_share_falls_steeply() -> None:
    found, reached = find_threshold(lambda threshold: 1 / (1 + math.exp(min(50 * (threshold - 41.7), 700))), 0.125, -20.0)
    assert reached and found == pytest.approx(41.7 + math.log(7) / 50, abs=1e-3)
    found, reached = find_threshold(lambda threshold: 0.6 if threshold < 3.3 else 0.1, 0.3, 0.0)
    assert not reached and found >= 3.3  # it jumps over the budget, and 0.1 is nearer
