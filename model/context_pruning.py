"""Dynamic context pruning (arXiv 2305.15805): every layer learns which past tokens no later token needs, and drops them.

    attach(model, PruningConfig(rank=64))        # any decoder of transformers whose attention goes through its interface, or one of ours
    settings_of(model).alpha = 4.0               # soft decisions, for training; infinity, the default: keep or drop
    model.generate(...)                          # with a cache that shrinks (model/pruned_cache.py)

With X what a layer's attention reads, k the token that decides and j < k one that it decides on (section 3 of the paper, which has neither
the norm, m and s, nor the slope):

    Q_int = norm(X W_Q), K_int = norm(X W_K)                one pair of (width x r) matrices a layer, shared by its heads
    x[k, j] = (<Q_int[k], K_int[j]> / sqrt(r) - m) / s + beta + slope log(k - j) - threshold
    p[k, j] = sigma_alpha(x[k, j])                          1 for the first `sinks` tokens, and where k - j < `window`
    log I[k, j] = sum over j < n <= k of log p[n, j]        what is dropped stays dropped
    A = softmax(Q K^T / sqrt(d) + log I + causal)

This file is the decisions, what steers them, and attention under them; model/pruning_hooks.py has `attach`, which puts them into a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import rotary_tables, rotate
from model.attention_need import taught
from model.config import PruningConfig
from model.errors import InputError
from model.linear_cross_entropy import IGNORED_TARGET
from model.pretrained import Gather
from model.pruned_cache import PrunedLayer
from model.sparse_sigmoid import sparse_sigmoid

ROWS = 256  # queries whose decisions are held at once without gradients
LOG_FLOOR = math.log(1e-9)  # of log p with soft decisions: log 0 has no gradient
CLOSE_ENOUGH = 0.01  # of a budget, where the search for its threshold ends
FINEST = 1e-4  # between two thresholds, where it ends too
WIDEST = 64.0  # how far from where it begins the threshold is looked for


class Decided(NamedTuple):
    """What a layer decided in a forward pass, for whoever asked by `observing`.

    layer: its number. log_keep: log I, (batch, queries, slots) float32, -inf for dropped and for what a query may not see.
    positions: (batch or 1, slots), the place in the text of each slot.
    """

    layer: int
    log_keep: Tensor
    positions: Tensor


# (query, key, value, scale, which slots each query may see: (batch or 1, queries, slots) bool) -> (mixed values, live entries that each
# query read: (batch, queries), a mean over heads where they differ)
Policy = Callable[[Tensor, Tensor, Tensor, float | None, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Settings:
    """How a model prunes now; one object, shared by its layers.

    Attributes:
        enabled: False: the model as it was, bit for bit.
        alpha: of the sparse sigmoid; infinity: hard decisions.
        threshold: common to all layers, 0 in the paper: higher drops more, so that one network serves several budgets.
        standards: of each layer (m, s).
        from_attention: while `recording`, decisions are taught by the attention of the network without pruning
            (model/attention_need.py), which is what then runs.
        level: with soft decisions, subtract from each layer's decision gradient its mean over undecided pairs: training chooses which
            pairs to keep, the threshold how many.
        sparsity_weight: gamma, what a token's whole context costs, in nats; with gradient, while `recording`.
        distillation_weight: share of the objective that is the divergence from the network without pruning.
        kept: of each layer, while `recording`: (sum of I over pairs j < k that see each other, with gradient; their number).
        kept_hard: that sum were decisions hard.
        need_losses: of each layer, while `from_attention`: how far its decisions are from what is needed, with gradient.
        policy: stands in for the decisions in whole texts, to compare with (analysis/cache_policies.py).
        live: what the policy says that each query read, by layer.
    """

    config: PruningConfig
    layers: list[int]
    enabled: bool = True
    alpha: float = math.inf
    threshold: float = 0.0
    standards: dict[int, tuple[float, float]] = field(default_factory=dict)
    level: bool = False
    from_attention: bool = False
    recording: bool = False
    sparsity_weight: float = 0.0
    distillation_weight: float = 0.0
    measured: dict[int, Tensor] = field(default_factory=dict)  # sums of (I, I with hard decisions, pairs) since they were last taken
    need_loss: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))  # its sum over forward passes, and their number
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept_hard: dict[int, Tensor] = field(default_factory=dict)
    need_losses: dict[int, Tensor] = field(default_factory=dict)
    observers: list[Callable[[Decided], None]] = field(default_factory=list)
    policy: Policy | None = None
    live: dict[int, Tensor] = field(default_factory=dict)
    calls: int = 0
    above: dict[int, Tensor] = field(default_factory=dict)  # propagate_in_depth: log I with that of all layers before, by place

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within it, the model is as it was without pruning."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def objective(self, loss: Tensor, logits: Tensor, targets: Tensor, dense_logits: Callable[[], Tensor]) -> Tensor:
        """What training descends, with the value of the plain loss: gamma x the kept share and the distillation have gradients alone.

        Args:
            loss: summed cross-entropy over the valid targets (batch, length) of these logits (batch, length, vocabulary).
            dense_logits: makes those of the network without pruning, which are held fixed.
        """
        if not (self.enabled and self.recording):
            return loss
        for layer, (kept, pairs) in self.kept.items():
            sums = torch.stack((kept.detach().double(), self.kept_hard[layer].double(), pairs.double()))
            self.measured[layer] = sums + self.measured[layer] if layer in self.measured else sums
        objective, counted = loss, targets != IGNORED_TARGET
        if self.from_attention:
            need_loss = torch.stack([*self.need_losses.values()]).mean()
            self.need_loss = self.need_loss.to(need_loss.device) + torch.stack((need_loss.detach(), torch.ones_like(need_loss)))
            objective = counted.sum() * need_loss
            return loss.detach() + (objective - objective.detach())
        if self.distillation_weight and torch.is_grad_enabled():
            divergence = _divergence(dense_logits()[counted], logits[counted])
            objective = (1 - self.distillation_weight) * objective + self.distillation_weight * divergence
        shares = [kept / pairs.clamp_min(1) for kept, pairs in self.kept.values()]
        objective = objective + self.sparsity_weight * counted.sum() * torch.stack(shares).mean()
        return loss.detach() + (objective - objective.detach())

    def describe(self) -> dict[str, Any]:
        """What has to be known, beside the weights, to decide as this does; in JSON's types. `take` reads it."""
        standards = [[layer, *standard] for layer, standard in self.standards.items()]
        return {"structure": asdict(self.config), "threshold": self.threshold, "standards": standards, "layers": self.layers}

    def take(self, description: dict[str, Any]) -> None:
        """Decide as a description says, which `structure_of` found whole. Raises InputError when it is of other layers."""
        if description["layers"] != self.layers:
            raise InputError(f"prunes layers {description['layers']}, and this model has {self.layers}")
        self.threshold = float(description["threshold"])
        self.standards = {int(layer): (float(mean), float(deviation)) for layer, mean, deviation in description["standards"]}

    def plainly_hard(self) -> bool:
        """Decisions are hard, nobody looks at them, and nothing stands in for them."""
        return math.isinf(self.alpha) and not (self.recording or self.observers or self.policy or self.config.propagate_in_depth)

    def above_of(self, layer: int) -> Tensor | None:
        """What the pruned layers before one have left of each place in the text; None with propagate_in_depth off, or before the first."""
        number = self.layers.index(layer)
        return self.above.get(self.layers[number - 1]) if number else None


