"""What of checkpoints does not need ranks: finding, verifying, removing, and the random state."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import InputError
from training import faults
from training.checkpoint import (
    Contents,
    _put_in_place,
    _random_state,
    _restore_random_state,
    checkpoints,
    newest_whole,
    put_aside,
    read_manifest,
    remove_old,
    write,
)
from training.distributed import Ranks
from training.metrics import drop_half_a_line
from training.recipe import CheckpointSection

ALONE = Ranks(0, 1, 0, 1)


SHARD = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
FILES = (SHARD, "mp_rank_00_model_states.pt", "random_state_rank_00000.pt")  # of ZeRO-2 on one rank


def make_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(bytes([step % 256]) * 1000)
    digest = {"size": 1000, "sha256": hashlib.sha256(bytes([step % 256]) * 1000).hexdigest()}
    files = dict.fromkeys(FILES, digest)
    manifest = {"step": step, "tokens": step, "world_size": 1, "zero_stage": 2, "precision": "fp32", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_unfinished_folders_are_not_checkpoints(tmp_path: Path) -> None:
    for step in (10, 2, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / ".writing-step-00000200").mkdir()
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [2, 10, 100]


def newest_step(run: Path, at_most: int | None = None) -> int:
    return newest_whole(run, ALONE, at_most).manifest["step"]


def test_the_newest_whole_one_is_found_and_damaged_ones_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for step in (1, 2, 3, 4, 5):
        make_checkpoint(tmp_path, step)
    assert newest_step(tmp_path) == 5 and newest_step(tmp_path, at_most=3) == 3
    assert newest_whole(tmp_path / "nowhere", ALONE) is None
    shards = {step: tmp_path / "checkpoints" / f"step-{step:08d}" / SHARD for step in (2, 3, 4, 5)}
    shards[5].write_bytes(b"\x05" * 999 + b"\x06")
    shards[4].write_bytes(b"\x04" * 10)
    shards[3].unlink()
    assert newest_step(tmp_path) == 2
    said = capsys.readouterr().err
    for step, words in ((5, "altered: its checksum"), (4, "truncated: 10 bytes"), (3, "missing")):
        assert f"passed over step-{step:08d}: {shards[step]}: {words}" in said
    assert all(path.parent.exists() for path in shards.values())  # nothing is deleted
    shards[2].write_bytes(b"")
    make_damaged = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    make_damaged.write_text("{")
    with pytest.raises(InputError, match=r"no whole checkpoint.*delete the damaged folders to begin again"):
        newest_whole(tmp_path, ALONE)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"step": -1, "tokens": 1, "world_size": 1, "zero_stage": 1, "files": {}}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = make_checkpoint(tmp_path, 3)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": 4}, "it is of step 4, and the folder is step-00000003"),
        ({"files": {}}, "it does not list mp_rank_00_model_states.pt"),
        ({"world_size": 10**15}, "it does not list zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ({"zero_stage": 3}, "it does not list zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ({"tokens": 4}, "4 tokens after 3 steps of 1"),
        *(({"without": name}, f"it does not list {name}") for name in FILES),
    ],
)
def test_an_altered_manifest_is_damaged_and_passed_over(
    changes: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_checkpoint(tmp_path, 2)
    path = make_checkpoint(tmp_path, 3) / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    manifest["files"].pop(manifest.pop("without", None), None)
    path.write_text(json.dumps(manifest))
    assert newest_whole(tmp_path, ALONE, tokens_per_step=1).manifest["step"] == 2
    said = capsys.readouterr().err
    assert said.startswith("warning: passed over step-00000003: ") and "manifest.json: damaged: " in said and expected in said


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_the_files_of_each_stage_are_what_is_asked_for(stage: int, prefix: str, tmp_path: Path) -> None:
    """As DeepSpeed names them on two ranks; tests/distributed saves and resumes with its own."""
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    names = [f"random_state_rank_{rank:05d}.pt" for rank in (0, 1)]
    names += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)] if stage == 3 else ["mp_rank_00_model_states.pt"]
    names += [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)] if stage > 0 else []
    for name in names:
        (folder / name).touch()
    files = {name: {"size": 0, "sha256": ""} for name in names}
    (folder / "manifest.json").write_text(json.dumps({"step": 3, "tokens": 3, "world_size": 2, "zero_stage": stage, "files": files}))
    assert sorted(read_manifest(folder)["files"]) == sorted(names)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, 3)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="outside the checkpoint"):
        read_manifest(folder)


def test_a_save_that_was_killed_between_its_renames_is_mended(tmp_path: Path) -> None:
    """Of the two whole ones of a step one is always in sight after the next launch, and the older is deleted last."""
    place = make_checkpoint(tmp_path, 3)
    place.rename(place.with_name(".replaced-step-00000003"))
    (tmp_path / "checkpoints" / ".writing-step-00000003").mkdir()
    assert newest_step(tmp_path) == 3  # which mends first
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    writing = place.rename(place.with_name(".writing-step-00000003"))
    make_checkpoint(tmp_path, 3)
    (writing / "newer").touch()
    _put_in_place(writing, place)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"] and (place / "newer").exists()


def test_removal_keeps_the_last_the_multiples_and_the_beginning(tmp_path: Path) -> None:
    for step in range(10):
        make_checkpoint(tmp_path, step)
    remove_old(tmp_path, 9, keep_last=None, keep_every=None)
    assert len(checkpoints(tmp_path)) == 10
    remove_old(tmp_path, 9, keep_last=2, keep_every=4)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [0, 4, 8, 9]
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def unwritten(run: Path, step: int) -> Contents:
    writing = run / "checkpoints" / f".writing-step-{step:08d}"
    writing.mkdir(parents=True)
    manifest = {"step": step, "tokens": step, "world_size": 1, "zero_stage": 2, "state": {}}
    files = {writing / "a.pt": {"weight": torch.arange(1000.0)}, **{writing / name: [1, 2] for name in FILES}}
    return Contents(writing, files, {"model_config.json": {"width": 8}}, manifest)


def test_what_is_written_is_whole_and_in_its_place(tmp_path: Path) -> None:
    place = write(unwritten(tmp_path, 6), ALONE, CheckpointSection())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"] == [place.name]
    manifest = read_manifest(place)
    assert sorted(manifest["files"]) == sorted(["a.pt", *FILES, "model_config.json"])
    for name, recorded in manifest["files"].items():
        assert recorded["sha256"] == hashlib.sha256((place / name).read_bytes()).hexdigest()
    assert torch.equal(torch.load(place / "a.pt")["weight"], torch.arange(1000.0))


def break_at(monkeypatch: pytest.MonkeyPatch, moment: str, act: Callable[[Path], None]) -> None:
    monkeypatch.setattr(faults, "at_save", lambda at, step, rank, folder: act(folder) if at == moment else None)


def full(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_nothing_old_is_removed_before_the_new_one_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, 3)
    break_at(monkeypatch, "renaming", full)
    with pytest.raises(InputError, match=r"No space left on device. Step 6 is not saved; the last whole checkpoint is .*step-00000003\."):
        write(unwritten(tmp_path, 6), ALONE, CheckpointSection(keep_last=1))
    assert newest_step(tmp_path) == 3 and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    write(unwritten(tmp_path, 6), ALONE, CheckpointSection(keep_last=1))
    assert newest_step(tmp_path) == 6 and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_file_that_vanishes_is_missed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_at(monkeypatch, "written", lambda folder: (folder / "a.pt").unlink())
    with pytest.raises(InputError, match=r"a checkpoint could not be written: .*a\.pt: missing"):
        write(unwritten(tmp_path, 6), ALONE, CheckpointSection())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_that_gives_back_something_else_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def save_and_flip(content: object, path: Path) -> None:
        save(content, path)
        if path.name == "a.pt":
            written = bytearray(path.read_bytes())
            written[written.index(torch.tensor(500.0).numpy().tobytes())] ^= 1
            path.write_bytes(written)

    monkeypatch.setattr(torch, "save", save_and_flip)
    with pytest.raises(InputError, match=r"a checkpoint could not be written: .*CRC-32"):
        write(unwritten(tmp_path, 6), ALONE, CheckpointSection())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_fault_of_ours_is_not_taken_for_the_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("something else")

    break_at(monkeypatch, "saving", fail)
    with pytest.raises(RuntimeError, match="something else"):
        write(unwritten(tmp_path, 6), ALONE, CheckpointSection())


def test_what_a_rewind_leaves_behind_is_out_of_sight_until_its_step_is_saved_again(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (make_checkpoint(tmp_path, step) / "first").touch()
    assert put_aside(tmp_path, 2, ALONE) == [".abandoned-step-00000004", ".abandoned-step-00000006"]
    assert newest_step(tmp_path) == 2 and (tmp_path / "checkpoints" / ".abandoned-step-00000006" / "first").exists()
    write(unwritten(tmp_path, 4), ALONE, CheckpointSection())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        ".abandoned-step-00000006", "step-00000002", "step-00000004",
    ]  # fmt: skip
    make_checkpoint(tmp_path, 6)  # as if it had been killed before the older one was deleted
    assert put_aside(tmp_path, 2, ALONE) == [".abandoned-step-00000004", ".abandoned-step-00000006"]
    assert not (tmp_path / "checkpoints" / ".abandoned-step-00000006" / "first").exists()
    assert put_aside(tmp_path, 2, ALONE) == []


def test_a_rewind_that_cannot_put_aside_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, 4)
    monkeypatch.setattr(os, "rename", lambda old, new: full(tmp_path))
    with pytest.raises(InputError, match="cannot be put aside: No space left on device; move the checkpoints after step 2 away by hand"):
        put_aside(tmp_path, 2, ALONE)


def test_removal_never_takes_the_one_just_saved(tmp_path: Path) -> None:
    """There are later steps, which were damaged and passed over."""
    for step in (2, 4, 6, 8, 10):
        make_checkpoint(tmp_path, step)
    remove_old(tmp_path, 6, keep_last=1, keep_every=None)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [6, 8, 10]


def test_what_is_removed_is_out_of_sight_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of it leaves no damaged checkpoint behind."""
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: removed.append(path.name))
    remove_old(tmp_path, 4, keep_last=1, keep_every=None)
    assert removed == [".writing-step-00000002"] and [p.name for p in checkpoints(tmp_path)] == ["step-00000004"]


