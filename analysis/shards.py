"""Opens any checkpoint: named float32 tensors from the files as they lie, lazily and safely.

    checkpoint = open_checkpoint("runs/X/checkpoints/step-00001000")
    checkpoint.shapes                            # {name: shape}; a tied weight once, under its owner
    checkpoint.tensor("blocks.0.mlp.up.weight")  # float32, whole
    checkpoint.segments("blocks.0.mlp.up.weight")  # [(offset in the flat parameter, 1-D memory-mapped view)]
    checkpoint.load_into(model)

Files are memory-mapped, so opening costs milliseconds and no memory, and they are unpickled with `weights_only`, so a hostile
file cannot run code. None of the libraries that wrote them is needed but torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from analysis.checkpoint import AdamSettings, Checkpoint, Kind, Segment
from analysis.files import is_deepspeed, latest_tag
from analysis.formats.deepspeed import DeepSpeedCheckpoint
from analysis.formats.distributed import DistributedCheckpoint, is_distributed
from analysis.formats.tensor_files import TensorFiles, is_tensor_file
from analysis.formats.tensor_parallel import TensorParallelCheckpoint, is_tensor_parallel
from analysis.formats.universal import UniversalCheckpoint, is_universal
from model.errors import InputError

__all__ = [
    "FORMATS",
    "AdamSettings",
    "Checkpoint",
    "Kind",
    "Segment",
    "deepspeed_inside",
    "is_checkpoint",
    "is_of_trainer",
    "open_checkpoint",
]

_TRAINER_FOLDER = re.compile(r"checkpoint-(\d+)")  # Hugging Face's Trainer counts its optimizer's steps in it


def is_of_trainer(folder: Path) -> bool:
    """Whether a folder is one checkpoint by its name, checkpoint-N, or by what a library other than DeepSpeed wrote into it."""
    return _TRAINER_FOLDER.fullmatch(folder.resolve().name) is not None or (folder / "config.json").exists() or is_tensor_file(folder)


def deepspeed_inside(folder: Path) -> Path | None:
    """The DeepSpeed folder that a folder stands for: the only one in it; among several, in a trainer's folder, the one `latest` names.

    Trainers put DeepSpeed's own files one level deeper: Hugging Face's into checkpoint-N/global_stepN, Lightning into X.ckpt/checkpoint.
    Several in a folder that DeepSpeed alone wrote are the checkpoints of a run.
    """
    if not folder.is_dir():
        return None
    tag = latest_tag(folder)

    def holds_files(child: Path) -> bool:
        try:
            return is_deepspeed(child)
        except PermissionError:  # what is named is not passed over for worse weights: opening it says that it is locked
            return child.name == tag

    found = [child for child in sorted(folder.iterdir()) if not child.name.startswith(".") and holds_files(child)]
    if len(found) > 1 and is_of_trainer(folder):
        found = [child for child in found if child.name == tag]
    return found[0] if len(found) == 1 else None


def _open_inside(folder: Path) -> Checkpoint:
    """The checkpoint of `deepspeed_inside`, by the name and the step of the folder around it.

    Raises:
        InputError: `latest` names another, which is not there.
    """
    inside, tag = deepspeed_inside(folder), latest_tag(folder)
    assert inside is not None
    if tag is not None and tag != inside.name:
        raise InputError(f"{folder / 'latest'}: names {tag}, which holds no checkpoint here: restore it, or name {inside} itself")
    checkpoint = open_checkpoint(inside)
    checkpoint.named = folder
    if match := _TRAINER_FOLDER.fullmatch(folder.resolve().name):
        checkpoint.step, checkpoint.step_is_said = int(match[1]), True
    return checkpoint


def _has_deepspeed_inside(path: Path) -> bool:
    return deepspeed_inside(path) is not None


# (does a path look like this format?, what opens it): the first that fits
FORMATS: list[tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]]] = [
    (is_universal, UniversalCheckpoint),
    (is_distributed, DistributedCheckpoint),
    (is_tensor_parallel, TensorParallelCheckpoint),
    (is_deepspeed, DeepSpeedCheckpoint),
    (_has_deepspeed_inside, _open_inside),  # float32 masters and moments: before 16-bit weights beside them
    (is_tensor_file, TensorFiles),
]


def is_checkpoint(path: Path) -> bool:
    """Whether the path itself looks like one checkpoint of some format. What may not be looked into does: opening it says why not."""
    try:
        return any(matches(path) for matches, _ in FORMATS)
    except PermissionError:
        return True


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open one checkpoint: a folder or file of any format in docs/analysis.md's table.

    A folder with one of DeepSpeed's inside stands for that. For a folder with several inside use `analysis.runs.find_run`.

    Raises:
        InputError: nothing there, a file missing, truncated, damaged, unreadable, or of a kind this reader does not know.
    """
    path = Path(path)
    try:
        return next((opener for matches, opener in FORMATS if matches(path)), DeepSpeedCheckpoint)(path)
    except OSError as error:  # a link to nothing, a folder in place of a file, a disk that fails
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: damaged, or of a kind this reader does not know: {type(error).__name__}: {error}") from error