def structure_of(description: dict[str, Any]) -> PruningConfig:
    """The structure in a description from outside.

    Raises KeyError, TypeError or ValueError where it is not as `Settings.describe` makes it, and InputError for one that cannot be.
    """
    for key, kind in {"structure": dict, "threshold": (int, float), "layers": list, "standards": list}.items():
        if not isinstance(description[key], kind):
            raise TypeError(f"{key} is {str(description[key])[:40]}")
    numbers = [description["threshold"], *(number for standard in description["standards"] for number in standard[1:])]
    if not all(math.isfinite(number) for number in numbers) or any(len(s) != 3 or s[2] <= 0 for s in description["standards"]):
        raise ValueError("threshold or standards are no numbers")
    return PruningConfig(**description["structure"])


def _divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """Summed KL(dense || pruned) in nats of rows of logits, chunk by chunk."""
    total = logits.new_zeros((), dtype=torch.float32)
    for teacher, student in zip(dense.split(256), logits.split(256), strict=True):
        teacher = teacher.float().log_softmax(-1)
        total = total + F.kl_div(student.float().log_softmax(-1), teacher, reduction="sum", log_target=True)
    return total


class Interaction(nn.Module):
    """W_Q, W_K, beta and the slope of age of one layer, a child of its attention module."""

    def __init__(self, width: int, settings: Settings, layer: int) -> None:
        super().__init__()
        self.settings, self.layer, config = settings, layer, settings.config
        self.query_key = nn.Linear(width, 2 * config.rank, bias=False)  # W_Q above W_K
        self.gain = nn.Parameter(torch.full((2, config.rank), config.scale)) if config.normalize else None
        self.bias = nn.Parameter(torch.full((1,), float(config.bias)))
        self.age_slope = None if config.age_slope is None else nn.Parameter(torch.full((1,), config.age_slope))
        self.current: tuple[Tensor, Tensor, Tensor, PrunedLayer | None] | None = None  # from the hook, for the attention function

    @property
    def standard(self) -> tuple[float, float]:
        """m and s."""
        return self.settings.standards.get(self.layer, (0.0, 1.0))

    @torch.no_grad()
    def initialize(self, seed: int, gather: Gather) -> None:
        """Draw W_Q and W_K, the same on any device and number of ranks; `gather` makes a sharded parameter whole while it is written."""
        generator = torch.Generator().manual_seed(1000 * seed + self.layer)
        with gather(cast(nn.Parameter, self.query_key.weight)):
            if not self.query_key.weight.is_meta:
                shape = self.query_key.weight.shape
                self.query_key.weight.copy_(torch.empty(shape).normal_(0.0, 1 / math.sqrt(shape[1]), generator=generator))

    def forward(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, tokens, width), the first of them at place `first` -> Q_int and K_int (batch, tokens, rank), beta (1,), or (2,) with
        the slope of age after it."""
        config = self.settings.config
        both = self.query_key(x).unflatten(-1, (2, config.rank))
        if self.gain is not None:
            both = F.rms_norm(both, (config.rank,), eps=1e-6) * self.gain
        if config.rope:
            both = rotate(both, rotary_tables(first, x.shape[1], config.rank, 10000.0, x.device))
        query, key = both.unbind(2)
        # a new tensor: under ZeRO-3 the parameters themselves are given back after this
        return query, key, self.bias * 1.0 if self.age_slope is None else torch.cat((self.bias, self.age_slope))

    def attend_next(self, x: Tensor, layer: PrunedLayer | None) -> None:
        """Make the interaction queries and keys of what the attention module is about to read, for `mix` and for the cache's layer."""
        if (self.settings.from_attention and self.settings.recording) or math.isinf(self.settings.alpha):
            x = x.detach()  # what is learned then concerns this layer's decisions alone; hard ones have no gradient
        query, key, beta = self(x, 0 if layer is None else layer.seen)
        if layer is not None:
            layer.staged = key
        self.current = query, key, beta, layer

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout: float = 0.0) -> Tensor:
        """`pruned_attention`, mask (batch or 1, 1, queries, places) bool, or added to the scores. Only after `attend_next`."""
        if mask is not None and mask.shape[1] != 1:
            raise InputError(f"attention mask: {mask.shape[1]} masks, one a head; context pruning takes one for all heads")
        seen = None if mask is None else mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        return pruned_attention(self, query, key, value, Visible(seen), scale, dropout)