def test_an_old_one_that_cannot_be_removed_is_named_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The new one is whole. What is left of the old one is out of sight, and the next launch and the next save go on with it there."""
    make_checkpoint(tmp_path, 3)
    removal = shutil.rmtree

    def keep(path: Path, **options: object) -> None:
        if path.name.endswith("3"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path / SHARD))
        removal(path, **options)

    monkeypatch.setattr(shutil, "rmtree", keep)
    warning = f"{SHARD}: cannot be deleted: Device or resource busy"
    for step in (6, 9):
        assert write(unwritten(tmp_path, step), ALONE, CheckpointSection(keep_last=1)).name == f"step-{step:08d}"
        assert newest_step(tmp_path) == step
        assert warning in capsys.readouterr().err
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000009"]
    monkeypatch.undo()
    assert newest_step(tmp_path) == 9 and not list((tmp_path / "checkpoints").glob(".*"))


def test_random_state_travels_through_a_file(tmp_path: Path) -> None:
    torch.save(_random_state(), tmp_path / "random_state_rank_00000.pt")
    expected = (torch.rand(5), random.random())
    torch.rand(100)
    manifest = {"world_size": 1, "step": 7}
    _restore_random_state(tmp_path, manifest, ALONE)
    assert torch.equal(torch.rand(5), expected[0]) and random.random() == expected[1]
    # a rank that was not there when it was written: not the state of another one, and the same each time
    drawn = []
    for rank in (1, 2, 1):
        _restore_random_state(tmp_path, manifest, Ranks(rank, 3, rank, 3))
        drawn.append(torch.rand(5))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    (tmp_path / "random_state_rank_00000.pt").write_bytes(b"PK")
    with pytest.raises(InputError):
        _restore_random_state(tmp_path, manifest, ALONE)


@pytest.mark.parametrize("words", ["kill", "kill@x", "explode@3", "nan@3:x"])
def test_a_fault_that_cannot_be_read_is_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_FAULTS", words)
    with pytest.raises(InputError, match="BURNISH_FAULTS"):
        faults.requested()


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    drop_half_a_line(path)
    for text, left in (('{"step": 1}\n{"st', '{"step": 1}\n'), ('{"st', ""), ('{"step": 1}\n', '{"step": 1}\n'), ("", "")):
        path.write_text(text)
        drop_half_a_line(path)
        assert path.read_text() == left
