"""The plan against independent truth: closed forms, PyTorch's own counters, and what DeepSpeed holds on two ranks."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from model.activation_checkpointing import ActivationCheckpointing
from model.activation_statistics import watch_residuals
from model.config import SIZES, ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from scripts.measure_memory import recorded_peak
from scripts.plan import largest_micro_batch, what_fits
from training.activation_memory import activation_bytes
from training.communication import bytes_sent, scaling
from training.context_pruning import PruningController
from training.memory import predict
from training.metrics import peak_of
from training.network import make_network
from training.plan import accumulation_steps, count_parameters, flops_per_token, format_plan, memory_advice, plan, print_plan
from training.recipe import CheckpointSection, ContextPruningSection, Recipe, SharpnessSection, model_config
from training.recipe_file import LoadedRecipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]


def recipe(deepspeed: dict[str, Any] | None = None, **training: Any) -> Recipe:
    values = {"tokens": 10**7, "tokens_per_step": 1024, "micro_batch_size": 2, "sequence_length": 64, "precision": "fp32"}
    return Recipe.model_validate(
        {"model": {"size": "nano"}, "training": values | training, "deepspeed": deepspeed or {"zero_optimization": {"stage": 0}}}
    )


def network(**fields: Any) -> ModelConfig:
    values: dict[str, Any] = {"width": 96, "depth": 2, "heads": 4, "vocab_size": 500, "sequence_length": 64}
    return ModelConfig(**values | fields)


@pytest.mark.parametrize("size", SIZES)
def test_gpt_shape_has_the_textbook_count(size: str) -> None:
    """12 width^2 a block, 2 norms a block and one at the end, and the embedding once: without making a weight."""
    shape: dict[str, Any] = {**SIZES[size]}
    width, depth = shape["width"], shape["depth"]
    counted = count_parameters(ModelConfig(**shape, vocab_size=16384, sequence_length=1024))
    assert counted.attention == 4 * width**2 * depth
    assert counted.mlp == 8 * width**2 * depth
    assert counted.norms_and_gains == (2 * depth + 1) * width
    assert (counted.embedding, counted.unembedding, counted.positions) == (16384 * width, 0, 0)
    assert counted.total == 16384 * width + 12 * width**2 * depth + (2 * depth + 1) * width
    assert counted.matmul == 16384 * width + 12 * width**2 * depth


def test_every_option_falls_into_its_part() -> None:
    config = network(
        block="outlier_protected", kv_heads=2, activation="swiglu", mlp_width=256, positions="learned", tied_embeddings=False, biases="all",
        qk_norm="layer_norm", residual_gain_form="vector", final_norm=True,
    )  # fmt: skip
    counted = count_parameters(config)
    assert counted.attention == 2 * (2 * 96 * 96 + 2 * 96 * 48 + 96 + 48 + 48 + 96)
    assert counted.mlp == 2 * (3 * 96 * 256 + 256 + 256 + 96)
    assert counted.norms_and_gains == 2 * (2 * 2 * 24 + 2 * 96) + 96  # scale and shift of queries and keys, two gains; final RMSNorm
    assert (counted.embedding, counted.unembedding, counted.positions) == (500 * 96, 500 * 96, 64 * 96)
    assert counted.total == sum(parameter.numel() for parameter in Transformer(config).parameters()) == sum(counted.tensor_sizes)


@pytest.mark.parametrize("fields", [{}, {"tied_embeddings": False, "activation": "swiglu", "kv_heads": 2}, {"block": "outlier_protected"}])
def test_flops_are_those_of_the_matrix_products(fields: dict[str, Any]) -> None:
    """PyTorch's flop counter over the matrix products of a forward and a backward pass, with attention written as two of them."""
    config = network(**fields)
    model = Transformer(config)
    initialize(model, seed=0)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1]}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, count_parameters(config), 64)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "layer_norm"},
    {"positions": "learned"},
    {"activation": "swiglu"},
    {"activation": "relu", "biases": "all"},
    {"kv_heads": 2, "qk_norm": "rms_norm"},
    {"block": "outlier_protected"},
    {"block": "outlier_protected", "residual_gain_form": "vector", "final_norm": True, "kv_heads": 2},
    {"block": "outlier_protected", "residual_gain_form": "fixed", "qk_norm": "layer_norm"},
    {"block": "outlier_protected", "qk_norm_gains": "frozen", "kv_heads": 2, "attention_softcap": 30.0},
    {"block": "post_norm", "norm": "layer_norm"},
    {"block": "post_norm", "norm": "simple_rms_norm", "residual_gain_form": "scalar"},
    {"norm": "simple_rms_norm", "norm_places": ["value"], "qk_norm": "rms_norm"},
    {"norm": "layer_norm", "norm_places": ["mlp"], "qk_norm": "layer_norm", "qk_norm_gains": "frozen"},
    {"block": "outlier_protected", "first_norm": True, "norm": "layer_norm", "norm_biases": True, "biases": "query_key"},
    {"attention": "shaped", "activation": "shaped_relu"},
    {"attention": "shaped", "kv_heads": 2, "skip_gain": 0.8},
    {"attention": "shaped", "attention_gains": "fixed", "parametrization": "mup", "base_width": 16},
    {"attention": "shaped", "block": "outlier_protected"},
    {"block": "simplified", "activation": "relu"},
    {"block": "simplified", "norm_places": []},
    {"block": "simplified_parallel", "activation": "relu"},
    {"block": "simplified_parallel", "norm_places": []},
]


