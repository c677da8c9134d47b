"""Save, verify, find the newest whole one, resume at any number of ranks and any ZeRO stage.

A checkpoint is written into a hidden folder beside its place, read back from the disk, hashed into a manifest, flushed and renamed: a
folder named `step-00001000` is complete, and what a crash leaves behind is never taken for one. A whole checkpoint is deleted only
after a newer one is whole.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from analysis.files import check_crc, load_file
from analysis.files import read_manifest as read_manifest_file
from model.errors import InputError
from model.pretrained import PretrainedDecoder
from training import faults
from training.distributed import Ranks, TrainingStoppedError, first_problem, heard_by_all, raise_together
from training.engine import Engine
from training.recipe import CheckpointSection
from training.run_folder import sync, write_json

_UNFINISHED = ".writing-"
_REPLACED = ".replaced-"
_ABANDONED = ".abandoned-"


class Found(NamedTuple):
    """A whole checkpoint and its manifest."""

    folder: Path
    manifest: dict[str, Any]


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first. A crash leaves none of these; damage afterwards may."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))


class Contents(NamedTuple):
    """What this rank writes of a checkpoint."""

    writing: Path  # the hidden folder
    files: dict[Path, Any]  # for torch.save
    settings: dict[str, dict[str, Any]]  # {name: JSON's types} of the first rank's small files
    manifest: dict[str, Any]  # but for the files' digests


def contents(engine: Engine, run: Path, step: int, tokens: int, state: dict[str, Any]) -> Contents:
    """What there is to write after `step` steps and `tokens` tokens: the state itself, not copies. Every rank calls it.

    Args:
        state: what else the loop needs to go on, in JSON's types; it comes back in the manifest.

    Raises:
        InputError: on every rank alike: the disk refuses, or there is no room.
    """
    ranks, folder = engine.ranks, run / "checkpoints"
    writing = folder / f"{_UNFINISHED}step-{step:08d}"
    problem = None
    if ranks.is_first:
        try:
            folder.mkdir(exist_ok=True)
            clean_up(run)
            needed, free = _expected_bytes(engine), shutil.disk_usage(folder).free
            if free < needed:
                problem = f"disk full: {folder} has {free / 2**20:,.1f} MiB free and a checkpoint takes about {needed / 2**20:,.1f} MiB"
            else:
                writing.mkdir()
        except OSError as error:
            problem = f"{folder}: cannot be written: {error.strerror}"
    raise_together(_with_advice(problem, writing) if problem else None)
    files = engine.files(folder, writing.name)
    files[writing / f"random_state_rank_{ranks.rank:05d}.pt"] = _random_state()
    return Contents(writing, files, _settings(engine), _manifest(engine, step, tokens, copy.deepcopy(state)))


def _settings(engine: Engine) -> dict[str, dict[str, Any]]:
    """What the network is, for those who read the checkpoint without its recipe."""
    pretrained = isinstance(engine.model, PretrainedDecoder)
    settings = {"pretrained.json" if pretrained else "model_config.json": engine.model.config.to_dict()}
    pruning = engine.model.context_pruning_settings
    if pruning is not None:
        settings["context_pruning.json"] = pruning.describe()
    return settings


def write(contents: Contents, ranks: Ranks, keep: CheckpointSection, group: Any = None) -> Path:
    """Write, read back, rename, and remove what is not to be kept. Every rank calls it; returns the checkpoint's folder.

    Args:
        group: of torch.distributed, over which the ranks agree; default: the one of all ranks. In a thread beside training it has to be
            one that nothing else uses.

    Raises:
        InputError: on every rank alike: the disk refused.
        TrainingStoppedError: another rank met a fault of ours, which is raised there as it is.

    Whatever is raised, nothing half-written is left, and earlier checkpoints are untouched.
    """
    writing, step = contents.writing, contents.manifest["step"]
    place, digests = writing.with_name(writing.name.removeprefix(_UNFINISHED)), {}

    def agree(digests: dict[str, Any], error: Exception | None) -> list[dict[str, Any]]:
        """The digests of every rank; ends here, on all of them, if any has an error."""
        refusal = _what_the_disk_says(error) if error is not None else None
        fault = f"rank {ranks.rank}: {type(error).__name__}: {error}" if error is not None and refusal is None else None
        share = (digests, refusal, fault)
        shares = [share]
        if ranks.world_size > 1:
            shares = [share] * ranks.world_size
            dist.all_gather_object(shares, share, group=group)
        refusals, faults_of_ours = [r for _, r, _ in shares if r], [f for _, _, f in shares if f]
        if not refusals and not faults_of_ours:
            return [digests for digests, _, _ in shares]
        if ranks.is_first:
            shutil.rmtree(writing, ignore_errors=True)
        if error is not None and fault is not None:
            raise error
        if refusals:
            raise InputError(_with_advice(f"{place.parent}: a checkpoint could not be written: {refusals[0]}", writing))
        raise TrainingStoppedError(f"{place.parent}: the checkpoint of step {step} could not be written: {faults_of_ours[0]}")

    error = None
    try:
        faults.at_save("saving", step, ranks.rank, writing)
        for path, content in contents.files.items():
            torch.save(content, path)
            digests[path.name] = _digest(path)
        if ranks.is_first:
            for name, content in contents.settings.items():
                write_json(writing / name, content)
                digests[name] = _digest(writing / name)
        faults.at_save("written", step, ranks.rank, writing)
    except Exception as caught:  # whatever it is, the other ranks wait to hear of it
        error = caught
    shares = agree(digests, error)
    if ranks.is_first:
        try:
            files = {name: digest for part in shares for name, digest in sorted(part.items())}
            write_json(writing / "manifest.json", {**contents.manifest, "files": files})
            read_manifest(writing)  # every file is there
            sync(writing)
            faults.at_save("renaming", step, ranks.rank, writing)
            _put_in_place(writing, place)
        except Exception as caught:
            error = caught
    agree({}, error)
    if ranks.is_first:
        remove_old(place.parent.parent, step, keep.keep_last, keep.keep_every)
    return place


def _what_the_disk_says(error: Exception) -> str | None:
    """Why a file could not be written, or was not there when it was looked for; None: the error is not the disk's."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("PytorchStreamWriter", "inline_container", "Parent directory")
    ):
        return str(error).splitlines()[0].rstrip(".")
    return None


