"""Whole launches of train.py on several CPU ranks: stages agree, ranks agree, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analysis.shards import open_checkpoint
from model.activation_statistics import watch_residuals
from model.parametrization import initialize
from model.transformer import IGNORED_TARGET, Transformer
from tests.distributed.conftest import LIMIT, ROOT, Launch, losses, records
from training.data import Sequences, open_prepared
from training.recipe import model_config
from training.recipe_file import load_recipe

pytestmark = pytest.mark.distributed
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def full_runs(launch: Launch, workplace: Path) -> dict[int, Path]:
    """An uninterrupted run of 8 steps on 2 ranks at each stage, checkpoints at 0, 4 and 8."""
    for stage in STAGES:
        launch(f"stage{stage}", 2, f"deepspeed.zero_optimization.stage={stage}", "checkpoint.first=true")
    return {stage: workplace / "runs" / f"stage{stage}" for stage in STAGES}


def test_stages_agree(full_runs: dict[int, Path]) -> None:
    """The same losses at every stage, to float32 rounding, and they fall."""
    reference = losses(full_runs[0])
    assert sorted(reference) == list(range(1, 9))
    assert reference[8] < reference[1] - 0.2
    for stage in STAGES[1:]:
        assert losses(full_runs[stage]) == pytest.approx(reference, rel=2e-6), f"stage {stage}"
        assert validation(full_runs[stage]) == pytest.approx(validation(full_runs[0]), rel=2e-6)


def validation(run: Path) -> list[float]:
    return [record["validation_loss"] for record in records(run) if "validation_loss" in record]


def test_ranks_and_micro_batches_agree(full_runs: dict[int, Path], launch: Launch, workplace: Path) -> None:
    """One rank, three ranks, another split into micro-batches: the losses of two ranks, to float32 rounding.

    The 15 validation sequences do not divide by ranks or micro-batches.
    """
    reference = losses(full_runs[2])
    launch("one", 1, launcher="python")
    launch("three", 3)
    launch("larger", 1, "training.micro_batch_size=6", launcher="python")
    for name in ("one", "three", "larger"):
        assert losses(workplace / "runs" / name) == pytest.approx(reference, rel=2e-6), name
        assert validation(workplace / "runs" / name) == pytest.approx(validation(full_runs[2]), rel=2e-6), name


def activations(run: Path) -> dict[int, dict]:
    return {record["step"]: record["activations"] for record in records(run) if "activations" in record}


def test_outliers_are_of_all_ranks_and_micro_batches(full_runs: dict[int, Path], launch: Launch, workplace: Path) -> None:
    """The measures of two ranks by two micro-batches, at stages 0 and 3, are those of one rank and of this process in one batch."""
    launch("watched", 1, "logging.outliers_every=3", launcher="python")
    reference = activations(workplace / "runs" / "watched")
    assert sorted(reference) == [0, 3, 6, 7]
    launch("watched_3", 2, "logging.outliers_every=3", "deepspeed.zero_optimization.stage=3", "training.activation_checkpointing=true")
    for name in ("watched_3", "stage0"):
        found = activations(workplace / "runs" / name)
        for step in sorted(found):
            for place, measures in found[step].items():
                assert measures == pytest.approx(reference[step][place], rel=1e-4), (name, step, place)
    recipe = load_recipe(workplace / "runs" / "watched" / "recipe.yaml").recipe
    data = open_prepared(json.loads((workplace / "runs" / "watched" / "data.json").read_text())["prepared"])
    batch = Sequences(data, "train", 64, seed=recipe.run.seed, shuffle=True, document_masks=False).batch(0, 12)
    model = Transformer(model_config(recipe, data.vocab_size))
    initialize(model, recipe.run.seed)
    with watch_residuals(model) as moments, torch.no_grad():
        model(batch.tokens)
    assert list(reference[0]) == list(moments) == ["layer 0", "layer 1", "unembedding"]
    for place, sums in moments.items():
        assert sums.sums[0] == 768
        assert reference[0][place] == pytest.approx(sums.measures(), rel=1e-5)


def test_ragged_documents_do_not_depend_on_the_split(launch: Launch, workplace: Path) -> None:
    """With document masks the valid targets differ from micro-batch to micro-batch; the loss is still the mean over all of them."""
    for name, ranks, size in (("masked_a", 1, 1), ("masked_b", 2, 3)):
        launch(name, ranks, "data.document_masks=true", f"training.micro_batch_size={size}", "training.tokens=2304")
    a, b = losses(workplace / "runs" / "masked_a"), losses(workplace / "runs" / "masked_b")
    assert len(a) == 3 and a == pytest.approx(b, rel=2e-6)
    # the first step again, in this process, in one batch
    recipe = load_recipe(workplace / "runs" / "masked_a" / "recipe.yaml").recipe
    data = open_prepared(json.loads((workplace / "runs" / "masked_a" / "data.json").read_text())["prepared"])
    batch = Sequences(data, "train", 64, seed=recipe.run.seed, shuffle=True, document_masks=True).batch(0, 12)
    model = Transformer(model_config(recipe, data.vocab_size))
    initialize(model, recipe.run.seed)
    valid = int((batch.targets != IGNORED_TARGET).sum())
    assert valid < 768
    assert a[1] == pytest.approx(model(batch.tokens, batch.targets, batch.document_ids).item() / valid, rel=2e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_exact(stage: int, full_runs: dict[int, Path], launch: Launch, workplace: Path) -> None:
    """4 steps, a new launch, 4 more: the same losses, weights and optimizer state as 8 in one go, to the last bit."""
    name = f"resumed{stage}"
    override = f"deepspeed.zero_optimization.stage={stage}"
    launch(name, 2, override, "run.stop_at_step=4")
    run, reference = workplace / "runs" / name, full_runs[stage]
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000004"]
    launch(name, 2, arguments=["--resume", str(run), "run.stop_at_step=null"])
    assert losses(run) == losses(reference)
    assert_equal_bits(reference / "checkpoints" / "step-00000008", run / "checkpoints" / "step-00000008")


def assert_equal_bits(expected: Path, found: Path) -> None:
    """Master weights and both Adam moments of every tensor, bit for bit (ZeRO-3's padding, which nobody writes, left out)."""
    first, second = open_checkpoint(expected), open_checkpoint(found)
    assert first.names() == second.names() and len(first.names()) > 10
    for name in first.names():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            a, b = first.tensor(name, kind), second.tensor(name, kind)
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)), (name, kind)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.shapes}


