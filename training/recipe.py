"""The recipe: one YAML file is one complete run.

Read a recipe top to bottom as the sections of `Recipe` below: each field is a key of the file, with its type, its default
and what it means. `load_recipe` reads a file, applies `section.key=value` overrides, and reports every problem at once.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError

from model.config import SIZES, SMALLEST_ALPHA, ModelConfig, PruningConfig
from model.errors import InputError
from model.section import ModelSection, Section, stands_for

if TYPE_CHECKING:
    from model.pretrained import PretrainedModel


class RunSection(Section):
    """Where the run lives and what makes it repeatable."""

    name: str | None = Field(default=None, description="Folder of the run below `folder`; default: the recipe file's name.")
    folder: str = Field(default="runs", description="Where run folders are made.")
    seed: int = Field(default=0, ge=0, description="Seeds the initial weights and the order of the data.")
    stop_at_step: int | None = Field(
        default=None, ge=1, description="Save and stop after this step; the schedule still spans the whole run."
    )
    hang_seconds: float = Field(
        default=1800, gt=0, description="A rank that gets no further for so long ends the run, with the stacks of all ranks."
    )
    lost_seconds: float = Field(
        default=60, gt=0, description="A rank that gives no sign of life for so long (dead, or cut off) ends the run, which names its host."
    )


class TokenizerSection(Section):
    """What turns text into tokens."""

    kind: Literal["sentencepiece", "pretrained"] = Field(
        default="sentencepiece", description="Train a SentencePiece model on the data, or use a Hugging Face tokenizer."
    )
    vocab_size: int = Field(
        default=16384, ge=260, le=2**24, description="Pieces of the SentencePiece model, 256 bytes and specials included."
    )
    sample_megabytes: float = Field(default=32.0, gt=0, description="How much text the SentencePiece model is trained on.")
    path: str | None = Field(default=None, description="kind pretrained: a local folder or a hub name.")


class DataSection(Section):
    """What the model reads."""

    source: Literal["python_source", "files", "huggingface"] = Field(
        default="python_source", description="The Python code installed on this machine, local files, or a Hugging Face data set."
    )
    paths: list[str] = Field(
        default_factory=list,
        description="source files: files, folders or globs (txt, md, py, jsonl, parquet; .gz and .zst of the text ones).",
    )
    dataset: str | None = Field(default=None, description="source huggingface: a hub name or a local folder.")
    subset: str | None = Field(default=None, description="source huggingface: the data set's configuration.")
    split: str = Field(default="train", description="source huggingface: which split to read.")
    text_field: str = Field(default="text", description="The field that holds the text in jsonl, parquet and Hugging Face data.")
    max_megabytes: float | None = Field(default=None, gt=0, description="Read at most this much text.")
    validation_fraction: float = Field(
        default=0.01, gt=0, lt=1, description="Share of documents held out, chosen by the hash of the document."
    )
    document_masks: bool = Field(
        default=False, description="Attention stays within a document, and no token predicts the next document's first."
    )
    tokenizer: TokenizerSection = TokenizerSection()
    prepared: str = Field(
        default="prepared",
        description="Where tokenised shards are kept, shared by all runs; or one prepared corpus itself, read whatever `source` says.",
    )
    workers: int | None = Field(default=None, ge=1, description="Processes that tokenise; default: the cores of this machine.")


class LossSpikesSection(Section):
    """What to do about a loss that stands out: training/loss_spikes.py says which does."""

    action: Literal["none", "skip", "rewind"] = Field(
        default="none", description="skip: leave the step's update out. rewind: back to a checkpoint, and past the data since then."
    )
    threshold: float = Field(default=10.0, gt=0, description="How far above the median is a spike, in robust standard deviations.")
    window: int = Field(default=128, ge=8, description="Steps whose losses are compared with.")
    warmup: int = Field(default=32, ge=4, description="Losses needed before any is called a spike; at most `window`.")
    rewind_steps: int = Field(default=100, ge=1, description="rewind: to the newest checkpoint at least so many steps back.")
    limit: int = Field(default=10, ge=1, description="Stop with exit code 1 after more spikes than this within `window` steps.")


class TrainingSection(Section):
    """How much, how long, how large a bite."""

    tokens: int = Field(description="Tokens to train on.", gt=0)
    tokens_per_step: int = Field(
        description="Tokens an optimiser step averages over: ranks x micro-batch x accumulation x sequence length.", gt=0
    )
    micro_batch_size: int = Field(description="Sequences a rank holds at once.", gt=0)
    sequence_length: int = Field(description="Tokens in a sequence.", gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_clipping: float = Field(default=1.0, ge=0, description="Largest global gradient norm; 0: no clipping.")
    activation_checkpointing: bool | int | Literal["auto"] = Field(
        default=False,
        description="Keep only a block's input and recompute the rest in the backward pass: every block (true), the first so many, or "
        "as few as fit (auto).",
    )
    memory_budget_gb: float | None = Field(
        default=None,
        gt=0,
        description="activation_checkpointing auto: what a rank may take, in 10^9 bytes; default: nine tenths of the device.",
    )
    compile: bool = Field(default=False, description="torch.compile each block.")
    profile: list[int] = Field(
        default_factory=list, description="Steps whose work is recorded by torch's profiler, into the run's folder profile/ (first rank)."
    )
    max_skipped_steps: int = Field(default=5, ge=1, description="Stop after so many steps in a row with non-finite gradients.")
    loss_spikes: LossSpikesSection = LossSpikesSection()


class SharpnessSection(Section):
    """How `sharpness_aware` perturbs the weights: training/sharpness_aware.py has the equations."""

    radius: float = Field(default=0.05, ge=0, description="Norm of the perturbation (the papers' rho); 0: none.")
    schedule: Literal["constant", "learning_rate", "linear_increase"] = Field(
        default="constant", description="The radius over the steps: constant, in proportion to the learning rate, or up from 0."
    )
    start_fraction: float = Field(default=0.0, ge=0, lt=1, description="Share of the steps that are plain before the first perturbed one.")
    every: int = Field(default=1, ge=1, description="Perturb every so many steps; the steps between are plain.")
    norm_scope: Literal["global", "tensor", "tensor_width"] = Field(
        default="global", description="What the radius is the norm of: all weights, or each tensor, equal or in proportion to its width."
    )
    ascent_fraction: float = Field(
        default=1.0, gt=0, le=1, description="Share of the step's micro-batches that the direction is taken from; the update uses all."
    )
    rest: Literal["perturbed", "plain"] = Field(
        default="perturbed", description="The micro-batches outside ascent_fraction: also taken at the perturbed weights, or as they are."
    )
    precondition: bool = Field(default=False, description="Divide the direction by the optimizer's second moment.")
    precondition_exponent: float = Field(default=0.5, ge=0, le=1, description="Power of the second moment: 0.5 is Adam's own.")
    precondition_epsilon: float = Field(default=1e-8, gt=0, description="Added to that power.")
    second_moment: Literal["previous", "updated"] = Field(
        default="previous", description="The second moment as the last step left it, or with this gradient taken in."
    )
    store_logits: bool = Field(
        default=False, description="functional_sam: keep the first pass's logits instead of rebuilding them from the hidden states."
    )
    float32_second_pass: bool = Field(
        default=False, description="precision bf16, ZeRO 0 to 2: the perturbed pass in float32, since bf16 rounds the perturbation away."
    )
    split_every: int | None = Field(
        default=None, ge=1, description="Steps between measurements of what acts through the logits and what through the function."
    )
    cosine_warning: float = Field(
        default=0.5, ge=0, le=1, description="Warn once when the realised perturbation's cosine with the intended one is below this."
    )


class OptimizerSection(Section):
    """The base optimizer and its schedule."""

    kind: Literal["adamw", "adafactor", "muon", "soap"] = Field(
        default="adamw", description="All but adamw need whole matrices, so ZeRO stage 0. muon: the blocks' matrices, adamw the rest."
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="The peak; adafactor: relative to the RMS of each tensor.")
    embedding_learning_rate_factor: float = Field(
        default=1.0, gt=0, description="On the learning rate of embedding and unembedding; the width ratio is a baseline for muP."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Of adamw and soap.")
    epsilon: float = Field(default=1e-8, gt=0, description="Of adamw and soap, added to the root of the second moment.")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="Of muon; default: 0.95.")
    precondition_frequency: int | None = Field(default=None, ge=1, description="soap: steps between new eigenbases; default: 10.")
    largest_preconditioner: int | None = Field(
        default=None, ge=1, description="soap: a side of a matrix that is longer, such as the vocabulary, is not rotated; default: 10000."
    )
    pruning_learning_rate_factor: float = Field(
        default=10.0, gt=0, description="On the learning rate of what decides about the context (context_pruning), which starts untrained."
    )
    weight_decay: float = Field(default=0.1, ge=0, description="On matrices; norms, gains, biases and positions have none.")
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1, description="Share of the steps in linear warm-up.")
    decay_fraction: float = Field(default=0.2, ge=0, le=1, description="warmup_stable_decay: share of the steps in the final linear decay.")
    final_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    sharpness_aware: Literal["none", "sam", "functional_sam"] = Field(
        default="none", description="Take the gradient at perturbed weights: SAM, or Functional-SAM (docs/functional_sam.md)."
    )
    sharpness: SharpnessSection = SharpnessSection()


class EvaluationSection(Section):
    """Validation loss during training."""

    every: int = Field(default=250, ge=1, description="Steps between evaluations; the last step is always evaluated.")
    tokens: int = Field(default=1_048_576, ge=1, description="Validation tokens an evaluation reads, at most.")
    curvature_every: int | None = Field(
        default=None, ge=1, description="Steps between measurements of the loss's curvature, on one validation micro-batch a rank."
    )
    curvature_iterations: int = Field(
        default=5, ge=1, description="Hessian products of each power iteration, which start where the last ended."
    )
    curvature_lanczos: int | None = Field(
        default=None, ge=2, description="Lanczos with so many products, and vectors kept, instead; also finds the smallest eigenvalue."
    )


class CheckpointSection(Section):
    """What is left on disk."""

    every: int = Field(default=1000, ge=1, description="Steps between checkpoints; the last step is always saved.")
    first: bool = Field(default=False, description="Also save the initial weights, as step 0: trajectories start there.")
    keep_last: int | None = Field(default=None, ge=1, description="Delete all but the last so many; default: keep all.")
    keep_every: int | None = Field(default=None, ge=1, description="Never delete a step that divides by this.")
    asynchronous: bool = Field(
        default=False, description="Train on while a checkpoint is written from a copy in the host's memory, of as many bytes as its files."
    )


class LoggingSection(Section):
    """What a person sees."""

    every: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl, TensorBoard and the console.")
    tensorboard: bool = True
    outliers_every: int = Field(
        default=100, ge=0, description="Steps between measurements of the activations' outliers, on that step's own tokens; 0: never."
    )


class ContextPruningSection(Section):
    """Every layer learns which past tokens to drop: model/context_pruning.py has the equations."""

    rank: int = Field(default=64, ge=1, description="r, of the interaction queries and keys.")
    normalize: bool = Field(default=True, description="Interaction queries and keys are RMS-normalised, with a trainable gain.")
    scale: float = Field(default=1.0, gt=0, description="That gain at first.")
    standardize: bool = Field(
        default=True, description="Shift and scale the products of each layer, once, by their mean and deviation in the first step's text."
    )
    rope: bool = Field(default=False, description="Rotate interaction queries and keys by position.")
    bias: float = Field(default=4.0, description="beta at first, in deviations with standardize; the higher, the less is dropped at first.")
    sinks: int = Field(default=1, ge=0, description="So many tokens at the start of a text are always kept.")
    window: int = Field(default=8, ge=1, description="The nearest so many tokens, itself included, are always kept.")
    propagate_in_depth: bool = Field(default=False, description="What a layer drops, all later layers drop.")
    trainable: Literal["all", "interactions", "lora"] = Field(
        default="all", description="Which weights are trained beside those that decide: all, none, or LoRA adapters (model.pretrained)."
    )
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32.0, gt=0)
    alpha_start: float = Field(default=4.0, ge=1, description="alpha of the sparse sigmoid at the first step.")
    alpha_end: float = Field(default=8.0, ge=1, description="alpha from alpha_fraction of the steps on; decisions are hard in generation.")
    alpha_fraction: float = Field(default=0.75, gt=0, le=1, description="Share of the steps in which alpha goes over, by a cosine.")
    sparsity_weight: float = Field(default=0.0, ge=0, description="gamma: nats that a token's whole context costs; the paper's own way.")
    target_kept: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the context to keep, with hard decisions: a threshold common to all layers is steered to it.",
    )
    target_fraction: float = Field(
        default=0.5, gt=0, le=1, description="Share of the steps in which the target falls from 1 to target_kept."
    )
    distillation_weight: float = Field(
        default=0.0, ge=0, le=1, description="Share of the objective that is the divergence from the network without pruning and adapters."
    )

    def structure(self) -> PruningConfig:
        """What of it belongs to the network."""
        return PruningConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(PruningConfig)})


class Recipe(Section):
    """A complete run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    training: TrainingSection
    optimizer: OptimizerSection = OptimizerSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    context_pruning: ContextPruningSection | None = Field(default=None, description="Learn to drop context; default: not.")
    deepspeed: dict[str, Any] = Field(
        default_factory=lambda: {"zero_optimization": {"stage": 2}}, description="DeepSpeed's own keys, passed through."
    )


