"""Whole launches with something wrong: one clear message, exit code 2, no traceback, and nothing half-written."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.shards import open_checkpoint
from tests.distributed.conftest import ROOT, Launch, losses, records

pytestmark = pytest.mark.distributed


def assert_refused(done: subprocess.CompletedProcess, *expected: str) -> None:
    """Exit code 2, and an `error:` message with these words as all that matters on stderr."""
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    for words in expected:
        assert words in message, message


def assert_nothing_left(workplace: Path, name: str) -> None:
    """No run folder, and no half-prepared data."""
    assert not (workplace / "runs" / name).exists()
    assert not [p for p in (workplace / "prepared").glob("*/") if not (p / "manifest.json").exists()]


RECIPE_PROBLEMS = [
    (["model.blok=pre_norm"], "model.blok: unknown key; did you mean model.block?"),
    (["training.micro_batch_size=two"], "training.micro_batch_size: expected integer"),
    (["training.tokens_per_step=800"], "training.tokens_per_step"),
    (["model.sequence_length=32"], "64 is over the model's 32"),
]


@pytest.mark.parametrize(("overrides", "expected"), RECIPE_PROBLEMS)
def test_recipe(overrides: list[str], expected: str, launch: Launch, workplace: Path) -> None:
    assert_refused(launch("bad", 1, *overrides, launcher="python", ok=False), expected)
    assert_nothing_left(workplace, "bad")


def test_what_deepspeed_refuses_when_it_is_built(launch: Launch) -> None:
    zero = "deepspeed.zero_optimization={stage: 3, zero_quantized_weights: true}"
    done = launch("refused", 1, zero, launcher="python", ok=False)
    assert_refused(done, "DeepSpeed refuses its configuration (ValueError: ", "change what the recipe says in its deepspeed section")


def test_compiling_without_a_compiler(launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_refused(launch("compiled", 1, "training.compile=true", launcher="python", ok=False), "training.compile: needs a C++ compiler")
    assert_nothing_left(workplace, "compiled")


DATA_PROBLEMS = {
    "missing": (None, [], "missing.txt"),
    "empty": (b"", [], "the corpus is empty"),
    "small": (b"def f(x):\n    return x + 1\n" * 40, ["data.tokenizer.vocab_size=270"], "small"),
    "binary": (b"\x7fELF\x00\x01\x02" * 1000, [], "binary.txt"),
    "vocabulary": (b"a b c d e f g h i j\n" * 4000, ["data.tokenizer.vocab_size=30000"], "vocab_size"),
}


@pytest.mark.parametrize("kind", DATA_PROBLEMS)
def test_data(kind: str, launch: Launch, workplace: Path, tmp_path: Path) -> None:
    content, overrides, expected = DATA_PROBLEMS[kind]
    path = tmp_path / f"{kind}.txt"
    if content is not None:
        path.write_bytes(content)
    assert_refused(launch("bad", 1, f"data.paths=[{path}]", *overrides, launcher="python", ok=False), expected)
    assert_nothing_left(workplace, "bad")


def test_under_the_deepspeed_launcher(launch: Launch, workplace: Path) -> None:
    """Two ranks: still one message and exit code 2."""
    done = launch("bad", 2, "data.paths=[nowhere.txt]", launcher="deepspeed", ok=False)
    assert_refused(done, "nowhere.txt")
    assert done.stderr.count("error: ") + done.stderr.count("error (rank") == 1


@pytest.fixture(scope="module")
def half_run(launch: Launch, workplace: Path) -> Path:
    """A run stopped at step 4 of 8, with checkpoints at 2 and 4."""
    launch("half", 1, "run.stop_at_step=4", "checkpoint.every=2", launcher="python")
    return workplace / "runs" / "half"


def copy_of(half_run: Path, name: str) -> Path:
    return Path(shutil.copytree(half_run, half_run.with_name(name)))


def resume(launch: Launch, run: Path, ok: bool = False) -> subprocess.CompletedProcess:
    return launch("", 1, arguments=["--resume", str(run), "run.stop_at_step=null"], launcher="python", ok=ok)


def test_run_folder_in_use(half_run: Path, launch: Launch) -> None:
    with (half_run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(resume(launch, half_run), "in use by another launch")


def test_run_folder_of_another_recipe(half_run: Path, launch: Launch) -> None:
    before = (half_run / "recipe.yaml").read_text()
    done = launch("half", 1, "optimizer.learning_rate=0.5", launcher="python", ok=False)
    assert_refused(done, "made by another recipe", "optimizer.learning_rate: 0.003 there, 0.5 here")
    assert (half_run / "recipe.yaml").read_text() == before


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_checkpoint(damage: str, half_run: Path, launch: Launch) -> None:
    """It is named and passed over; the run goes on from the one before, and puts a whole one in its place."""
    run = copy_of(half_run, damage)
    newest = run / "checkpoints" / "step-00000004"
    shard = next(newest.glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[:-100])
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    done = resume(launch, run, ok=True)
    assert "warning: passed over step-00000004" in done.stderr and str(shard) in done.stderr and damage in done.stderr
    assert "from step 2," in done.stdout
    assert losses(run) == losses(copy_that_went_on(half_run, launch))
    open_checkpoint(newest).verify()


def copy_that_went_on(half_run: Path, launch: Launch) -> Path:
    run = half_run.with_name("went_on")
    if not run.exists():
        resume(launch, copy_of(half_run, "went_on"), ok=True)
    return run


def test_no_whole_checkpoint(half_run: Path, launch: Launch) -> None:
    """It does not begin again by itself."""
    run = copy_of(half_run, "none_whole")
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "manifest.json").write_text("{}")
    assert_refused(resume(launch, run), "no whole checkpoint", "step-00000002", "delete the damaged folders to begin again")
    assert not [r for r in records(run) if r["step"] > 4]


def test_damaged_data(launch: Launch, workplace: Path) -> None:
    launch("data_first", 1, "training.tokens=768", f"data.prepared={workplace / 'prepared_damaged'}", launcher="python")
    shard = next((workplace / "prepared_damaged").glob("*/train-00000.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    done = launch("data_second", 1, "training.tokens=768", f"data.prepared={workplace / 'prepared_damaged'}", launcher="python", ok=False)
    assert_refused(done, "train-00000.bin")


@pytest.mark.parametrize("beside", [False, True])
def test_disk_full_while_saving(beside: bool, half_run: Path, launch: Launch) -> None:
    """A file may grow to 100 KiB only, so the next checkpoint breaks off; the one before stays whole, and the run goes on from it."""
    run = copy_of(half_run, f"full_{beside}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "train.py", "--resume", str(run), "run.stop_at_step=null", f"checkpoint.asynchronous={beside}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, 100 * 1024)),
    )  # fmt: skip
    assert_refused(done, "a checkpoint could not be written", "step-00000004")
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir()) == ["step-00000002", "step-00000004"]
    resume(launch, run, ok=True)
    assert sorted(losses(run)) == list(range(1, 9))


def test_no_such_recipe_and_no_such_run(launch: Launch, tmp_path: Path) -> None:
    assert_refused(
        launch("", 1, arguments=["recipes/quickstart_pre_nor.yaml"], launcher="python", ok=False),
        "did you mean recipes/quickstart_pre_norm.yaml?",
    )
    assert_refused(launch("", 1, arguments=["--resume", str(tmp_path)], launcher="python", ok=False), "not a run folder")
    both = ["recipes/quickstart_pre_norm.yaml", "--resume", str(tmp_path)]
    assert_refused(launch("", 1, arguments=both, launcher="python", ok=False), "--resume brings its own recipe", "leave recipes/quickstart")
    assert_refused(launch("", 1, arguments=[], launcher="python", ok=False), "give a recipe")


def test_diverging_run_stops_and_names_the_place(launch: Launch, workplace: Path) -> None:
    """A learning rate of 1e30 makes weights overflow: steps are skipped and counted, and after three in a row the run stops."""
    done = launch(
        "diverged",
        1,
        "optimizer.learning_rate=1e30",
        "training.max_skipped_steps=3",
        "deepspeed.zero_optimization.stage=0",
        launcher="python",
        ok=False,
    )
    assert done.returncode == 1
    assert "(3 in a row): output of blocks." in done.stdout or "(3 in a row): output of" in done.stdout
    assert "stopped at step" in done.stderr and "max_skipped_steps" in done.stderr
    assert [r["skipped_steps"] for r in records(workplace / "runs" / "diverged") if "skipped_steps" in r][-1] == 3
    lines = (workplace / "runs" / "diverged" / "metrics.jsonl").read_text()
    assert "null" in lines and "NaN" not in lines and "Infinity" not in lines  # which JSON does not know