# ------------------------------------------------------------------------------------------------------- the decisions


class _Levelled(torch.autograd.Function):
    """x itself, whose gradient loses its mean over the pairs that have one.

    With a threshold that keeps the share where it is meant to be, moving all decisions of a layer together has no use: the loss always
    asks for it, since more context is better, and the threshold takes it back. What is left is which pairs to prefer.
    """

    @staticmethod
    def forward(ctx, x: Tensor, undecided: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(undecided)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (undecided,) = ctx.saved_tensors
        mean = (gradient * undecided).sum() / undecided.sum().clamp_min(1)
        return (gradient - mean) * undecided, None


def decision_scores(
    interaction_query: Tensor, interaction_key: Tensor, beta: Tensor, places: Tensor, positions: Tensor, standard: tuple[float, float]
) -> Tensor:
    """x before the threshold, (batch, queries, slots), at least float32; arguments as of `log_kept`."""
    mean, deviation = standard
    dtype = torch.promote_types(interaction_query.dtype, torch.float32)
    query, key, beta = interaction_query.to(dtype), interaction_key.to(dtype), beta.to(dtype)
    x = query @ key.mT / (math.sqrt(query.shape[2]) * deviation) + (beta[0] - mean / deviation)
    if len(beta) > 1:
        x = x + beta[1] * (places[:, None] - positions[:, None, :]).clamp(min=1).to(dtype).log()
    return x


def always_kept(places: Tensor, positions: Tensor, starts: Tensor | None, config: PruningConfig, padding: Tensor | None = None) -> Tensor:
    """Pairs that are not decided on, (batch or 1, queries, slots) bool: slots in a query's window or later, the first of its text, and
    all where the query is padding; arguments as of `log_kept`."""
    exempt = places[:, None] - positions[:, None, :] < config.window
    if config.sinks:
        since = positions[:, None, :] if starts is None else positions[:, None, :] - starts[:, :, None]
        exempt = exempt | (since < config.sinks)
    return exempt if padding is None else exempt | padding[:, :, None]


def log_kept(
    interaction_query: Tensor,
    interaction_key: Tensor,
    beta: Tensor,
    places: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    before: Tensor | None,
    settings: Settings,
    standard: tuple[float, float] = (0.0, 1.0),
    hard: bool = False,
    padding: Tensor | None = None,
) -> Tensor:
    """log I of some queries on all slots, (batch, queries, slots), at least float32; 0 where a query's own token or a later one stands.

    Args:
        interaction_query, interaction_key: (batch, queries, rank) and (batch, slots, rank).
        beta: (1,), or (2,) with the slope of age.
        places: (queries,), where the queries stand in the text.
        positions: (batch or 1, slots), where the slots' tokens do.
        starts: (batch or 1, queries), where each query's text begins; None: at 0.
        before: (batch, slots), log I before the first of these queries; None: 0.
        standard: m and s of the layer.
        hard: keep or drop, whatever alpha is.
        padding: (batch or 1, queries) bool, which queries are no part of a text, and drop nothing; None: none.
    """
    x = decision_scores(interaction_query, interaction_key, beta, places, positions, standard) - settings.threshold
    exempt = always_kept(places, positions, starts, settings.config, padding)
    if hard or math.isinf(settings.alpha):
        dropped = (x <= 0) & ~exempt
        # counted in int32: exact, and cheaper than sums of infinities
        log_keep = torch.zeros_like(x).masked_fill_(dropped.cumsum(1, dtype=torch.int32) > 0, -torch.inf)
    else:
        if settings.level:
            x = _Levelled.apply(x, ~exempt & (x.detach().abs() * (settings.alpha - 1) < 1))
        keep = sparse_sigmoid(x, settings.alpha).masked_fill(exempt, 1.0)
        log_keep = keep.clamp(min=math.exp(LOG_FLOOR)).log().cumsum(1)
    return log_keep if before is None else log_keep + before[:, None]


class Visible(NamedTuple):
    """Who may look at whom, by places in the text.

    mask: (batch or 1, queries, places) bool; None: every token those before it.
    """

    mask: Tensor | None

    def rows(self, rows: slice) -> Visible:
        return Visible(None if self.mask is None else self.mask[:, rows])

    def starts(self) -> Tensor | None:
        """The first place each query may look at, (batch or 1, queries)."""
        return None if self.mask is None else self.mask.int().argmax(-1)

    def padding(self, places: Tensor) -> Tensor | None:
        """Which queries may not look at themselves, (batch or 1, queries) bool."""
        if self.mask is None:
            return None
        return ~self.mask.gather(2, places[None, :, None].expand(len(self.mask), -1, 1))[:, :, 0]

    def slots(self, places: Tensor, positions: Tensor) -> Tensor:
        """Which slots each query may look at, (batch or 1, queries, slots) bool; itself always, so that no row is empty."""
        positions = positions[:, None, :]
        own = positions == places[:, None]
        if self.mask is None:
            return positions <= places[:, None]
        batch = max(self.mask.shape[0], positions.shape[0])
        index = positions.expand(batch, self.mask.shape[1], -1)
        return self.mask.expand(batch, -1, -1).gather(2, index) | own


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None, dropout: float = 0.0) -> Tensor:
    """softmax(scale Q K^T + bias) V for query (batch, heads, queries, head_dim), key and value (batch, kv_heads, slots, head_dim).

    bias (batch or 1, 1, queries, slots) or None: every query sees every slot. -> (batch, heads, queries, head_dim).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.shape[2] == 1:  # a group's queries as rows: its keys are then read once, and not repeated
        batch, heads, _, head_dim = query.shape
        rows = query.view(batch, heads // groups, groups, head_dim)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
        return out.reshape(batch, heads, 1, value.shape[3])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=groups > 1)


def pruned_attention(
    interaction: Interaction, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Attention over what is kept; with a cache, that then forgets what is dropped. (batch, heads, queries, head_dim).

    query (batch, heads, queries, head_dim); key, value (batch, kv_heads, slots, head_dim), of all slots of the layer's cache.
    """
    settings, layer_number = interaction.settings, interaction.layer
    assert interaction.current is not None
    interaction_query, interaction_key, beta, layer = interaction.current
    interaction.current = None
    settings.calls += 1
    queries, slots = query.shape[2], key.shape[2]
    if layer is not None and queries == 1 and visible.mask is None and settings.plainly_hard():
        _drop(layer, interaction, interaction_query, beta)
        mixed = attend(query, key, value, layer.log_keep[:, None, None, :slots].to(query.dtype), scale, dropout)
        layer.release(None, 1)
        return mixed
    if layer is not None:
        first, positions = layer.seen - queries, layer.positions[:, :slots]
        interaction_key, before = layer.interaction_keys[:, :slots], layer.log_keep[:, :slots]
    else:
        first, positions, before = 0, torch.arange(queries, device=query.device)[None], None
    places = torch.arange(first, first + queries, device=query.device)
    if settings.policy is not None:
        if layer is not None:
            raise InputError("a cache policy stands in for context pruning in whole texts alone: use_cache=False")
        mixed, settings.live[layer_number] = settings.policy(query, key, value, scale, visible.slots(places, positions))
        return mixed
    decided_by = interaction_query, interaction_key, beta
    if settings.from_attention and settings.recording:
        allowed = visible.slots(places, positions)
        decided = ~always_kept(places, positions, visible.starts(), settings.config, visible.padding(places))
        score = partial(decision_scores, places=places, positions=positions, standard=interaction.standard)
        settings.need_losses[layer_number] = taught(score, decided_by, decided, query, key, scale, allowed)
        _record(interaction, decided_by, places, positions, visible, allowed)
        if visible.mask is None:
            return F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=query.shape[1] > key.shape[1]
            )
        return attend(query, key, value, allowed[:, None], scale, dropout)
    above = settings.above_of(layer_number)
    outputs, passed_on = [], []
    step = queries if torch.is_grad_enabled() or settings.recording else ROWS
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        seen = visible.rows(rows)
        # Slots after that of the last of these queries hold later tokens: new tokens stand last, in their order.
        at, known = positions[:, : slots - queries + rows.stop], slots - queries + rows.stop
        kept = log_kept(
            interaction_query[:, rows],
            interaction_key[:, :known],
            beta,
            places[rows],
            at,
            seen.starts(),
            None if before is None else before[:, :known],
            settings,
            interaction.standard,
            padding=seen.padding(places[rows]),
        )
        own_last = kept[:, -1].detach()
        if above is not None:
            kept = kept + above[:, rows].gather(2, at[:, None].expand(*kept.shape[:2], -1))
        allowed = seen.slots(places[rows], at)
        if settings.recording:
            _record(interaction, decided_by, places, positions, visible, allowed, kept)
        bias = kept.masked_fill(~allowed, -torch.inf)
        if settings.config.propagate_in_depth:
            by_place = bias.new_full((*bias.shape[:2], first + queries), -torch.inf)
            passed_on.append(by_place.scatter(2, at[:, None].expand(*bias.shape[:2], -1), bias))
        for observer in settings.observers:
            observer(Decided(layer_number, bias, at))
        outputs.append(attend(query[:, :, rows], key[:, :, :known], value[:, :, :known], bias.to(query.dtype)[:, None], scale, dropout))
        before = F.pad(own_last, (0, slots - known))
    if settings.config.propagate_in_depth:
        settings.above[layer_number] = torch.cat(passed_on, dim=1)
    if layer is not None and before is not None:
        # what the last token may not see, such as padding, no later token may
        layer.release(before.masked_fill(bias[:, -1] == -torch.inf, -torch.inf), queries)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _drop(layer: PrunedLayer, interaction: Interaction, interaction_query: Tensor, beta: Tensor) -> None:
    """What `log_kept` decides of the one newest token of texts that begin at place 0, into the cache: a dozen operations, not thirty."""
    settings, slots, (mean, deviation) = interaction.settings, slice(layer.used), interaction.standard
    config = settings.config
    dtype = torch.promote_types(interaction_query.dtype, torch.float32)
    scores = (layer.interaction_keys[:, slots].to(dtype) @ interaction_query.to(dtype).mT)[:, :, 0]
    positions, beta = layer.positions[:, slots], beta.to(dtype)
    enough = (mean + deviation * (settings.threshold - beta[0])) * math.sqrt(config.rank)
    if config.age_slope is not None:
        enough = enough - deviation * math.sqrt(config.rank) * beta[1] * (layer.seen - 1 - positions).clamp(min=1).to(dtype).log()
    dropped = scores <= enough
    dropped &= positions < layer.seen - config.window
    if config.sinks:
        dropped &= positions >= config.sinks
    layer.log_keep[:, slots].masked_fill_(dropped, -torch.inf)