class LoadedRecipe(typing.NamedTuple):
    """A validated recipe, where it came from, and where each of its values came from."""

    recipe: Recipe
    path: Path
    provenance: dict[str, str]  # dotted key -> "default", the file, or "command line"

    @property
    def run_folder(self) -> Path:
        return Path(self.recipe.run.folder) / (self.recipe.run.name or self.path.stem)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> LoadedRecipe:
    """Read, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, each value in YAML.

    Raises:
        InputError: every problem found, one a line.
    """
    path = Path(path)
    tree = _read_yaml(path)
    provenance = dict.fromkeys(_leaves(tree), str(path))
    problems = []
    for override in overrides or []:
        problem = _override(tree, provenance, override)
        if problem:
            problems.append(problem)
    _use_its_own_tokenizer(tree, provenance)
    recipe = _validate(tree, problems)
    if recipe is not None:
        problems.extend(_cross_field_problems(recipe))
    if recipe is None or problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise InputError("\n".join([f"{path}: {count} in the recipe", *(f"  {problem}" for problem in problems)]))
    for field, (origin, _) in stands_for(recipe.model.preset, recipe.model.size).items():
        provenance.setdefault(f"model.{field}", origin)
    for leaf in _leaves(recipe.model_dump()):
        provenance.setdefault(leaf, "default")
    return LoadedRecipe(recipe, path, provenance)


