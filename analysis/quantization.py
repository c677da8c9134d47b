"""What int8 costs: loss and perplexity of a decoder before and after quantisation, under four recipes from harsh to mild.

    w8a8_static      per-tensor, static, everything but the unembedding: the outlier paper's (analysis/fake_quantization.py), simulated
    w8a8_dynamic     one scale a matrix and one a batch of activations, taken as it comes; linear maps of the layers alone
    w8a8_per_token   one scale an output channel and one a token; linear maps of the layers alone
    w4a8             4-bit weights, one scale for 32 of them, 8-bit activations, one scale a token; linear maps of the layers alone

The last three are torchao's. The int8 ones multiply int8 by int8 into int32; w4a8 rounds both and multiplies in floating point.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from analysis.decoders import Decoder, Pretrained, Projections, open_decoder, projection_groups, watch
from analysis.fake_quantization import StaticRanges, calibrate, check_sites, intercept, quantise_weights
from analysis.runs import Run
from analysis.tokens import BATCH_TOKENS, check_vocabulary, encoder, file_windows, held_out_tokens, sequences_at_once, training_windows
from model.activation_statistics import ActivationMoments, add_to
from model.errors import InputError

Logits = Callable[[Tensor], Tensor]  # tokens (batch, length) -> logits (batch, length, vocab_size)

INT4: Any = vars(torch)["int4"]  # which pyright does not know
RECIPES = ("w8a8_static", "w8a8_dynamic", "w8a8_per_token", "w4a8")
GROUP_SIZE = 32  # weights that share a scale under w4a8

DEFINITIONS = {
    "loss": "mean cross-entropy over these tokens, nats per token",
    "perplexity": "exp(loss)",
    "perplexity_increase": "perplexity after - perplexity before; 0 when quantisation costs nothing",
    "perplexity_ratio": "perplexity after / perplexity before",
    "output_kl": "mean over positions of KL(p || q), nats: p the model's next-token distribution before, q after",
    "spread": "standard deviation (n - 1) of the perplexity over calibration seeds; null with one seed, or where nothing is calibrated",
    "how": "what computed it: torchao's quantised tensors, or a simulation in floating point",
    "kurtosis": "mean_j(s_j^4) / mean_j(s_j^2)^2 of the residual stream entering attention (1: all neurons alike), before quantisation",
    "w8a8_static": "int8, static, one range a tensor: weights symmetric, least squared error of 100 ranges; activations asymmetric, "
    "running percentile of training batches; projections, scores, softmax, context, MLP, residual sums, norms, embeddings",
    "w8a8_dynamic": "int8, symmetric, one scale a weight matrix and one an activation tensor of one batch; linear maps of the layers",
    "w8a8_per_token": "int8, symmetric, one scale an output channel and one a token; linear maps of the layers",
    "w4a8": f"int4 weights, one scale for {GROUP_SIZE}; int8 activations, asymmetric, one scale a token; linear maps of the layers",
}


@dataclass
class Options:
    """What the verb takes; checked when made. Raises InputError."""

    recipes: list[str] = field(default_factory=lambda: list(RECIPES))
    tokens: int = 8192
    data: list[str] | None = None
    calibration: list[str] | None = None
    seeds: int = 3
    calibration_batches: int = 4
    percentile: float = 99.999

    def __post_init__(self) -> None:
        unknown = [name for name in self.recipes if name not in RECIPES]
        if unknown:
            raise InputError(f"--recipes {' '.join(unknown)}: expected some of {', '.join(RECIPES)}")
        for name in ("tokens", "seeds", "calibration_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a positive number")
        if not 50 < self.percentile <= 100:
            raise InputError(f"--percentile {self.percentile:g}: expected a number above 50, up to 100")


# ------------------------------------------------------------------------------------------------------- quantising


def quantise_linears(decoder: Decoder, groups: list[Projections], recipe: str) -> Decoder:
    """A copy with the layers' linear maps quantised by torchao: w8a8_dynamic, w8a8_per_token or w4a8.

    Raises:
        InputError: a shape that the recipe cannot take, by the name of the first such map.
    """
    names = {decoder.name(module) for group in groups for maps in group for module in maps}
    for name in sorted(names):
        rows, columns = decoder.network.get_submodule(name).weight.shape  # pyright: ignore
        if recipe == "w4a8" and columns % GROUP_SIZE:
            raise InputError(f"{name}: {rows} x {columns}: {columns} inputs do not divide into groups of {GROUP_SIZE}")
        if recipe != "w4a8" and decoder.device.type == "cuda" and (rows % 8 or columns % 8):
            raise InputError(f"{name}: {rows} x {columns}: int8 products on CUDA need multiples of 8 (torchao would use the CPU)")
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerGroup,
        PerRow,
        PerTensor,
        quantize_,
    )

    configuration = {
        "w8a8_dynamic": lambda: Int8DynamicActivationInt8WeightConfig(granularity=PerTensor(), set_inductor_config=False),
        "w8a8_per_token": lambda: Int8DynamicActivationInt8WeightConfig(granularity=PerRow(), set_inductor_config=False),
        "w4a8": lambda: Int8DynamicActivationIntxWeightConfig(weight_dtype=INT4, weight_granularity=PerGroup(GROUP_SIZE)),
    }[recipe]()
    decoder = copy.deepcopy(decoder)
    quantize_(decoder.network, configuration, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name in names)
    return decoder


def how(recipe: str) -> str:
    """What computes a recipe, for the JSON."""
    if recipe == "w8a8_static":
        return "simulated in floating point (analysis/fake_quantization.py)"
    import torchao

    product = "int8 values multiplied in floating point" if recipe == "w4a8" else "int8 x int8 products summed in int32"
    return f"torchao {torchao.__version__}, {product}"


# -------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def compare(
    before: Callable[[Tensor], Tensor], after: list[Callable[[Tensor], Tensor]], batches: Iterable[Tensor]
) -> list[dict[str, float]]:
    """Loss of each of `after`, and how far its output lies from that of `before`, over batches (sequences, length + 1) of tokens.

    Returns:
        for each of `after`: {"loss": nats per token, "output_kl": nats per position}
    """
    sums = torch.zeros(len(after), 2, dtype=torch.float64)
    count = 0
    for batch in batches:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        reference = before(inputs).float().log_softmax(dim=-1)
        for i, logits_of in enumerate(after):
            log_probabilities = logits_of(inputs).float().log_softmax(dim=-1)
            loss = F.nll_loss(log_probabilities.flatten(0, 1), targets.flatten().to(log_probabilities.device), reduction="sum")
            kl = F.kl_div(log_probabilities, reference, reduction="sum", log_target=True)
            sums[i] += torch.stack([loss, kl]).double().cpu()
        count += targets.numel()
    return [{"loss": loss / count, "output_kl": kl / count} for loss, kl in sums.tolist()]


@torch.no_grad()
def measure_before(decoder: Decoder, batches: list[Tensor], name: str) -> dict[str, Any]:
    """Loss, perplexity and the kurtosis of every place, unquantised."""
    moments: dict[str, ActivationMoments] = {}
    loss, count = 0.0, 0
    with watch(decoder, lambda place, x: add_to(moments, place, x)):
        for batch in batches:
            loss += decoder.summed_loss(batch)
            count += batch[:, 1:].numel()
    loss /= count
    places: dict[str, float | None] = {place: sums.measures()["kurtosis"] for place, sums in moments.items()}
    layers = [value for place, value in places.items() if place != "unembedding" and value is not None]
    kurtosis = {
        "largest_layer": max(layers, default=None),
        "mean_over_layers": sum(layers) / len(layers) if layers else None,
        "places": places,
    }
    return {"loss": loss, "perplexity": _perplexity(loss, name), "kurtosis": kurtosis}


def measure_recipe(
    recipe: str, decoder: Decoder, groups: list[Projections], batches: list[Tensor], calibration: list[list[Tensor]], percentile: float
) -> dict[str, Any]:
    """One recipe's losses, one a calibration seed (a single one where nothing is calibrated), before they are averaged."""
    if recipe != "w8a8_static":
        return {"over_seeds": compare(decoder.logits, [quantise_linears(decoder, groups, recipe).logits], batches)}
    quantised = quantise_weights(decoder, groups)
    quantised_groups = projection_groups(quantised, recipe)
    ranges = [calibrate(quantised, quantised_groups, batches_of_seed, percentile) for batches_of_seed in calibration]

    def static(grid: StaticRanges) -> Logits:
        def logits(tokens: Tensor) -> Tensor:
            with intercept(quantised, quantised_groups, grid):
                return quantised.logits(tokens)

        return logits

    return {"over_seeds": compare(decoder.logits, [static(grid) for grid in ranges], batches), "sites": len(ranges[0].ranges)}


