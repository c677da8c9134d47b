"""Check that imports point one way: `python -m scripts.check_imports` prints each violation as file:line and exits 1.

    train.py -> training -> model        analysis -> model        scripts, tests -> anything but each other

One arrow crosses: training reads checkpoints with the reader of analysis (analysis.shards and what it stands on), the only one that
takes apart what other ranks wrote. Nothing else of analysis is open to it, and analysis never imports training.

Each room may import itself and the rooms, or modules, listed in `ALLOWED`; nothing imports scripts, and only tests import tests. The
outside libraries in `FORBIDDEN`, and the parts of them in `FORBIDDEN_PARTS`, stay out of the rooms that must work without them. Imports
inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# room -> rooms or modules it may import besides itself; train.py is a room of one file
ALLOWED: dict[str, set[str]] = {
    "model": set(),
    "training": {"model", "analysis.shards", "analysis.checkpoint", "analysis.files"},
    "analysis": {"model"},
    "train": {"training", "model"},
    "scripts": {"train", "training", "analysis", "model"},
    "tests": {"train", "training", "analysis", "model", "scripts"},
}
# room -> libraries that it must not need: the network knows no files and no ranks, and reading a checkpoint needs no DeepSpeed
FORBIDDEN: dict[str, set[str]] = {
    "model": {"deepspeed", "datasets", "sentencepiece", "tensorboard", "yaml", "pyarrow", "zstandard", "matplotlib"},
    "training": {"matplotlib"},
    "analysis": {"deepspeed"},
}
# room -> parts of libraries that it must not name, imported or not
FORBIDDEN_PARTS: dict[str, set[str]] = {"model": {"torch.distributed"}}


def imported_modules(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file of `package` (dotted, "" for the root); relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.lineno, node.module or ""
                continue
            parents = package.split(".") if package else []
            base = parents[: len(parents) - node.level + 1]
            if node.module:
                yield node.lineno, ".".join([*base, node.module])
            else:  # `from .. import model` names rooms in its aliases
                for alias in node.names:
                    yield node.lineno, ".".join([*base, alias.name])


def named_parts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, LIBRARY.PART) of every part of a library that is imported, or reached from its name, as `torch.distributed` is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        else:
            continue
        for name in names:
            yield node.lineno, ".".join(name.split(".")[:2])


def violations(root: Path) -> list[str]:
    """Every forbidden import below `root`, as `file:line: what is wrong`, in file order."""
    found = []
    for room, allowed in ALLOWED.items():
        single_file = root / f"{room}.py"
        for path in [single_file] if single_file.is_file() else sorted((root / room).rglob("*.py")):
            relative = path.relative_to(root)
            tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(relative))
            for line, name in sorted(imported_modules(tree, ".".join(relative.parent.parts))):
                target = name.partition(".")[0]
                if target in ALLOWED and target != room and target not in allowed and name not in allowed:
                    found.append(f"{relative}:{line}: {room} must not import {name}")
                elif target in FORBIDDEN.get(room, set()):
                    found.append(f"{relative}:{line}: {room} must not need {target}")
            for line, part in sorted(set(named_parts(tree))):
                if part in FORBIDDEN_PARTS.get(room, set()):
                    found.append(f"{relative}:{line}: {room} must not need {part}")
    return found


def main() -> int:
    found = violations(Path(__file__).resolve().parent.parent)
    for line in found:
        print(line)
    if not found:
        print("imports point one way")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