def _use_its_own_tokenizer(tree: dict[str, Any], provenance: dict[str, str]) -> None:
    """A pretrained model's tokenizer is its own, where the recipe does not say otherwise."""
    source = tree["model"].get("pretrained") if isinstance(tree.get("model"), dict) else None
    data = tree.setdefault("data", {}) if isinstance(source, str) else None
    tokenizer = data.setdefault("tokenizer", {}) if isinstance(data, dict) else None
    if isinstance(tokenizer, dict):
        for key, value in (("kind", "pretrained"), ("path", source)):
            if key not in tokenizer:
                tokenizer[key] = value
                provenance[f"data.tokenizer.{key}"] = "model.pretrained"


def _validate(tree: dict[str, Any], problems: list[str]) -> Recipe | None:
    """The recipe without its wrong values, which go into `problems`, so that what is wrong between fields is found as well."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems.extend(_describe(details) for details in error.errors())
        remaining = copy.deepcopy(tree)
        for details in error.errors():
            _remove(remaining, details["loc"])
    try:
        return Recipe.model_validate(remaining)
    except ValidationError:  # something required is missing
        return None


def _remove(tree: Any, location: tuple[int | str, ...]) -> None:
    """Take the value at a location out of nested mappings; what lies inside a list goes with its list."""
    for key in location[:-1]:
        if not isinstance(tree, dict) or not isinstance(tree.get(key), dict):
            break
        tree = tree[key]
    else:
        key = location[-1]
    if isinstance(tree, dict):
        tree.pop(key, None)


def model_config(recipe: Recipe, vocab_size: int) -> ModelConfig | PretrainedModel:
    """The network this recipe asks for. Raises InputError when a pretrained one cannot be had, or has fewer tokens than the tokenizer."""
    if recipe.model.pretrained is not None:
        from model.pretrained import LoraShape, describe  # transformers takes seconds to import

        pruning = recipe.context_pruning
        lora = LoraShape(pruning.lora_rank, pruning.lora_alpha) if pruning is not None and pruning.trainable == "lora" else None
        shape = describe(recipe.model.pretrained, recipe.training.sequence_length, lora)
        if vocab_size > shape.vocab_size:
            raise InputError(
                f"data.tokenizer: has {vocab_size} tokens, and {recipe.model.pretrained} knows {shape.vocab_size}: use its own tokenizer"
            )
        return shape
    return recipe.model.config(vocab_size, recipe.training.sequence_length)


def dump_recipe(loaded: LoadedRecipe) -> str:
    """The resolved recipe as YAML, each value with a comment that says where it came from. It loads as a recipe again."""
    lines = [f"# Resolved from {loaded.path}. Each comment says where the value came from."]

    def emit(tree: dict[str, Any], prefix: str, indent: str) -> None:
        for key, value in tree.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, dict) and value:
                lines.append(f"{indent}{key}:")
                emit(value, f"{dotted}.", indent + "  ")
            else:
                scalar = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
                lines.append(f"{indent}{key}: {scalar}  # {loaded.provenance.get(dotted, 'default')}")

    emit(json.loads(loaded.recipe.model_dump_json()), "", "")
    return "\n".join(lines) + "\n"


# What may differ between the launch that made a run and one that continues it: nothing that changes a weight by more than rounding.
MAY_CHANGE_ON_RESUME = (
    "run.folder",
    "run.name",
    "run.stop_at_step",
    "run.hang_seconds",
    "run.lost_seconds",
    "deepspeed.zero_optimization",
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.memory_budget_gb",
    "training.compile",
    "training.profile",
    "evaluation.",
    "checkpoint.",
    "logging.",
    "data.prepared",
    "data.workers",
)


def differences(saved: Path, loaded: LoadedRecipe) -> list[str]:
    """What differs between a run's saved recipe and this one, as `key: saved there, given here`, but for what may change on resume."""
    there = _flat(Recipe.model_validate(_read_yaml(saved)).model_dump(mode="json"))
    here = _flat(loaded.recipe.model_dump(mode="json"))
    return [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]


