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

from collections.abc import Callable
from pathlib import Path

from analysis.checkpoint import AdamSettings, Checkpoint, Kind, Segment
from analysis.files import is_deepspeed
from analysis.formats.deepspeed import DeepSpeedCheckpoint
from analysis.formats.distributed import DistributedCheckpoint, is_distributed
from analysis.formats.tensor_files import TensorFiles, is_tensor_file
from analysis.formats.tensor_parallel import TensorParallelCheckpoint, is_tensor_parallel
from analysis.formats.universal import UniversalCheckpoint, is_universal
from model.errors import InputError

__all__ = ["FORMATS", "AdamSettings", "Checkpoint", "Kind", "Segment", "is_checkpoint", "open_checkpoint"]

# (does a path look like this format?, what opens it): the first that fits
FORMATS: list[tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]]] = [
    (is_universal, UniversalCheckpoint),
    (is_distributed, DistributedCheckpoint),
    (is_tensor_parallel, TensorParallelCheckpoint),
    (is_deepspeed, DeepSpeedCheckpoint),
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

    For a folder with several inside use `analysis.runs.find_run`.

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