def _put_in_place(writing: Path, place: Path) -> None:
    """Rename a whole folder to its place. One that is there, of a run that came to this step again, goes after that."""
    replaced = place.with_name(f"{_REPLACED}{place.name}")
    if place.exists():
        os.rename(place, replaced)
    os.rename(writing, place)
    sync(place.parent)
    for old in (replaced, place.with_name(f"{_ABANDONED}{place.name}")):
        if old.exists():
            _delete(old)


def _delete(folder: Path) -> None:
    """Delete a folder that is not needed, out of sight at once, whole or not. What the disk keeps is named: the run goes on without it."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(f"{_UNFINISHED}{folder.name}")
    try:
        os.rename(folder, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        print(f"warning: {error.filename or folder}: cannot be deleted: {error.strerror}", file=sys.stderr, flush=True)


def put_aside(run: Path, step: int, ranks: Ranks) -> list[str]:
    """Take checkpoints later than `step` out of sight: the run goes another way from there, and the next launch must not go on from them.

    Each keeps a hidden name until the run saves its step again. Every rank calls it; returns the hidden names, on the first rank.

    Raises:
        InputError: on every rank alike: the disk refuses.
    """
    hidden, problem, folder = [], None, run / "checkpoints"
    if ranks.is_first:
        try:
            for later in checkpoints(run):
                if int(later.name.removeprefix("step-")) > step:
                    aside = folder / f"{_ABANDONED}{later.name}"
                    if aside.exists():  # of an earlier rewind
                        _delete(aside)
                    os.rename(later, aside)
                    hidden.append(aside.name)
            sync(folder)
        except OSError as error:
            where = error.filename or folder
            problem = f"{where}: cannot be put aside: {error.strerror}; move the checkpoints after step {step} away by hand"
    raise_together(problem)
    return hidden


def clean_up(run: Path) -> None:
    """Remove what a launch that was killed left half-done; the first rank alone calls it, holding the run's lock."""
    folder = run / "checkpoints"
    for replaced in folder.glob(f"{_REPLACED}*"):
        place = folder / replaced.name.removeprefix(_REPLACED)
        if not place.exists():  # killed between the two renames
            os.rename(replaced, place)
    for leftover in [*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_REPLACED}*")]:
        _delete(leftover)


