"""The recipe: one YAML file is one complete run.

Read a recipe top to bottom as the sections of `Recipe` below: each field is a key of the file, with its type, its default and what it
means. `training/recipe_file.py` reads a file; `training/recipe_problems.py` says which fields need or exclude one another.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from model.config import ModelConfig, PruningConfig
from model.errors import InputError
from model.section import ModelSection, Section

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
    seed: int | None = Field(
        default=None, ge=0, description="Seeds the order of the data alone, for runs that share their initial weights; default: run.seed."
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
    rewind_steps: int = Field(
        default=100, ge=1, description="rewind: to the newest checkpoint at least so many steps back; where there is none: as skip."
    )
    limit: int = Field(default=10, ge=1, description="Stop with exit code 1 after more spikes than this within `window` steps.")


class TrainingSection(Section):
    """Tokens, batch and sequence length, precision, and what to do about bad steps."""

    tokens: int = Field(description="Tokens to train on.", gt=0)
    tokens_per_step: int = Field(
        description="Tokens an optimiser step averages over: ranks x micro-batch x accumulation x sequence length.", gt=0
    )
    micro_batch_size: int = Field(description="Sequences a rank holds at once.", gt=0)
    sequence_length: int = Field(description="Tokens in a sequence.", gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_clipping: float = Field(default=1.0, ge=0, description="Largest global gradient norm; 0: no clipping.")
    activation_checkpointing: bool | int | Literal["selective", "auto"] = Field(
        default=False,
        description="Keep only a block's input and recompute the rest in the backward pass: of every block (true), or of the first so "
        "many; selective: also keep what matrix products and attention gave, of every block; auto: the cheapest of these that fits, "
        "block by block.",
    )
    memory_budget_gb: float | None = Field(
        default=None,
        gt=0,
        description="activation_checkpointing auto: what a rank may take, in 10^9 bytes; default: nine tenths of the device.",
    )
    compile: bool = Field(default=False, description="torch.compile each block, and the loss behind the logits.")
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
        default=False, description="precision bf16: the perturbed pass in float32, since bf16 rounds the perturbation away."
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
    learning_rate: float = Field(
        default=1e-3, gt=0, description="The peak; adafactor: relative to the RMS of each tensor, and by torch at most 1/sqrt(step)."
    )
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
        default=100,
        ge=0,
        description="Steps between measurements of the activations' outliers, on that step's own tokens; 0: never. Not of pretrained ones.",
    )


class ContextPruningSection(Section):
    """Every layer learns which past tokens to drop: model/context_pruning.py has the equations."""

    start: str | None = Field(
        default=None,
        description="Begin with decisions that another run learned on the same pretrained model: a folder that "
        "`analysis export [--adapters]` wrote; default: untrained.",
    )
    rank: int = Field(default=64, ge=1, description="r, of the interaction queries and keys.")
    normalize: bool = Field(default=True, description="Interaction queries and keys are RMS-normalised, with a trainable gain.")
    scale: float = Field(default=1.0, gt=0, description="That gain at first.")
    standardize: bool = Field(
        default=True, description="Shift and scale the products of each layer, once, by their mean and deviation in the first step's text."
    )
    rope: bool = Field(default=False, description="Rotate interaction queries and keys by position.")
    age_slope: float | None = Field(
        default=None,
        description="At first, of a trainable multiple of the log of a token's age in decisions on it; default: none.",
    )
    bias: float = Field(default=4.0, description="beta at first, in deviations with standardize; the higher, the less is dropped at first.")
    sinks: int = Field(default=1, ge=0, description="So many tokens at the start of a text are always kept.")
    window: int = Field(default=8, ge=1, description="The nearest so many tokens, itself included, are always kept.")
    propagate_in_depth: bool = Field(default=False, description="What a layer drops, all later layers drop.")
    trainable: Literal["all", "interactions", "lora"] = Field(
        default="all", description="Which weights are trained beside those that decide: all, none, or LoRA adapters (model.pretrained)."
    )
    decisions: Literal["learned", "fixed"] = Field(
        default="learned",
        description="fixed: they stay as `start` has them and are hard, as in generation, so that the weights alone learn to live with "
        "them; the mask then has no gradient, and a step costs little more than one without pruning.",
    )
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32.0, gt=0)
    attention_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the steps, the first ones, in which decisions learn from the dense network's attention alone, and nothing "
        "else is trained (model/attention_need.py); not in the paper.",
    )
    alpha_start: float = Field(default=4.0, ge=1, description="alpha of the sparse sigmoid at the first step.")
    alpha_end: float = Field(default=8.0, ge=1, description="alpha from alpha_fraction of the steps on; decisions are hard in generation.")
    alpha_fraction: float = Field(
        default=0.75, gt=0, le=1, description="Share of the steps over which alpha moves from alpha_start to alpha_end, on a cosine."
    )
    sparsity_weight: float = Field(default=0.0, ge=0, description="gamma: nats that a token's whole context costs; the paper's own way.")
    target_kept: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the context to keep, with hard decisions: a threshold common to all layers is steered to it.",
    )
    target_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the steps in which the target falls from 1 to target_kept; 0: it stands from the first. Default: 0.5, and 0 "
        "with fixed decisions.",
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
        default_factory=lambda: {"zero_optimization": {"stage": 2}},
        description="DeepSpeed's own keys, passed through. zero_optimization.stage is 2 where it is not given.",
    )

    @field_validator("deepspeed")
    @classmethod
    def _zero_2_unless_told(cls, section: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed's own default is stage 0, which would come with any other of its keys."""
        zero = section.get("zero_optimization", {})
        return {**section, "zero_optimization": {"stage": 2, **zero}} if isinstance(zero, dict) else section


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


def zero_stage(recipe: Recipe) -> int:
    """ZeRO stage, 0 to 3."""
    return int(recipe.deepspeed.get("zero_optimization", {}).get("stage", 0))
