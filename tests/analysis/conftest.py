"""Real DeepSpeed checkpoints, made once a test session; and a run folder as train.py leaves it, made by hand."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.parametrization import initialize
from model.transformer import Transformer

SCRIPT = Path(__file__).with_name("make_checkpoints.py")
LAYOUTS = re.findall(r'^    "(stage[\w-]+)"', SCRIPT.read_text(), re.MULTILINE)


WORLD_SIZES = {1: ["stage1-bf16-optimizer", "stage2-fp32", "stage3-bf16"], 2: LAYOUTS, 3: LAYOUTS, 4: ["stage2-bf16", "stage3-sub-groups"]}
ZOO = [(world_size, layout) for world_size, layouts in WORLD_SIZES.items() for layout in layouts]


def make(folder: Path, world_size: int) -> None:
    """Run the script on that many ranks, each guarded by a timeout."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder.with_name(f"{folder.name}-rank-{rank}.log") for rank in range(world_size)]
    command = [sys.executable, str(SCRIPT), str(folder)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            arguments = [*command, str(rank), str(world_size), str(port), *WORLD_SIZES[world_size]]
            ranks.append(subprocess.Popen(arguments, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world_size, "\n".join(log.read_text()[-2000:] for log in logs)


@pytest.fixture(scope="session")
def deepspeed_checkpoints(tmp_path_factory) -> Path:
    """FOLDER/WORLD_SIZE/LAYOUT/: a DeepSpeed save folder with two steps, and truth-1.pt and truth-2.pt. Do not write into it."""
    folder = tmp_path_factory.mktemp("deepspeed")
    for world_size in WORLD_SIZES:
        make(folder / str(world_size), world_size)
    return folder


@pytest.fixture(scope="session")
def universal_checkpoints(deepspeed_checkpoints: Path) -> Path:
    """FOLDER/LAYOUT/: what DeepSpeed's own ds_to_universal makes of step 2 on two ranks."""
    folder = deepspeed_checkpoints / "universal"
    code = (
        "import sys\nfrom types import SimpleNamespace\nfrom deepspeed.checkpoint.ds_to_universal import main\n"
        "for layout in sys.argv[3:]:\n"
        "    main(SimpleNamespace(input_folder=f'{sys.argv[1]}/{layout}/step-00000002', output_folder=f'{sys.argv[2]}/{layout}',\n"
        "        num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True))"
    )
    command = [sys.executable, "-c", code, str(deepspeed_checkpoints / "2"), str(folder), *UNIVERSAL]
    done = subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


UNIVERSAL = ("stage1-bf16-optimizer", "stage2-bf16", "stage2-round-robin", "stage2-alignment", "stage3-bf16")
CONFIG = ModelConfig(width=16, depth=2, heads=2, vocab_size=64, sequence_length=16)


def write_checkpoint(folder: Path, model: Transformer, step: int) -> None:
    """A ZeRO-0 checkpoint as train.py leaves it, with a manifest."""
    import hashlib

    folder.mkdir(parents=True)
    state = {
        "module": model.state_dict(),
        "buffer_names": [],
        "global_steps": step,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "optimizer": None,
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    (folder / "model_config.json").write_text(json.dumps(model.config.to_dict()))
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
    manifest = {"format": 1, "step": step, "tokens": step * 64, "world_size": 1, "zero_stage": 0, "precision": "fp32", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """runs/toy with three steps, metrics and prepared data, small enough to make in every test."""
    run = tmp_path / "runs" / "toy"
    for step in (0, 10, 20):
        model = Transformer(CONFIG)
        initialize(model, seed=0)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                parameter += 0.001 * step * torch.empty(parameter.shape).normal_(generator=generator)
        write_checkpoint(run / "checkpoints" / f"step-{step:08d}", model, step)
    (run / "checkpoints" / ".writing-step-00000030").mkdir()
    prepared = tmp_path / "prepared" / "abc"
    prepared.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 200).astype("<u2")
    tokens[:120].tofile(prepared / "validation-00000.bin")
    tokens[120:].tofile(prepared / "validation-00001.bin")
    shards = [{"file": "validation-00000.bin", "tokens": 120}, {"file": "validation-00001.bin", "tokens": 80}]
    manifest = {
        "dtype": "uint16",
        "validation": {"tokens": 200, "shards": shards},
        "train": {"tokens": 1000},
        "documents": 7,
        "source": "files",
    }
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    (run / "data.json").write_text(json.dumps({"prepared": str(prepared), "validation_unigram_loss": 4.1}))
    (run / "recipe.yaml").write_text("model: {size: nano}\n")
    environment = {"command": "python train.py recipes/toy.yaml", "git_commit": "0123456789abcdef", "packages": {"torch": "2.13.0"}}
    (run / "environment.json").write_text(json.dumps(environment))
    records = [{"step": s, "tokens": s * 64, "loss": 4.2 - s / 50, "tokens_per_second": 100.0, "grad_norm": 1.0} for s in range(1, 21)]
    records += [{"step": 10, "tokens": 640, "validation_loss": 4.0}, {"step": 20, "tokens": 1280, "validation_loss": 3.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run