def test_initial_weights_do_not_depend_on_ranks_or_stage(full_runs: dict[int, Path], launch: Launch, workplace: Path) -> None:
    """Step 0 at every stage on two ranks, and on one and three: the same bits; of another seed others, of the data alone the same."""
    launch("start_one", 1, "run.stop_at_step=1", "checkpoint.first=true", launcher="python")
    launch("start_three", 3, "run.stop_at_step=1", "checkpoint.first=true", "deepspeed.zero_optimization.stage=3")
    launch("start_seed", 1, "run.stop_at_step=1", "checkpoint.first=true", "run.seed=1", launcher="python")
    launch("start_order", 1, "run.stop_at_step=1", "checkpoint.first=true", "data.seed=1", launcher="python")
    folders = [run / "checkpoints" / "step-00000000" for run in full_runs.values()]
    folders += [workplace / "runs" / name / "checkpoints" / "step-00000000" for name in ("start_one", "start_three", "start_order")]
    reference = tensors_of(folders[0])
    for folder in folders[1:]:
        other = tensors_of(folder)
        assert reference.keys() == other.keys()
        for name, tensor in reference.items():
            assert torch.equal(tensor, other[name]), (folder, name)
    seeded = tensors_of(workplace / "runs" / "start_seed" / "checkpoints" / "step-00000000")
    assert not torch.equal(reference["embedding.weight"], seeded["embedding.weight"])
    assert losses(workplace / "runs" / "start_order")[1] != losses(workplace / "runs" / "start_one")[1]


def test_the_same_launch_again_goes_on_by_itself(full_runs: dict[int, Path], launch: Launch, workplace: Path) -> None:
    """A launch of a finished run says so; one whose last checkpoint is gone goes on from the one before."""
    run = workplace / "runs" / "again"
    shutil.copytree(full_runs[2], run)
    assert "complete at step 8" in launch("again", 2, "deepspeed.zero_optimization.stage=2").stdout
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    assert "from step 4" in launch("again", 2, "deepspeed.zero_optimization.stage=2").stdout
    assert losses(run) == losses(full_runs[2])


