"""Whether a signal gets through a network: how alike its tokens become, and how large activations and gradients are, layer by layer.

Of a recipe at its initial weights, at any depths and widths, so that one knows before training; or of a checkpoint on real text.
`analysis/token_geometry.py` says what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from analysis import token_geometry
from analysis.decoders import Decoder, Pretrained, find_decoder, open_decoder, projection_groups, run_decoder, watch
from analysis.fused import heads_in, parts_of_shape
from analysis.runs import Run
from analysis.token_geometry import centred, geometry, summarize
from analysis.tokens import check_vocabulary, encoder, read_text, validation_tokens
from model.config import ModelConfig
from model.errors import InputError
from model.linear_cross_entropy import IGNORED_TARGET
from model.parametrization import initialize
from model.section import ModelSection, resizing
from model.transformer import Transformer

BEFORE_NORM, AFTER_NORM = "before final norm", "after final norm"
LENGTH = 128  # tokens of a sequence, where neither --length nor the network says less

# When the verdict speaks against a network; each is a choice, and stands in the JSON.
THRESHOLDS = {
    "token_cosine": 0.95,  # collapsed above it
    "activation_growth": 100.0,  # largest activation RMS over the smallest
    "gradient_range": 1000.0,  # largest gradient RMS over the smallest
    "query_value_ratio": 1e-3,  # queries learn next to nothing below it
}
DEFINITIONS = {
    **token_geometry.DEFINITIONS,
    "places": f"`layer i`: the residual stream that enters layer i; `{BEFORE_NORM}`: what leaves the last; `{AFTER_NORM}`: what the "
    "unembedding reads. Padding counts nowhere",
    "gradient_rms": "root mean square over tokens and channels of the derivative of the summed next-token loss",
    "query_gradient": "Frobenius norm of the mean loss's derivative to the layer's query weights; so key_gradient, value_gradient; null "
    "where the layer has no such weights",
    "query_value_ratio": "query_gradient / value_gradient; so key_value_ratio. Both vanish where tokens collapse (arXiv 2206.03126); keys "
    "get exactly none while queries are zero",
    "loss": "mean next-token cross-entropy on these tokens, nats",
    "collapsed_at": "the first place with a token cosine above the threshold; null: none",
    "refused": "networks that could not be measured, and why",
    "healthy": "none of the thresholds was passed: a judgement of propagation alone, which says nothing of data, learning rate or length",
}


@dataclass
class Network:
    """One network to look at, and on what. `make` builds it when its turn comes."""

    name: str
    path: str
    state: str  # "initialisation", "step N" or "pretrained"
    make: Callable[[], Decoder]


@dataclass
class Batch:
    """Sequences padded on the right. tokens, targets: (sequences, length) int64, IGNORED_TARGET on padding; valid: bool."""

    tokens: Tensor
    targets: Tensor
    valid: Tensor


# What is looked at


def find_networks(words: list[str], depths: list[int], widths: list[int], seed: int, verify: bool) -> Iterator[tuple[Network, Any]]:
    """(network, where its text comes from) for the words of the command line: recipes, each with the section.key=value that follow
    it, and checkpoints. A recipe is taken at each of the depths and widths.

    Raises:
        InputError: not a recipe, a checkpoint, or a network that can be built.
    """
    sources: list[tuple[str, list[str]]] = []
    for word in words:
        if "=" in word and not Path(word).exists():
            if not sources or not is_recipe(sources[-1][0]):
                raise InputError(f"{word}: an override follows the recipe that it changes: signal recipes/X.yaml {word}")
            sources[-1][1].append(word)
        else:
            sources.append((word, []))
    for path, overrides in sources:
        if not is_recipe(path):
            if depths or widths:
                raise InputError(f"{path}: --depth and --width are for recipes; a checkpoint has the size that it has")
            source = find_decoder(path)
            state = "pretrained" if isinstance(source, Pretrained) else f"step {source.last(verify).step}"
            yield Network(source.name, path, state, lambda source=source: open_decoder(source, verify=False)), source
            continue
        section, vocab_size, length = read_recipe(path, overrides)
        label = " ".join([Path(path).stem, *overrides])
        for depth in depths or [None]:
            for width in widths or [None]:
                fields = section.model_dump(exclude={"size", "preset"}, exclude_unset=True)
                config = ModelSection(**{**fields, **resizing(section, depth, width)}).config(vocab_size, length)
                size = [f"{name} {value}" for name, value in (("depth", depth), ("width", width)) if value is not None]
                name = ", ".join([label, *size])
                yield Network(name, path, "initialisation", lambda config=config: initial_decoder(config, seed)), config


def is_recipe(path: str) -> bool:
    return path.endswith((".yaml", ".yml"))


def read_recipe(path: str, overrides: list[str]) -> tuple[ModelSection, int, int]:
    """The network of a recipe, its vocabulary (the tokenizer's, 16384 where the recipe names a pretrained one) and sequence length.

    Raises:
        InputError: the file or an override cannot be read, or does not describe a network.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: no such recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    tree = read_yaml(text, path)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise InputError(f"{path}: not a recipe: it has no model section")
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, leaf = key.split(".")
        if sections != ["model"]:
            raise InputError(f"{override}: here only the network can be changed: model.key=value")
        tree["model"][leaf] = read_yaml(value, override)
    try:
        section = ModelSection.model_validate(tree["model"])
    except ValidationError as error:
        problems = "; ".join(f"model.{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise InputError(f"{path}: {problems}") from None
    if section.pretrained is not None:
        raise InputError(
            f"{path}: the recipe begins with a pretrained model, so there are no initial weights to draw; give that model and a text: "
            f"python -m analysis signal {section.pretrained} --data FILES"
        )
    missing = [name for name in ("width", "depth", "heads") if getattr(section, name) is None]
    if missing:
        raise InputError(f"{path}: model: give a size, or also {' and '.join(missing)}")
    vocab_size = size_in(tree, "data.tokenizer.vocab_size", 16384, path)
    return section, vocab_size, size_in(tree, "training.sequence_length", 1024, path)


def read_yaml(text: str, origin: str) -> Any:
    """What YAML text says. Raises InputError, which names where it comes from."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 99th of a month
        raise InputError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def size_in(tree: dict[str, Any], key: str, default: int, path: str) -> int:
    """The positive number at a dotted key of a recipe. Raises InputError."""
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, dict):
            raise InputError(f"{path}: {key}: expected a mapping with {part}, found {value!r}")
        value = value.get(part)
        if value is None:
            return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not (number >= 1 and number.is_integer()):
        raise InputError(f"{path}: {key}: expected a positive whole number, found {value!r}")
    return int(number)


def initial_decoder(config: ModelConfig, seed: int) -> Decoder:
    model = Transformer(config)
    initialize(model, seed)
    return run_decoder(model.to("cuda" if torch.cuda.is_available() else "cpu"))


# On what


def batches_of(
    source: Any, decoder: Decoder, files: list[str] | None, tokens: int, length: int | None, seed: int
) -> tuple[list[Batch], str]:
    """The tokens, and what they are: text files or the validation split; of a recipe, files as bytes, or uniform random tokens.

    Each file is cut into sequences of its own; the last is padded.
    """
    length = min(LENGTH if length is None else length, decoder.sequence_length)
    at_initialisation = isinstance(source, ModelConfig)
    if files:
        if at_initialisation and decoder.vocab_size < 256:
            raise InputError(f"--data: a recipe reads text as bytes, and its vocabulary of {decoder.vocab_size} has not 256")
        encode = (lambda text: list(text.encode())) if at_initialisation else encoder(source)
        # a token is rarely longer than a dozen characters, so this is enough text, and never a huge file at once
        texts = [encode(read_text(file, 64 * (tokens + length))) for file in files]
        what = ("bytes of " if at_initialisation else "") + ", ".join(files)
        rows = [text[i : i + length + 1] for text in texts for i in range(0, max(1, len(text) - 1), length)]
        rows = [row for row in rows if len(row) > 2][: math.ceil(tokens / length)]
        if not rows:
            raise InputError(f"{', '.join(files)}: too little text to measure anything")
    elif at_initialisation:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(decoder.vocab_size, (math.ceil(tokens / length), length + 1), generator=generator).tolist()
        what = "uniform random tokens"
    elif isinstance(source, Run):
        sequences, what = validation_tokens(source, tokens, length)
        rows = sequences.tolist()
    else:
        raise InputError(f"{source.path}: a pretrained model does not say what text to measure it on: give --data FILES")
    check_vocabulary(torch.tensor([max(map(max, rows))]), decoder.vocab_size, what)
    return [pad(rows[i : i + 8], length) for i in range(0, len(rows), 8)], what


def pad(rows: list[list[int]], length: int) -> Batch:
    """Rows of up to length + 1 tokens as a batch: each token but the last is read, and predicts the next."""
    whole = torch.full((len(rows), length + 1), -1)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = torch.tensor(row)
    valid = whole[:, 1:] >= 0
    return Batch(whole[:, :-1].clamp(min=0), whole[:, 1:].masked_fill(~valid, IGNORED_TARGET), valid)


# What is measured


def measure(decoder: Decoder, batches: list[Batch], name: str) -> dict[str, Any]:
    """The measures at every place and the gradients of every layer, in one forward and backward pass a batch.

    Args:
        name: of the network, for messages.

    Raises:
        InputError: a layer whose queries and values cannot be told apart; the loss or a gradient is not finite.
    """
    places: dict[str, list[dict[str, Tensor]]] = {}
    without_mean: dict[str, list[dict[str, Tensor]]] = {}
    squares: dict[str, Tensor] = {}
    parts = query_key_value(decoder, name)
    decoder.network.zero_grad(set_to_none=True)
    loss, targets = 0.0, 0
    for batch in batches:
        seen: dict[str, Tensor] = {}
        valid = batch.valid.to(decoder.device)
        with residual_stream(decoder, seen):
            logits = decoder.logits(batch.tokens)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            summed = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten().to(logits.device), reduction="sum")
            loss += summed.item()
            if not math.isfinite(loss):  # nor are the activations, which have no singular values then
                raise InputError(f"{name}: the loss is not finite, so there is no signal to look at")
            summed.backward()
        targets += int(valid.sum())
        for place, x in seen.items():
            assert x.grad is not None
            places.setdefault(place, []).append(geometry(x, valid))
            without_mean.setdefault(place, []).append(geometry(centred(x, valid), valid))
            squares[place] = squares.get(place, 0) + x.grad.double().square().sum()  # 0 on padding, which nothing reads
    if not all(square.isfinite() for square in squares.values()):
        raise InputError(f"{name}: its gradients are not finite")
    layers = [gradients(own, targets) for own in parts]
    decoder.network.zero_grad(set_to_none=True)
    return {
        "loss": loss / targets,
        "places": {
            place: {
                **summarize(found),
                "gradient_rms": float((squares[place] / (targets * decoder.width)).sqrt()),
                "centred": summarize(without_mean[place]),
            }
            for place, found in places.items()
        },
        "layers": layers,
    }


@contextmanager
def residual_stream(decoder: Decoder, seen: dict[str, Tensor]) -> Iterator[None]:
    """Within it, a forward pass leaves the residual stream at every place in `seen`, and a backward pass its gradient there."""

    def look(place: str, x: Tensor) -> None:
        seen[AFTER_NORM if place == "unembedding" else place] = x
        x.retain_grad()

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        look(BEFORE_NORM, output)

    handle = decoder.layers[-1].register_forward_hook(leave)
    try:
        with watch(decoder, look):
            yield
    finally:
        handle.remove()


Rows = list[tuple[Tensor, list[tuple[int, int]]]]  # a weight, and runs of it when flat


def query_key_value(decoder: Decoder, name: str) -> list[dict[str, Rows]]:
    """Where each layer's query, key and value weights are; a layer without a value matrix has no "value"."""
    if isinstance(decoder.network, Transformer):
        found = []
        for block in decoder.network.blocks:
            own = {kind: getattr(block.attention, kind) for kind in ("query", "key", "value")}  # pyright: ignore
            found.append({kind: [whole(module.weight)] for kind, module in own.items() if isinstance(module, nn.Linear)})
        return found
    config = getattr(decoder.network, "config", None)
    heads = None if config is None else heads_in(lambda field: getattr(config.get_text_config(), field, None))
    found = []
    for layer, group in enumerate(projection_groups(decoder, name)):
        modules = group.attention_inputs
        if len(modules) == 3:  # called in this order in every family
            found.append({kind: [whole(module.weight)] for kind, module in zip(("query", "key", "value"), modules, strict=True)})
            continue
        weight = modules[0].weight
        parts = list(parts_of_shape(name, f"{decoder.name(modules[0])}.weight", weight.shape, heads)) if len(modules) == 1 else []
        if len(parts) != 3:
            raise InputError(f"{name}: layer {layer}: its queries, keys and values cannot be told apart")
        found.append({part.rpartition("[")[2][:-1]: [(weight, runs)] for part, runs in parts})
    return found


def whole(weight: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    return weight, [(0, weight.numel())]


def gradients(parts: dict[str, Rows], targets: int) -> dict[str, float | None]:
    """Norms of the mean loss's gradients to the query, key and value weights of a layer, and their ratios."""
    norms: dict[str, float | None] = {}
    for kind in ("query", "key", "value"):
        runs = [weight.grad.flatten()[a:b] for weight, places in parts.get(kind, []) for a, b in places if weight.grad is not None]
        norms[f"{kind}_gradient"] = float(torch.cat(runs).double().norm()) / targets if runs else None
    value = norms["value_gradient"]
    for kind in ("query", "key"):
        own = norms[f"{kind}_gradient"]
        norms[f"{kind}_value_ratio"] = own / value if own is not None and value else None
    return norms


# What it says


def analyze_signal(
    words: list[str],
    depths: list[int] | None = None,
    widths: list[int] | None = None,
    files: list[str] | None = None,
    tokens: int = 1024,
    length: int | None = None,
    seed: int = 0,
    verify: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """What signal.json holds: each network of the command line, side by side.

    Raises:
        InputError: see `find_networks` and `batches_of`; or no network could be measured, see `measure`.
    """
    for option, values in (
        ("tokens", [tokens]),
        ("length", [2 if length is None else length]),
        ("depth", depths or []),
        ("width", widths or []),
    ):
        for value in values:
            least = 2 if option in ("length", "tokens") else 1
            if value < least:
                raise InputError(f"--{option} {value}: expected at least {least}")
    found, refused = [], []
    for network, source in tqdm(
        list(find_networks(words, depths or [], widths or [], seed, verify)), desc="signal", unit="network", disable=not progress
    ):
        decoder = network.make()
        batches, what = batches_of(source, decoder, files, tokens, length, seed)
        entry: dict[str, Any] = {
            "name": network.name,
            "path": network.path,
            "state": network.state,
            "seed": seed if network.state == "initialisation" else None,
            "depth": len(decoder.layers),
            "width": decoder.width,
            "vocab_size": decoder.vocab_size,
            "data": what,
            "tokens": sum(int(batch.valid.sum()) for batch in batches),
            "sequence_length": batches[0].tokens.shape[1],
        }
        try:
            entry |= measure(decoder, batches, network.name)
        except InputError as error:  # one that diverged takes nothing from the others
            refused.append({"name": network.name, "path": network.path, "state": network.state, "problem": str(error)})
        else:
            found.append({**entry, **judge(entry)})
    if not found:
        raise InputError("; ".join(network["problem"] for network in refused))
    return {"format": 1, "verb": "signal", "definitions": DEFINITIONS, "thresholds": THRESHOLDS, "networks": found, "refused": refused}


def judge(network: dict[str, Any]) -> dict[str, Any]:
    """{"collapsed_at", "healthy", "verdict"}: what the measures of one network mean, by THRESHOLDS."""
    stream = [place for place in network["places"] if place != AFTER_NORM]
    measures = [network["places"][place] for place in stream]
    cosines = [m["token_cosine"] for m in measures]
    collapsed = next((place for place, cosine in zip(stream, cosines, strict=True) if cosine > THRESHOLDS["token_cosine"]), None)
    against = []
    if collapsed is not None:
        by = "by the end of the last layer" if collapsed == BEFORE_NORM else f"by {collapsed}"
        rank = network["places"][collapsed]["stable_rank"]
        against.append(
            f"tokens collapse {by}: cosine {network['places'][collapsed]['token_cosine']:.3f}, stable rank {rank:.2f}"
            f" (at the end {cosines[-1]:.3f} and {measures[-1]['stable_rank']:.2f})"
        )
    growth = spread([m["activation_rms"] for m in measures])
    if growth > THRESHOLDS["activation_growth"]:
        against.append(f"activations differ {growth:.3g}-fold between layers")
    steepness = spread([m["gradient_rms"] for m in measures])
    if steepness > THRESHOLDS["gradient_range"]:
        first, last = measures[0]["gradient_rms"], measures[-1]["gradient_rms"]
        against.append(f"gradients differ {steepness:.3g}-fold between layers: they {'vanish' if first < last else 'explode'} backwards")
    ratios = [(own["query_value_ratio"], i) for i, own in enumerate(network["layers"]) if own["query_value_ratio"] is not None]
    if ratios and min(ratios)[0] < THRESHOLDS["query_value_ratio"]:
        ratio, layer = min(ratios)
        against.append(f"queries get next to no gradient: {ratio:.2g} of the values' in layer {layer}")
    if not against:
        least = f", queries at least {min(ratios)[0]:.2g} of the values' gradient" if ratios else ""
        return {
            "collapsed_at": None,
            "healthy": True,
            "verdict": f"tokens stay apart (cosine at most {max(cosines):.3f}), activations within {growth:.3g}-fold, "
            f"gradients within {steepness:.3g}-fold{least}",
        }
    return {"collapsed_at": collapsed, "healthy": False, "verdict": "; ".join(against)}


def spread(values: list[float]) -> float:
    """The largest over the smallest; infinite where one is 0."""
    return max(values) / min(values) if min(values) > 0 else math.inf


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal."""
    lines = []
    for network in result["networks"]:
        lines.append(
            f"{network['name']} at {network['state']}: depth {network['depth']}, width {network['width']}, {network['tokens']:,} tokens "
            f"in sequences of {network['sequence_length']} ({network['data']})"
        )
        says = ("will train", "will hardly train") if network["state"] == "initialisation" else ("the signal gets through", "it does not")
        lines.append(f"  {says[not network['healthy']]}: {network['verdict']}")
        end, after = network["places"][BEFORE_NORM], network["places"][AFTER_NORM]
        lines.append(
            f"  at the end: cosine {end['token_cosine']:.3f}, correlation {end['correlation']:.3f}, stable rank {end['stable_rank']:.2f} "
            f"(without the mean {end['centred']['stable_rank']:.2f}), entropy rank {end['entropy_rank']:.1f}; after the final norm: "
            f"cosine {after['token_cosine']:.3f}"
        )
    lines += [f"{network['problem']} ({network['path']} at {network['state']})" for network in result["refused"]]
    return "\n".join(lines)
