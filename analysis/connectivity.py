"""The loss along the straight line between two checkpoints: is there a barrier between them, and which part of the network makes it?

    analyze_connectivity([find_run("runs/X")], Options())          # every two checkpoints of a run: a map
    analyze_connectivity([find_decoder(a), find_decoder(b)], ...)  # two networks, and each of their parts alone

One network is in memory. For each place on the line its weights are written tensor by tensor from the two ends, which for checkpoints
of ours are the memory-mapped shards. The norms have no running statistics, so nothing is to be estimated again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from tqdm import tqdm

from analysis.decoders import Decoder, Pretrained, build_model, model_config_of, run_decoder
from analysis.output import number_or_none
from analysis.runs import Run
from analysis.tokens import check_vocabulary, held_out_tokens, sequences_at_once
from analysis.trajectory import kind_of, layer_of
from model.errors import InputError
from model.transformer import Transformer

DEFINITIONS = {
    "line": "theta(a) = (1 - a) theta_A + a theta_B at the places `at`, in float32; buffers stay as they are",
    "losses": "L(a), mean cross-entropy over these tokens, nats per token; null: not finite",
    "excess": "the largest L(a) - (1 - a) L(0) - a L(1) between the ends: what the line costs above its chord; negative: it runs through a "
    "valley all the way; null: a loss on the way is not finite",
    "excess_at": "the place a of it",
    "barrier": "excess, at least the 0 of the ends (2506.22712)",
    "rise": "the largest L(a) - (L(0) + L(1)) / 2, as Frankle et al. measure instability (1912.05671)",
    "lowest": "the lowest loss among the places, and its place: between 0 and 1 a mean of the weights is better than either end",
    "distance": "|theta_B - theta_A|, over all parameters, a tied one once",
    "cosine": "<theta_A, theta_B> / (|theta_A| |theta_B|)",
    "parts": "the same with one part of the network moved from A to B and the rest left at A, L(0) = L_A; `swapped`: L(1) - L_A",
    "excess_map": "the excess between every two ends; 0 on the diagonal",
    "aligned": "the same after B was moved by a symmetry of its function to where its weights are nearest A's (analysis/alignment.py), the "
    "scales of norms folded into the matrices behind them in both; rounds: of matching; cosine_before: of the folded weights as they were; "
    "logits_deviation: the largest difference of the moved network's logits from B's, over the largest logit; in_place: shares of MLP "
    "units and of groups of heads, by layer, that kept their number",
}
PART_PLACES = (0.25, 0.5, 0.75, 1.0)
LARGEST_DEVIATION = 1e-2  # of a moved network's logits: many times what rounding gives


@dataclass(frozen=True)
class Options:
    """What `python -m analysis connectivity` can be asked.

    Attributes:
        points: places on a line, ends included; None: 11 between two ends, 3 between several.
        tokens: how many the loss is over.
        data: text files; None: the first run's validation split.
        every: of a run's checkpoints only those at multiples of so many steps.
        align: also after a symmetry of the second network that brings it nearest the first.
    """

    points: int | None = None
    tokens: int = 8192
    data: Sequence[str] | None = None
    every: int | None = None
    align: bool = False


class End(NamedTuple):
    """One end of a line: `tensor(name)` is a parameter, float32, on the CPU or where it lies."""

    name: str
    path: str
    step: int | None
    shapes: Mapping[str, Size]
    tensor: Callable[[str], Tensor]


class Line:
    """A network that walks between ends, and the loss where it stands."""

    def __init__(self, decoder: Decoder, batches: Sequence[Tensor], tick: Callable[[], object]) -> None:
        self.decoder, self.batches, self.tick = decoder, batches, tick
        self.parameters = dict(decoder.network.named_parameters())
        self.tokens = sum(batch[:, 1:].numel() for batch in batches)

    @torch.no_grad()
    def place(self, a: End, b: End, at: float, names: Iterable[str] | None = None) -> None:
        """Write (1 - at) A + at B into all parameters, or those named."""
        for name in self.parameters if names is None else names:
            parameter = self.parameters[name]
            value = (a if at < 1.0 else b).tensor(name).to(parameter.device)
            parameter.copy_(torch.lerp(value, b.tensor(name).to(parameter.device), at) if 0.0 < at < 1.0 else value)

    def loss(self) -> float:
        """Nats per token."""
        self.tick()
        return sum(self.decoder.summed_loss(batch) for batch in self.batches) / self.tokens

    def between(self, a: End, b: End, ends: tuple[float, float], points: int) -> dict[str, Any]:
        """The losses from A to B, whose own are known."""
        at = torch.linspace(0.0, 1.0, points, dtype=torch.float64).tolist()
        losses = [ends[0]]
        for place in at[1:-1]:
            self.place(a, b, place)
            losses.append(self.loss())
        return {**self.separation(a, b), **barrier(at, [*losses, ends[1]])}

    def parts(self, a: End, b: End, loss_of_a: float) -> dict[str, Any]:
        """What each part does alone; the network stands at A before and after."""
        self.place(a, b, 0.0)
        found = {}
        for part, names in parts_of(self.parameters).items():
            losses = [loss_of_a]
            for place in PART_PLACES:
                self.place(a, b, place, names)
                losses.append(self.loss())
            self.place(a, b, 0.0, names)
            swapped = losses[-1] - loss_of_a
            weights = sum(self.parameters[name].numel() for name in names)
            found[part] = {"weights": weights, **barrier([0.0, *PART_PLACES], losses), "swapped": number_or_none(swapped)}
        return found

    def separation(self, a: End, b: End) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64)
        for name in self.parameters:
            x, y = a.tensor(name).flatten(), b.tensor(name).flatten()
            products = [torch.sum(u * v, dtype=torch.float64).cpu() for u, v in ((x, x), (y, y), (x, y), (y - x, y - x))]
            sums += torch.stack(products)
        squares_a, squares_b, product, distance = sums.tolist()
        return {"distance": math.sqrt(distance), "cosine": product / math.sqrt(squares_a * squares_b)}


def barrier(at: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """What `DEFINITIONS` says of the losses at these places, the ends first and last."""
    first, last = losses[0], losses[-1]
    finite = all(map(math.isfinite, losses))
    excess = [loss - (1 - a) * first - a * last for a, loss in zip(at, losses, strict=True)]
    highest = max(range(1, len(at) - 1), key=lambda i: excess[i]) if finite else None
    lowest = min((i for i in range(len(at)) if math.isfinite(losses[i])), key=lambda i: losses[i])
    return {
        "at": list(at),
        "losses": [number_or_none(loss) for loss in losses],
        "excess": None if highest is None else excess[highest],
        "excess_at": None if highest is None else at[highest],
        "barrier": None if highest is None else max(excess[highest], 0.0),
        "rise": max(losses) - (first + last) / 2 if finite else None,
        "lowest": {"at": at[lowest], "loss": losses[lowest]},
    }


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters by layer, and outside the layers by what they do."""
    found: dict[str, list[str]] = {}
    for name in names:
        layer = layer_of(name)
        found.setdefault(kind_of(name) if layer is None else f"layer {layer}", []).append(name)
    return found