def test_run_folder_is_complete(full_runs: dict[int, Path]) -> None:
    run = full_runs[3]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["world_size"] == 2
    manifest = json.loads((run / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert manifest["step"] == 8 and manifest["tokens"] == 8 * 768
    assert {p.name for p in (run / "checkpoints" / "step-00000008").iterdir()} == {*manifest["files"], "manifest.json"}
    assert (run / "tokenizer" / "tokenizer.model").exists()
    assert "stage: 3  # command line" in (run / "recipe.yaml").read_text()
    last = [r for r in records(run) if "loss" in r][-1]
    assert last["tokens_per_second"] > 0 and last["peak_memory_bytes"] > 0 and "mfu" not in last


@pytest.mark.parametrize("launcher", ["deepspeed", "python"])
def test_other_launchers(launcher: str, launch: Launch, workplace: Path) -> None:
    """The deepspeed launcher (which appends --local_rank) and plain python; bf16 and a learning-rate schedule of its own."""
    name = f"launcher_{launcher}"
    ranks = 2 if launcher == "deepspeed" else 1
    launch(name, ranks, "training.precision=bf16", "optimizer.schedule=warmup_stable_decay", "training.tokens=2304", launcher=launcher)
    assert len(losses(workplace / "runs" / name)) == 3


def test_activation_checkpointing_and_offload(full_runs: dict[int, Path], launch: Launch, workplace: Path) -> None:
    """Recomputed activations under ZeRO-3, and DeepSpeed's offload keys passed through: the same losses."""
    launch("checkpointed", 2, "deepspeed.zero_optimization.stage=3", "training.activation_checkpointing=true")
    launch("offloaded", 2, "deepspeed.zero_optimization={stage: 2, offload_optimizer: {device: cpu}}")
    for name in ("checkpointed", "offloaded"):
        assert losses(workplace / "runs" / name) == pytest.approx(losses(full_runs[0]), rel=2e-6), name


def test_old_checkpoints_are_removed_on_request(launch: Launch, workplace: Path) -> None:
    launch("kept", 1, "checkpoint={every: 1, keep_last: 2, keep_every: 3, first: true}", launcher="python")
    kept = [p.name for p in sorted((workplace / "runs" / "kept" / "checkpoints").iterdir()) if p.is_dir()]
    assert kept == [f"step-{step:08d}" for step in (0, 3, 6, 7, 8)]


def test_a_run_goes_on_with_the_tokens_it_began_with(launch: Launch, workplace: Path) -> None:
    """The source has changed: the prepared folder is used as it was. That folder is gone too: the launch is refused."""
    prepared = workplace / "prepared_once"
    corpus = workplace / "changing.jsonl"
    shutil.copy(workplace / "corpus.jsonl", corpus)
    overrides = [f"data.paths=[{corpus}]", f"data.prepared={prepared}"]
    launch("changing", 1, *overrides, "run.stop_at_step=4", launcher="python")
    launch("unchanged", 1, *overrides, launcher="python")
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "another document " * 50}) + "\n")
    launch("changing", 1, *overrides, launcher="python")
    assert losses(workplace / "runs" / "changing") == losses(workplace / "runs" / "unchanged")
    shutil.rmtree(prepared)
    shutil.rmtree(workplace / "runs" / "changing" / "checkpoints" / "step-00000008")
    done = launch("changing", 1, *overrides, launcher="python", ok=False)
    assert done.returncode == 2 and "has changed since" in done.stderr


def test_the_analysis_reads_what_training_left(full_runs: dict[int, Path], workplace: Path, tmp_path: Path) -> None:
    """The README's verbs on runs of different stages, on their own validation text and on a file: JSON, pictures, one page."""
    text = tmp_path / "my_text.txt"
    text.write_text("abc def " * 500)

    def analysis(*words: str) -> None:
        done = subprocess.run([sys.executable, "-m", "analysis", *words], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stderr[-3000:]

    run = str(full_runs[3])
    analysis("trajectory", run, "--out", str(tmp_path))
    analysis("outliers", run, "--out", str(tmp_path), "--data", str(text))
    analysis("report", str(full_runs[1]), run, "--out", str(tmp_path / "compared"))
    assert (tmp_path / "compared" / "overview.png").stat().st_size > 10_000
    page = (tmp_path / "compared" / "report.html").read_text()
    assert "stage1" in page and "stage3" in page
    # two stages of the same training: the same path and the same kurtosis, read from differently laid out shards
    for verb in ("trajectory", "outliers"):
        first, second = (json.loads((tmp_path / "compared" / f"stage{stage}" / f"{verb}.json").read_text()) for stage in (1, 3))
        assert numbers(first) == pytest.approx(numbers(second), rel=1e-3, abs=1e-6)
        assert len(numbers(first)) > 20


def numbers(value: object) -> list[float]:
    """All numbers of nested JSON, in order, but for the stage."""
    if isinstance(value, dict):
        return [n for key, inner in value.items() if key != "zero_stage" for n in numbers(inner)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_data_can_be_prepared_before(workplace: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.prepare_data", str(workplace / "recipe.yaml"), f"data.prepared={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/manifest.json"))) == 1
