"""What attention teaches the decisions: the need against loops over tokens, its loss against autograd and its optimum in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_need import NEGLIGIBLE, UNSEEN, future_need, need_loss, taught
from model.config import PruningConfig
from model.context_pruning import always_kept, decision_scores, dense, interactions, settings_of
from model.transformer import IGNORED_TARGET
from tests.model.test_context_pruning import LENGTH, make, tokens_of

TAUGHT = PruningConfig(rank=8, bias=5.0, window=3, age_slope=-0.7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_need_is_the_most_attention_that_any_later_token_gives() -> None:
    """A pair at a time, with grouped queries and two documents in a row."""
    batch, heads, kv_heads, length, head_dim = 2, 4, 2, 12, 5
    query, key = 2 * random(batch, heads, length, head_dim), random(batch, kv_heads, length, head_dim, seed=1)
    document = torch.tensor([[0] * 12, [0] * 5 + [1] * 7])
    allowed = (document[:, :, None] == document[:, None, :]) & torch.ones(length, length).tril().bool()
    found = future_need(query, key, 0.3, allowed)
    for b in range(batch):
        attention = torch.zeros(length, length)
        for t in range(length):
            seen = [j for j in range(t + 1) if allowed[b, t, j]]
            for h in range(heads):
                scores = torch.stack([0.3 * query[b, h, t] @ key[b, h // 2, j] for j in seen])
                attention[t, seen] += scores.softmax(0) / heads
        for k in range(length):
            for j in range(length):
                expected = max((float(attention[t, j]) for t in range(k + 1, length)), default=0.0)
                assert float(found[b, k, j]) == pytest.approx(expected, abs=1e-6)


def test_the_loss_is_least_where_decisions_expect_what_is_needed() -> None:
    """One number for all pairs: exp(x) is then the mean of u, and the least loss is 1 - log mean(u)."""
    need, pairs = random(1, 9, 9).square() * 1e-3, torch.ones(9, 9).tril(-2).bool()[None]
    mean = float(need[pairs].mean() / NEGLIGIBLE)
    x = torch.full((1, 9, 9), math.log(mean), requires_grad=True)
    loss = need_loss(x, need, pairs)
    assert float(loss.detach()) == pytest.approx(1 - math.log(mean), rel=1e-5)
    assert abs(float(torch.autograd.grad(loss, x)[0].sum())) < 1e-5
    for shift in (-0.3, 0.3):
        assert float(need_loss(x.detach() + shift, need, pairs)) > float(loss.detach()) + 0.01


def test_the_gradient_is_autograds_over_the_pairs_that_count() -> None:
    """A pair counts when it is decided on, and a quarter of the text comes after it."""
    config, length = TAUGHT, 24
    query, key = random(1, 2, length, 4), random(1, 2, length, 4, seed=1)
    made_of = [part.requires_grad_() for part in (random(1, length, 8, seed=2), random(1, length, 8, seed=3), torch.tensor([2.0, -0.4]))]
    places = torch.arange(length)
    allowed = torch.ones(1, length, length).tril().bool()

    def score(*parts: Tensor) -> Tensor:
        return decision_scores(*parts, places, places[None], (0.2, 1.5))

    loss = taught(score, tuple(made_of), ~always_kept(places, places[None], None, config), query, key, None, allowed)
    found = torch.autograd.grad(3 * loss, made_of)
    total, needed = torch.zeros(()), torch.zeros(())
    need = future_need(query, key, None, allowed)
    for k in range(length):
        for j in range(1, k - config.window + 1):  # the first token is a sink
            if length - 1 - k >= UNSEEN * length:
                x = (made_of[0][0, k] @ made_of[1][0, j] / math.sqrt(8) - 0.2) / 1.5 + made_of[2][0] + made_of[2][1] * math.log(k - j)
                u = need[0, k, j] / NEGLIGIBLE
                total, needed = total + x.exp() - u * x, needed + u
    assert float(loss.detach()) == pytest.approx(float((total / needed).detach()), rel=1e-4)
    for gradient, expected in zip(found, torch.autograd.grad(3 * total / needed, made_of), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_packed_documents_teach_what_each_teaches_alone() -> None:
    """However short beside the row: in each, the pairs on which a quarter of that document follows."""
    length, documents = 24, 8
    query, key = random(1, 2, length * documents, 4), random(1, 2, length * documents, 4, seed=1)
    made_of = random(1, length * documents, 8, seed=2), random(1, length * documents, 8, seed=3)

    def parts(rows: slice) -> tuple[Tensor, Tensor]:
        """Sums over pairs, which add up: of the loss, and of u."""
        number = len(range(length * documents)[rows])
        document = torch.arange(number) // length
        allowed = (document[:, None] == document) & torch.ones(number, number).tril().bool()
        places = torch.arange(number)
        decided = ~always_kept(places, places[None], (document * length)[None], TAUGHT)

        def score(*now: Tensor) -> Tensor:
            return decision_scores(*now, torch.tensor([2.0, -0.4]), places, places[None], (0.0, 1.0))

        loss = taught(score, (made_of[0][:, rows], made_of[1][:, rows]), decided, query[:, :, rows], key[:, :, rows], None, allowed[None])
        u = torch.where(decided & allowed, future_need(query[:, :, rows], key[:, :, rows], None, allowed[None]) / NEGLIGIBLE, 0.0)
        u[:, (places % length) > length - 1 - UNSEEN * length] = 0.0
        return loss.detach() * u.sum(), u.sum()

    together, needed = parts(slice(None))
    apart = [parts(slice(first, first + length)) for first in range(0, length * documents, length)]
    torch.testing.assert_close(together, torch.stack([total for total, _ in apart]).sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(needed, torch.stack([u for _, u in apart]).sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_teaches_what_decides_and_nothing_else(checkpointing: bool) -> None:
    """The network is the dense one meanwhile; shares are those of hard decisions; the objective is the mean over layers, a token each."""
    model, tokens = make("llama", TAUGHT).train(), tokens_of()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = settings_of(model)
    settings.recording = settings.from_attention = True
    settings.threshold = 2.0
    logits = model(tokens, use_cache=False).logits
    with dense(model):
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits)
    targets = torch.where(tokens < 9, IGNORED_TARGET, tokens)
    model(tokens, use_cache=False)
    biases = [interaction.bias for interaction in interactions(model).values()]
    alone = torch.autograd.grad((targets != IGNORED_TARGET).sum() / 3 * torch.stack([*settings.need_losses.values()]).sum(), biases)
    model(tokens, use_cache=False)
    value = logits.detach().float().sum()
    objective = settings.objective(value, logits, targets, lambda: logits)
    assert float(objective.detach()) == float(value)
    objective.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".context_pruning." in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name
    for bias, expected in zip(biases, alone, strict=True):
        torch.testing.assert_close(bias.grad, expected)
    for kept, pairs in settings.kept.values():
        assert 0.02 < float(kept / pairs) < 0.98 and int(pairs) == 2 * LENGTH * (LENGTH - 1) / 2


def test_decisions_learn_what_will_be_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taught by one text until they know it, scores rise and fall with the log of the need; untaught ones do not."""
    import model.context_pruning as module

    model, tokens = make("llama", TAUGHT), tokens_of()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(15)  # attention of a random model is nearly even, and there is nothing to learn
    settings, seen = settings_of(model), []
    settings.recording = settings.from_attention = True

    def look(score: Any, made_of: Any, decided: Tensor, query: Tensor, key: Tensor, scale: float, allowed: Tensor) -> Tensor:
        pairs = (decided & allowed).expand(2, -1, -1).clone()
        pairs[:, -LENGTH // 4 :] = False
        need = future_need(query, key, scale, allowed)[pairs].clamp_min(1e-6).log()
        seen.append(float(torch.corrcoef(torch.stack([score(*made_of).detach()[pairs], need]))[0, 1]))
        return taught(score, made_of, decided, query, key, scale, allowed)

    monkeypatch.setattr(module, "taught", look)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".context_pruning." in n], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        model(tokens, use_cache=False)
        torch.stack([*settings.need_losses.values()]).mean().backward()
        optimizer.step()
    assert max(seen[:3]) < 0.25 and min(seen[-3:]) > 0.45, (seen[:3], seen[-3:])