def summarise(found: dict[str, Any], before: dict[str, Any], recipe: str) -> dict[str, Any]:
    """What stands in the table: means over the calibration seeds, and what they cost."""
    seeds = [{**seed, "perplexity": _perplexity(seed["loss"], recipe)} for seed in found["over_seeds"]]
    perplexities = torch.tensor([seed["perplexity"] for seed in seeds], dtype=torch.float64)
    perplexity = perplexities.mean().item()
    return {
        "loss": sum(seed["loss"] for seed in seeds) / len(seeds),
        "perplexity": perplexity,
        "perplexity_increase": perplexity - before["perplexity"],
        "perplexity_ratio": perplexity / before["perplexity"],
        "spread": perplexities.std().item() if len(seeds) > 1 else None,
        "output_kl": sum(seed["output_kl"] for seed in seeds) / len(seeds),
        "over_seeds": seeds,
        "how": how(recipe),
        **({"sites": found["sites"]} if "sites" in found else {}),
    }


def analyze_checkpoint(source: Run | Pretrained, options: Options, verify: bool = True, progress: bool = True) -> dict[str, Any]:
    """One checkpoint's entry of quantization.json; of a run, its last checkpoint.

    Raises:
        InputError: nothing to read or calibrate on, an unreadable checkpoint, or a network that cannot be taken apart.
    """
    decoder = open_decoder(source, verify)
    sequences, origin = held_out_tokens(source, options.data, options.tokens, decoder.sequence_length)
    check_vocabulary(sequences, decoder.vocab_size, origin)

    groups = projection_groups(decoder, str(source.path))
    calibration: list[list[Tensor]] = []
    if "w8a8_static" in options.recipes:
        check_sites(decoder, groups, str(source.path))
        calibration = [_calibration(source, options, decoder, seed) for seed in range(options.seeds)]
        check_vocabulary(torch.cat([torch.cat(batches) for batches in calibration]), decoder.vocab_size, f"{source.path}: calibration data")
    length = sequences.shape[1] - 1
    batches = list(sequences.split(sequences_at_once(length, decoder.vocab_size)))
    before = measure_before(decoder, batches, str(source.path))
    recipes: dict[str, Any] = {}
    for recipe in tqdm(options.recipes, desc=source.name, unit="recipe", disable=not progress):
        try:
            recipes[recipe] = summarise(measure_recipe(recipe, decoder, groups, batches, calibration, options.percentile), before, recipe)
        except InputError as error:  # a shape that this recipe alone cannot take
            recipes[recipe] = {"refused": str(error)}
    return {
        "name": source.name,
        "path": str(source.path),
        "data": origin,
        "tokens": sequences.shape[0] * length,
        "sequence_length": length,
        "batch_sequences": len(batches[0]),
        "width": decoder.width,
        "before": before,
        "recipes": recipes,
    }


