"""Recipes: every problem at once, with the nearest right name; overrides; provenance; the resolved file loads again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import train
from model.errors import InputError
from training.plan import print_plan
from training.recipe import Recipe, model_config, zero_stage
from training.recipe_file import differences, dump_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = """
model: {size: nano}
training: {tokens: 1e6, tokens_per_step: 4096, micro_batch_size: 8, sequence_length: 256}
"""


NO_ZERO = "deepspeed.zero_optimization.stage=0"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(path, list(overrides))
    return str(error.value)


def test_defaults_file_and_command_line(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["optimizer.learning_rate=3e-4", "deepspeed.zero_optimization.stage=3", "training.micro_batch_size=4"])
    assert loaded.recipe.training.tokens == 1_000_000  # 1e6: a number here, a string in YAML 1.1
    assert loaded.recipe.optimizer.learning_rate == 3e-4
    assert loaded.recipe.deepspeed == {"zero_optimization": {"stage": 3}}
    assert loaded.provenance["training.tokens"] == str(recipe)
    assert loaded.provenance["training.micro_batch_size"] == "command line"
    assert loaded.provenance["deepspeed.zero_optimization.stage"] == "command line"
    assert loaded.provenance["optimizer.betas"] == "default"
    assert loaded.run_folder == Path("runs/small")


def test_an_override_of_a_section_replaces_what_the_file_said_below_it(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["model={width: 64, depth: 2, heads: 2}"])
    assert loaded.recipe.model.size is None and loaded.recipe.model.width == 64
    assert loaded.provenance["model.size"] == "default" and loaded.provenance["model.width"] == "command line"


def test_every_problem_at_once_with_the_nearest_name(recipe: Path) -> None:
    message = problems(
        recipe,
        "optimizer.learing_rate=1e-3", "model.size=nanu", "model.blok=pre_norm", "data.learning_rate=1", "training.gradient_clipping=much",
        "training.precision=bf61", "dat.source=files", "evaluation.every=0", "deepspeed.zero_optimisation={}", "no_equals_sign",
        "data.source=files",
    )  # fmt: skip
    lines = message.splitlines()
    assert lines[0] == f"{recipe}: 11 problems in the recipe"
    for expected in (
        "no_equals_sign: an override is written section.key=value",
        "optimizer.learing_rate: unknown key; did you mean optimizer.learning_rate?",
        "model.blok: unknown key; did you mean model.block?",
        "data.learning_rate: unknown key; did you mean optimizer.learning_rate?",
        "training.precision: 'bf61' is not one of 'fp32' or 'bf16'; did you mean bf16?",
        "dat: unknown key; did you mean data?",
        "evaluation.every: expected greater than or equal to 1, found 0",
        "training.gradient_clipping: expected number, unable to parse string as a number, found 'much'",
    ):
        assert any(line.strip() == expected for line in lines), (expected, message)


def test_problems_between_fields(recipe: Path) -> None:
    message = problems(
        recipe,
        "data.source=files", "data.tokenizer.kind=pretrained", "model.sequence_length=128", "model.heads=3", "training.tokens=100",
        "optimizer.betas=[0.9, 1.0]", "deepspeed.train_batch_size=8", "deepspeed.zero_optimization.stage=4",
    )  # fmt: skip
    for expected in (
        "data.paths: required", "data.tokenizer.path: required", "256 is over the model's 128", "width 128 does not divide by 3 heads",
        "100 is less than one step of 4096", "optimizer.betas",
        "deepspeed.train_batch_size: set by Burnish; say it as training.tokens_per_step",
        "deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, found 4",
    ):  # fmt: skip
        assert expected in message


def test_deepspeeds_zero_section_is_checked_too(recipe: Path) -> None:
    load_recipe(recipe, ["deepspeed.zero_optimization={stage: 2, overlap_comm: true, offload_optimizer: {device: cpu}}"])
    message = problems(
        recipe, "deepspeed.zero_optimization={stage: 2, overlap_com: true, reduce_bucket_size: many, offload_optimizer: {devise: cpu}}"
    )
    assert "deepspeed.zero_optimization.overlap_com: unknown key; did you mean overlap_comm?" in message
    assert "deepspeed.zero_optimization.reduce_bucket_size" in message and "found 'many'" in message
    assert "deepspeed.zero_optimization.offload_optimizer.devise: unknown key" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.sharpness.radius=0.3", "optimizer.sharpness.radius: does nothing without optimizer.sharpness_aware"),
        ("deepspeed.sequence_parallel_size=2", "deepspeed.sequence_parallel_size: sequences are not spread over ranks"),
        ("deepspeed.tensor_parallel={autotp_size: 2}", "deepspeed.tensor_parallel: matrices are not spread"),
        ("deepspeed.checkpoint={load_universal: true}", "deepspeed.checkpoint: checkpoints of any ranks"),
        ("deepspeed.activation_checkpointing={}", "say it as training.activation_checkpointing"),
        ("deepspeed.zero_optimization={stage: 2, offload_param: {device: cpu}}", "offload_param: stage 2 keeps weights on the device"),
        ("deepspeed={zero_optimization: {stage: 0}, data_types: {grad_accum_dtype: fp32}}", "grad_accum_dtype: fp32 with bf16 needs ZeRO"),
        ("deepspeed.zero_optimization={stage: 0, offload_optimizer: {device: cpu}}", "offload_optimizer: stage 0 keeps the optimizer's"),
        ("deepspeed.zero_optimization.stage=true", "deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, found True"),
        (
            "deepspeed.communication_data_type=bf17",
            "deepspeed.communication_data_type: 'bf17' is not one of fp32, bf16, fp16; did you mean",
        ),
        ("deepspeed.steps_per_print=many", "deepspeed.steps_per_print: expected a whole number from 1 on, found 'many'"),
        ("deepspeed.steps_per_print=0", "deepspeed.steps_per_print: expected a whole number from 1 on, found 0"),
        ("deepspeed.gradient_predivide_factor=0", "deepspeed.gradient_predivide_factor: expected a number above 0, found 0"),
        ("deepspeed={zero_optimization: {stage: 2}, gradient_predivide_factor: 2}", "gradient_predivide_factor: ZeRO stage 2 has 1 alone"),
        ("deepspeed={zero_optimization: {stage: 3}, prescale_gradients: true}", "prescale_gradients: ZeRO stage 3 divides after reducing"),
        ("deepspeed.prescale_gradients=2", "deepspeed.prescale_gradients: expected true or false, found 2"),
    ],
)
def test_what_would_do_nothing_or_fail_inside_is_refused(recipe: Path, override: str, expected: str) -> None:
    assert expected in problems(recipe, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.paths=[my.txt]"], "data.paths: does nothing with data.source python_source; did you mean data.source: files? Else leave"),
        (["data.source=huggingface", "data.dataset=a/b", "data.paths=[my.txt]"], "data.paths: does nothing with data.source huggingface"),
        (["data.dataset=a/b"], "data.dataset: does nothing with data.source python_source; did you mean data.source: huggingface?"),
        (["data.source=files", "data.paths=[my.txt]", "data.dataset=a/b"], "data.dataset: does nothing with data.source files"),
        (["data.subset=small"], "data.subset: does nothing with data.source python_source; did you mean data.source: huggingface?"),
        (["data.split=test"], "data.split: does nothing with data.source python_source; did you mean data.source: huggingface?"),
        (["data.text_field=body"], "data.text_field: does nothing with data.source python_source; did you mean data.source: files or"),
        (["data.tokenizer.path=gpt2"], "data.tokenizer.path: does nothing with data.tokenizer.kind sentencepiece; did you mean "
         "data.tokenizer.kind: pretrained?"),
        (["data.tokenizer={kind: pretrained, path: gpt2, sample_megabytes: 3}"], "data.tokenizer.sample_megabytes: does nothing with "
         "data.tokenizer.kind pretrained; did you mean data.tokenizer.kind: sentencepiece?"),
        *(([f"training.loss_spikes.{key}={value}"], f"training.loss_spikes.{key}: does nothing without training.loss_spikes.action; say "
           "skip, rewind or none")
          for key, value in (("threshold", 5), ("window", 64), ("warmup", 8), ("rewind_steps", 50), ("limit", 3))),
        *(([f"evaluation.{key}=7"], f"evaluation.{key}: does nothing without evaluation.curvature_every; say every how many steps, or null")
          for key in ("curvature_iterations", "curvature_lanczos")),
        *((["optimizer.kind=adafactor", NO_ZERO, f"optimizer.{key}={value}"], f"optimizer.{key}: only adamw, muon and soap have it, "
           "and optimizer.kind is adafactor; leave it out")
          for key, value in (("betas", "[0.8, 0.9]"), ("epsilon", "1e-6"))),
        (["optimizer.schedule=linear", "optimizer.decay_fraction=0.5"], "optimizer.decay_fraction: only warmup_stable_decay has it, and "
         "optimizer.schedule is linear; leave it out"),
        (["optimizer.pruning_learning_rate_factor=5"], "optimizer.pruning_learning_rate_factor: does nothing without context_pruning; give "
         "that section, or null"),
        *(([f"context_pruning={{target_kept: 0.5, {key}: 4}}"], f"context_pruning.{key}: does nothing with context_pruning.trainable all; "
           "did you mean context_pruning.trainable: lora?")
          for key in ("lora_rank", "lora_alpha")),
        (["checkpoint.keep_every=500"], "checkpoint.keep_every: does nothing without checkpoint.keep_last, since none is deleted then; "
         "say how many to keep, or null"),
        *(([f"training.profile=[3, {step}]"], f"training.profile: step {step}, expected steps from 1 to 244, the last one of")
          for step in (0, -1, 245)),
    ],
)  # fmt: skip
def test_what_nothing_would_read_is_refused(recipe: Path, overrides: list[str], expected: str) -> None:
    message = problems(recipe, *overrides)
    assert expected in message and "1 problem in the recipe" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.source=files", "data.paths=[my.txt]", "data.text_field=body", "data.dataset=null"],
        ["data.source=huggingface", "data.dataset=a/b", "data.subset=small", "data.split=test", "data.text_field=body", "data.paths=[]"],
        ["data.tokenizer={kind: pretrained, path: gpt2, vocab_size: 50257}"],  # the plan and the benchmarks go by it
        ["training.loss_spikes={threshold: 5, rewind_steps: 50, action: none}"],
        ["evaluation.curvature_every=null", "evaluation.curvature_lanczos=9"],
        ["optimizer.pruning_learning_rate_factor=5", "context_pruning=null"],
        ["checkpoint.keep_every=500", "checkpoint.keep_last=null"],
        ["optimizer.kind=muon", "deepspeed.zero_optimization.stage=0", "optimizer.betas=[0.8, 0.9]", "optimizer.epsilon=1e-6"],
        ["training.profile=[1, 244]"],
    ],
)
def test_what_is_read_or_switched_off_on_purpose_is_taken_and_loads_again(recipe: Path, overrides: list[str]) -> None:
    loaded = load_recipe(recipe, overrides)
    saved = recipe.with_name("resolved.yaml")
    saved.write_text(dump_recipe(loaded))
    assert load_recipe(saved).recipe == loaded.recipe


def test_what_nothing_reads_since_a_value_was_refused_is_no_problem_of_its_own(recipe: Path) -> None:
    for overrides in (
        ["data.source=filez", "data.paths=[my.txt]"],
        ["data.tokenizer={kind: pretraind, path: gpt2}"],
        ["training.loss_spikes={action: skipp, threshold: 5}"],
        ["evaluation.curvature_every=0", "evaluation.curvature_lanczos=9"],
        ["optimizer.schedule=wsd", "optimizer.decay_fraction=0.5"],
        ["checkpoint={keep_last: 0, keep_every: 5}"],
    ):
        assert "1 problem in the recipe" in problems(recipe, *overrides), overrides


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("data_types: {grad_accum_dtyp: fp32}", "data_types.grad_accum_dtyp: unknown key; did you mean grad_accum_dtype?"),
        ("data_types: {grad_accum_dtype: fp31}", "data_types.grad_accum_dtype: 'fp31' is not one of fp32, bf16, fp16; did you mean fp32?"),
        ("data_types: {keep_in_fp32_modules: norm}", "data_types.keep_in_fp32_modules: expected auto or a list of names, found 'norm'"),
        ("aio: {block_sizes: 4096}", "aio.block_sizes: unknown key; did you mean block_size?"),
        ("aio: {queue_depth: deep}", "aio.queue_depth: "),
        ("bf16: {imediate_grad_update: true}", "bf16.imediate_grad_update: unknown key; did you mean immediate_grad_update?"),
        ("bf16: {check_grad_overflow: 7}", "bf16.check_grad_overflow: "),
        ("comms_logger: {verbos: true}", "comms_logger.verbos: unknown key; did you mean verbose?"),
        ("compile: {deep_compile: true}", "compile.deep_compile: unknown key; did you mean deepcompile?"),
        ("csv_monitor: {enable: true}", "csv_monitor.enable: unknown key; did you mean enabled?"),
        ("wandb: {projet: x}", "wandb.projet: unknown key; did you mean project?"),
        ("comet: {samples_log_interval: often}", "comet.samples_log_interval: "),
        ("flops_profiler: {profile_stp: 5}", "flops_profiler.profile_stp: unknown key; did you mean profile_step?"),
        ("flops_profiler: {output_file: 5}", "flops_profiler.output_file: "),
        ("timers: {througput: {enabled: true}}", "timers.througput: unknown key; did you mean throughput?"),
        ("timers: {throughput: {enable: true}}", "timers.throughput.enable: unknown key; did you mean enabled?"),
        ("torch_autocast: {enabld: true}", "torch_autocast.enabld: unknown key; did you mean enabled?"),
        ("torch_autocast: {enabled: true, dtype: bf61}", "torch_autocast.dtype: "),
        ("bf16: {self: 1}", "bf16.self: unknown key"),
        ("wall_clock_breakdown: sometimes", "wall_clock_breakdown: expected true or false, found 'sometimes'"),
    ],
)
def test_deepspeeds_other_sections_are_checked_too(recipe: Path, section: str, expected: str) -> None:
    message = problems(recipe, f"deepspeed={{zero_optimization: {{stage: 2}}, {section}}}")
    assert f"  deepspeed.{expected}" in message and "1 problem in the recipe" in message


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ("stage: 2, offload_optimizer: {device: cpu, ratio: 0.5}", "Partial offloading only supported for ZeRO Stage 3."),
        ("stage: 3, compute_grad_norm: false", "compute_grad_norm=false is supported only with ZeRO Stage 1 or 2"),
        ("stage: 2, cpu_offload: true, offload_optimizer: {device: cpu}", "Cannot provide deprecated parameter 'cpu_offload'"),
    ],
)
def test_keys_of_deepspeeds_that_do_not_go_together_are_one_line(recipe: Path, zero: str, expected: str) -> None:
    lines = problems(recipe, f"deepspeed.zero_optimization={{{zero}}}").splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"  deepspeed.zero_optimization: {expected}")
    load_recipe(recipe, ["deepspeed.zero_optimization={stage: 3, offload_optimizer: {device: cpu, ratio: 0.5}}"])


def test_what_deepspeed_takes_in_its_other_sections_is_left_alone(recipe: Path) -> None:
    sections = (
        "data_types: {grad_accum_dtype: fp32, keep_in_fp32_modules: auto}",
        "aio: {block_size: 4096, queue_depth: 4, intra_op_parallelism: 2, single_submit: true, overlap_events: false, use_gds: false}",
        "bf16: {enabled: true, check_grad_overflow: false}",
        "comms_logger: {enabled: true, prof_all: false, prof_ops: [all_reduce]}",
        "flops_profiler: {enabled: true, recompute_fwd_factor: 1, profile_step: 2, module_depth: -1, detailed: false, output_file: x.txt}",
        "timers: {throughput: {enabled: true, synchronized: false}}",
        "torch_autocast: {enabled: false, dtype: bfloat16, lower_precision_safe_modules: [torch.nn.Linear]}",
        "wandb: {enabled: false}, csv_monitor: {}, comet: {}, compile: {}, memory_breakdown: true, wall_clock_breakdown: false",
    )
    loaded = load_recipe(recipe, [f"deepspeed={{zero_optimization: {{stage: 2}}, {', '.join(sections)}}}"])
    assert len(loaded.recipe.deepspeed) == 14


def test_what_deepspeed_takes_at_stage_1_is_left_alone(recipe: Path) -> None:
    zero = "{zero_optimization: {stage: 1}, gradient_predivide_factor: 2, prescale_gradients: true, communication_data_type: fp32}"
    load_recipe(recipe, [f"deepspeed={zero}"])
    load_recipe(recipe, ["deepspeed={zero_optimization: {stage: 2, reduce_scatter: false}, prescale_gradients: true}"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.learning_rate=true"], "optimizer.learning_rate: expected a number, found True"),
        (["model.depth=false"], "model.depth: expected a number, found False"),
        (["optimizer.betas=[true, 0.9]"], "optimizer.betas: expected a number, found [True, 0.9]"),
        (["model.qk_norm=false"], "model.qk_norm: False is not one of 'rms_norm', 'layer_norm' or 'simple_rms_norm' or 'none'"),
        (
            ["training.activation_checkpointing=x"],
            "training.activation_checkpointing: expected boolean or integer or 'selective' or 'auto', found 'x'",
        ),
        (["data.source=files", "data.paths=x.txt"], "data.paths: expected list, found 'x.txt'"),
        (["model.size=3"], "model.size: expected string, found 3"),
        (["context_pruning.target_kept=1.0"], "context_pruning.target_kept: expected less than 1, found 1.0"),
        (["context_pruning.tarket_kept=0.5"], "context_pruning.tarket_kept: unknown key; did you mean context_pruning.target_kept?"),
        (["optimizer.kind=adam", "optimizer.momentum=0.9"], "optimizer.kind: 'adam' is not one of 'adamw', 'adafactor', 'muon' or 'soap'; "
         "did you mean adamw?"),
        (["optimizer.schedule=wsd"], "optimizer.schedule: 'wsd' is not one of 'cosine', 'linear', 'constant' or 'warmup_stable_decay'; "
         "did you mean warmup_stable_decay?"),
        *(([f"training.precision={name}"], f"training.precision: '{name}' is not one of 'fp32' or 'bf16'; did you mean {meant}?")
          for name, meant in (("float32", "fp32"), ("float16", "bf16"), ("bfloat16", "bf16"), ("fp16", "bf16"))),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_and_no_other_problem_follows(recipe: Path, overrides: list[str], expected: str) -> None:
    assert problems(recipe, *overrides).splitlines() == [f"{recipe}: 1 problem in the recipe", f"  {expected}"]


def test_problems_that_do_not_follow_from_a_refused_value_are_still_said(recipe: Path) -> None:
    message = problems(
        recipe, "data.paths=x.txt", "data.source=files", "data.tokenizer.kind=pretrained", "model.width=many", "model.heads=3"
    )
    assert "data.tokenizer.path: required" in message and "width 128 does not divide by 3 heads" in message


def test_numbers_written_as_yaml_has_them_are_taken(recipe: Path) -> None:
    training = load_recipe(
        recipe, ["training.tokens=1e6", "training.activation_checkpointing=true", "model.norm_biases=true"]
    ).recipe.training
    assert training.tokens == 1_000_000 and training.activation_checkpointing is True
    assert load_recipe(recipe, ["training.activation_checkpointing=1"]).recipe.training.activation_checkpointing == 1


def test_sharpness_aware_steps_can_be_switched_off_in_their_recipe() -> None:
    load_recipe(ROOT / "recipes" / "functional_sam_nano.yaml", ["optimizer.sharpness_aware=none"])


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {size: nano}\n")
    assert "training: required, and not given" in problems(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping of sections"),
        ("model: {size: nano}\nmodel: {size: 10m}\n", "key 'model' is given twice"),
        ("", "a recipe is a mapping of sections"),
    ],
)
def test_files_that_are_not_recipes(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert expected in problems(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a recipe" in problems(path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.loss_spikes.action=rewind", "checkpoint.keep_last=2", "checkpoint.every=60"], "do not reach back 100 steps"),
        (["training.loss_spikes.action=rewind", "checkpoint.keep_last=3", "checkpoint.every=60"], None),
        (["training.loss_spikes.warmup=20", "training.loss_spikes.window=16"], "is over the window of 16"),
        (["deepspeed.bf16=true"], "deepspeed.bf16: expected a mapping"),
    ],
)
def test_what_a_rewind_needs(recipe: Path, overrides: list[str], expected: str | None) -> None:
    if expected is None:
        load_recipe(recipe, overrides)
    else:
        with pytest.raises(InputError, match=expected):
            load_recipe(recipe, overrides)


def test_a_missing_file_names_the_nearest(recipe: Path) -> None:
    assert "no such recipe; did you mean" in problems(recipe.with_name("smal.yaml"))


def test_the_resolved_recipe_loads_again_and_says_where_values_came_from(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["run.seed=7", "optimizer.epsilon=1e-12"])
    text = dump_recipe(loaded)
    assert "  seed: 7  # command line\n" in text and f"  size: nano  # {recipe}\n" in text and "  block: pre_norm  # default\n" in text
    saved = recipe.with_name("resolved.yaml")
    saved.write_text(text)
    assert load_recipe(saved).recipe == loaded.recipe


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_again_from_its_run_folder(path: Path, tmp_path: Path) -> None:
    """What `train.py --resume` does first."""
    loaded = load_recipe(path)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(dump_recipe(loaded))
    assert load_recipe(saved).recipe == loaded.recipe
    assert differences(saved, loaded) == []


@pytest.mark.parametrize("name", ["2024", "a: b", "1e3", "null", "it's # one", "\u00fc\U0001f525"])
def test_resume_takes_the_name_of_a_folder_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, resumed = tmp_path / "7" / name, []
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(MINIMAL)

    def look(loaded: Any, ranks: int) -> None:
        resumed.append(loaded.run_folder)

    monkeypatch.setattr("training.plan.print_plan", look)
    monkeypatch.setattr("training.distributed.leave", sys.exit)
    for folder, written in ((tmp_path, f"7/{name}"), (tmp_path / "7", name), (run, "."), (tmp_path, str(run))):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", written, "--dry-run", "run.seed=3"])
        train.main()
    assert resumed == [run] * 4


def test_differences_ignore_what_changes_no_weight(recipe: Path) -> None:
    saved = recipe.with_name("resolved.yaml")
    saved.write_text(dump_recipe(load_recipe(recipe)))
    assert differences(saved, load_recipe(recipe, ["checkpoint.every=5", "logging.every=3", "run.stop_at_step=9"])) == []
    assert differences(saved, load_recipe(recipe, ["optimizer.learning_rate=0.5"])) == ["optimizer.learning_rate: 0.001 there, 0.5 here"]


def test_model_config_takes_the_size_and_what_the_recipe_overrides(recipe: Path) -> None:
    config = model_config(load_recipe(recipe, ["model.depth=2", "model.block=outlier_protected"]).recipe, vocab_size=500)
    assert (config.width, config.depth, config.heads, config.vocab_size, config.sequence_length) == (128, 2, 4, 500, 256)
    assert config.qk_norm == "rms_norm" and config.final_norm is False


def test_every_field_says_what_it_is() -> None:
    """The schema is what an editor shows: bounds and types for all, and a description wherever the name does not say it."""
    schema = Recipe.model_json_schema()
    for name, section in schema["$defs"].items():
        assert section["description"], name


def test_a_preset_fills_in_what_the_recipe_leaves_out(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["model.preset=paper", "model.residual_gain=0.1"])
    model = loaded.recipe.model
    assert (model.width, model.block, model.activation, model.residual_gain) == (128, "outlier_protected", "relu", 0.1)
    assert loaded.provenance["model.width"] == "size nano"
    assert loaded.provenance["model.activation"] == "preset paper"
    assert loaded.provenance["model.residual_gain"] == "command line"
    assert "activation: relu  # preset paper" in dump_recipe(loaded)
    assert model_config(loaded.recipe, 300).embedding_multiplier == 50
    expected = "model.preset: 'papers' is not one of 'paper', 'released_code' or 'shaped_transformer'; did you mean paper?"
    assert expected in problems(recipe, "model.preset=papers")


@pytest.mark.parametrize("kind", ["adafactor", "muon", "soap"])
def test_optimizers_of_whole_matrices_are_refused_where_zero_cuts_them(recipe: Path, kind: str) -> None:
    for stage in (1, 2, 3):
        message = problems(recipe, f"optimizer.kind={kind}", f"deepspeed.zero_optimization.stage={stage}")
        assert f"optimizer.kind: {kind} needs whole matrices, which ZeRO stage {stage} cuts" in message
        assert "set deepspeed.zero_optimization.stage: 0" in message
    assert load_recipe(recipe, [f"optimizer.kind={kind}", "deepspeed.zero_optimization.stage=0"]).recipe.optimizer.kind == kind
    assert load_recipe(recipe, [f"optimizer.kind={kind}", "deepspeed.zero_optimization.stage=0"]).recipe.optimizer.kind == kind


def test_an_optimizers_option_that_the_kind_does_not_have_is_refused(recipe: Path) -> None:
    message = problems(recipe, "optimizer.momentum=0.9", "optimizer.precondition_frequency=5")
    assert "optimizer.momentum: only muon has it, and optimizer.kind is adamw; leave it out" in message
    assert "optimizer.precondition_frequency: only soap has it" in message


def test_what_cannot_work_is_warned_of_before_the_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(load_recipe(recipe, ["model.block=outlier_protected", "model.qk_norm=none"]), 1)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "nothing keeps attention's entropy up" in warning and "arXiv 2405.19279" in warning


def test_a_dry_run_says_what_would_end_a_launch_on_this_machine(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the plan, all at once, and without reading a text or writing anything."""
    overrides = [f"run.folder={tmp_path}/runs", f"data.prepared={tmp_path}/prepared", "data.source=files"]
    (tmp_path / "text").mkdir()
    begun = load_recipe(recipe, [*overrides, f"data.paths=[{tmp_path}/text]"])
    begun.run_folder.mkdir(parents=True)
    (begun.run_folder / "recipe.yaml").write_text(dump_recipe(begun))
    before = sorted(tmp_path.rglob("*"))
    for paths, expected in (
        (f"[{tmp_path}/nowhere.txt]", f"data.paths: {tmp_path}/nowhere.txt does not exist"),
        (f"['{tmp_path}/*.txt']", "data.paths: no file in"),
        (f"[{tmp_path}/text]", "data.paths: no file in"),
    ):
        with pytest.raises(InputError) as refused:
            print_plan(load_recipe(recipe, [*overrides, f"data.paths={paths}", "run.seed=5"]), 1)
        assert expected in str(refused.value) and "run.seed: 0 there, 5 here" in str(refused.value)
        assert "tokens per step" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    (begun.run_folder / "data.json").write_text("{}")  # it went on from there: what it began with is read, not the source
    print_plan(load_recipe(recipe, [*overrides, f"data.paths=[{tmp_path}/text]"]), 1)


def test_a_dry_run_says_what_it_does_not_look_at(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(load_recipe(recipe, [f"run.folder={tmp_path}", "data.source=huggingface", "data.dataset=someone/texts"]), 1)
    assert capsys.readouterr().out.endswith("not looked at: the text itself, and whether the data set someone/texts can be had\n")


@pytest.mark.parametrize(
    ("section", "stage"),
    [
        (None, 2),
        ({"wall_clock_breakdown": False}, 2),
        ({"zero_optimization": {"overlap_comm": True}}, 2),
        ({"zero_optimization": {"stage": 0}}, 0),
    ],
)
def test_zero_2_is_there_unless_a_recipe_says_otherwise(section: dict[str, Any] | None, stage: int) -> None:
    """Another of DeepSpeed's keys does not bring its own default, stage 0, along."""
    tree: dict[str, Any] = {"model": {"size": "nano"}, "training": {"tokens": 1e6, "tokens_per_step": 1024, "micro_batch_size": 2}}
    tree["training"]["sequence_length"] = 64
    assert zero_stage(Recipe.model_validate(tree | ({"deepspeed": section} if section is not None else {}))) == stage
