"""What runs differently on a GPU: compiled blocks, the chunked loss, the engine's step, and what a step waits for."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.linear_cross_entropy import IGNORED_TARGET, linear_cross_entropy
from model.parametrization import initialize
from model.transformer import Transformer
from tests.distributed.conftest import LIMIT, ROOT, losses

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BLOCKS: dict[str, dict[str, Any]] = {
    "pre_norm": {},
    "swiglu, grouped queries": {"activation": "swiglu", "kv_heads": 2},
    "outlier_protected": {"block": "outlier_protected"},
    "shaped": {"attention": "shaped"},
    "simplified": {"block": "simplified"},
    "simplified_parallel": {"block": "simplified_parallel"},
}


def gradients(model: Transformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_blocks_in_bf16_against_float32(name: str) -> None:
    """Both are bf16's rounding away from float32 on the CPU, which is what the compiler may not make worse."""
    model = Transformer(ModelConfig(width=128, depth=2, heads=4, vocab_size=512, sequence_length=320, init_std=0.06, **BLOCKS[name]))
    initialize(model, 0)
    tokens = torch.randint(512, (2, 301), generator=torch.Generator().manual_seed(0))
    true_loss, true = gradients(copy.deepcopy(model), tokens)

    def distance(is_compiled: bool) -> tuple[float, float]:
        torch._dynamo.reset()
        narrow = copy.deepcopy(model).to(DEVICE, torch.bfloat16)
        if is_compiled:
            for block in narrow.blocks:
                block.compile()
            narrow.unembedding.compiled = True
        loss, found = gradients(narrow, tokens.to(DEVICE))
        square = sum(float((found[n].cpu() - true[n]).square().sum()) for n in true)
        return abs(float(loss) - float(true_loss)) / float(true_loss), (square / sum(float(g.square().sum()) for g in true.values())) ** 0.5

    eager, compiled = distance(False), distance(True)
    assert eager[0] < 0.01 and compiled[0] < 0.01
    assert eager[1] < 0.1 and compiled[1] < max(0.05, 1.5 * eager[1])


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_chunked_loss(dtype: torch.dtype, tolerance: float, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_cross_entropy.__globals__["CHUNK_ELEMENTS"], DEVICE, 100 * 1000)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 111, 64, generator=generator), 0.1 * torch.randn(1000, 64, generator=generator)
    targets = torch.randint(1000, (3, 111), generator=generator)
    targets[:, ::7] = IGNORED_TARGET

    def run(device: str, kind: torch.dtype, chunked: bool) -> list[Tensor]:
        h, w = (x.to(device, kind).detach().requires_grad_() for x in (hidden, weight))
        if chunked:
            loss = linear_cross_entropy(h, w, targets.to(device), None, is_compiled)
        else:
            loss = F.cross_entropy((h @ w.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
        loss.backward()
        assert h.grad is not None and w.grad is not None
        return [x.detach().double().cpu() for x in (loss, h.grad, w.grad)]

    for found, true in zip(run(DEVICE, dtype, True), run("cpu", torch.float64, False), strict=True):
        assert float((found - true).norm() / true.norm()) < tolerance


def run_of(workplace: Path, name: str, stage: int, environment: dict[str, str]) -> dict[int, float]:
    """Losses of eight steps of train.py in float32."""
    command = [sys.executable, "train.py", str(workplace / "recipe.yaml"), f"run.name={name}", f"deepspeed.zero_optimization.stage={stage}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    run = workplace / "runs" / name
    accelerator = json.loads((run / "environment.json").read_text())["hardware"]["accelerator"]
    assert (accelerator is None) == bool(environment)
    return losses(run)


@pytest.fixture(scope="module")
def of_a_cpu(workplace: Path) -> dict[int, float]:
    return run_of(workplace, "cpu", 2, {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_is_that_of_a_cpu(stage: int, workplace: Path, of_a_cpu: dict[int, float]) -> None:
    gpu = run_of(workplace, f"gpu_{stage}", stage, {})
    assert gpu.keys() == of_a_cpu.keys()
    assert max(abs(gpu[step] - of_a_cpu[step]) for step in gpu) < 2e-3


def test_a_micro_batch_is_not_waited_for(tmp_path: Path) -> None:
    """Forward and backward pass of the engine while PyTorch refuses every call that waits for the GPU, and synchronize is counted."""
    code = """
import json, sys, torch
from training.distributed import discover
from training.engine import Engine, start_distributed
from training.data import Batch
from training.recipe import Recipe, model_config
ranks = discover()
device = start_distributed(ranks)
recipe = Recipe.model_validate({
    "model": {"width": 64, "depth": 2, "heads": 4}, "data": {"tokenizer": {"vocab_size": 512}},
    "training": {"tokens": 1e6, "tokens_per_step": 1024, "micro_batch_size": 4, "sequence_length": 128, "precision": "bf16"},
    "deepspeed": {"zero_optimization": {"stage": 2}}})
engine = Engine(recipe, model_config(recipe, 512), 2, ranks, device)
tokens = torch.randint(512, (4, 128)).pin_memory()
waits, synchronize = [0], torch.cuda.synchronize
def counted(*arguments):
    waits[0] += 1
    synchronize(*arguments)
torch.cuda.synchronize = counted
for step in range(6):
    for micro_batch in range(2):
        if step > 3:
            torch.cuda.set_sync_debug_mode("error")
        before = waits[0]
        engine.accumulate(Batch(tokens, tokens, None), 1 / 1024)
        torch.cuda.set_sync_debug_mode("default")
        if step > 3 and waits[0] != before:
            sys.exit("a micro-batch waited for the GPU")
    engine.step(1e-3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
