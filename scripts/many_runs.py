"""What the scripts that train many runs share: one text for all of them, one thread each, and results that a later call carries on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Lock
from typing import Any

from model.errors import InputError
from training.data import prepare
from training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent
DIVERGED = r"stopped at step \d+: .* non-finite gradients"  # train.py's word for a run whose end is a result too


class Results:
    """What is known so far, by run, kept in a JSON file that several threads write; without a path, in memory alone.

    Attributes:
        header: what the file holds beside the runs.
        runs: name of a run -> what is known of it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.lock = path, Lock()
        self.header: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.runs: dict[str, dict[str, Any]] = self.header.pop("runs", {})

    def belong_to(self, **settings: Any) -> None:
        """Note what all runs have in common. Raises InputError where those that are known have something else."""
        for key, value in settings.items():
            if self.header.setdefault(key, value) != value:
                raise InputError(f"{self.path}: holds runs with {key} {self.header[key]}, not {value}: name another --out")

    def set(self, run: str, **figures: Any) -> None:
        with self.lock:
            self.runs.setdefault(run, {}).update(figures)
            self.write(**self.header)

    def write(self, **header: Any) -> None:
        self.header = header
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**header, "runs": self.runs}, indent=1) + "\n")
        partial.replace(self.path)


def common_corpus(runs: Path, results: Results, recipe: str | Path, overrides: list[str]) -> Path:
    """The prepared corpus that all runs read: of those in the folder `runs`, or a new one, whatever is installed between them.

    Ends this program when that is not the text of the results so far.
    """
    record = runs / "corpus"
    if not record.exists():
        runs.mkdir(parents=True, exist_ok=True)
        record.write_text(str(prepare(load_recipe(recipe, overrides).recipe.data).folder.resolve()))
    folder = Path(record.read_text())
    content = json.loads((folder / "manifest.json").read_text())["content_hash"]
    if results.header.setdefault("content_hash", content) != content:
        raise SystemExit(f"{results.path}: its runs read another text than {folder}; give another --out, or bring that text back")
    return folder


def run_python(what: str, arguments: list[str], log: Path | None = None, may_say: str | None = None) -> bool:
    """Run Python in one thread, on the CPU; whether it went well. Ends this program when not, with the last of what it said.

    Args:
        log: what it says goes here while it runs, after what is there.
        may_say: a pattern that excuses exit code 1.
    """
    print(f"{what} ...", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a+") if log is not None else tempfile.TemporaryFile("w+") as output:  # a file, so that it can be followed
        begin = output.seek(0, os.SEEK_END)
        code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
        output.seek(begin)
        said = output.read()
    excused = code == 1 and may_say is not None and re.search(may_say, said) is not None
    if code and not excused:
        raise SystemExit(f"{what}: failed with exit code {code}\n{said[-2000:]}")
    return code == 0


def environment_of(run: Path) -> dict[str, Any]:
    """What a run's environment.json says of the machine and the packages."""
    recorded = json.loads((run / "environment.json").read_text())
    return {key: value for key, value in recorded.items() if key != "command"}
