"""A pretrained model by its name: a hub name, a folder, a GGUF file, or `package:NAME`, the GGUF file in an installed Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from model.errors import InputError, one_line


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """(what transformers' `from_pretrained` takes, with which arguments).

    Raises:
        InputError: a path that is not there, a folder without a model, a package without one, or a name that the hub does not know.
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
                raise InputError(f"{source}: no such file or folder; give one, a GGUF file, package:NAME or a name on the Hugging Face hub")
            _look_up(source)
            return source, {}
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if (path / "config.json").exists():
        return str(path), {}
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(f"{source}: {len(files)} GGUF files here; name one of them: {', '.join(file.name for file in files)}")
    if not files:
        raise InputError(f"{source}: neither a config.json nor a GGUF file is there")
    return str(path), {"gguf_file": files[0].name}


def _look_up(name: str) -> None:
    """Ask the hub once whether it has a model, since transformers asks for each file again and again where there is no connection.

    Raises:
        InputError: it has not, or cannot be reached, and the model is not in the cache.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    here = f"{name}: no such folder or file here, and"
    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"{here} no such model on the Hugging Face hub, or none that you may read") from None
    except HfHubHTTPError:
        return  # it answers: transformers says what is wrong
    except Exception as error:  # of whatever library it is that connects
        raise InputError(f"{here} the Hugging Face hub cannot be reached: {one_line(error)}") from None


def open_decoder(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of transformers, or of ours, in evaluation mode on the CPU; code that lies beside it is not run.

    Raises:
        InputError: no such model can be read.
    """
    from transformers import AutoModelForCausalLM

    import model.huggingface  # noqa: F401  # makes our own networks known to transformers

    where, arguments = locate(source)
    try:
        return AutoModelForCausalLM.from_pretrained(where, trust_remote_code=False, dtype=dtype, **arguments).eval()
    except Exception as error:  # no connection, no such name, broken files: each family fails in its own way
        raise InputError(f"{source}: no model can be read from it: {one_line(error)}") from None


def open_tokenizer(source: str) -> Any:
    """The tokenizer of transformers that goes with a model. Raises InputError where none can be read."""
    from transformers import AutoTokenizer

    where, arguments = locate(source)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **arguments)
    except Exception as error:
        raise InputError(f"{source}: no tokenizer can be read from it: {one_line(error)}") from None