def _record(
    interaction: Interaction,
    decided_by: tuple[Tensor, Tensor, Tensor],
    places: Tensor,
    positions: Tensor,
    visible: Visible,
    allowed: Tensor,
    kept: Tensor | None = None,
) -> None:
    """Sum up, for the whole of a text without a cache, how much of their context the queries still have; kept: log I, None: as if hard."""
    settings = interaction.settings
    pairs, padding = (positions[:, None, :] < places[:, None]) & allowed, visible.padding(places)
    if padding is not None:  # which has no context
        pairs = pairs & ~padding[:, :, None]
    with torch.no_grad():
        if kept is not None and math.isinf(settings.alpha) and not settings.config.propagate_in_depth:
            hard = kept
        else:
            starts, standard = visible.starts(), interaction.standard
            hard = log_kept(*decided_by, places, positions, starts, None, settings, standard, hard=True, padding=padding)
        pairs = pairs.expand(hard.shape)
        settings.kept_hard[interaction.layer] = kept_hard = ((hard == 0) & pairs).sum()
    shares = kept_hard.float() if kept is None or hard is kept else torch.where(pairs, kept, -torch.inf).exp().sum()
    settings.kept[interaction.layer] = shares, pairs.sum()


# --------------------------------------------------------------------------------------------------- what a caller needs


