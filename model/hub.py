"""Where a pretrained model lies: a hub name, a folder, a GGUF file, or `package:NAME`, the GGUF file in an installed Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from model.errors import InputError


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """(what transformers' `from_pretrained` takes, with which arguments).

    Raises:
        InputError: a path that is not there, a folder without a model, or a package without one.
    """
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{source}: no such package is installed; pip install --no-deps {name.replace('_', '-')}")
        path = Path(spec.submodule_search_locations[0])
    else:
        path = Path(source).expanduser()
        if not path.exists():
            if source.startswith((".", "/", "~")) or source.count("/") > 1:
                raise InputError(f"{source}: does not exist: give a folder, a GGUF file or a name on the Hugging Face hub")
            return source, {}
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if (path / "config.json").exists():
        return str(path), {}
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{source}: neither a config.json nor one GGUF file is there")
    return str(path), {"gguf_file": files[0].name}