def _with_advice(problem: str, writing: Path) -> str:
    step, whole = int(writing.name.rpartition("-")[2]), checkpoints(writing.parent.parent)
    kept = f"the last whole checkpoint is {whole[-1]}" if whole else "no earlier checkpoint was made"
    return f"{problem}. Step {step} is not saved; {kept}. Make room and launch again to continue from there"


def _expected_bytes(engine: Engine) -> int:
    """12 bytes a parameter for the float32 master and two moments, 4 more for the weights beside them."""
    return 16 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())


def _manifest(engine: Engine, step: int, tokens: int, state: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "step": step,
        "tokens": tokens,
        "seed": engine.recipe.run.seed,
        "world_size": engine.ranks.world_size,
        "zero_stage": engine.stage,
        "precision": engine.recipe.training.precision,
        "optimizer": engine.recipe.optimizer.kind,
        "skipped_steps": engine.skipped_steps,
        "optimizer_steps": engine.optimizer_steps,
        "state": state,
    }


def _digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file as the disk gives it back.

    Raises:
        OSError: it does not hold what torch wrote: the CRC-32 of a record, taken before it was written, does not fit.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # forget the pages, so that what is read now is what the disk has
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            check_crc(path)
        except InputError as error:
            raise OSError(errno.EIO, str(error)) from None
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def newest_whole(run: Path, ranks: Ranks, at_most: int | None = None, tokens_per_step: int | None = None) -> Found | None:
    """The newest checkpoint whose every file is what its manifest says, the reading shared between ranks. Every rank calls it.

    Damaged ones are named on stderr and passed over; they stay until the run comes to their step again.

    Args:
        at_most: none of a later step.
        tokens_per_step: of the run, which the manifest's tokens have to agree with (data that was passed over does not count in them).

    Raises:
        InputError: on every rank alike: there are checkpoints, and none is whole, so that beginning again is for a person to decide; or
            the disk refuses.
    """
    names, problem = [], None
    if ranks.is_first:
        try:
            clean_up(run)
            names = [folder.name for folder in checkpoints(run)]
        except OSError as error:
            problem = f"{error.filename or run / 'checkpoints'}: what a launch left half-done cannot be mended: {error.strerror}"
    found = [(names, problem)]
    if ranks.world_size > 1:  # a shared folder may look older from another host
        dist.broadcast_object_list(found, src=0)
    names, problem = found[0]
    if problem is not None:
        raise InputError(problem)
    problems = []
    for folder in (run / "checkpoints" / name for name in reversed(names)):
        if at_most is not None and int(folder.name.removeprefix("step-")) > at_most:
            continue
        manifest, problem = None, None
        try:
            manifest = read_manifest(folder)
            if tokens_per_step is not None and manifest["tokens"] != manifest["step"] * tokens_per_step:
                raise InputError(
                    f"{folder}/manifest.json: damaged: {manifest['tokens']} tokens after {manifest['step']} steps of {tokens_per_step}"
                )
        except InputError as error:
            problem = str(error)
        # what one rank cannot read is damaged for all
        problem = first_problem(problem) or first_problem(_altered(folder, manifest or {"files": {}}, ranks))
        if problem is None and manifest is not None:
            return Found(folder, manifest)
        problems.append(problem)
        if ranks.is_first:
            print(f"warning: passed over {folder.name}: {problem}", file=sys.stderr, flush=True)
    if problems:
        raise InputError(
            f"{run / 'checkpoints'}: no whole checkpoint{f' up to step {at_most}' if at_most is not None else ''}: {problems[-1]}; "
            "bring back the files, or delete the damaged folders to begin again"
        )
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, after comparing the files' names and sizes with it.

    Raises:
        InputError: it is missing or not readable, it is another step's, it does not list what a checkpoint cannot do without, or a file
            is missing, truncated, or outside the folder.
    """
    manifest = read_manifest_file(folder)
    if manifest is None:
        raise InputError(f"{folder}/manifest.json: missing")
    try:
        whole = {key: int(manifest[key]) for key in ("step", "tokens", "world_size", "zero_stage")}
        state = manifest.get("state", {})
        skipped = int(manifest.get("skipped_steps", 0))
        updates = int(manifest.get("optimizer_steps", whole["step"] - skipped))  # older manifests do not say
        if not isinstance(state, dict) or min(*whole.values(), skipped, updates) < 0:
            raise ValueError("a number below 0")
        if int(folder.name.rpartition("-")[2]) != whole["step"]:
            raise ValueError(f"it is of step {whole['step']}, and the folder is {folder.name}")
        hashes = {name: {"sha256": str(recorded["sha256"])} for name, recorded in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/manifest.json: damaged: {type(error).__name__}: {error}") from None
    listed = {name.removeprefix("bf16_") for name in hashes}  # as DeepSpeed names the optimizer's files where it holds bf16 weights
    unlisted = next((name for name in _required_files(whole["world_size"], whole["zero_stage"]) if name not in listed), None)
    if unlisted is not None:
        raise InputError(f"{folder}/manifest.json: damaged: it does not list {unlisted}")
    return {**whole, "state": state, "skipped_steps": skipped, "optimizer_steps": updates, "files": hashes}


def _required_files(world_size: int, stage: int) -> Iterator[str]:
    """What every checkpoint of so many ranks has, one name after the other: the number of ranks may be anything in a damaged manifest."""
    if stage < 3:
        yield "mp_rank_00_model_states.pt"
    for rank in range(max(1, world_size)):
        if stage == 3:
            yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        if stage > 0:
            yield f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        yield f"random_state_rank_{rank:05d}.pt"


def _altered(folder: Path, manifest: dict[str, Any], ranks: Ranks) -> str | None:
    """What is wrong with this rank's share of the files, by their checksums."""
    try:
        for name in sorted(manifest["files"])[ranks.rank :: ranks.world_size]:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != manifest["files"][name]["sha256"]:
                    return f"{folder / name}: altered: its checksum is not the manifest's"
    except OSError as error:
        return f"{error.filename}: cannot be read: {error.strerror}"
    return None


