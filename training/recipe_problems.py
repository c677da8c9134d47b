"""What is wrong with a recipe that no single field can say: fields that need or exclude one another, each problem one line."""

from __future__ import annotations

import difflib
from typing import Any

from model.config import SIZES, SMALLEST_ALPHA
from model.errors import InputError
from model.section import Section
from training.recipe import Recipe, model_config

# What Burnish writes into DeepSpeed's configuration itself, and where a recipe says it.
_SET_ELSEWHERE = {
    "train_batch_size": "training.tokens_per_step",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.tokens_per_step",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "tensorboard": "logging.tensorboard",
    "activation_checkpointing": "training.activation_checkpointing",
}
# What DeepSpeed knows, and Burnish's network, data or checkpoints do not go along with.
_NOT_HERE = {
    "checkpoint": "checkpoints of any ranks and stage are read by Burnish itself; leave it out",
    "dataloader_drop_last": "Burnish feeds its own batches; leave it out",
    "fp16": "Burnish trains in fp32 or bf16; say it as training.precision",
    "sequence_parallel_size": "sequences are not spread over ranks; leave it out",
    "seq_parallel_communication_data_type": "sequences are not spread over ranks; leave it out",
    "tensor_parallel": "matrices are not spread over ranks but by ZeRO; leave it out",
}
# DeepSpeed ignores a top-level key it does not know, so a mistyped one would silently do nothing. Its own list is spread over
# its parser; these are the keys that its 0.19 documentation names and that make sense here.
_DEEPSPEED_KEYS = (
    "zero_optimization", "bf16", "torch_autocast", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio", "comms_logger",
    "compile", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print", "wall_clock_breakdown",
    "disable_allgather", "timers", "wandb", "csv_monitor", "comet",
)  # fmt: skip


# Of these, the ones that are sections
_DEEPSPEED_SECTIONS = (
    "zero_optimization", "bf16", "torch_autocast", "data_types", "aio", "comms_logger", "compile", "flops_profiler", "timers", "wandb",
    "csv_monitor", "comet",
)  # fmt: skip

# And the ones that are switches
_DEEPSPEED_SWITCHES = (
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "dump_state", "memory_breakdown", "wall_clock_breakdown",
    "disable_allgather",
)  # fmt: skip

# What `data_types` may have: DeepSpeed asks for these keys one by one, and sees no other
_DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")
_PRECISIONS = ("fp32", "bf16", "fp16")

# Which sources read a key of the data section; the others are read with any.
_READ_BY = {
    "paths": ("files",),
    "dataset": ("huggingface",),
    "subset": ("huggingface",),
    "split": ("huggingface",),
    "text_field": ("files", "huggingface"),
}


def _given(section: Section) -> list[str]:
    """The keys of a section that are not at their defaults; a run's resolved recipe, which has them all, must load again."""
    fields = type(section).model_fields
    return [name for name, field in fields.items() if getattr(section, name) != field.get_default(call_default_factory=True)]


def problems_between_fields(recipe: Recipe) -> list[str]:
    """What single fields cannot say: fields that need or exclude one another."""
    problems = []
    model, data, training = recipe.model, recipe.data, recipe.training
    if model.size is not None and model.size not in SIZES:
        near = difflib.get_close_matches(model.size, SIZES, n=1)
        problems.append(f"model.size: {model.size!r} is not one of {', '.join(SIZES)}" + (f"; did you mean {near[0]}?" if near else ""))
    missing = [name for name in ("width", "depth", "heads") if getattr(model, name) is None]
    if model.pretrained is not None:
        beside = sorted(set(_given(model)) - {"pretrained", "sequence_length"})
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
        problems.append("training.memory_budget_gb: only training.activation_checkpointing auto looks at it; leave it out, or set that")
    blocks = training.activation_checkpointing
    if isinstance(blocks, int) and not isinstance(blocks, bool) and blocks < 0:
        problems.append(f"training.activation_checkpointing: {blocks} is not a number of blocks")
    if blocks == "selective" and model.pretrained is not None and training.compile:
        problems.append(
            "training.activation_checkpointing: a compiled layer of a pretrained model is recomputed whole or not at all; set it to true "
            "or false, or training.compile to false"
        )
    if any(not 0 <= beta < 1 for beta in recipe.optimizer.betas):
        problems.append(f"optimizer.betas: expected two numbers in [0, 1), found {list(recipe.optimizer.betas)}")
    for look in (_unread_problems, _pruning_problems, _optimizer_problems, _sharpness_problems, _deepspeed_problems):
        problems.extend(look(recipe))
    return problems


