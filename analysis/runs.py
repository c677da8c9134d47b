"""Finds what a path on the command line names, and reads what a run left beside its checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.checkpoint import Checkpoint, step_of_name, verify_checkpoints
from analysis.files import is_deepspeed
from analysis.formats.tensor_files import refuse_part
from analysis.shards import deepspeed_inside, is_checkpoint, is_of_trainer, open_checkpoint
from model.errors import InputError

SUFFIXES = "a file ending in .safetensors, .pt, .pth, .bin or .ckpt"
_STEP_FOLDER = re.compile(r"step-\d+")


@dataclass
class Run:
    """A run folder, a folder of checkpoints, or one checkpoint.

    Attributes:
        path: what was named.
        folder: the run folder (recipe.yaml, metrics.jsonl, ...), or None where the checkpoints stand alone.
        checkpoints: their paths, by the number at the end of the name; never empty. `oldest_first` goes by what they hold.
    """

    path: Path
    folder: Path | None
    checkpoints: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name; a single checkpoint's is run/step."""
        if self.folder is not None and self.folder.resolve() != self.path.resolve():
            return f"{self.folder.resolve().name}/{self.path.resolve().name}"
        return self.path.resolve().name

    def default_report(self) -> Path:
        """Where results go unless told otherwise: report/ of the run or save folder; for one checkpoint, a folder of its name in there."""
        if self.checkpoints != [self.path]:
            return self.path / "report"
        return (self.folder or self.path.resolve().parent) / "report" / self.path.resolve().name

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run folder, or None when there is none. Raises InputError when it is not JSON."""
        path = self.folder / name if self.folder else None
        return read_json(path) if path is not None and path.exists() else None

    def open(self, verify: bool = True, every: int | None = None) -> list[Checkpoint]:
        """Every checkpoint, oldest first; with `verify`, after comparing all files with their recorded checksums.

        Args:
            every: only those whose step divides by this.

        Raises:
            InputError: a damaged one; none at such a step.
        """
        if every is not None and every < 1:
            raise InputError(f"--every {every}: expected a positive number of steps")
        opened = [c for c in map(open_checkpoint, self.checkpoints) if every is None or c.step % every == 0]
        if not opened:
            raise InputError(f"{self.path}: no checkpoint at a multiple of {every} steps")
        if verify:
            verify_checkpoints(opened)
        return sorted(opened, key=lambda checkpoint: checkpoint.step)

    def last(self, verify: bool = True) -> Checkpoint:
        """The checkpoint of the most steps; with `verify`, after comparing its files, and no others, with their recorded checksums."""
        checkpoint = open_checkpoint(self.oldest_first()[-1])
        if verify:
            checkpoint.verify()
        return checkpoint

    def oldest_first(self) -> list[Path]:
        """`checkpoints`, by the steps that they hold.

        train.py names them by their step, so there damage to one is no hindrance to using another; elsewhere a name (`final`,
        `epoch1_step100`) need not say it, and all are opened.

        Raises:
            InputError: one whose step is asked for cannot be opened.
        """
        if all(_of_train(path) for path in self.checkpoints):
            return self.checkpoints
        return [checkpoint.named for checkpoint in self.open(verify=False)]


def find_run(path: str | Path) -> Run:
    """What lies at a path: a run folder, a folder that holds checkpoints (of any format, a folder or file each), or one checkpoint.

    Raises:
        InputError: no such path, no checkpoint there, or one file of a checkpoint of several.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    refuse_part(path)
    if is_checkpoint(path) and not _is_save_folder(path):
        parent = path.resolve().parent
        return Run(path, parent.parent if parent.name == "checkpoints" else None, [path])
    if not path.is_dir():
        raise InputError(f"{path}: found a file of an unknown kind; expected a run folder, a checkpoint folder, or {SUFFIXES}")
    is_run = (path / "checkpoints").is_dir()
    inside = [p for p in sorted((path / "checkpoints" if is_run else path).iterdir()) if not p.name.startswith(".")]
    # train.py's count by their names, so that one that lost its files is said to be damaged. Files count only where there are no
    # folders: truth.pt beside DeepSpeed's tags is no checkpoint of the run
    tags = [p for p in inside if _of_train(p)] or [p for p in inside if p.is_dir() and is_checkpoint(p)]
    tags = sorted(tags or [p for p in inside if is_checkpoint(p)], key=step_of_name)
    if not tags and is_run:
        raise InputError(f"{path}: this run has no checkpoint yet")
    if not tags:
        raise InputError(f"{path}: no checkpoint here (expected a run folder, a checkpoint, or a folder of checkpoints)")
    return Run(path, path if is_run or (path / "metrics.jsonl").exists() else None, tags)


def _is_save_folder(path: Path) -> bool:
    """Whether DeepSpeed, or train.py, saves its checkpoints in this folder: a run of them also while there is only one."""
    try:
        return not is_deepspeed(path) and deepspeed_inside(path) is not None and not is_of_trainer(path)
    except PermissionError:  # opening it says so
        return False


def folder_names(runs: Sequence[Any]) -> list[str]:
    """A folder's name for the results of each run, no two alike."""
    names = [run.name.replace("/", "-") for run in runs]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]


def _of_train(path: Path) -> bool:
    """Whether a path is one that train.py gives its checkpoints: checkpoints/step-00001000."""
    return path.parent.name == "checkpoints" and _STEP_FOLDER.fullmatch(path.name) is not None


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The numbers and activations of metrics.jsonl, a record a step; where a resumed run wrote a step again, the later record wins.

    Raises:
        InputError: a line other than the last (which may be half-written) is not a JSON object.
    """
    path = run.folder / "metrics.jsonl" if run.folder else None
    if path is None or not path.exists():
        return []
    records: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            values = {key: value for key, value in record.items() if isinstance(value, int | float) or key == "activations"}
            records.setdefault(int(record["step"]), {}).update(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not a metrics record: {line[:80]!r}") from None
    return [records[step] for step in sorted(records)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