# What compiling changes: norms in one piece, gates and signs, scores in float32
COMPILED: list[dict[str, Any]] = [
    {},
    {"activation": "swiglu", "kv_heads": 2},
    {"activation": "relu", "qk_norm": "rms_norm"},
    {"block": "outlier_protected", "attention_softcap": 30.0},
    {"block": "simplified"},
]


def kept_by_autograd(config: ModelConfig, dtype: torch.dtype, masked: bool, compiled: bool = False, selective: bool = False) -> float:
    """Bytes a token of the distinct tensors that a forward pass saves, parameters left out."""
    model = Transformer(config)
    initialize(model, seed=0)
    model.to(dtype)
    model.activation_checkpointing = ActivationCheckpointing(selective=config.depth if selective else 0)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    if compiled:  # inductor's own partition of the graph, whatever makes its kernels: this needs no C++ compiler
        for block in model.blocks:
            block.compile(backend="aot_eager_decomp_partition")
        model(tokens, tokens)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens, torch.zeros(2, 64, dtype=torch.long) if masked else None)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in parameters) / tokens.numel()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "compute"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("fields", OPTIONS)
def test_activations_are_what_autograd_keeps(fields: dict[str, Any], dtype: torch.dtype, compute: int, masked: bool) -> None:
    one, two = network(depth=1, **fields, residual_gain=0.5), network(depth=2, **fields, residual_gain=0.5)
    activations = activation_bytes(one, 64, compute, masked, cuda=False)
    block, head = activations.block, activations.head
    kept = kept_by_autograd(one, dtype, masked)
    # bf16 LayerNorm on a CPU keeps its statistics in bf16: a few bytes a vector less than on a GPU
    assert kept_by_autograd(two, dtype, masked) - kept == pytest.approx(block, abs=40)
    gradient = 4 * one.vocab_size * one.width / 128  # the unembedding's, made with the loss, over the tokens
    assert kept == pytest.approx(block + head + gradient, abs=150)  # tokens and RoPE's tables beside