def _unread_problems(recipe: Recipe) -> list[str]:
    """Keys that the recipe gives and nothing would read: the run would go, and not be the one that was meant."""
    data, problems = recipe.data, []
    for key in _given(data):
        if key in _READ_BY and data.source not in _READ_BY[key]:
            meant = " or ".join(_READ_BY[key])
            problems.append(
                f"data.{key}: does nothing with data.source {data.source}; did you mean data.source: {meant}? Else leave it out"
            )
    # vocab_size is not here: with a pretrained tokenizer too, the plan and the benchmarks make a network of that many tokens
    kind_of = {"path": "pretrained", "sample_megabytes": "sentencepiece"}
    if recipe.model.pretrained is None or data.tokenizer.kind == "pretrained":
        problems.extend(
            f"data.tokenizer.{key}: does nothing with data.tokenizer.kind {data.tokenizer.kind}; did you mean data.tokenizer.kind: "
            f"{kind_of[key]}? Else leave it out"
            for key in _given(data.tokenizer)
            if key in kind_of and data.tokenizer.kind != kind_of[key]
        )
    spikes, evaluation, checkpoint, pruning = recipe.training.loss_spikes, recipe.evaluation, recipe.checkpoint, recipe.context_pruning
    # Said to be off, it is off on purpose, to compare with; not said, it was forgotten. A run's resolved recipe says all.
    if spikes.action == "none" and "action" not in spikes.model_fields_set and (given := _given(spikes)):
        problems.append(f"training.loss_spikes.{given[0]}: does nothing without training.loss_spikes.action; say skip, rewind or none")
    if evaluation.curvature_every is None and "curvature_every" not in evaluation.model_fields_set:
        problems.extend(
            f"evaluation.{key}: does nothing without evaluation.curvature_every; say every how many steps, or null"
            for key in _given(evaluation)
            if key in ("curvature_iterations", "curvature_lanczos")
        )
    if checkpoint.keep_every is not None and checkpoint.keep_last is None and "keep_last" not in checkpoint.model_fields_set:
        problems.append(
            "checkpoint.keep_every: does nothing without checkpoint.keep_last, since none is deleted then; say how many to keep, or null"
        )
    if pruning is None and "context_pruning" not in recipe.model_fields_set and "pruning_learning_rate_factor" in _given(recipe.optimizer):
        problems.append("optimizer.pruning_learning_rate_factor: does nothing without context_pruning; give that section, or null")
    if pruning is not None and pruning.trainable != "lora":
        problems.extend(
            f"context_pruning.{key}: does nothing with context_pruning.trainable {pruning.trainable}; did you mean "
            "context_pruning.trainable: lora? Else leave it out"
            for key in _given(pruning)
            if key in ("lora_rank", "lora_alpha")
        )
    last_step = recipe.training.tokens // recipe.training.tokens_per_step
    beyond = [step for step in recipe.training.profile if not 1 <= step <= last_step]
    if beyond and last_step:
        problems.append(
            f"training.profile: step {beyond[0]}, expected steps from 1 to {last_step}, the last one of training.tokens over "
            "training.tokens_per_step"
        )
    return problems


