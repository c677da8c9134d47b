"""Real launches of train.py on CPU ranks: what the tests of this folder start and read."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds a launch may take before it counts as hung


def write_corpus(folder: Path) -> Path:
    """Short documents of a small invented language."""
    chooser = random.Random(0)
    words = ["".join(chooser.choices("abcdefghijklmnop", k=chooser.randint(2, 7))) for _ in range(300)]
    path = folder / "corpus.jsonl"
    with open(path, "w") as file:
        for _ in range(1500):
            file.write(json.dumps({"text": " ".join(chooser.choices(words, k=chooser.randint(5, 30))) + ".\n"}) + "\n")
    return path


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and a recipe of 8 steps that every test of the session shares."""
    folder = tmp_path_factory.mktemp("workplace")
    recipe = {
        # a width, head count and vocabulary for which most tensors do not divide by 2 or 3 ranks
        "run": {"folder": str(folder / "runs")},
        "model": {"width": 36, "depth": 2, "heads": 2, "mlp_width": 75, "block": "outlier_protected"},
        "data": {
            "source": "files",
            "paths": [str(write_corpus(folder))],
            "validation_fraction": 0.1,
            "prepared": str(folder / "prepared"),
            "tokenizer": {"vocab_size": 401},
        },
        "training": {"tokens": 8 * 768, "tokens_per_step": 768, "micro_batch_size": 2, "sequence_length": 64, "precision": "fp32"},
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {"every": 4, "tokens": 960},
        "checkpoint": {"every": 4},
        "logging": {"every": 1, "tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def launch(workplace: Path) -> Launch:
    """launch(name, ranks, *overrides, launcher="torchrun", ok=True): train.py in processes of its own."""

    def start(
        name: str, ranks: int, *overrides: str, launcher: str = "torchrun", arguments: list[str] | None = None, ok: bool = True
    ) -> subprocess.CompletedProcess:
        commands = {
            "torchrun": ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", "train.py"],
            "deepspeed": [
                "-m",
                "deepspeed.launcher.runner",
                f"--num_accelerators={ranks}",
                f"--master_port={20000 + os.getpid() % 20000}",
                "train.py",
            ],
            "python": ["train.py"],
        }
        rest = arguments if arguments is not None else [str(workplace / "recipe.yaml"), f"run.name={name}", *overrides]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
        done = subprocess.run(
            [sys.executable, *commands[launcher], *rest], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        if ok:
            assert done.returncode == 0, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    return start


def records(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, in order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; after a resume the later record of a step counts."""
    return {record["step"]: record["loss"] for record in records(run) if "loss" in record}