@pytest.mark.parametrize("fields", OPTIONS)
def test_activations_under_selective_checkpointing(fields: dict[str, Any]) -> None:
    """What a forward pass leaves allocated, by the allocator's own record, since what the second pass is given is not autograd's."""
    left = []
    for depth in (1, 2):
        model = Transformer(network(depth=depth, **fields, residual_gain=0.5))
        initialize(model, seed=0)
        model.activation_checkpointing = ActivationCheckpointing(selective=depth)
        tokens = torch.zeros(2, 64, dtype=torch.long)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = model(tokens, tokens)
        events: list[Any] = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        left.append(sum(event.nbytes() for event in events if event.name() == "[memory]") / tokens.numel())
        del loss
    one = network(depth=1, **fields, residual_gain=0.5)
    assert left[1] - left[0] == pytest.approx(activation_bytes(one, 64, 4, False, cuda=False).selective, rel=0.03)


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("fields", COMPILED)
def test_activations_of_compiled_blocks(fields: dict[str, Any], selective: bool) -> None:
    """What the partition of a compiled block's graph saves; the compiler may find less than the plan counts, never more."""
    torch._dynamo.reset()
    one, two = network(depth=1, **fields, residual_gain=0.5), network(depth=2, **fields, residual_gain=0.5)
    first, both = (kept_by_autograd(config, torch.bfloat16, False, True, selective) for config in (one, two))
    activations = activation_bytes(one, 64, 2, False, cuda=False, compiled=True)
    planned = activations.selective if selective else activations.block
    assert 0.8 * planned < both - first < 1.02 * planned


CHECKPOINTING = [
    ({"depth": 6}, (0, 0)),
    ({"vocab_size": 20000}, (0, 0)),
    ({"depth": 12}, (12, 0)),
    ({"depth": 2}, (2, 0)),
    ({"depth": 6}, (0, 6)),
    ({"depth": 12}, (6, 6)),
    ({"depth": 12}, (4, 4)),
]


