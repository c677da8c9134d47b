"""Writes results so that a reader finds the old file or the new, never a part; and says numbers the same way everywhere."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from model.errors import InputError


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file, making its folder. Raises InputError when it cannot be written; the old file stays then."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def check_writable(folder: Path) -> None:
    """Find out before the work whether results can be written into a folder. It is left as it was, so that none stays where work fails.

    Raises:
        InputError: they cannot.
    """
    probe, made = folder / f".{os.getpid()}.writing", []
    try:
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}; give --out a place that can be") from None
    finally:
        for one in made:
            with suppress(OSError):
                one.rmdir()


def write_json(path: Path, value: dict[str, Any]) -> Path:
    """Write JSON; numbers that are not finite are a fault."""
    return write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def number_or_none(value: float) -> float | None:
    """A JSON number, or None for what is not one."""
    return float(value) if math.isfinite(value) else None


def short(number: float) -> str:
    """1234567 -> 1.23M: three digits, for labels."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"