LARGEST_RECIPE = 1 << 20  # characters


class _Loader(yaml.SafeLoader):
    """YAML with two changes: numbers such as 1e-3 are numbers (YAML 1.2), and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _construct_mapping(loader: Any, node: Any) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key, _ in node.value:
        if keys.count(key.value) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _load_yaml(text: str) -> Any:
    """What YAML text says, in words, numbers, lists and mappings whose keys are words. Raises ValueError with one line else."""
    try:
        tree = yaml.load(text, _Loader)
        _require_plain(tree)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:500]) from None
    except (RecursionError, TypeError, AttributeError, KeyError, OverflowError):  # brackets in brackets without end, keys that are lists
        raise ValueError("nested too deeply, or a key that is not a word") from None
    return tree


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {str(key)[:40]} is not a word")
            _require_plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _require_plain(inner)
    elif isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"a number of {value.bit_length()} bits, and 63 are the most")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such recipe{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a recipe: {error}") from None
    if len(text) > LARGEST_RECIPE:
        raise InputError(f"{path}: {len(text)} characters, and a recipe has at most {LARGEST_RECIPE}")
    try:
        tree = _load_yaml(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)}), found {type(tree).__name__}")
    return tree


def _override(tree: dict[str, Any], provenance: dict[str, str], override: str) -> str | None:
    """Put one `section.key=value` into the tree; returns what is wrong with it, if anything."""
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return f"{override}: an override is written section.key=value"
    try:
        value = _load_yaml(text)
    except ValueError:
        return f"{override}: the value is not valid YAML"
    for depth, key in enumerate(keys[:-1], start=1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return f"{override}: {'.'.join(keys[:depth])} is a value, not a section"
    tree[keys[-1]] = value
    for leaf in [leaf for leaf in provenance if leaf == dotted or leaf.startswith(dotted + ".")]:
        del provenance[leaf]
    provenance.update({f"{dotted}.{leaf}".rstrip("."): "command line" for leaf in (_leaves(value) if isinstance(value, dict) else [""])})
    return None


def _leaves(tree: dict[str, Any]) -> list[str]:
    return list(_flat(tree))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _describe(details: Any) -> str:
    """One pydantic error as one line: the key, what was found, what was expected, and the nearest right name."""
    location = [str(part) for part in details["loc"]]
    dotted = ".".join(location)
    found = details["input"]
    if details["type"] == "extra_forbidden":
        known = _known_names(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        elsewhere = [f"{section}.{location[-1]}" for section in Recipe.model_fields if location[-1] in _known_names([section])]
        advice = (
            f"did you mean {'.'.join([*location[:-1], near[0]])}?"
            if near
            else f"did you mean {elsewhere[0]}?"
            if elsewhere
            else f"known here: {', '.join(known)}"
        )
        return f"{dotted}: unknown key; {advice}"
    if details["type"] == "missing":
        return f"{dotted}: required, and not given"
    if details["type"] == "literal_error":
        expected = details["ctx"]["expected"]
        near = difflib.get_close_matches(str(found), re.findall(r"'([^']*)'", expected), n=1)
        return f"{dotted}: {found!r} is not one of {expected}" + (f"; did you mean {near[0]}?" if near else "")
    message = details["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{dotted}: expected {message}, found {found!r}"


def _known_names(location: list[str]) -> list[str]:
    """The keys a section may have, following nested sections."""
    section: Any = Recipe
    for part in location:
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, Section) else None
        section = field.annotation if field else None
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []


# What Burnish writes into DeepSpeed's configuration itself, and where a recipe says it.
_SET_ELSEWHERE = {
    "train_batch_size": "training.tokens_per_step",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.tokens_per_step",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "tensorboard": "logging.tensorboard",
}
# DeepSpeed ignores a top-level key it does not know, so a mistyped one would silently do nothing. Its own list is spread over
# its parser; these are the keys that its 0.19 documentation names and that make sense here.
_DEEPSPEED_KEYS = (
    "zero_optimization", "bf16", "torch_autocast", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "activation_checkpointing", "aio", "checkpoint", "comms_logger", "compile", "dump_state", "flops_profiler",
    "memory_breakdown", "seq_parallel_communication_data_type", "steps_per_print", "wall_clock_breakdown",
    "disable_allgather", "dataloader_drop_last", "tensor_parallel", "sequence_parallel_size", "timers", "wandb",
    "csv_monitor", "comet",
)  # fmt: skip


# Of these, the ones that are sections
_DEEPSPEED_SECTIONS = (
    "zero_optimization", "bf16", "torch_autocast", "data_types", "activation_checkpointing", "aio", "checkpoint", "comms_logger",
    "compile", "flops_profiler", "tensor_parallel", "timers", "wandb", "csv_monitor", "comet",
)  # fmt: skip


def _cross_field_problems(recipe: Recipe) -> list[str]:
    """What single fields cannot say: fields that need or exclude one another."""
    problems = []
    model, data, training = recipe.model, recipe.data, recipe.training
    if model.size is not None and model.size not in SIZES:
        near = difflib.get_close_matches(model.size, SIZES, n=1)
        problems.append(f"model.size: {model.size!r} is not one of {', '.join(SIZES)}" + (f"; did you mean {near[0]}?" if near else ""))
    missing = [name for name in ("width", "depth", "heads") if getattr(model, name) is None]
    if model.pretrained is not None:
        beside = sorted(model.model_fields_set - {"pretrained", "sequence_length"})
        if beside:
            problems.append(f"model.{beside[0]}: model.pretrained brings its own shape; leave {', '.join(beside)} out")
        if data.tokenizer.kind != "pretrained":
            problems.append("data.tokenizer.kind: model.pretrained needs the tokenizer that it was trained with: kind pretrained")
        problems.extend(_pretrained_problems(recipe))
    elif recipe.context_pruning is not None and recipe.context_pruning.trainable == "lora":
        problems.append("context_pruning.trainable: lora adapts a pretrained model (model.pretrained); use all or interactions")
    elif model.size is None and missing:
        problems.append(f"model: give a size ({', '.join(SIZES)}), or also {' and '.join(missing)}")
    if not problems and model.pretrained is None:
        try:
            model_config(recipe, vocab_size=1)
        except InputError as error:
            problems.extend(str(error).splitlines())
    if model.sequence_length is not None and training.sequence_length > model.sequence_length:
        problems.append(
            f"training.sequence_length: {training.sequence_length} is over the model's {model.sequence_length} (model.sequence_length)"
        )
    if training.tokens < training.tokens_per_step:
        problems.append(
            f"training.tokens: {training.tokens} is less than one step of {training.tokens_per_step} tokens (training.tokens_per_step)"
        )
    if data.source == "files" and not data.paths:
        problems.append("data.paths: required with source files: the files, folders or globs to read")
    if data.source == "huggingface" and not data.dataset:
        problems.append("data.dataset: required with source huggingface: a hub name or a local folder")
    if data.tokenizer.kind == "pretrained" and not (data.tokenizer.path or model.pretrained):
        problems.append("data.tokenizer.path: required with kind pretrained: a local folder or a hub name")
    saving, back = recipe.checkpoint, training.loss_spikes.rewind_steps
    if training.loss_spikes.action == "rewind" and saving.keep_last is not None and (saving.keep_last - 1) * saving.every < back:
        problems.append(
            f"checkpoint.keep_last: {saving.keep_last} checkpoints, every {saving.every} steps, do not reach back {back} steps "
            "(training.loss_spikes.rewind_steps); keep more"
        )
    if training.loss_spikes.warmup > training.loss_spikes.window:
        problems.append(
            f"training.loss_spikes.warmup: {training.loss_spikes.warmup} is over the window of {training.loss_spikes.window} losses"
        )
    if training.memory_budget_gb is not None and training.activation_checkpointing != "auto":
        problems.append("training.memory_budget_gb: only activation_checkpointing auto looks at it; leave it out, or set that")
    blocks = training.activation_checkpointing
    if isinstance(blocks, int) and not isinstance(blocks, bool) and blocks < 0:
        problems.append(f"training.activation_checkpointing: {blocks} is not a number of blocks")
    if any(not 0 <= beta < 1 for beta in recipe.optimizer.betas):
        problems.append(f"optimizer.betas: expected two numbers in [0, 1), found {list(recipe.optimizer.betas)}")
    return problems + _pruning_problems(recipe) + _optimizer_problems(recipe) + _sharpness_problems(recipe) + _deepspeed_problems(recipe)


def _pretrained_problems(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.optimizer.sharpness_aware == "functional_sam":
        problems.append(
            "optimizer.sharpness_aware: functional_sam goes through our own network's unembedding; use sam with model.pretrained"
        )
    if recipe.evaluation.curvature_every:
        problems.append("evaluation.curvature_every: is measured on our own network alone; leave it out with model.pretrained")
    if recipe.optimizer.kind == "muon":
        problems.append("optimizer.kind: muon is for the blocks of our own network; use adamw with model.pretrained")
    return problems


def _pruning_problems(recipe: Recipe) -> list[str]:
    pruning, problems = recipe.context_pruning, []
    if pruning is None:
        return []
    if pruning.target_kept is None and pruning.sparsity_weight == 0:
        problems.append("context_pruning: nothing makes it drop anything; give target_kept, or a sparsity_weight")
    for name in ("alpha_start", "alpha_end"):
        if 1 < getattr(pruning, name) < SMALLEST_ALPHA:
            problems.append(f"context_pruning.{name}: {getattr(pruning, name)}, expected 1 or at least {SMALLEST_ALPHA}")
    if pruning.rope and pruning.rank % 2:
        problems.append(f"context_pruning.rank: {pruning.rank} is odd, and rope rotates pairs")
    if recipe.training.compile:
        problems.append("training.compile: context pruning runs uncompiled; switch one of the two off")
    if recipe.optimizer.sharpness_aware == "functional_sam":
        problems.append(
            "optimizer.sharpness_aware: functional_sam holds the loss's derivative at the logits, and the sparsity term does not go "
            "through them; use sam"
        )
    return problems


def _optimizer_problems(recipe: Recipe) -> list[str]:
    optimizer, problems = recipe.optimizer, []
    for field, kind in (("momentum", "muon"), ("precondition_frequency", "soap"), ("largest_preconditioner", "soap")):
        if getattr(optimizer, field) is not None and optimizer.kind != kind:
            problems.append(f"optimizer.{field}: only {kind} has it, and optimizer.kind is {optimizer.kind}; leave it out")
    zero = recipe.deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if optimizer.kind != "adamw" and stage != 0:
        problems.append(
            f"optimizer.kind: {optimizer.kind} needs whole matrices, which ZeRO stage {stage} cuts into flat shards; "
            "set deepspeed.zero_optimization.stage: 0, or use adamw"
        )
    return problems


# Optimizers that keep a second moment of each weight, as `exp_avg_sq`
_WITH_SECOND_MOMENT = ("adamw",)


def _sharpness_problems(recipe: Recipe) -> list[str]:
    optimizer, options = recipe.optimizer, recipe.optimizer.sharpness
    problems = []
    if recipe.evaluation.curvature_every and recipe.training.precision != "fp32":
        problems.append(
            "evaluation.curvature_every: bf16 rounds away what it looks at; use training.precision fp32, or, on the checkpoints, "
            "python -m analysis curvature"
        )
    if optimizer.sharpness_aware == "none":
        return problems
    if options.precondition and optimizer.kind not in _WITH_SECOND_MOMENT:
        problems.append(
            f"optimizer.sharpness.precondition: needs an optimizer with a second moment ({', '.join(_WITH_SECOND_MOMENT)}); "
            f"{optimizer.kind} has none"
        )
    if options.split_every is not None and options.ascent_fraction < 1:
        problems.append("optimizer.sharpness.split_every: compares gradients of the same tokens, so ascent_fraction has to be 1")
    if options.store_logits and optimizer.sharpness_aware != "functional_sam" and options.split_every is None:
        problems.append("optimizer.sharpness.store_logits: only functional_sam needs the first pass's logits")
    if options.float32_second_pass:
        key, training = "optimizer.sharpness.float32_second_pass", recipe.training
        if training.precision == "fp32":
            problems.append(f"{key}: training.precision is fp32 already; leave it out")
        elif training.compile:
            problems.append(f"{key}: compiled blocks (training.compile) run in bf16 alone; switch one of the two off")
        elif zero_stage(recipe) == 3:
            problems.append(f"{key}: needs whole weights, which ZeRO stage 3 does not hold; use a lower stage, or training.precision fp32")
    if recipe.deepspeed.get("torch_autocast"):
        problems.append("deepspeed.torch_autocast: its weights cannot be perturbed (optimizer.sharpness_aware); use training.precision")
    zero = recipe.deepspeed.get("zero_optimization")
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) if isinstance(zero, dict) else None
        if isinstance(section, dict) and section.get("device") == "nvme":
            problems.append(
                f"deepspeed.zero_optimization.{key}.device: weights on nvme cannot be perturbed (optimizer.sharpness_aware); use cpu"
            )
    return problems


def _deepspeed_problems(recipe: Recipe) -> list[str]:
    problems = []
    for key in recipe.deepspeed:
        if key in _SET_ELSEWHERE:
            problems.append(f"deepspeed.{key}: set by Burnish; say it as {_SET_ELSEWHERE[key]}")
        elif key == "fp16":
            problems.append("deepspeed.fp16: Burnish trains in fp32 or bf16; say it as training.precision")
        elif key not in _DEEPSPEED_KEYS:
            near = difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1)
            problems.append(
                f"deepspeed.{key}: unknown key"
                + (f"; did you mean deepspeed.{near[0]}?" if near else f"; known: {', '.join(_DEEPSPEED_KEYS)}")
            )
    for key in _DEEPSPEED_SECTIONS:
        if not isinstance(recipe.deepspeed.get(key, {}), dict):
            example = " such as {stage: 2}" if key == "zero_optimization" else ""
            problems.append(f"deepspeed.{key}: expected a mapping{example}, found {str(recipe.deepspeed[key])[:80]!r}")
    zero = recipe.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return problems
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, found {zero['stage']!r}")
    bf16 = recipe.deepspeed.get("bf16", {})
    if isinstance(bf16, dict) and bf16.get("enabled", recipe.training.precision == "bf16") != (recipe.training.precision == "bf16"):
        problems.append("deepspeed.bf16.enabled: contradicts training.precision; leave it out")
    if zero.keys() - {"stage"}:
        from training.engine import zero_section_problems  # DeepSpeed takes seconds to import

        problems.extend(f"deepspeed.zero_optimization.{problem}" for problem in zero_section_problems(zero))
    return problems


def zero_stage(recipe: Recipe) -> int:
    """ZeRO stage, 0 to 3."""
    return int(recipe.deepspeed.get("zero_optimization", {}).get("stage", 0))