@pytest.mark.parametrize(("fields", "checkpointing"), CHECKPOINTING)
def test_peak_of_a_forward_and_backward_pass(fields: dict[str, Any], checkpointing: tuple[int, int]) -> None:
    """The allocator's own record of one pass, where activations, logits or what checkpointing leaves of them are most."""
    config = network(**fields)
    model = Transformer(config)
    initialize(model, seed=0)
    model.activation_checkpointing = ActivationCheckpointing(*checkpointing)
    tokens = torch.zeros(8, 64, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("counted"):
        model(tokens, tokens).backward()
    parameters = count_parameters(config)
    planned = recipe(micro_batch_size=8)
    memory = predict(
        planned,
        config,
        parameters.tensor_sizes,
        2 * parameters.total,
        world_size=1,
        accumulation=1,
        device="cpu",
        checkpointing=model.activation_checkpointing,
    )
    moments = [
        memory.phases["the loss"],
        memory.phases["the first gradients"],
        memory.phases["the recomputing"],
        memory.phases["the last gradients"] - memory.buckets,
    ]
    assert recorded_peak(profiler) == pytest.approx(max(moments) - memory.weights - memory.optimizer - memory.statistics, rel=0.06)


@pytest.mark.parametrize(
    "pruning",
    [
        {},
        {"decisions": "fixed"},
        {"attention_fraction": 1.0, "trainable": "interactions"},
    ],
)
def test_peak_of_a_pass_with_context_pruning(pruning: dict[str, Any]) -> None:
    """As above: where decisions are learned by the loss, where they are fixed, and where attention teaches them and nothing else."""
    section = ContextPruningSection(rank=16, target_kept=0.5, **pruning)
    config = network(depth=4, vocab_size=2000, sequence_length=256)
    model = make_network(config, section)
    initialize(model, seed=0)
    controller = PruningController(model.context_pruning_settings, section, torch.device("cpu"))
    controller.before_step(0, 10)
    tokens = torch.zeros(4, 256, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("counted"):
        model(tokens, tokens).backward()
    planned = recipe(micro_batch_size=4, sequence_length=256).model_copy(update={"context_pruning": section})
    count = count_parameters(config, section)
    memory = predict(
        planned, config, count.tensor_sizes, 2 * sum(count.tensor_sizes), world_size=1, accumulation=1, device="cpu", frozen=count.frozen
    )
    moments = [memory.phases["the loss"], memory.phases["the first gradients"], memory.phases["the last gradients"] - memory.buckets]
    assert recorded_peak(profiler) == pytest.approx(max(moments) - memory.weights - memory.optimizer - memory.statistics, rel=0.08)


def test_outlier_statistics_are_counted() -> None:
    config = network()
    model = Transformer(config)
    initialize(model, seed=0)
    with watch_residuals(model) as moments:
        model(torch.zeros(1, 64, dtype=torch.long))
    held = sum(t.nbytes for m in moments.values() for t in (m.sums, m.gram, m.ratio_max))
    case = recipe()
    assert plan(case, config, 1, device="cpu").memory.statistics == held
    silent = case.model_copy(update={"logging": case.logging.model_copy(update={"outliers_every": 0})})
    assert plan(silent, config, 1, device="cpu").memory.statistics == 0


DEEPSPEED: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {"zero_optimization": {"stage": 0}}),
    ("fp32", {"zero_optimization": {"stage": 1}}),
    ("fp32", {"zero_optimization": {"stage": 2}}),
    ("fp32", {"zero_optimization": {"stage": 3}}),
    ("bf16", {"zero_optimization": {"stage": 0}}),
    ("bf16", {"zero_optimization": {"stage": 2}}),
    ("bf16", {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}),
    ("bf16", {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}),
    ("bf16", {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
]


@pytest.mark.distributed
def test_states_are_what_deepspeed_holds() -> None:
    """Weights, optimizer state and standing buffers of every kind of sharding on two ranks, and what a save copies, to a percent."""
    config = network(width=144, heads=4, depth=2, vocab_size=1001)
    parameters = count_parameters(config)
    cases = [recipe(section, precision=precision, tokens_per_step=256) for precision, section in DEEPSPEED]
    cases = [case.model_copy(update={"checkpoint": CheckpointSection(asynchronous=True)}) for case in cases]
    for case in cases:
        case.deepspeed["zero_optimization"]["reduce_bucket_size"] = parameters.total
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(Path(__file__).with_name("held_by_deepspeed.py")),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [json.dumps([case.model_dump(mode="json") for case in cases]), json.dumps(config.to_dict())]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    held = json.loads(done.stdout.splitlines()[-1])
    for (precision, section), case, (size, copied) in zip(DEEPSPEED, cases, held, strict=True):
        memory = plan(case, config, world_size=2, device="cpu").memory
        expected = memory.weights + memory.optimizer
        stage = section["zero_optimization"]["stage"]
        if stage == 3:  # its gradients and their bucket stay
            expected += memory.gradients + (2 if precision == "bf16" else 4) * parameters.total
        elif "data_types" in section:
            expected += memory.gradients
        expected += memory.host  # on a CPU the host is the device
        assert size == pytest.approx(expected, rel=0.01), f"{precision} {section}"
        assert memory.checkpoint == pytest.approx(copied, rel=0.01), f"{precision} {section}"
        plain = plan(case.model_copy(update={"checkpoint": CheckpointSection()}), config, world_size=2, device="cpu").memory
        assert memory.total == plain.total + memory.checkpoint and plain.checkpoint == 0


def test_sharding_divides_what_it_should() -> None:
    """ZeRO's table (arXiv 1910.02054, figure 1), bf16 with Adam: of 16 bytes a parameter the stages leave 4 + 12/N, 2 + 14/N, 16/N."""
    config = model_config(Recipe.model_validate({"model": {"size": "1b"}, "training": recipe().training.model_dump()}), 16384)
    parameters = count_parameters(config).total
    for stage, per_parameter in ((0, 16.0), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        case = recipe({"zero_optimization": zero}, precision="bf16", tokens_per_step=64 * 128)
        memory = plan(case, config, world_size=64, device="cuda").memory
        assert (memory.weights + memory.gradients + memory.optimizer) / parameters == pytest.approx(per_parameter, rel=1e-3), stage


def test_offloading_empties_the_device() -> None:
    config = network()
    held = plan(recipe({"zero_optimization": {"stage": 3}}), config, 4, device="cuda").memory
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloaded = plan(recipe({"zero_optimization": zero}), config, 4, device="cuda").memory
    assert (offloaded.optimizer, offloaded.gradients, held.host) == (0, 0, 0)
    assert offloaded.host > held.optimizer
    assert offloaded.total < held.total


def test_a_bucket_of_the_recipe_counts_whole_on_a_gpu() -> None:
    given = recipe({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}, precision="bf16")
    assert plan(given, network(), 2, device="cuda").memory.buckets == 10**9
    assert plan(given, network(), 2, device="cpu").memory.buckets == 2 * count_parameters(network()).total


def test_the_batch_equation() -> None:
    assert accumulation_steps(recipe(tokens_per_step=524288, micro_batch_size=16, sequence_length=1024), 8) == 4
    assert accumulation_steps(recipe(), 1) == 8


@pytest.mark.parametrize(("tokens_per_step", "world_size"), [(1000, 1), (1024, 3), (4000, 2), (64 * 9, 3), (100, 8)])
def test_the_advice_on_a_batch_that_does_not_divide_is_good(tokens_per_step: int, world_size: int) -> None:
    """One line that names the numbers; every value that it names is accepted, and no valid one lies nearer."""
    with pytest.raises(InputError) as error:
        accumulation_steps(recipe(tokens_per_step=tokens_per_step), world_size)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"training.tokens_per_step: {tokens_per_step} does not divide by {world_size} rank")
    advice = message.partition("nearest valid: ")[2].partition(";")[0]
    named = [int(choice.split()[0]) for choice in advice.split(" or ")]
    for value in named:
        assert accumulation_steps(recipe(tokens_per_step=value), world_size) >= 1
    unit = world_size * 2 * 64
    assert named == [value for value in (tokens_per_step // unit * unit, tokens_per_step // unit * unit + unit) if value]
    kept = message.partition("training.micro_batch_size ")[2]
    if tokens_per_step % (world_size * 64) == 0:
        assert accumulation_steps(recipe(tokens_per_step=tokens_per_step, micro_batch_size=int(kept)), world_size) >= 1
    else:
        assert not kept


def test_what_is_printed() -> None:
    case = recipe({"zero_optimization": {"stage": 2}}, tokens=2.5e9, tokens_per_step=524288, micro_batch_size=16, sequence_length=1024)
    manifest = {"train": {"tokens": 10**9}}
    text = format_plan(plan(case, model_config(case, 16384), 8, manifest, device="cuda"))
    assert "tokens per step 524288 = 8 ranks x 16 micro-batch x 4 accumulation x 1024 length" in text
    assert "steps 4768 = 2499805184 tokens" in text
    assert "2.50 epochs" in text
    for part in ("embedding", "unembedding", "weights", "gradients", "optimizer state", "activations", "logits", "ZeRO buckets", "FLOPs"):
        assert part in text
    assert len(text.splitlines()) < 50
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("size", ["a lot", "auto", None])
def test_a_bucket_that_is_no_number(size: object) -> None:
    with pytest.raises(InputError, match="reduce_bucket_size: expected a number"):
        plan(recipe({"zero_optimization": {"stage": 2, "reduce_bucket_size": size}}), network(), 1)


def test_what_recipes_say_that_they_need_is_the_plans() -> None:
    found = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        said = re.search(r"by the plan \(not run here\): (.*);", path.read_text())
        if said:
            loaded = load_recipe(path).recipe
            config = model_config(loaded, loaded.data.tokenizer.vocab_size)
            for gigabytes, ranks in re.findall(r"([\d.]+) GiB(?: a GPU)? on (\d+)", said[1]):
                memory = plan(loaded, config, int(ranks), device="cuda").memory
                assert memory.total / 2**30 == pytest.approx(float(gigabytes), abs=0.06), path
                found.append((path.stem, int(ranks)))
    assert found == [("fineweb_outlier_protected_1b", 8), ("fineweb_pre_norm_7b", 8), ("fineweb_pre_norm_7b", 32)]


def test_the_peak_of_a_gpu_is_that_of_its_kind_or_not_known() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989.5e12 and peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA A100 80GB PCIe") == 312e12  # as fast as the other kind
    hopper = [f"NVIDIA {name} {kind}" for name in ("H100", "H200", "H800") for kind in ("PCIe", "NVL", "80GB HBM3 MIG 1g.10gb")]
    for name in (*hopper, "NVIDIA H200 MIG 1g.18gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090"):
        assert peak_of(name) is None


def test_no_ranks_at_all() -> None:
    with pytest.raises(InputError, match="--ranks"):
        print_plan(LoadedRecipe(recipe(), Path("x.yaml"), {}), 0)


def test_auto_takes_the_cheapest_checkpointing_that_fits() -> None:
    """At the budget of a choice exactly that one, and one byte below it the next: blocks selectively one by one, then in full."""
    config, parameters = network(depth=6), count_parameters(network(depth=6))

    def of(checkpointing: Any, gigabytes: float | None = None) -> Any:
        return plan(recipe(micro_batch_size=8, activation_checkpointing=checkpointing, memory_budget_gb=gigabytes), config, 1, device="cpu")

    def total(choice: tuple[int, int]) -> int:
        elements, chosen = 2 * parameters.total, ActivationCheckpointing(*choice)
        return predict(recipe(micro_batch_size=8), config, parameters.tensor_sizes, elements, 1, 2, "cpu", checkpointing=chosen).total

    choices = [*((0, n) for n in range(7)), *((n, 6 - n) for n in range(1, 7))]
    totals = [total(choice) for choice in choices]
    assert totals == sorted(totals, reverse=True) and len(set(totals[:9])) == 9
    assert of(False).checkpointing == (0, 0) and of(True).checkpointing == (6, 0) and of(4).checkpointing == (4, 0)
    assert of("selective").checkpointing == (0, 6) and of("selective").memory.total == totals[6]
    for i in (0, 1, 4, 6, 7):
        assert of("auto", totals[i] / 1e9).checkpointing == choices[i]
        assert of("auto", (totals[i] - 1) / 1e9).checkpointing == choices[i + 1]
    with pytest.raises(InputError, match="auto finds nothing that fits"):
        of("auto", (totals[-1] - 1) / 1e9)


def test_what_only_some_steps_need_is_planned() -> None:
    """A second pass in float32 holds the perturbation in bf16 and float32 weights; comparing gradients four vectors; Lanczos its basis."""
    config = network(width=256, depth=2)
    count = count_parameters(config).total

    def phases(sharpness: dict[str, Any] | None = None, lanczos: int | None = None, precision: str = "bf16") -> dict[str, int]:
        case = recipe({"zero_optimization": {"stage": 0}}, precision=precision)
        if sharpness is not None:
            options = SharpnessSection.model_validate(sharpness)
            case = case.model_copy(update={"optimizer": case.optimizer.model_copy(update={"sharpness_aware": "sam", "sharpness": options})})
        if lanczos is not None:
            watched = case.evaluation.model_copy(update={"curvature_every": 8, "curvature_lanczos": lanczos})
            case = case.model_copy(update={"evaluation": watched})
        return plan(case, config, 1, device="cpu").memory.phases

    second = "the second loss"
    assert phases({"float32_second_pass": True})[second] >= phases({})[second] + 6 * count
    assert phases({"split_every": 8})[second] == phases({})[second] + 16 * count
    longer, shorter = (phases(lanczos=steps, precision="fp32")["the curvature"] for steps in (12, 4))
    assert longer - shorter == 8 * 4 * count


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("x"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: not enough memory: ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_running_out_of_memory_is_one_line_with_advice(error: BaseException) -> None:
    made = plan(recipe(micro_batch_size=8), network(depth=6), 2, device="cpu")
    with pytest.raises(InputError, match="out of memory during step 1: the plan counts") as said, memory_advice(made, "step 1"):
        raise error
    message = str(said.value)
    assert "\n" not in message and "training.activation_checkpointing=true" in message and "training.micro_batch_size=4" in message
    with pytest.raises(RuntimeError, match="another"), memory_advice(made, "step 1"):
        raise RuntimeError("another fault")


def test_a_chunk_of_the_loss_is_counted_once() -> None:
    """Of 128 rows of 2^20 logits: float32 ones; bf16 ones and float32 ones; compiled, bf16 ones. The unembedding's gradient
    is beside them in float32, and in bf16 a chunk's part of it."""
    config, count = network(width=8, depth=1, vocab_size=2**20), 128 * 2**20

    def logits(precision: str, compile: bool = False) -> int:
        case = recipe({"zero_optimization": {"stage": 0}}, precision=precision, compile=compile)
        return plan(case, config, 1, device="cuda").memory.logits - 4 * 8 * 2**20

    assert logits("fp32") == logits("fp32", compile=True) == 4 * count
    assert logits("bf16") == 6 * count + 2 * 8 * 2**20
    assert logits("bf16", compile=True) == 2 * count + 2 * 8 * 2**20


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_sent_against_the_rings_themselves(stage: int) -> None:
    """A ring of G ranks passes G - 1 pieces of 1 / G on in a reduce-scatter or an all-gather; counted collective by collective."""
    ranks, parameters, accumulation = 4, 1000, 3
    ring = sum(2 * parameters // ranks for _ in range(ranks - 1))  # bytes of bf16 that a rank sends
    reduces, gathers = {0: (1, 1), 1: (1, 1), 2: (accumulation, 1), 3: (accumulation, 2 * accumulation)}[stage]
    assert bytes_sent(stage, parameters, ranks, accumulation) == pytest.approx((reduces + gathers) * ring)
    assert bytes_sent(stage, parameters, 1, accumulation) == 0


def test_scaling_lies_between_its_bounds() -> None:
    slow = scaling(3, 10**9, 6e9, 10**4, 1, 64, sustained=4e14)
    assert 0 < slow.share_exposed < slow.share_hidden <= 1
    twice = scaling(3, 10**9, 6e9, 10**4, 1, 64, sustained=4e14, passes=2.0)
    assert twice.exposed == pytest.approx(slow.exposed / 2) and twice.sent == 2 * slow.sent
    alone = scaling(3, 10**9, 6e9, 10**4, 1, 1, sustained=4e14)
    assert alone.share_exposed == alone.share_hidden == 1 and alone.hidden == pytest.approx(4e14 / 6e9)


def test_of_each_size_what_fits_is_said() -> None:
    """From a recipe that names a size, as from one that gives the shape itself."""
    asked = argparse.Namespace(gpus=2, gigabytes=24.0, share=0.9, sizes=True)
    by_shape = {"model": {"width": 128, "depth": 2, "heads": 4, "kv_heads": 2}}
    for case in (recipe(), Recipe.model_validate({**recipe().model_dump(include={"training"}), **by_shape})):
        lines = what_fits(case, asked).splitlines()
        assert [line.split()[0] for line in lines[2:-1:4]] == ["the", *SIZES]
        found = {line.split()[0]: line.split() for line in lines[6:-1] if line.split()[1] == "3"}
        sizes = [0 if found[size][2] == "-" else int(found[size][2]) for size in SIZES]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]  # larger models, fewer sequences
        fits = [size for size in SIZES if found[size][4] != "-"]
        assert lines[-1].startswith(f"the largest model.size that trains: {fits[-1]};")


def test_the_largest_micro_batch_fits_and_twice_as_many_do_not() -> None:
    case, ranks = recipe({"zero_optimization": {"stage": 2}}, precision="bf16"), 2
    for budget in (30 * 10**6, 100 * 10**6):
        size, taken = largest_micro_batch(case, ranks, budget)

        def total(count: int) -> int:
            values = {"micro_batch_size": count, "tokens_per_step": 2 * count * ranks * 64}
            bigger = case.model_copy(update={"training": case.training.model_copy(update=values)})
            return plan(bigger, model_config(bigger, case.data.tokenizer.vocab_size), ranks, device="cuda").memory.total

        assert size == 0 or (taken == total(size) <= budget)
        assert total(2 * size or 1) > budget
