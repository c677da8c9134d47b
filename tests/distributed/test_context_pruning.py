"""Fine-tuning with context pruning by train.py: stages and ranks agree, it resumes, and what it leaves loads and generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from analysis.export import export
from analysis.runs import find_run
from analysis.shards import open_checkpoint
from model.config import PruningConfig
from model.pretrained import LoraShape, PretrainedDecoder, PretrainedModel, pretrained_weights
from model.pruning_hooks import attach
from tests.distributed.conftest import Launch, losses, records, write_corpus
from tests.training.tiny_pretrained import save_tiny_llama

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained Llama, and a recipe of 8 steps that teaches it to drop half of its context."""
    folder = tmp_path_factory.mktemp("pruning")
    save_tiny_llama(folder / "tiny")
    content = {
        "run": {"folder": str(folder / "runs")},
        "model": {"pretrained": str(folder / "tiny")},
        "data": {
            "source": "files",
            "paths": [str(write_corpus(folder))],
            "validation_fraction": 0.1,
            "prepared": str(folder / "prepared"),
            "document_masks": True,
        },
        "training": {"tokens": 8 * 768, "tokens_per_step": 768, "micro_batch_size": 2, "sequence_length": 64, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-3},
        "context_pruning": {"rank": 6, "bias": 2.5, "window": 2, "target_kept": 0.5, "alpha_start": 2.0, "alpha_end": 4.0},
        "evaluation": {"every": 4, "tokens": 960},
        "checkpoint": {"every": 4},
        "logging": {"every": 1, "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(launch: Launch, recipe: Path, name: str, ranks: int, *overrides: str) -> Path:
    launch(name, ranks, launcher="torchrun" if ranks > 1 else "python", arguments=[str(recipe), f"run.name={name}", *overrides])
    return recipe.parent / "runs" / name


def kept(run: Path) -> list[float]:
    return [record["kept_share"] for record in records(run) if "kept_share" in record]


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_stages_and_ranks_agree(launch: Launch, recipe: Path, trainable: str) -> None:
    """One process without ZeRO, and two ranks at every stage: the same losses and kept shares, to float32 rounding."""
    overrides = (f"context_pruning.trainable={trainable}", "context_pruning.distillation_weight=0.5")
    alone = start(launch, recipe, f"{trainable}_alone", 1, *overrides, "deepspeed.zero_optimization.stage=0")
    assert sorted(losses(alone)) == list(range(1, 9))
    assert kept(alone)[-1] < kept(alone)[0]  # the target falls, and the share follows
    for stage in (0, 1, 2, 3) if trainable == "all" else (2, 3):
        run = start(launch, recipe, f"{trainable}_{stage}", 2, *overrides, f"deepspeed.zero_optimization.stage={stage}")
        # a decision on the edge may fall the other way where a sum was rounded otherwise
        assert losses(run) == pytest.approx(losses(alone), rel=2e-4), f"stage {stage}"
        assert kept(run) == pytest.approx(kept(alone), abs=2e-3), f"stage {stage}"
        evaluated = [[record for record in records(r) if "validation_loss" in record][-1] for r in (run, alone)]
        for key in ("validation_loss", "validation_loss_soft", "validation_loss_dense", "validation_kept_share"):
            assert evaluated[0][key] == pytest.approx(evaluated[1][key], rel=5e-4), (stage, key)
        assert evaluated[0]["validation_loss"] != evaluated[0]["validation_loss_dense"]


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_attention_teaches_alike_at_every_stage(launch: Launch, recipe: Path, trainable: str) -> None:
    """Five steps in which decisions alone learn, by the dense network's attention, and three by the loss."""
    section = "context_pruning={attention_fraction: 0.625, age_slope: -0.7, bias: 5.0, window: 2, rank: 6, target_kept: 0.5, trainable: %s}"
    overrides = (section % trainable, "optimizer.weight_decay=0.5")
    alone = start(launch, recipe, f"need_{trainable}_alone", 1, *overrides, "deepspeed.zero_optimization.stage=0")
    taught = [record["need_loss"] for record in records(alone) if "need_loss" in record]
    assert len(taught) == 5 and taught[-1] < taught[0]
    untouched = [record["validation_loss_dense"] for record in records(alone) if "validation_loss_dense" in record]
    first = start(launch, recipe, f"need_{trainable}_begun", 1, *overrides, "run.stop_at_step=1", "evaluation.every=1")
    begun = [record["validation_loss_dense"] for record in records(first) if "validation_loss_dense" in record]
    assert untouched[0] == begun[0] and untouched[1] != begun[0]  # nothing else has moved after step 4, and has after step 8
    for stage in (1, 2, 3):
        run = start(launch, recipe, f"need_{trainable}_{stage}", 2, *overrides, f"deepspeed.zero_optimization.stage={stage}")
        assert losses(run) == pytest.approx(losses(alone), rel=2e-4), f"stage {stage}"
        assert kept(run) == pytest.approx(kept(alone), abs=2e-3), f"stage {stage}"


def test_lora_leaves_the_base_as_it_was(launch: Launch, recipe: Path) -> None:
    """The checkpoint holds the base bit for bit; without pruning and adapters its network is the pretrained one."""
    run = recipe.parent / "runs" / "lora_3"
    if not run.exists():
        run = start(launch, recipe, "lora_3", 2, "context_pruning.trainable=lora", "deepspeed.zero_optimization.stage=3")
    folder = run / "checkpoints" / "step-00000008"
    described = json.loads((folder / "pretrained.json").read_text())
    shape = PretrainedModel(**{**described, "lora": LoraShape(**described["lora"])})
    decoder = PretrainedDecoder(shape)
    pruning = json.loads((folder / "context_pruning.json").read_text())
    attach(decoder, PruningConfig(**pruning["structure"])).take(pruning)
    checkpoint = open_checkpoint(folder)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(checkpoint.tensor(name))
    for name, weight in pretrained_weights(described["source"]).items():
        stored = decoder.model.get_parameter(name) if name in dict(decoder.model.named_parameters(remove_duplicate=False)) else None
        stored = decoder.model.get_parameter(name.replace(".weight", ".base_layer.weight")) if stored is None else stored
        assert torch.equal(stored, weight), name
    tokens = torch.randint(0, shape.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    untouched = transformers.AutoModelForCausalLM.from_pretrained(described["source"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder.eval().dense_logits(tokens, None), untouched(tokens).logits, rtol=0, atol=1e-6)
        assert (decoder(tokens) - untouched(tokens).logits).abs().max() > 1e-4


def test_a_step_that_is_not_finite_is_skipped_where_most_weights_are_frozen(
    launch: Launch, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNISH_FAULTS", "nan@2")
    run = start(launch, recipe, "lora_nan", 1, "context_pruning.trainable=lora", "run.stop_at_step=3")
    assert [record["step"] for record in records(run) if "loss" in record and record["skipped_steps"] == 1] == [2, 3]


def test_one_run_begins_with_the_decisions_of_another(launch: Launch, recipe: Path) -> None:
    """What attention taught is exported, and LoRA runs at another budget begin with it, sharded or not; on another base none begins."""
    taught = start(launch, recipe, "taught", 1, "context_pruning.trainable=interactions", "context_pruning.attention_fraction=1.0")
    adapters = recipe.parent / "adapters"
    export(find_run(taught), adapters, adapters=True)
    learned = json.loads((adapters / "context_pruning.json").read_text())["threshold"]
    overrides = [f"context_pruning.start={adapters}", "context_pruning.trainable=lora", "context_pruning.target_fraction=0", "run.seed=1"]
    alone = start(launch, recipe, "begun_alone", 1, *overrides)
    stage_3 = start(launch, recipe, "begun_3", 2, *overrides, "deepspeed.zero_optimization.stage=3")
    assert losses(stage_3) == pytest.approx(losses(alone), rel=2e-4)
    assert kept(stage_3) == pytest.approx(kept(alone), abs=2e-3)
    thresholds = [record["threshold"] for record in records(alone) if "threshold" in record]
    assert abs(learned) > 0.25 and thresholds[0] == pytest.approx(learned, abs=0.2)  # of a move in one step; untrained ones begin at 0
    first = [open_checkpoint(run / "checkpoints" / f"step-{step:08d}") for run, step in ((taught, 8), (alone, 4))]
    name = "model.model.layers.1.self_attn.context_pruning.query_key.weight"
    moved = (first[0].tensor(name) - first[1].tensor(name)).norm() / first[0].tensor(name).norm()
    assert moved < 0.2  # four steps; two seeds' draws of this weight differ by 1.4 of their norm
    fixed = [*overrides, "context_pruning.decisions=fixed", "context_pruning.distillation_weight=0.5", "logging.every=1"]
    held_alone = start(launch, recipe, "held_alone", 1, *fixed)
    held_3 = start(launch, recipe, "held_3", 2, *fixed, "deepspeed.zero_optimization.stage=3")
    assert losses(held_3) == pytest.approx(losses(held_alone), rel=2e-4)
    assert kept(held_3) == pytest.approx(kept(held_alone), abs=2e-3)
    assert kept(held_alone)[0] == pytest.approx(0.5, rel=0.03)  # found before the first step
    ends = [open_checkpoint(run / "checkpoints" / "step-00000008") for run in (held_alone, held_3)]
    assert torch.equal(ends[0].tensor(name), first[0].tensor(name)) and torch.equal(ends[1].tensor(name), first[0].tensor(name))
    adapter = "model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    assert all(end.tensor(adapter).norm() > 0 for end in ends)
    written = recipe.parent / "held_adapters"
    export(find_run(held_3), written, adapters=True)
    again = load_file(written / "context_pruning.safetensors")
    assert torch.equal(again["model.layers.1.self_attn.context_pruning.query_key.weight"], first[0].tensor(name))
    save_tiny_llama(recipe.parent / "other", seed=1)
    done = launch(
        "begun_elsewhere",
        1,
        launcher="python",
        arguments=[str(recipe), "run.name=elsewhere", f"model.pretrained={recipe.parent / 'other'}", *overrides],
        ok=False,
    )
    assert done.returncode == 2 and "context_pruning.start: " in done.stderr and "this model has other weights" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_goes_on_where_it_was_stopped(launch: Launch, recipe: Path) -> None:
    """Stopped at step 4 on two ranks at stage 2, gone on with on one at stage 3: the losses of the uninterrupted run."""
    whole = start(launch, recipe, "whole", 1)
    start(launch, recipe, "parts", 2, "run.stop_at_step=4", "deepspeed.zero_optimization.stage=2")
    parts = start(launch, recipe, "parts", 1, "deepspeed.zero_optimization.stage=3")
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-4)
    assert kept(parts) == pytest.approx(kept(whole), abs=2e-3)
    states = [json.loads((run / "checkpoints" / "step-00000008" / "manifest.json").read_text())["state"] for run in (whole, parts)]
    assert states[0]["context_pruning"]["threshold"] == pytest.approx(states[1]["context_pruning"]["threshold"], rel=1e-3)


def test_our_own_network_learns_to_prune(launch: Launch, workplace: Path) -> None:
    """With the sparsity weight of the paper instead of a target, at two stages."""
    found = []
    for stage, ranks in ((0, 1), (3, 2)):
        name = f"pruned_{stage}"
        launch(
            name,
            ranks,
            "model.block=pre_norm",
            "context_pruning={rank: 6, bias: 1.5, window: 2, sparsity_weight: 3.0}",
            "training.activation_checkpointing=true",
            f"deepspeed.zero_optimization.stage={stage}",
            launcher="torchrun" if ranks > 1 else "python",
        )
        found.append(workplace / "runs" / name)
    assert losses(found[1]) == pytest.approx(losses(found[0]), rel=2e-4)
    shares = [record["kept_share_soft"] for record in records(found[0]) if "kept_share_soft" in record]
    assert shares[-1] < 0.9 * shares[0]
