"""The benchmark's own arithmetic: what its bound counts, when it ends, and what it says of a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from scripts import benchmark
from scripts.benchmark import Bench, is_time_up, products_and_attention, table_line, visible_alone
from training.plan import count_parameters, flops_per_token

CPU = torch.device("cpu")


@pytest.mark.parametrize("fields", [{}, {"activation": "swiglu", "kv_heads": 2}])
def test_the_bound_does_a_steps_products_and_attention(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's flop counter over one of its steps, against the formula: with chunks of the loss that divide, all FLOPs are there."""
    config = ModelConfig(width=64, depth=3, heads=4, vocab_size=512, sequence_length=32, **fields)
    monkeypatch.setitem(benchmark.chunk_rows.__globals__["CHUNK_ELEMENTS"], "cpu", 16 * 512)
    counted = []

    class Small:
        arguments, device, vocabulary, length, micro_batch = argparse.Namespace(precision="fp32"), CPU, 512, 32, 2

        def timed(self, step: Any) -> list[float]:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                step(0)
            counted.append(counter.get_total_flops())
            return [1.0]

    small = Small()
    small.config = config  # pyright: ignore[reportAttributeAccessIssue]
    assert products_and_attention(cast(Bench, small)) == [1.0]
    assert counted == [2 * 32 * flops_per_token(config, count_parameters(config), 32)]


def test_no_round_begins_that_would_end_too_late() -> None:
    assert not is_time_up(10_000, None, CPU)
    assert not is_time_up(539, 540, CPU) and is_time_up(541, 540, CPU)


def test_a_peer_sees_one_gpu() -> None:
    assert [visible_alone(index, None) for index in (0, 3)] == ["0", "3"]
    assert [visible_alone(index, "4, 5,GPU-1f") for index in (0, 1, 2)] == ["4", "5", "GPU-1f"]


def test_a_peers_memory_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own says what it took; this one's GPU memory does not know."""
    said = '{"seconds": [0.5], "peak_memory_bytes": 3000000000}'
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *a, **k: argparse.Namespace(returncode=0, stdout=f"noise\n{said}\n"))

    class Small:
        config = ModelConfig(width=64, depth=3, heads=4, vocab_size=512, sequence_length=32)
        arguments, device = argparse.Namespace(precision="fp32", clock="wall"), torch.device("cuda", 0)
        vocabulary, length, micro_batch, steps, compiled = 512, 32, 2, 1, False
        memory: ClassVar[dict[str, int]] = {}

    assert benchmark.peer(cast(Bench, Small()), "hf_trainer", str(Path("python"))) == [0.5]
    assert Small.memory == {"hf_trainer": 3_000_000_000}


def test_a_line_of_the_table_has_what_was_measured() -> None:
    row = {"tokens_per_second": 12345.6, "over_litgpt": 1.25, "mfu": 0.456, "peak_memory_bytes": 12_340_000_000}
    line = table_line("pre_norm", row, "litgpt")
    assert all(part in line for part in ("12,346 tokens/s", "1.250 of litgpt", "MFU 45.6%", "12.3 GB"))
    assert "MFU" not in table_line("pre_norm", {"tokens_per_second": 1.0}, None)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark whose subjects say what they take, and one of which finds no memory."""

    def refuses() -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    subjects = {"pre_norm": lambda: [2.0, 4.0, 3.0], "shaped": refuses, "sam": lambda: [1.0]}
    config = ModelConfig(width=64, depth=3, heads=4, vocab_size=512, sequence_length=32)
    monkeypatch.setattr(benchmark, "choose", lambda *ignored: (dict(subjects), {"litgpt": "not here"}))
    monkeypatch.setattr(benchmark, "ceiling", lambda bench: 1.0)
    monkeypatch.setattr(benchmark, "summarise", lambda bench, seconds, *rest: {"subjects": {}, "best_peer": None, "seconds": dict(seconds)})
    monkeypatch.setattr(benchmark.dist, "barrier", lambda: None)
    return argparse.Namespace(
        arguments=argparse.Namespace(rounds=2), device=CPU, ranks=argparse.Namespace(is_first=True, world_size=1), config=config, length=32,
        tokens_per_step=64, size="17m",
    )  # fmt: skip


def test_a_subject_without_memory_or_time_is_named_and_the_others_are_measured(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "benchmark_picture", lambda *ignored: None)
    benchmark.in_rounds(bench, None, tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["seconds"] == {"pre_norm": [3.0, 3.0], "sam": [1.0, 1.0]}
    assert "shaped: not run: out of memory" in capsys.readouterr().out
    benchmark.in_rounds(bench, -1.0, tmp_path / "no_time.json")
    assert json.loads((tmp_path / "no_time.json").read_text())["seconds"] == {"pre_norm": [3.0]}
    said = capsys.readouterr().out
    assert "sam: not run: --minutes left no time for it" in said and "litgpt: not run: not here" in said
    bench.ranks.world_size = 2  # the other rank would wait
    with pytest.raises(torch.OutOfMemoryError):
        benchmark.in_rounds(bench, None, None)
