"""Checkpoints for another number of ranks: laid out as DeepSpeed lays them out, and DeepSpeed goes on from them as if nothing were."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.__main__ import main
from analysis.files import StandIn, load_file
from analysis.shards import open_checkpoint

WORKER = Path(__file__).with_name("resharding_worker.py")
LAYOUTS = ["stage1-bf16-optimizer", "stage2-round-robin", "stage2-alignment", "stage3-sub-groups"]


def launch(folder: Path, ranks: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    running = []
    for rank in range(ranks):
        log = open(folder / f"rank-{rank}.log", "w")  # noqa: SIM115  # the process keeps it
        command = [sys.executable, str(WORKER), str(folder), str(rank), str(ranks), str(port), *LAYOUTS]
        running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * ranks, "\n".join((folder / f"rank-{rank}.log").read_text()[-2000:] for rank in range(ranks))


@pytest.mark.distributed
def test_deepspeed_goes_on_at_another_number_of_ranks(tmp_path):
    """Two ranks take four steps. Three ranks, and one, take the last two from what was exported after the second."""
    (tmp_path / "2").mkdir()
    launch(tmp_path / "2", 2)
    for ranks in (3, 1):
        folder = tmp_path / str(ranks)
        for layout in LAYOUTS:
            source = tmp_path / "2" / layout / "step-00000002"
            assert main(["export", str(source), "--ranks", str(ranks), "--out", str(folder / layout)]) == 0
        launch(folder, ranks)
        for layout in LAYOUTS:
            truth, found = (torch.load(tmp_path / name / layout / "weights.pt") for name in ("2", str(ranks)))
            start = open_checkpoint(tmp_path / "2" / layout / "step-00000002")
            moved = max(float((truth[name] - start.tensor(name)).abs().max()) for name in truth)
            apart = max(float((truth[name] - found[name]).abs().max()) for name in truth)
            # bf16 gradients are added up in another order: up to 2^-8 of a gradient, and Adam divides by its length
            assert apart < moved * (0.05 if "bf16" in layout else 2e-5), (layout, ranks, apart, moved)


def same_but_for_values(found: Any, expected: Any, where: str = "") -> None:
    """The same keys, shapes, dtypes and plain values; tensors may hold other numbers."""
    assert isinstance(found, dict if isinstance(expected, dict) else type(expected)), where
    if isinstance(found, torch.Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), where
        assert found.untyped_storage().nbytes() <= expected.untyped_storage().nbytes(), where
    elif isinstance(found, dict):
        assert list(found) == list(expected), where
        for key, value in found.items():
            same_but_for_values(value, expected[key], f"{where}.{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            same_but_for_values(a, b, f"{where}[{i}]")
    elif isinstance(found, StandIn):
        assert vars(found) == vars(expected), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("layout", ["stage1-bf16-optimizer", "stage1-fp32", "stage2-bf16", "stage2-alignment", "stage3-bf16"])
def test_the_files_are_those_that_deepspeed_writes(deepspeed_checkpoints, tmp_path, layout):
    """What two ranks wrote, exported for three, has the keys, shapes, paddings and mappings of what three ranks wrote."""
    two, three = (deepspeed_checkpoints / ranks / layout / "step-00000002" for ranks in ("2", "3"))
    assert main(["export", str(two), "--ranks", "3", "--out", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / "step-00000002"
    assert (tmp_path / "out" / "latest").read_text() == "step-00000002"
    assert sorted(p.name for p in written.iterdir()) == sorted(p.name for p in three.iterdir())
    for path in written.iterdir():
        found, expected = load_file(path), load_file(three / path.name)
        for content in (found, expected):
            content.pop("global_samples", None)
            content.pop("shared_params", None)  # DeepSpeed's other ranks list none; here all have the first's
        same_but_for_values(found, expected, path.name)


@pytest.mark.parametrize("layout", ["stage0-bf16", "stage2-round-robin", "stage3-sub-groups"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_there_and_back_again_is_the_same(deepspeed_checkpoints, tmp_path, layout, ranks):
    source = deepspeed_checkpoints / "3" / layout / "step-00000002"
    assert main(["export", str(source), "--ranks", str(ranks), "--out", str(tmp_path / "there")]) == 0
    assert main(["export", str(tmp_path / "there" / "step-00000002"), "--ranks", "3", "--out", str(tmp_path / "back")]) == 0
    there, back, first = (open_checkpoint(p) for p in (tmp_path / "there/step-00000002", tmp_path / "back/step-00000002", source))
    assert there.world_size == ranks and there.step == 2
    for name in first.shapes:
        assert torch.equal(there.tensor(name), first.tensor(name)) and torch.equal(back.tensor(name), first.tensor(name))
    if first.zero_stage:
        for rank in range(3):
            name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            found, expected = load_file(back.path / name)["optimizer_state_dict"], load_file(source / name)["optimizer_state_dict"]
            if layout == "stage2-round-robin":  # there DeepSpeed's own mapping is wrong
                assert found.pop("param_slice_mappings") and expected.pop("param_slice_mappings")
            same_but_for_values(found, expected, name)


def test_a_run_of_ours_keeps_its_manifest(deepspeed_checkpoints, tmp_path, capsys):
    """model_config.json and the random states come along, and the new manifest fits the new files."""
    import hashlib
    import json

    source = tmp_path / "run" / "step-00000002"
    shutil.copytree(deepspeed_checkpoints / "2" / "stage2-fp32" / "step-00000002", source)
    (source / "model_config.json").write_text("{}")
    for rank in range(2):
        torch.save({"rank": rank}, source / f"random_state_rank_{rank:05d}.pt")
    files = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in source.iterdir() if p.is_file()
    }
    (source / "manifest.json").write_text(json.dumps({"step": 2, "tokens": 128, "world_size": 2, "files": files}))
    assert main(["export", str(source), "--ranks", "3", "--out", str(tmp_path / "out")]) == 0
    new = open_checkpoint(tmp_path / "out" / "step-00000002")
    new.verify()
    assert new.manifest["world_size"] == 3 and new.manifest["tokens"] == 128
    assert [torch.load(new.path / f"random_state_rank_{rank:05d}.pt")["rank"] for rank in range(3)] == [0, 1, 0]
    assert (new.path / "model_config.json").read_text() == "{}"
    assert set(new.manifest["files"]) == {p.name for p in new.path.iterdir()} - {"manifest.json"}
    capsys.readouterr()
    assert main(["inspect", str(new.path)]) == 0


def test_what_is_refused(deepspeed_checkpoints, tmp_path, capsys):
    source = deepspeed_checkpoints / "2" / "stage3-bf16" / "step-00000002"
    (tmp_path / "there").mkdir()
    weights = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(3)}, weights)
    for arguments, message in (
        ([str(source), "--ranks", "0", "--out", str(tmp_path / "new")], "--ranks 0: expected at least 1"),
        ([str(source), "--ranks", "3", "--out", str(tmp_path / "there")], "exists already"),
        ([str(weights), "--ranks", "3", "--out", str(tmp_path / "new")], "is for DeepSpeed's own checkpoints, and this is torch"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["there", "weights.pt"]


def test_there_is_no_bar_where_there_is_nothing_to_cut(run_folder, tmp_path, capsys):
    """At ZeRO 0 the optimizer is in the model's file."""
    assert main(["export", str(run_folder), "--ranks", "2", "--out", str(tmp_path / "out")]) == 0
    assert "reshard" not in capsys.readouterr().err
