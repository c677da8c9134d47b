"""A run's folder: made once, held by one launch at a time, and never mixed with another recipe's."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from model.errors import InputError
from training.recipe_file import LoadedRecipe, differences, dump_recipe
from training.run_lock import RunLock

_PACKAGES = ("deepspeed", "transformers", "datasets", "sentencepiece", "numpy")


def check_run_folder(loaded: LoadedRecipe) -> None:
    """Raises InputError when the folder was made by another recipe, or cannot be a run's. Writes nothing."""
    saved, metrics = loaded.run_folder / "recipe.yaml", loaded.run_folder / "metrics.jsonl"
    try:
        different = differences(saved, loaded) if saved.exists() else []
        in_the_way = metrics.exists() and not metrics.is_file()
    except OSError as error:  # a name that is too long
        where = f"run.folder {loaded.recipe.run.folder[:80]!r} with run.name {loaded.run_folder.name[:80]!r}"
        raise InputError(f"{where}: no folder can have this name: {error.strerror}; give another one") from None
    if in_the_way:
        raise InputError(f"{metrics}: expected a file to add records to, found something else; move it out of the way")
    if different:
        longer = "training.tokens: " in "; ".join(different)
        raise InputError(
            f"{loaded.run_folder}: made by another recipe ({'; '.join(different)}); give the same values, or another run.name for a new run"
            + (". " + _ABOUT_TOKENS if longer else "")
        )


_ABOUT_TOKENS = (
    "The schedules span training.tokens, so the steps that were done belong to that number: a run that is to be shorter ends at "
    "run.stop_at_step, and one that may be longer is given all its tokens from the start, and run.stop_at_step for the time being"
)


def open_run_folder(loaded: LoadedRecipe) -> RunLock:
    """Make the folder, or check that it belongs to this recipe, and hold it. Called by the first rank alone.

    Raises:
        InputError: another launch holds the folder, it was made by another recipe, or it cannot be written.
    """
    folder = loaded.run_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the run folder cannot be written: {error.strerror}") from None
    lock = RunLock(folder)
    try:
        check_run_folder(loaded)
        if not (folder / "recipe.yaml").exists():
            write_whole(folder / "recipe.yaml", dump_recipe(loaded))
    except BaseException:
        lock.release()
        raise
    return lock


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old text or the new, never a part, even after the power was cut."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk take a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(package: str) -> str | None:
    """None where it is not installed, or was put there without its metadata."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """Versions, commit, hardware and command: what someone needs to get a figure of this run again."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        except OSError:  # a machine without git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": _command(root),
        "python": platform.python_version(),
        "packages": {"torch": str(torch.__version__), **{name: _version(name) for name in _PACKAGES}},  # torch with its CUDA build
        "git_commit": git("rev-parse", "HEAD"),
        "git_changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "world_size": world_size,
        "hardware": {
            "accelerator": accelerator,
            "cpu": _cpu_name(),
            "cpu_cores": len(os.sched_getaffinity(0)),
            "threads_per_rank": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def _command(root: Path) -> str:
    """The command line, with the program below the repository and without what the deepspeed launcher adds to every rank's."""
    program = Path(sys.argv[0]).resolve()
    name = str(program.relative_to(root)) if program.is_relative_to(root) else sys.argv[0]
    return " ".join([Path(sys.executable).name, name, *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
