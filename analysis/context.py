"""Perplexity token by token against the share of the context that is kept: context pruning beside the cache policies that need no training.

Every number is of decoding with the cache that a method leaves, computed in one pass: hard decisions as a mask for context pruning
(tests/model hold that against the shrinking cache), and analysis/cache_policies.py for the others. Methods are compared at equal mean live
entries: those of context pruning are measured, what its interaction keys take is added, and the others get the smallest size that has as
many on the same text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from analysis.cache_policies import POLICIES, SINKS, mean_live, size_for
from analysis.context_options import DEFINITIONS, Options
from analysis.lifetimes import Reads, summarise, token_classes
from analysis.needle import make_needles, score_needles
from analysis.pruned import Subject, learned_to_prune, open_subject
from analysis.tokens import check_vocabulary, read_text, sequences_at_once, training_windows, validation_tokens
from model.context_pruning import find_threshold, observing
from model.errors import InputError

CALIBRATION_TOKENS = 8192
KEEPS_ALL = 0.99  # a network that keeps so much at its own threshold decides nothing
SHOWN = 2  # texts on the page


@dataclass
class Texts:
    """measured (texts, length + 1) and calibration (texts, length), int64, which share no token; and where they are from."""

    measured: Tensor
    calibration: Tensor
    origin: str
    calibration_origin: str


@dataclass
class Point:
    """A budget to compare methods at: the threshold of a network that prunes, and the entries that come of it on a kind of text."""

    label: str
    budget: float | None  # None: what a network keeps at its own threshold
    threshold: float | None = None
    reached: bool = True
    entries: dict[str, float] = field(default_factory=dict)  # by task


@dataclass
class Passed:
    """What came of running texts through: nll and correct (texts, length), entries read a step by layer, and who read each token."""

    nll: Tensor
    correct: Tensor
    live: list[float]
    reads: Tensor | None = None  # (layers, texts, length)


def analyze_context(paths: list[str], options: Options, verify: bool = True, progress: bool = True) -> tuple[dict[str, Any], list[Any]]:
    """(what context.json holds, for each network that prunes what its page shows: (checkpoint's entry, pieces, reads)).

    Raises:
        InputError: options out of range, nothing to read, an unreadable checkpoint, or a network without softmax attention of its own.
    """
    options.check()
    learned = [learned_to_prune(path) for path in paths]
    if list(options.methods) == ["pruning"] and not any(learned):
        raise InputError(f"{paths[0]}: it has no context pruning, and --methods asks for nothing else: add a cache policy")
    found: dict[int, dict[str, Any]] = {}
    pages, points = [], []
    # those that prune come first, since they say what the others are compared at
    waiting = sorted(range(len(paths)), key=lambda i: not learned[i])
    while waiting:
        number = waiting.pop(0)
        subject = open_subject(paths[number], options.precision, verify)
        measured = _Measurement(subject, options, progress)
        if subject.prunes and learned[number] and measured.decides_nothing():
            learned[number] = False  # in its turn, as one without pruning
            waiting.append(number)
            continue
        subject.prunes = learned[number]
        if subject.prunes:
            own = measured.points()
            points += own
        else:
            own = points or [Point(f"{budget:g}", budget) for budget in options.budgets]
        found[number] = {"name": subject.name, "path": paths[number], **measured.all(own)}
        if measured.shown is not None:
            pages.append((found[number], *measured.shown))
    result = {
        "format": 1,
        "verb": "context",
        "definitions": DEFINITIONS,
        "options": {"length": options.length, "methods": list(options.methods), "precision": options.precision, "sinks": SINKS},
        "checkpoints": [found[number] for number in range(len(paths))],
    }
    return result, pages


class _Measurement:
    """One network on its texts."""

    def __init__(self, subject: Subject, options: Options, progress: bool) -> None:
        self.subject, self.options, self.progress = subject, options, progress
        if options.length > subject.longest:
            raise InputError(f"--length: {options.length}, and {subject.name} accepts at most {subject.longest} tokens")
        self.texts = choose_texts(subject, options)
        for tokens, origin in ((self.texts.measured, self.texts.origin), (self.texts.calibration, self.texts.calibration_origin)):
            check_vocabulary(tokens, subject.vocab_size, origin)
        self.needles = make_needles(subject.tokenizer, self.texts.measured, options.needle) if options.needle else None
        rank = subject.settings.config.rank
        self.overheads = [rank / width for width in subject.entry_widths()]  # of interaction keys, by layer
        self.whole = (options.length + 1) / 2  # live entries of the whole context, a mean
        self.own: Passed | None = None  # at its own threshold
        self.shown: tuple[list[list[str]], Tensor] | None = None

    def entries(self, passed: Passed) -> float:
        """Of context pruning: mean live entries, interaction keys counted."""
        return sum(live * (1 + more) for live, more in zip(passed.live, self.overheads, strict=True)) / len(passed.live)

    def decides_nothing(self) -> bool:
        """At its own threshold it keeps all, or its sinks and window alone: a fine-tune without sparsity, or under sinks and a window."""
        self.own = self.run(self.texts.measured, f"{self.subject.name}, its own threshold")
        live, config = sum(self.own.live) / len(self.own.live), self.subject.settings.config
        always = mean_live(config.sinks + config.window, self.options.length)
        return live >= KEEPS_ALL * self.whole or live <= 1.0001 * always

    def points(self) -> list[Point]:
        """Its own threshold, and those that keep each budget of the calibration text."""
        subject = self.subject
        points = [Point(f"own threshold of {subject.name}", None, subject.threshold)]
        known: dict[float, float] = {}

        def share(threshold: float) -> float:
            subject.settings.threshold = threshold
            return self.entries(self.run(self.texts.calibration, f"calibrating, threshold {threshold:.3g}")) / self.whole

        for budget in self.options.budgets:
            threshold, reached = find_threshold(share, budget, subject.threshold, known)
            points.append(Point(f"{budget:g} of {subject.name}", budget, threshold, reached))
        subject.settings.threshold = subject.threshold
        return points

    def all(self, points: list[Point]) -> dict[str, Any]:
        """Its entry of context.json."""
        subject, texts = self.subject, self.texts
        with subject.dense():
            dense = self.run(texts.measured, f"{subject.name}, whole context")
            dense_needles = self.run_needles(f"{subject.name}, needles in the whole context")
        entry: dict[str, Any] = {
            "prunes": subject.prunes,
            "data": texts.origin,
            "calibration_data": texts.calibration_origin,
            "tokens": texts.measured[:, 1:].numel(),
            "threshold": subject.threshold if subject.prunes else None,
            "interaction_overhead": sum(self.overheads) / len(self.overheads) if subject.prunes else None,
            "layers": subject.settings.layers,
            "dense": self.summary(dense, dense, dense_needles),
            "without_adapters": None,
            "points": [],
        }
        if subject.adapted:
            with subject.dense(adapters=False):
                before = self.run(texts.measured, f"{subject.name}, adapters off")
                entry["without_adapters"] = self.summary(before, dense, self.run_needles(f"{subject.name}, needles, adapters off"))
        if subject.prunes and "pruning" in self.options.methods:
            entry["points"] += [self.at_threshold(point, dense) for point in points]
        elif subject.prunes:
            for point in points:
                self.at_threshold(point, dense)  # the others are compared at its entries
        for method in self.options.methods:
            if method != "pruning":
                entry["points"] += self.at_sizes(method, points, dense)
        if subject.prunes and self.own is not None and self.own.reads is not None:
            pieces = [subject.tokenizer.pieces(row.tolist()) for row in texts.measured[:, :-1]]
            classes = [token_classes(row) for row in pieces]
            entry["lifetimes"] = summarise(self.own.reads, classes, subject.settings.layers)
            self.shown = pieces[:SHOWN], self.own.reads[:, :SHOWN]
        return entry

    def at_threshold(self, point: Point, dense: Passed) -> dict[str, Any]:
        subject = self.subject
        assert point.threshold is not None
        subject.settings.threshold = point.threshold
        own = point.budget is None and self.own is not None
        passed = self.own if own else self.run(self.texts.measured, f"{subject.name}, pruning, {point.label}")
        assert passed is not None
        needles = self.run_needles(f"{subject.name}, needles, {point.label}")
        subject.settings.threshold = subject.threshold
        point.entries["text"] = self.entries(passed)
        if needles is not None:
            point.entries["needle"] = self.entries(needles)
        where = {"method": "pruning", "point": point.label, "budget": point.budget, "threshold": point.threshold, "reached": point.reached}
        return {**where, **self.summary(passed, dense, needles, interaction_keys=True)}

    def at_sizes(self, method: str, points: list[Point], dense: Passed) -> list[dict[str, Any]]:
        """A cache policy at the entries of each point; one pass a size."""
        found, passes = [], {}

        def run(task: str, size: int) -> Passed:
            if (task, size) not in passes:
                with self.subject.with_policy(POLICIES[method](size)):
                    what = f"{self.subject.name}, {method}, {size} entries"
                    passes[task, size] = self.run_needles(what) if task == "needle" else self.run(self.texts.measured, what)
            return passes[task, size]

        for point in points:
            sizes = {}
            for task in ("text", "needle") if self.needles is not None else ("text",):
                entries = point.entries.get(task, (point.budget or 1.0) * self.whole)
                sizes[task] = size_for(entries, self.options.length)
            needles = run("needle", sizes["needle"]) if "needle" in sizes else None
            where = {"method": method, "point": point.label, "budget": point.budget, "size": sizes["text"]}
            summary = self.summary(run("text", sizes["text"]), dense, needles)
            if needles is not None:
                summary["needle"]["size"] = sizes["needle"]
            found.append({**where, **summary})
        return found

    def summary(self, passed: Passed, dense: Passed, needles: Passed | None, interaction_keys: bool = False) -> dict[str, Any]:
        loss, whole = float(passed.nll.double().mean()), float(dense.nll.double().mean())
        if not math.isfinite(loss) or loss > 700:
            raise InputError(f"{self.subject.name}: a loss of {loss:g} nats per token has no finite perplexity")
        live = sum(passed.live) / len(passed.live)
        entries = self.entries(passed) if interaction_keys else live
        values: dict[str, Any] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "ratio": math.exp(loss - whole),
            "live": live,
            "entries": entries,
            "share": entries / self.whole,
            "live_by_layer": passed.live,
        }
        if needles is not None and self.needles is not None:
            read = self.entries(needles) if interaction_keys else sum(needles.live) / len(needles.live)
            values["needle"] = {"share": read / self.whole, **score_needles(self.needles, needles.nll, needles.correct)}
        return values

    def run_needles(self, what: str) -> Passed | None:
        return None if self.needles is None else self.run(self.needles.tokens, what)

    @torch.no_grad()
    def run(self, tokens: Tensor, what: str) -> Passed:
        """tokens (texts, length + 1), or (texts, length) where no loss is wanted, through the network as it is set now."""
        subject, length = self.subject, self.options.length
        settings, scored = subject.settings, tokens.shape[1] > length
        batch = sequences_at_once(length, subject.vocab_size)
        layers = len(settings.layers)
        live, nll, correct, counts = torch.zeros(layers, dtype=torch.float64), [], [], []
        with tqdm(total=len(tokens) * length, desc=what, unit="tok", unit_scale=True, disable=not self.progress, leave=False) as bar:
            for rows in tokens.split(batch):
                reads = Reads(length)
                with observing(subject.network, reads):
                    logits = subject.logits(rows[:, :length], last=0 if scored else 1)
                if settings.enabled and settings.policy is None:
                    counts.append(reads.counts())
                    live += counts[-1].double().sum((1, 2)) / length
                elif settings.enabled:
                    live += torch.stack([settings.live[layer].double().mean(1).sum().cpu() for layer in settings.layers])
                else:
                    live += len(rows) * self.whole
                if scored:
                    targets = rows[:, 1:].to(logits.device)
                    nll.append(torch.stack([_nll(row, target) for row, target in zip(logits, targets, strict=True)]))
                    correct.append((logits.argmax(-1) == targets).cpu())
                bar.update(rows.shape[0] * length)
        reads_of_all = torch.cat(counts, dim=1) if counts else None
        empty = torch.zeros(0)
        means = (live / len(tokens)).tolist()
        return Passed(torch.cat(nll) if nll else empty, torch.cat(correct) if correct else empty, means, reads_of_all)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """(length, vocabulary) and (length,) -> (length,) float32 on the CPU, some rows at a time."""
    parts = zip(logits.split(256), targets.split(256), strict=True)
    return torch.cat([F.cross_entropy(part.float(), target, reduction="none").cpu() for part, target in parts])


# ------------------------------------------------------------------------------------------------------------------ texts


def choose_texts(subject: Subject, options: Options) -> Texts:
    """The texts to measure on, and others to find thresholds on.

    Of files: windows that lie within one file, the first of each file, then the second of each, and so on; the first of them calibrate.
    Without files: the run's validation split, and random windows of its training split.
    """
    length, texts = options.length, math.ceil(options.tokens / options.length)
    calibrating = max(1, min(texts, CALIBRATION_TOKENS // length))
    if options.data:
        windows = _file_windows(subject, options.data, length, texts + calibrating)
        if len(windows) < texts + calibrating:
            calibrating = max(1, len(windows) // 3)
        if len(windows) < 2:
            raise InputError(f"{options.data[0]}: one text of {length + 1} tokens alone; one calibrates, another is measured: add text")
        origin = ", ".join(options.data)
        measured = windows[calibrating : calibrating + texts]
        return Texts(measured, windows[:calibrating, :-1], f"{origin}: later windows", f"{origin}: the first {calibrating} windows")
    if subject.run is None:
        raise InputError(f"{subject.name}: it does not say what text to measure it on: give --data FILES")
    measured, origin = validation_tokens(subject.run, options.tokens, length)
    if measured.shape[1] <= length:
        raise InputError(f"{origin}: {measured.shape[1]} tokens, and one text takes {length + 1}: give a smaller --length, or --data")
    windows = training_windows(subject.run, calibrating, length, seed=0)
    return Texts(measured, windows, origin, f"random windows of the training split beside it, seed 0: {len(windows)}")


def _file_windows(subject: Subject, files: list[str], length: int, most: int) -> Tensor:
    """(windows, length + 1), in turn of each file."""
    of_file = []
    for file in files:
        tokens = torch.tensor(subject.tokenizer.encode(read_text(file, 64 * most * length)), dtype=torch.int64)
        of_file.append(list(tokens.unfold(0, length + 1, length)) if len(tokens) > length else [])
    longest = max(map(len, of_file))
    if longest == 0:
        raise InputError(f"{', '.join(files[:3])}: no file has one text of {length + 1} tokens: give longer ones, or a smaller --length")
    in_turn = [windows[i] for i in range(longest) for windows in of_file if i < len(windows)]
    return torch.stack(in_turn[:most])


# ------------------------------------------------------------------------------------------------------------------ table


def describe(result: dict[str, Any]) -> str:
    """The table for the terminal."""
    lines = []
    for entry in result["checkpoints"]:
        overhead = f"; interaction keys add {entry['interaction_overhead']:.1%} to an entry" if entry["prunes"] else ""
        lines.append(f"{entry['name']}: {entry['tokens']:,} tokens in texts of {result['options']['length']}{overhead}")
        needle = "needle" in entry["dense"]
        lines.append(f"  {'':14}{'share':>8}{'live':>9}{'perplexity':>12}{'ratio':>8}" + (f"{'needle':>9}{'log p':>9}" if needle else ""))
        rows = [("dense", entry["dense"])]
        if entry["without_adapters"]:
            rows.append(("no adapters", entry["without_adapters"]))
        lines += [_row(name, values) for name, values in rows]
        points = list(dict.fromkeys(values["point"] for values in entry["points"]))
        for point in points:
            lines.append(f"  {point}")
            for values in entry["points"]:
                if values["point"] == point:
                    lines.append(_row(f"  {values['method']}", values) + ("" if values.get("reached", True) else "  (not the budget)"))
    return "\n".join(lines)


def _row(name: str, values: dict[str, Any]) -> str:
    row = f"  {name:14}{values['share']:>8.3f}{values['live']:>9.1f}{values['perplexity']:>12.4g}{values['ratio']:>8.3f}"
    if "needle" in values:
        row += f"{values['needle']['exact']:>9.2f}{values['needle']['log_probability']:>9.2f}"
    return row
