"""Save, verify, resume.

A checkpoint is written into a hidden folder beside its place, hashed into a manifest, and renamed when whole: a folder named
`step-00001000` is complete, and what a crash leaves behind is never taken for one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.errors import InputError
from training.distributed import Ranks, raise_together
from training.engine import Engine
from training.run_folder import write_json

_UNFINISHED = ".writing-"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))


def save(engine: Engine, run: Path, step: int, tokens: int) -> Path:
    """Write the checkpoint after `step` steps and `tokens` tokens. Every rank calls it.

    Raises:
        InputError: the disk refused. Nothing half-written is left, and earlier checkpoints are untouched.
    """
    ranks, name = engine.ranks, f"step-{step:08d}"
    folder, writing = run / "checkpoints", run / "checkpoints" / f"{_UNFINISHED}step-{step:08d}"
    problem = None
    if ranks.is_first:
        try:
            folder.mkdir(exist_ok=True)
            for leftover in folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover)
            needed, free = _expected_bytes(engine), shutil.disk_usage(folder).free
            if free < needed:
                problem = f"disk full: {folder} has {free / 2**30:.2f} GiB free and a checkpoint takes about {needed / 2**30:.2f} GiB"
        except OSError as error:
            problem = f"{folder}: cannot be written: {error.strerror}"
    raise_together(_with_advice(problem, run, step) if problem else None)
    try:
        engine.save(folder, writing.name)
        torch.save(_random_state(), writing / f"random_state_rank_{ranks.rank:05d}.pt")
        if ranks.is_first:
            write_json(writing / "model_config.json", engine.model.config.to_dict())
        dist.barrier()
        digests = _digests(writing, ranks)
        if ranks.is_first:
            write_json(writing / "manifest.json", _manifest(engine, step, tokens, digests))
            _flush(writing)
            if (folder / name).exists():  # a run that went back and came to this step again
                shutil.rmtree(folder / name)
            os.rename(writing, folder / name)
            _flush(folder)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        shutil.rmtree(writing, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise InputError(_with_advice(f"{folder}: a checkpoint could not be written: {reason}", run, step)) from None
    dist.barrier()
    return folder / name


def _with_advice(problem: str, run: Path, step: int) -> str:
    whole = checkpoints(run)
    kept = f"the last whole checkpoint is {whole[-1]}" if whole else "no earlier checkpoint was made"
    return f"{problem}. Stopped after step {step}; {kept}. Make room and launch again to continue from there"


def _expected_bytes(engine: Engine) -> int:
    """12 bytes a parameter for the float32 master and two moments, 4 more for the weights beside them."""
    return 16 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())


def _manifest(engine: Engine, step: int, tokens: int, digests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": 1,
        "step": step,
        "tokens": tokens,
        "seed": engine.recipe.run.seed,
        "world_size": engine.ranks.world_size,
        "zero_stage": engine.stage,
        "precision": engine.recipe.training.precision,
        "files": digests,
    }


def _digests(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """{file: {size, sha256}} of a folder; every rank reads its share, and all get the whole."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    share = {}
    for path in files[ranks.rank :: ranks.world_size]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            share[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    shares: list[dict[str, dict[str, Any]]] = [share]
    if ranks.world_size > 1:
        shares = [{} for _ in range(ranks.world_size)]
        dist.all_gather_object(shares, share)
    return {name: digest for part in shares for name, digest in part.items()}


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises InputError when it is missing or not readable."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return {key: manifest[key] for key in ("step", "tokens", "world_size", "zero_stage", "precision", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/manifest.json: missing or damaged ({type(error).__name__}); {_how_to_go_back(folder)}") from None


def verify(folder: Path, manifest: dict[str, Any], ranks: Ranks) -> None:
    """Compare sizes and checksums with the manifest, the reading shared between ranks.

    Raises:
        InputError: on every rank alike, naming each file that is missing, truncated or altered.
    """
    problems = []
    present = {name: folder / name for name in manifest["files"] if (folder / name).is_file()}
    for name in manifest["files"].keys() - present.keys():
        problems.append(f"{folder / name}: missing")
    for name, path in present.items():
        expected = manifest["files"][name]["size"]
        if path.stat().st_size != expected:
            problems.append(f"{path}: truncated: {path.stat().st_size} bytes, expected {expected}")
    if not problems:
        for name, path in sorted(present.items())[ranks.rank :: ranks.world_size]:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != manifest["files"][name]["sha256"]:
                    problems.append(f"{path}: altered: its checksum is not the manifest's")
    raise_together("\n".join([*problems, _how_to_go_back(folder)]) if problems else None)


def _how_to_go_back(folder: Path) -> str:
    earlier = [p for p in checkpoints(folder.parent.parent) if p.name < folder.name]
    return f"delete {folder} to continue from {earlier[-1].name if earlier else 'the beginning'}"


def check_layout(folder: Path, manifest: dict[str, Any], engine_stage: int, ranks: Ranks) -> None:
    """DeepSpeed loads a checkpoint only at the ranks and stage that wrote it; say so before any weight is made."""
    if (manifest["world_size"], manifest["zero_stage"]) != (ranks.world_size, engine_stage):
        raise InputError(
            f"{folder}: written by {manifest['world_size']} ranks with ZeRO stage {manifest['zero_stage']}, and this launch has "
            f"{ranks.world_size} with stage {engine_stage}; launch with {manifest['world_size']} ranks and stage {manifest['zero_stage']}"
        )


def load(engine: Engine, folder: Path) -> None:
    """Weights, optimizer state and random state from a verified checkpoint folder."""
    engine.load(folder.parent, folder.name)
    _restore_random_state(torch.load(folder / f"random_state_rank_{engine.ranks.rank:05d}.pt", weights_only=True))


def remove_old(run: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Delete checkpoints beyond the last `keep_last`, but for step 0 and those whose step divides by `keep_every`."""
    if keep_last is None:
        return
    for folder in checkpoints(run)[:-keep_last]:
        step = int(folder.name.removeprefix("step-"))
        if step > 0 and not (keep_every and step % keep_every == 0):
            hidden = folder.with_name(f"{_UNFINISHED}{folder.name}")  # gone from sight at once, whole or not
            os.rename(folder, hidden)
            shutil.rmtree(hidden)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