def load(engine: Engine, found: Found) -> None:
    """Weights, optimizer state and random state from a whole checkpoint of this model, whatever ranks and stage wrote it.

    Raises:
        InputError: on every rank alike: it is of another model or optimizer, or its files contradict one another.
    """
    folder, manifest = found
    engine.load(folder, manifest["step"], manifest["skipped_steps"], with_moments=manifest["optimizer_steps"] > 0)
    with heard_by_all(folder):
        _restore_random_state(folder, manifest, engine.ranks)


def remove_old(run: Path, saved: int, keep_last: int | None, keep_every: int | None) -> None:
    """Delete checkpoints beyond the last `keep_last`, but for step 0 and those whose step divides by `keep_every`.

    To be called by the first rank when step `saved` is in its place, which has been read back and is never deleted. Later steps,
    which were damaged and passed over, do not count and stay until the run comes to them again.
    """
    if keep_last is None:
        return
    steps = [int(folder.name.removeprefix("step-")) for folder in checkpoints(run)]
    for step in [step for step in steps if step <= saved][:-keep_last]:
        folder = run / "checkpoints" / f"step-{step:08d}"
        if step > 0 and not (keep_every and step % keep_every == 0):
            _delete(folder)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(folder: Path, manifest: dict[str, Any], ranks: Ranks) -> None:
    """A rank's own random state. One that was not there goes on from a state of its own, a function of the step and its number."""
    path = folder / f"random_state_rank_{ranks.rank:05d}.pt"
    if ranks.rank >= manifest["world_size"]:
        torch.manual_seed((manifest["step"] << 20) + ranks.rank)
        return
    try:
        state = load_file(path)
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{path}: not a random state: {type(error).__name__}: {error}") from None