def analyze_quantization(sources: list[Run | Pretrained], options: Options, verify: bool = True, progress: bool = True) -> dict[str, Any]:
    """What quantization.json holds: an entry a checkpoint."""
    return {
        "format": 1,
        "verb": "quantization",
        "definitions": DEFINITIONS,
        "null_values": {"perplexity_increase": 0.0, "perplexity_ratio": 1.0, "output_kl": 0.0},
        "options": {
            "recipes": options.recipes,
            "calibration": options.calibration or "the run's training split",
            "calibration_seeds": options.seeds,
            "calibration_batches": options.calibration_batches,
            "calibration_tokens_per_batch": BATCH_TOKENS,
            "percentile": options.percentile,
        },
        "checkpoints": [analyze_checkpoint(source, options, verify, progress) for source in sources],
    }


def _calibration(source: Run | Pretrained, options: Options, decoder: Decoder, seed: int) -> list[Tensor]:
    """Batches of about `BATCH_TOKENS` training tokens, (sequences, length) each."""
    length = decoder.sequence_length
    each = max(1, BATCH_TOKENS // length)
    if options.calibration:
        windows = file_windows(encoder(source), options.calibration, each * options.calibration_batches, length, seed)
    elif isinstance(source, Run):
        windows = training_windows(source, each * options.calibration_batches, length, seed)
    else:
        raise InputError(
            f"{source.path}: w8a8_static is calibrated on training text, which a pretrained model does not come with: "
            "give --calibration FILES, or leave it out of --recipes"
        )
    return list(windows.split(each))


def _perplexity(loss: float, what: str) -> float:
    if not math.isfinite(loss) or loss > 700:
        raise InputError(f"{what}: a loss of {loss:g} nats per token has no finite perplexity")
    return math.exp(loss)


def describe(result: dict[str, Any]) -> str:
    """The table for the terminal: checkpoints down, recipes across; under each perplexity what it grew by, and the KL of the output."""
    options, checkpoints = result["options"], result["checkpoints"]
    width = max(len(checkpoint["name"]) for checkpoint in checkpoints)
    lines = [
        f"perplexity; below it the increase (± over calibration seeds, here {options['calibration_seeds']}), then the output's KL in nats",
        f"  {'':{width}}  kurtosis       float" + "".join(f"{recipe:>20}" for recipe in options["recipes"]),
    ]
    refused = []
    for checkpoint in checkpoints:
        before = checkpoint["before"]
        rows = [f"  {checkpoint['name']:{width}}  {before['kurtosis']['largest_layer'] or math.nan:>8.2f}  {before['perplexity']:>10.4g}"]
        rows += [" " * len(rows[0])] * 2
        for recipe in options["recipes"]:
            found = checkpoint["recipes"][recipe]
            cells = ["-", "", ""]
            if "refused" in found:
                refused.append(f"  {checkpoint['name']}, {recipe}: {found['refused']}")
            else:
                spread = "" if found["spread"] is None else f" ± {found['spread']:.2g}"
                cells = [f"{found['perplexity']:.4g}", f"{found['perplexity_increase']:+.3g}{spread}", f"{found['output_kl']:.2g}"]
            rows = [row + f"{cell:>20}" for row, cell in zip(rows, cells, strict=True)]
        lines += rows
    return "\n".join([*lines, *refused])
