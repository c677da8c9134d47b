"""What of checkpoints does not need ranks: finding, verifying, removing, and the random state."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from model.errors import InputError
from training.checkpoint import _random_state, _restore_random_state, checkpoints, read_manifest, remove_old, verify
from training.distributed import Ranks

ALONE = Ranks(0, 1, 0, 1)


def make_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_bytes(bytes([step % 256]) * 1000)
    digest = {"size": 1000, "sha256": hashlib.sha256(bytes([step % 256]) * 1000).hexdigest()}
    manifest = {"step": step, "tokens": step, "world_size": 1, "zero_stage": 2, "precision": "fp32", "files": {"shard.pt": digest}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_unfinished_folders_are_not_checkpoints(tmp_path: Path) -> None:
    for step in (10, 2, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / ".writing-step-00000200").mkdir()
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [2, 10, 100]


def test_verify_names_what_is_wrong_and_how_to_go_back(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    folder = make_checkpoint(tmp_path, 2)
    manifest = read_manifest(folder)
    verify(folder, manifest, ALONE)
    shard = folder / "shard.pt"
    shard.write_bytes(b"\x02" * 999 + b"\x03")
    with pytest.raises(InputError, match=r"shard\.pt: altered[^$]*delete .*step-00000002 to continue from step-00000001"):
        verify(folder, manifest, ALONE)
    shard.write_bytes(b"\x02" * 10)
    with pytest.raises(InputError, match=r"shard\.pt: truncated: 10 bytes, expected 1000"):
        verify(folder, manifest, ALONE)
    shard.unlink()
    with pytest.raises(InputError, match=r"shard\.pt: missing"):
        verify(folder, manifest, ALONE)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = make_checkpoint(tmp_path, 3)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: missing or damaged"):
        read_manifest(folder)


def test_removal_keeps_the_last_the_multiples_and_the_beginning(tmp_path: Path) -> None:
    for step in range(10):
        make_checkpoint(tmp_path, step)
    remove_old(tmp_path, keep_last=None, keep_every=None)
    assert len(checkpoints(tmp_path)) == 10
    remove_old(tmp_path, keep_last=2, keep_every=4)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [0, 4, 8, 9]
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_random_state_travels_through_a_file(tmp_path: Path) -> None:
    torch.save(_random_state(), tmp_path / "state.pt")
    expected = (torch.rand(5), random.random())
    torch.rand(100)
    _restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.rand(5), expected[0]) and random.random() == expected[1]
