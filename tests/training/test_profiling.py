"""The profile of a step: both files, and a sum over kinds that is the sum of what was recorded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from training.profiling import kind_of, profiled


def test_a_step_that_is_asked_for_is_recorded_and_no_other(tmp_path: Path) -> None:
    a = torch.randn(300, 300)
    with profiled(tmp_path / "profile", 3, wanted=False):
        torch.mm(a, a)
    assert not (tmp_path / "profile").exists()
    with profiled(tmp_path / "profile", 4, wanted=True):
        for _ in range(20):
            torch.nn.functional.gelu(a @ a)
    with gzip.open(tmp_path / "profile" / "step-00000004.json.gz") as file:
        trace = json.loads(file.read())
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 20
    lines = (tmp_path / "profile" / "step-00000004.txt").read_text().splitlines()
    assert len(lines) < 30 and lines[0].startswith("step 4: ")
    kinds = {line[:20].strip(): float(line.split(" ms")[0].split()[-1]) for line in lines[2 : lines.index("", 2)]}
    assert sum(kinds.values()) == pytest.approx(float(lines[0].split()[2]), abs=0.1 * len(kinds))
    assert max(kinds, key=lambda kind: kinds[kind]) == "matrix products"
    assert any(line.startswith("aten::mm") and line.split()[-1] == "20" for line in lines)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("c10d::allreduce_", "communication"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_log_softmax", "loss"),
        ("aten::copy_", "copies"),
        ("aten::gelu_backward", "elementwise"),
        ("cudaLaunchKernel", "everything else"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
