"""What `python -m analysis context` can be asked, and what the numbers in context.json are. The command line reads it for every verb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InputError

METHODS = ("pruning", "window", "sinks_window", "tova", "h2o")  # analysis/cache_policies.py has all but the first
BUDGETS = (0.5, 0.25, 0.2, 0.125)

DEFINITIONS = {
    "loss": "mean cross-entropy of the next token in nats, over every token of the measured texts",
    "perplexity": "exp(loss)",
    "live": "entries that attention reads at a step, the token's own included: a mean over steps, texts and the layers that are pruned",
    "entries": "live, and for context pruning live x (1 + rank / (kv_heads x (head_dim of keys + of values))): its interaction keys count",
    "share": "entries / live of the whole context, (length + 1) / 2; above 1 where pruning keeps all and its keys are added",
    "size": "of a policy: the most entries that a step reads; the smallest with at least the entries of context pruning at this point",
    "threshold": "of context pruning: what is subtracted from every decision's score; for a budget found on the calibration text",
    "ratio": "perplexity / perplexity of the same weights with the whole context",
    "reached": "False: no threshold brings the share down (or up) to the budget",
    "dense": "the same weights with the whole context: pruning off, LoRA adapters on",
    "without_adapters": "the whole context, LoRA adapters off: the network as it was before the fine-tune",
    "exact": "share of needles whose every token is the most likely one, given those before it",
    "log_probability": "mean log-probability of a token of the needle's code in nats",
    "horizon": "lifetimes are of tokens that at least so many others follow; dropped means within so many",
    "dropped_share": "share of the tokens that were dropped within the horizon",
    "median_lifetime": "later tokens that still read it, the median; null: beyond the horizon",
    "read_by_later_tokens": "mean share of the later tokens that still read a token, by its position",
}


@dataclass
class Options:
    """Of `analyze_context`; what each is for is said by `python -m analysis context --help`."""

    data: list[str] | None = None
    tokens: int = 16384
    length: int = 1024
    budgets: Sequence[float] = BUDGETS
    methods: Sequence[str] = METHODS
    needle: int = 0
    precision: str = "fp32"

    def check(self) -> None:
        """Raises InputError naming the first that is out of range."""
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise InputError(f"--budgets: {budget:g}, expected shares of the context above 0, up to 1")
        for method in self.methods:
            if method not in METHODS:
                raise InputError(f"--methods: {method!r} is none; there are {', '.join(METHODS)}")
        for name, least in (("tokens", 1), ("length", 2), ("needle", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}: {getattr(self, name)}, expected at least {least}")
