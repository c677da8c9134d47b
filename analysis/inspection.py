"""What a checkpoint holds, what is damaged and what is missing: `python -m analysis inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.formats.tensor_files import is_tensor_file
from analysis.output import short
from analysis.runs import Run
from analysis.shards import Checkpoint, open_checkpoint
from analysis.trajectory import kind_of
from model.errors import InputError

DEFINITIONS = {
    "parameters": "elements of trained and frozen parameters, tied ones once; buffers do not count",
    "read": "the folder inside that the path stands for, or null where it is the path itself",
    "precision": "what trained weights are read in; fp32 means float32 master weights",
    "optimizer_state": "whether Adam's moments of the trained parameters are in the files",
    "bytes": "of all files that the checkpoint is read from",
    "not_finite": "names of the parameters that hold an infinity or a NaN",
    "problem": "why the checkpoint cannot be trusted, or null",
}


def inspect(run: Run, verify: bool = True) -> dict[str, Any]:
    """What inspect.json holds. A damaged checkpoint is described, not raised.

    Args:
        verify: read everything: compare checksums (the manifest's, or those in torch's files) and look for values that are not finite.
    """
    return {
        "format": 1,
        "verb": "inspect",
        "run": run.name,
        "path": str(run.path),
        "definitions": DEFINITIONS,
        "checked": "checksums and values" if verify else "the index alone",
        "checkpoints": [_inspect(path, verify) for path in run.checkpoints],
    }


def _inspect(path: Path, verify: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"path": str(path), "problem": None}
    try:
        checkpoint = open_checkpoint(path)
        kinds: dict[str, int] = {}
        for name, shape in checkpoint.shapes.items():
            kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + shape.numel()
        result |= {
            "format": checkpoint.format,
            "read": _what_is_read(checkpoint),
            "step": checkpoint.step,
            "ranks": checkpoint.world_size,
            "precision": checkpoint.precision,
            "parameters": sum(shape.numel() for shape in checkpoint.shapes.values()),
            "parameters_by_kind": kinds,
            "tensors": {name: list(shape) for name, shape in checkpoint.shapes.items()},
            "tied": checkpoint.aliases,
            "frozen": sorted(checkpoint.frozen),
            "buffers": {name: list(buffer.shape) for name, buffer in checkpoint.buffers.items()},
            "bytes": sum(file.stat().st_size for file in checkpoint.files()),
            "manifest": checkpoint.manifest is not None,
            "optimizer_state": _has_moments(checkpoint),
        }
        if verify:
            checkpoint.verify()
            checkpoint.check_contents()
            result["not_finite"] = [name for name in checkpoint.shapes if not _finite(checkpoint, name)]
            if result["not_finite"]:
                result["problem"] = f"{path}: {', '.join(result['not_finite'][:4])}: values that are not finite"
    except InputError as error:
        result["problem"] = str(error)
    return result


def _what_is_read(checkpoint: Checkpoint) -> str | None:
    """Which of a trainer's two forms of the weights is read, in words; None where there is one folder alone."""
    if checkpoint.named == checkpoint.path:
        return None
    beside = is_tensor_file(checkpoint.named)
    return f"{checkpoint.path.name}/, DeepSpeed's files{', and not the weights that lie beside it' if beside else ''}"


def _has_moments(checkpoint: Checkpoint) -> bool:
    trained = next((name for name in checkpoint.shapes if name not in checkpoint.frozen), None)
    try:
        return trained is not None and bool(checkpoint.segments(trained, "exp_avg"))
    except InputError:
        return False


def _finite(checkpoint: Checkpoint, name: str, piece: int = 1 << 22) -> bool:
    """Whether all values are finite, `piece` elements at a time."""
    pieces = (part for _, values in checkpoint.segments(name) for part in values.split(piece))
    return all(bool(part.float().isfinite().all()) for part in pieces)


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines a checkpoint."""
    lines = []
    for found in result["checkpoints"]:
        lines.append(found["path"])
        if "parameters" in found:
            state = "Adam's moments" if found["optimizer_state"] else "no optimizer state"
            lines.append(
                f"  {found['format']}, step {found['step']}, {found['ranks']} rank{'s' * (found['ranks'] > 1)}, weights in "
                f"{found['precision']}, {state}; {found['bytes'] / 1e6:,.1f} MB, {'a' if found['manifest'] else 'no'} manifest"
            )
            if found["read"]:
                lines.append(f"  read: {found['read']}")
            kinds = ", ".join(f"{kind} {short(count)}" for kind, count in found["parameters_by_kind"].items())
            lines.append(f"  {found['parameters']:,} parameters in {len(found['tensors'])} tensors: {kinds}")
            for what in ("tied", "frozen", "buffers"):
                if found[what]:
                    named = [f"{a} = {b}" for a, b in found[what].items()] if what == "tied" else list(found[what])
                    lines.append(f"  {what}: {', '.join(named[:6])}{f' and {len(named) - 6} more' if len(named) > 6 else ''}")
        lines.append(f"  DAMAGED: {found['problem']}" if found["problem"] else f"  sound ({result['checked']})")
    return "\n".join(lines)