@torch.no_grad()
def analyze_connectivity(sources: list[Run | Pretrained], options: Options, verify: bool = True, progress: bool = True) -> dict[str, Any]:
    """What connectivity.json holds: of one run between every two of its checkpoints, of several between every two of their last ones.

    Raises:
        InputError: damaged checkpoints; fewer than two ends, or ends that are not of one network; no data; a loss at an end that is not
            finite; networks that cannot be aligned.
    """
    if options.points is not None and options.points < 3:
        raise InputError(f"--points {options.points}: expected at least 3, the ends and a place between them")
    if options.tokens < 1:
        raise InputError(f"--tokens {options.tokens}: expected at least 1")
    decoder, ends = open_ends(sources, options.every, verify)
    if options.align and not isinstance(decoder.network, Transformer):
        raise InputError("--align: only networks of Burnish's own can be aligned; of others the symmetries are not known")
    data = list(options.data) if options.data else None
    sequences, origin = held_out_tokens(sources[0], data, options.tokens, decoder.sequence_length)
    check_vocabulary(sequences, decoder.vocab_size, origin)
    batches = sequences.split(sequences_at_once(sequences.shape[1] - 1, decoder.vocab_size))
    pairs = list(combinations(range(len(ends)), 2))
    points = options.points or (11 if len(ends) == 2 else 3)
    parts = len(parts_of(name for name, _ in decoder.network.named_parameters())) * len(PART_PLACES) if len(ends) == 2 else 0
    with tqdm(total=len(ends) + len(pairs) * (points - 2 + parts), desc="connectivity", unit="loss", disable=not progress) as bar:
        line = Line(decoder, batches, bar.update)
        losses = []
        for end in ends:
            line.place(end, end, 0.0)
            losses.append(line.loss())
            if not math.isfinite(losses[-1]):
                raise InputError(f"{end.path}: its loss over these tokens is {losses[-1]}; `python -m analysis inspect` names weights")
        found = []
        for i, j in pairs:
            a, b, both = ends[i], ends[j], (losses[i], losses[j])
            one: dict[str, Any] = {"from": i, "to": j, **line.between(a, b, both, points)}
            if len(ends) == 2:
                one["parts"] = line.parts(a, b, losses[i])
            if options.align:
                one["aligned"] = aligned(line, a, b, points, len(ends) == 2, bar)
            found.append(one)
    return {
        "format": 1,
        "verb": "connectivity",
        "definitions": DEFINITIONS,
        "null_values": {"barrier": 0.0},
        "data": origin,
        "tokens": line.tokens,
        "sequence_length": sequences.shape[1] - 1,
        "points": points,
        "ends": [
            {"name": e.name, "path": e.path, "step": e.step, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            for e, loss in zip(ends, losses, strict=True)
        ],
        "pairs": found,
        "excess_map": excess_map(len(ends), found),
        **({"aligned_excess_map": excess_map(len(ends), found, True)} if options.align else {}),
    }


def excess_map(ends: int, pairs: Sequence[dict[str, Any]], is_aligned: bool = False) -> list[list[float | None]]:
    result: list[list[float | None]] = [[0.0] * ends for _ in range(ends)]
    for pair in pairs:
        value = (pair["aligned"] if is_aligned else pair)["excess"]
        result[pair["from"]][pair["to"]] = result[pair["to"]][pair["from"]] = value
    return result


def open_ends(sources: list[Run | Pretrained], every: int | None, verify: bool) -> tuple[Decoder, list[End]]:
    """A network, and the ends that it can walk between.

    Raises:
        InputError: damaged checkpoints, fewer than two of them, or networks that differ.
    """
    if len(sources) > 1 and every is not None:
        raise InputError("--every chooses among the checkpoints of one run; here the last of each of several is taken")
    if len(sources) == 1 and isinstance(sources[0], Run):
        checkpoints = sources[0].open(verify, every)
        named = [(f"step {checkpoint.step}", checkpoint) for checkpoint in checkpoints]
    else:
        named = [(source.name, source.last(verify) if isinstance(source, Run) else source) for source in sources]
    if len(named) < 2:
        raise InputError(f"{sources[0].path}: one checkpoint, and a line has two ends: give a run with several, or two of them")
    decoder: Decoder | None = None
    ends = []
    for name, source in named:
        if isinstance(source, Pretrained):
            loaded = source.load()
            weights = dict(loaded.network.named_parameters())
            tensor: Callable[[str], Tensor] = lambda name, weights=weights: weights[name].detach()  # noqa: E731
            end = End(name, str(source.path), None, {n: p.shape for n, p in weights.items()}, tensor)
            config = loaded.network.config if isinstance(loaded.network, Transformer) else None
            if decoder is None:  # of its own, since the ends stay as they are
                decoder = copy.deepcopy(loaded)
        else:
            config = model_config_of(source)
            end = End(name, str(source.path), source.step, source.shapes, source.tensor)
            if decoder is None:
                decoder = run_decoder(build_model(source))
        wanted = {n: p.shape for n, p in decoder.network.named_parameters()}
        differs = next((n for n in [*wanted, *end.shapes] if wanted.get(n) != end.shapes.get(n)), None)
        if differs is not None:
            there, here = (tuple(shape) if (shape := side.get(differs)) is not None else "absent" for side in (wanted, end.shapes))
            raise InputError(f"{end.path}: not of one network with {named[0][1].path}: {differs} is {here}, and {there} there")
        known = decoder.network.config if isinstance(decoder.network, Transformer) else None
        if config != known:
            raise InputError(f"{end.path}: not of one network with {named[0][1].path}: its configuration is another")
        ends.append(end)
    assert decoder is not None
    return decoder, ends


def aligned(line: Line, a: End, b: End, points: int, with_parts: bool, bar: tqdm) -> dict[str, Any]:
    """The line between A and what B becomes in A's coordinates; the bar says how the matching goes."""
    from analysis.alignment import align

    network = line.decoder.network
    assert isinstance(network, Transformer)

    def standing_at(end: End) -> Transformer:
        line.place(end, end, 0.0)
        return copy.deepcopy(network)

    result = align(standing_at(a), standing_at(b), lambda rounds: bar.set_postfix(matching=rounds))  # the network stands at B now
    tokens = line.batches[0][:1, :-1].to(line.decoder.device)
    true, moved = network(tokens), result.moved(tokens)
    deviation = float((moved - true).abs().max() / true.abs().max())
    if not deviation < LARGEST_DEVIATION:
        raise InputError(f"{b.path}: its function did not survive the alignment: logits differ by {deviation:.2g} of the largest")
    walker = Line(run_decoder(copy.deepcopy(result.fixed)), line.batches, line.tick)
    bar.total += points + with_parts * len(parts_of(walker.parameters)) * len(PART_PLACES)
    ends, losses = [], []
    for name, model in ((a.name, result.fixed), (b.name, result.moved)):
        weights = dict(model.named_parameters())
        ends.append(End(name, "", None, {}, lambda name, weights=weights: weights[name]))
        walker.place(ends[-1], ends[-1], 0.0)
        losses.append(walker.loss())
    found = walker.between(ends[0], ends[1], (losses[0], losses[1]), points)
    if with_parts:
        found["parts"] = walker.parts(ends[0], ends[1], losses[0])
    beside = {"cosine_before": result.cosine[0], "rounds": result.rounds, "logits_deviation": deviation, "in_place": result.in_place}
    return {**found, **beside}


def describe(result: dict[str, Any]) -> str:
    """A few lines for a person."""
    ends, pairs = result["ends"], result["pairs"]
    lines = [f"connectivity over {result['tokens']:,} tokens, {result['points']} places on a line, {len(ends)} ends"]
    if len(ends) > 2:
        known = [pair for pair in pairs if pair["excess"] is not None]
        if len(known) < len(pairs):
            lines.append(f"  {len(pairs) - len(known)} of {len(pairs)} lines lead through a loss that is not finite")
        if known:
            most = max(known, key=lambda pair: pair["excess"])
            none = sum(pair["excess"] < 0.01 for pair in known)
            between = f"{ends[most['from']]['name']} and {ends[most['to']]['name']}"
            lines.append(f"  largest excess {most['excess']:+.4f} nats, between {between}; {none} of {len(known)} pairs below 0.01")
        return "\n".join(lines)
    pair = pairs[0]
    for title, found in (("as they are", pair), *((("aligned", pair["aligned"]),) if "aligned" in pair else ())):
        lines.append(f"  {title}: {_excess_text(found)}; cosine {found['cosine']:.4f}, distance {found['distance']:.4g}")
        parts = sorted(found["parts"].items(), key=lambda item: -(math.inf if item[1]["excess"] is None else item[1]["excess"]))
        lines.append("    alone: " + ", ".join(f"{name} {_excess_text(part, short=True)}" for name, part in parts[:4]))
    for end in ends:
        lines.append(f"  {end['name']}: loss {end['loss']:.4f}")
    return "\n".join(lines)


def _excess_text(found: dict[str, Any], short: bool = False) -> str:
    if found["excess"] is None:
        return "not finite"
    return f"{found['excess']:+.4f}" if short else f"excess {found['excess']:+.4f} nats at {found['excess_at']:.2f}"