def _pretrained_problems(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.optimizer.sharpness_aware == "functional_sam":
        problems.append(
            "optimizer.sharpness_aware: functional_sam goes through our own network's unembedding; use sam with model.pretrained"
        )
    if recipe.optimizer.sharpness.norm_scope == "tensor_width":
        problems.append("optimizer.sharpness.norm_scope: tensor_width goes by the names of our own network's parts; use tensor or global")
    if recipe.optimizer.sharpness.split_every is not None:
        problems.append(
            "optimizer.sharpness.split_every: compares with functional_sam, which goes through our own network's unembedding; "
            "leave it out with model.pretrained"
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
    if pruning.start is not None and recipe.model.pretrained is None:
        problems.append("context_pruning.start: decisions go with the pretrained model that they were learned on; give model.pretrained")
    fixed = pruning.decisions == "fixed"
    if pruning.target_kept is None and pruning.sparsity_weight == 0 and not fixed:
        problems.append("context_pruning: nothing makes it drop anything; give target_kept, or a sparsity_weight")
    if fixed and pruning.trainable == "interactions":
        problems.append("context_pruning.decisions: fixed leaves nothing to train with trainable interactions; use all or lora")
    for name in ("attention_fraction", "sparsity_weight"):
        if fixed and getattr(pruning, name):
            problems.append(f"context_pruning.{name}: teaches decisions, and decisions are fixed; leave one out")
    for name in ("alpha_start", "alpha_end"):
        if 1 < getattr(pruning, name) < SMALLEST_ALPHA:
            problems.append(f"context_pruning.{name}: {getattr(pruning, name)}, expected 1 or at least {SMALLEST_ALPHA}")
    if pruning.rope and pruning.rank % 2:
        problems.append(f"context_pruning.rank: {pruning.rank} is odd, and rope rotates pairs")
    if pruning.attention_fraction and pruning.propagate_in_depth:
        problems.append(
            "context_pruning.attention_fraction: each layer's own attention teaches it, and with propagate_in_depth others drop for it; "
            "leave one out"
        )
    if pruning.attention_fraction and recipe.optimizer.sharpness_aware != "none":
        problems.append(
            f"optimizer.sharpness_aware: {recipe.optimizer.sharpness_aware} perturbs weights that attention_fraction keeps still"
        )
    if recipe.training.compile:
        problems.append("training.compile: context pruning runs uncompiled; switch one of the two off")
    if recipe.optimizer.sharpness_aware == "functional_sam":
        problems.append(
            "optimizer.sharpness_aware: functional_sam holds the loss's derivative at the logits, and the sparsity term does not go "
            "through them; use sam"
        )
    split, curvature = recipe.optimizer.sharpness.split_every, recipe.evaluation.curvature_every
    for name, value in (("optimizer.sharpness.split_every", split), ("evaluation.curvature_every", curvature)):
        if value and recipe.model.pretrained is None:
            problems.append(
                f"{name}: holds the loss's derivative at the logits too, which leaves context pruning's terms out; leave it out"
            )
    if recipe.model.parametrization != "standard":
        problems.append(
            f"model.parametrization: {recipe.model.parametrization} has no rule for context pruning's interactions; use standard"
        )
    return problems


def _optimizer_problems(recipe: Recipe) -> list[str]:
    optimizer, problems = recipe.optimizer, []
    for field, kind in (("momentum", "muon"), ("precondition_frequency", "soap"), ("largest_preconditioner", "soap")):
        if getattr(optimizer, field) is not None and optimizer.kind != kind:
            problems.append(f"optimizer.{field}: only {kind} has it, and optimizer.kind is {optimizer.kind}; leave it out")
    for field in _given(optimizer):
        if field in ("betas", "epsilon") and optimizer.kind == "adafactor":  # muon has them for what is beside the blocks' matrices
            problems.append(f"optimizer.{field}: only adamw, muon and soap have it, and optimizer.kind is adafactor; leave it out")
        if field == "decay_fraction" and optimizer.schedule != "warmup_stable_decay":
            problems.append(
                f"optimizer.decay_fraction: only warmup_stable_decay has it, and optimizer.schedule is {optimizer.schedule}; leave it out"
            )
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
        # said to be none, it is switched off on purpose, to compare with; not said, it was forgotten
        if "sharpness_aware" not in optimizer.model_fields_set and (given := _given(options)):
            problems.append(
                f"optimizer.sharpness.{given[0]}: does nothing without optimizer.sharpness_aware; say sam, functional_sam or none"
            )
        return problems
    if options.precondition and optimizer.kind not in _WITH_SECOND_MOMENT:
        problems.append(
            f"optimizer.sharpness.precondition: needs an optimizer with a second moment ({', '.join(_WITH_SECOND_MOMENT)}); "
            f"{optimizer.kind} has none"
        )
    if options.split_every is not None and options.ascent_fraction < 1:
        problems.append("optimizer.sharpness.split_every: compares gradients of the same tokens, so ascent_fraction has to be 1")
    if options.split_every is not None and options.split_every % options.every:
        problems.append(
            f"optimizer.sharpness.split_every: {options.split_every} is no multiple of optimizer.sharpness.every {options.every}, and the "
            "steps between have no perturbation to split"
        )
    if options.store_logits and optimizer.sharpness_aware != "functional_sam" and options.split_every is None:
        problems.append("optimizer.sharpness.store_logits: only functional_sam needs the first pass's logits")
    if options.float32_second_pass:
        key, training = "optimizer.sharpness.float32_second_pass", recipe.training
        if training.precision == "fp32":
            problems.append(f"{key}: training.precision is fp32 already; leave it out")
        elif recipe.context_pruning is not None and recipe.context_pruning.trainable != "all":
            problems.append(f"{key}: weights that context_pruning.trainable keeps still stay in bf16; use training.precision fp32")
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
        elif key in _NOT_HERE:
            problems.append(f"deepspeed.{key}: {_NOT_HERE[key]}")
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
    for key in _DEEPSPEED_SWITCHES:
        if not isinstance(found := recipe.deepspeed.get(key, False), bool):
            problems.append(f"deepspeed.{key}: expected true or false, found {str(found)[:80]!r}")
    problems.extend(_data_types_problems(recipe.deepspeed.get("data_types", {})))
    # DeepSpeed takes seconds to import: not for what is empty, nor for a stage alone, which is looked at below
    for key in (key for key in _DEEPSPEED_SECTIONS if key != "data_types"):
        section = recipe.deepspeed.get(key)
        if isinstance(section, dict) and section.keys() - ({"stage"} if key == "zero_optimization" else set()):
            from training.engine import deepspeed_section_problems

            problems.extend(deepspeed_section_problems(key, section))
    zero = recipe.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return problems
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        problems.append(f"deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, found {stage!r}")
    problems.extend(_reduction_problems(recipe.deepspeed, stage, zero.get("reduce_scatter", True)))
    bf16 = recipe.deepspeed.get("bf16", {})
    if isinstance(bf16, dict) and bf16.get("enabled", recipe.training.precision == "bf16") != (recipe.training.precision == "bf16"):
        problems.append("deepspeed.bf16.enabled: contradicts training.precision; leave it out")
    if zero.get("offload_param") and stage != 3:
        problems.append(
            f"deepspeed.zero_optimization.offload_param: stage {stage} keeps weights on the device; needs stage 3, or "
            "offload_optimizer alone"
        )
    if zero.get("offload_optimizer") and stage == 0:
        problems.append(
            "deepspeed.zero_optimization.offload_optimizer: stage 0 keeps the optimizer's state on the device; needs stage 1 to 3"
        )
    types = recipe.deepspeed.get("data_types", {})
    accumulated = types.get("grad_accum_dtype") if isinstance(types, dict) else None
    if recipe.training.precision == "bf16" and stage == 0 and accumulated in ("fp32", "fp16"):
        problems.append(
            f"deepspeed.data_types.grad_accum_dtype: {accumulated} with bf16 needs ZeRO stage 1 to 3; at stage 0 leave it out, or use "
            "training.precision fp32"
        )
    return problems


def _data_types_problems(types: Any) -> list[str]:
    problems = []
    for key, found in types.items() if isinstance(types, dict) else ():
        if key not in _DATA_TYPES:
            near = difflib.get_close_matches(key, _DATA_TYPES, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known here: {', '.join(_DATA_TYPES)}"
            problems.append(f"deepspeed.data_types.{key}: unknown key; {advice}")
        elif key == "keep_in_fp32_modules":
            if found != "auto" and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
                problems.append(f"deepspeed.data_types.{key}: expected auto or a list of names, found {str(found)[:80]!r}")
        elif found is not None and found not in _PRECISIONS:
            problems.append(_no_precision(f"data_types.{key}", found))
    return problems


def _no_precision(key: str, found: Any) -> str:
    near = difflib.get_close_matches(str(found), _PRECISIONS, n=1)
    return f"deepspeed.{key}: {found!r} is not one of {', '.join(_PRECISIONS)}" + (f"; did you mean {near[0]}?" if near else "")


def _reduction_problems(deepspeed: dict[str, Any], stage: Any, scattered: Any) -> list[str]:
    """Of the plain values that DeepSpeed looks at when it is built, or in the first step, and refuses with an exception."""
    problems = []
    found = deepspeed.get("communication_data_type")
    if found is not None and found not in _PRECISIONS:
        problems.append(_no_precision("communication_data_type", found))
    found = deepspeed.get("steps_per_print")
    if found is not None and (type(found) is not int or found < 1):
        problems.append(f"deepspeed.steps_per_print: expected a whole number from 1 on, found {found!r}")
    factor, before = deepspeed.get("gradient_predivide_factor", 1.0), deepspeed.get("prescale_gradients", False)
    number, known = type(factor) in (int, float) and factor > 0, isinstance(before, bool)
    if not number:
        problems.append(f"deepspeed.gradient_predivide_factor: expected a number above 0, found {factor!r}")
    if not known:
        problems.append(f"deepspeed.prescale_gradients: expected true or false, found {before!r}")
    if stage in (2, 3) and scattered:
        if number and factor != 1:
            problems.append(f"deepspeed.gradient_predivide_factor: ZeRO stage {stage} has 1 alone; leave it out, or use stage 0 or 1")
        if before is True:
            problems.append(f"deepspeed.prescale_gradients: ZeRO stage {stage} divides after reducing; leave it out, or use stage 0 or 1")
    return problems