def settings_of(model: nn.Module) -> Settings:
    """What steers the pruning of a model. Raises InputError where there is none."""
    settings = getattr(model, "context_pruning_settings", None)
    if settings is None:
        raise InputError("the model has no context pruning: attach(model) gives it one")
    return settings


def interactions(model: nn.Module) -> dict[str, Interaction]:
    """Name -> the part of each pruned layer that pruning brought."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Interaction)}


@contextmanager
def measuring_products(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collect of each layer, over the forward passes within, the sums of (1, product, product^2) over pairs j < k, (3,) float64."""
    sums: dict[int, Tensor] = {}

    def add(interaction: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        query, key = output[0].detach().double(), output[1].detach().double()
        products = (query @ key.mT / math.sqrt(query.shape[-1])).tril(-1)
        length, batch = query.shape[1], query.shape[0]
        found = torch.stack((products.new_tensor(batch * length * (length - 1) / 2), products.sum(), products.square().sum()))
        sums[interaction.layer] = found + sums.get(interaction.layer, torch.zeros_like(found))

    handles = [interaction.register_forward_hook(add) for interaction in interactions(model).values()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def standards_of(sums: dict[int, Tensor]) -> dict[int, tuple[float, float]]:
    """Layer -> mean and standard deviation, of what `measuring_products` collected."""
    standards = {}
    for layer, (count, total, squares) in ((layer, found.tolist()) for layer, found in sums.items()):
        mean = total / count
        standards[layer] = (mean, max(math.sqrt(max(squares / count - mean**2, 0.0)), 1e-6))
    return standards


def find_threshold(
    share: Callable[[float], float], budget: float, start: float, known: dict[float, float] | None = None
) -> tuple[float, bool]:
    """(the threshold that keeps a share closest to a budget, whether that is near it): bisection, outwards from `start` at first.

    Args:
        share: measures the share of the context kept at a threshold; it falls with it.
        known: share by threshold, which is added to, so that one budget's passes serve the next.
    """
    known = {} if known is None else known
    looked_at, step = start, 0.5
    while True:  # each turn doubles the step up to WIDEST, or halves the distance down to FINEST
        if looked_at not in known:
            known[looked_at] = share(looked_at)
        best = min(known, key=lambda threshold: abs(known[threshold] - budget))
        if abs(known[best] - budget) <= CLOSE_ENOUGH * budget:
            break
        above = max((threshold for threshold, kept in known.items() if kept > budget), default=None)
        below = min(
            (threshold for threshold, kept in known.items() if kept <= budget and (above is None or threshold > above)), default=None
        )
        if above is not None and below is not None:
            if below - above < FINEST:
                break
            looked_at = (above + below) / 2
        else:
            if step > WIDEST:
                break
            looked_at = above + step if above is not None else min(known) - step
            step *= 2
    return best, abs(known[best] - budget) <= 5 * CLOSE_ENOUGH * budget


def dense(model: nn.Module) -> AbstractContextManager[None]:
    """The model as it is without pruning."""
    return settings_of(model).switched_off()


@contextmanager
def observing(model: nn.Module, observer: Callable[[Decided], None]) -> Iterator[None]:
    """Call `observer` with what each layer decides."""
    settings = settings_of(model)
    settings.observers.append(observer)
    try:
        yield
    finally:
        settings.observers.remove(observer)
