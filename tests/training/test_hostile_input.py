"""Files from strangers: nothing in them runs, leads out of its folder, or ends in a traceback. `scripts/fuzz.py` tries many more."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.errors import InputError
from training.checkpoint import newest_whole, read_manifest
from training.data import open_prepared
from training.distributed import Ranks
from training.recipe_file import load_recipe
from training.tokenizer import pretrained_tokenizer

ALONE = Ranks(0, 1, 0, 1)


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.system ["touch TRAP"]', '!!python/object/new:os.system ["touch TRAP"]', "!!python/name:os.system",
        "[" * 3000, "{a: " * 600 + "}" * 600, "9" * 6000, "{[1]: 2}", "{1: 2}", "*nowhere", "&a [*a]", "\x07",
    ],
)  # fmt: skip
def test_no_yaml_tag_runs_and_no_yaml_breaks_the_reader(value: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for place in ("{key}: {value}", "run: {{{key}: {value}}}", "deepspeed: {{{key}: {value}}}"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(place.format(key="seed", value=value.replace("TRAP", str(trap))))
        with pytest.raises(InputError) as refused:
            load_recipe(recipe)
        assert len(str(refused.value)) < 20_000
        with pytest.raises(InputError):
            load_recipe(recipe, [f"run.seed={value.replace('TRAP', str(trap))}"])
    assert not trap.exists()


def test_a_recipe_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# " + "x" * (2 << 20))
    with pytest.raises(InputError, match="a recipe has at most"):
        load_recipe(recipe)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    (folder / "tokenizer").mkdir(parents=True)
    shards = {}
    for split in ("train", "validation"):
        content = np.arange(90, dtype="<u2").tobytes()
        (folder / f"{split}-00000.bin").write_bytes(content)
        shards[split] = {
            "tokens": 90, "documents": 1,
            "shards": [{"file": f"{split}-00000.bin", "tokens": 90, "sha256": hashlib.sha256(content).hexdigest()}],
        }  # fmt: skip
    manifest = {"format": 1, "vocab_size": 100, "end_of_text": 3, "dtype": "uint16", "content_hash": "x", "validation_unigram_loss": 4.0}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **shards}))
    assert open_prepared(folder).train_tokens == 90
    return folder


def change(folder: Path, keys: tuple[Any, ...], value: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    *parents, key = keys
    inner = manifest
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / ".verified.json").unlink()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("train", "shards", 0, "file"), "../../etc/passwd", "not a file of this folder"),
        (("train", "shards", 0, "file"), "/etc/passwd", "not a file of this folder"),
        (("train", "shards", 0, "file"), 7, "cannot be read"),
        (("train", "shards", 0, "tokens"), -90, "cannot be read"),
        (("train", "tokens"), 10**9, "its shards have 90"),
        (("train", "shards"), {}, "its shards have 0"),
        (("dtype",), "object", "expected uint16"),
        (("dtype",), "uint32", "expected uint16"),
        (("vocab_size",), "many", "cannot be read"),
        (("vocab_size",), 50, "has token 89, outside the vocabulary of 50"),
        (("end_of_text",), 100, "end_of_text"),
        (("content_hash",), None, "cannot be read"),
    ],
)
def test_a_prepared_folder_of_a_stranger(keys: tuple[Any, ...], value: Any, message: str, prepared: Path) -> None:
    change(prepared, keys, value)
    with pytest.raises(InputError, match=message):
        open_prepared(prepared)


def test_a_tokenizer_that_leads_out_of_its_folder(prepared: Path) -> None:
    """Following the link would copy a file of this machine into the run folder."""
    (prepared / "tokenizer" / "vocabulary").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="leads out of the folder"):
        open_prepared(prepared)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    with pytest.raises(InputError):
        pretrained_tokenizer(str(tmp_path))
    assert not trap.exists()


def test_a_manifest_that_names_a_pipe_or_a_device_does_not_hang(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        manifest = {"step": 1, "tokens": 1, "world_size": 1, "zero_stage": 0, "files": {name: {"size": 0, "sha256": ""}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError):
            read_manifest(folder)
        with pytest.raises(InputError, match="no whole checkpoint"):
            newest_whole(tmp_path, ALONE)
