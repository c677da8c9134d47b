"""Recipes as files: `load_recipe` reads one, applies `section.key=value` overrides, and reports every problem at once.

`dump_recipe` writes a recipe out again with where each value came from; `differences` holds a run's recipe beside the one that is to
continue it.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from model.errors import InputError
from model.section import Section, stands_for
from training.recipe import Recipe
from training.recipe_problems import problems_between_fields


class LoadedRecipe(typing.NamedTuple):
    """A validated recipe, where it came from, and where each of its values came from."""

    recipe: Recipe
    path: Path
    provenance: dict[str, str]  # dotted key -> "default", the file, or "command line"

    @property
    def run_folder(self) -> Path:
        return Path(self.recipe.run.folder) / (self.recipe.run.name or self.path.stem)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> LoadedRecipe:
    """Read, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, each value in YAML.

    Raises:
        InputError: every problem found, one a line.
    """
    path = Path(path)
    tree = _read_yaml(path)
    provenance = dict.fromkeys(_leaves(tree), str(path))
    problems = []
    for override in overrides or []:
        problem = _override(tree, provenance, override)
        if problem:
            problems.append(problem)
    _use_its_own_tokenizer(tree, provenance)
    refused: list[str] = []
    recipe = _validate(tree, problems, refused)
    if recipe is not None:
        problems.extend(problem for problem in problems_between_fields(recipe) if not _follows(problem, refused))
    if recipe is None or problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise InputError("\n".join([f"{path}: {count} in the recipe", *(f"  {problem}" for problem in problems)]))
    for field, (origin, _) in stands_for(recipe.model.preset, recipe.model.size).items():
        provenance.setdefault(f"model.{field}", origin)
    for leaf in _leaves(recipe.model_dump()):
        provenance.setdefault(leaf, "default")
    return LoadedRecipe(recipe, path, provenance)


def _use_its_own_tokenizer(tree: dict[str, Any], provenance: dict[str, str]) -> None:
    """A pretrained model's tokenizer is its own, where the recipe does not say otherwise."""
    source = tree["model"].get("pretrained") if isinstance(tree.get("model"), dict) else None
    data = tree.setdefault("data", {}) if isinstance(source, str) else None
    tokenizer = data.setdefault("tokenizer", {}) if isinstance(data, dict) else None
    if isinstance(tokenizer, dict):
        for key, value in (("kind", "pretrained"), ("path", source)):
            if key not in tokenizer:
                tokenizer[key] = value
                provenance[f"data.tokenizer.{key}"] = "model.pretrained"


def _validate(tree: dict[str, Any], problems: list[str], refused: list[str]) -> Recipe | None:
    """The recipe without its wrong values, so that what is wrong between fields is found as well.

    What is wrong with them goes into `problems`, and their keys into `refused`.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        remaining = copy.deepcopy(tree)
        for location, details in _by_key(error).items():
            problems.append(_describe(location, details))
            refused.append(".".join(str(part) for part in location))
            _remove(remaining, location)
    try:
        return Recipe.model_validate(remaining)
    except ValidationError:  # something required is missing
        return None


def _by_key(error: ValidationError) -> dict[tuple[int | str, ...], list[Any]]:
    """pydantic's errors by the key that they are about: of a key that may be of several kinds it has one for each of them."""
    found: dict[tuple[int | str, ...], list[Any]] = {}
    for details in error.errors():
        found.setdefault(_key_of(details), []).append(details)
    return found


def _key_of(details: Any) -> tuple[int | str, ...]:
    """The location of an error as far as it names keys: behind those pydantic names which of several kinds it tried."""
    section: Any = Recipe
    for depth, part in enumerate(details["loc"]):
        if section is None or isinstance(part, int):
            return details["loc"][: depth + isinstance(part, int)]
        section = _section_of(section, part)
    return details["loc"]


def _follows(problem: str, refused: list[str]) -> bool:
    """Whether a problem between fields may be there only since a value was refused: it names its key, or is about its whole section."""
    about = problem.partition(":")[0]
    return any(about == key.rpartition(".")[0] or re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", problem) for key in refused)


def _remove(tree: Any, location: tuple[int | str, ...]) -> None:
    """Take the value at a location out of nested mappings; what lies inside a list goes with its list."""
    for key in location[:-1]:
        if not isinstance(tree, dict) or not isinstance(tree.get(key), dict):
            break
        tree = tree[key]
    else:
        key = location[-1]
    if isinstance(tree, dict):
        tree.pop(key, None)


def dump_recipe(loaded: LoadedRecipe) -> str:
    """The resolved recipe as YAML, each value with a comment that says where it came from. It loads as a recipe again."""
    lines = [f"# Resolved from {loaded.path}. Each comment says where the value came from."]

    def emit(tree: dict[str, Any], prefix: str, indent: str) -> None:
        for key, value in tree.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, dict) and value:
                lines.append(f"{indent}{key}:")
                emit(value, f"{dotted}.", indent + "  ")
            else:
                scalar = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
                lines.append(f"{indent}{key}: {scalar}  # {loaded.provenance.get(dotted, 'default')}")

    emit(json.loads(loaded.recipe.model_dump_json()), "", "")
    return "\n".join(lines) + "\n"


# What may differ between the launch that made a run and one that continues it: nothing that changes a weight by more than rounding.
MAY_CHANGE_ON_RESUME = (
    "run.folder",
    "run.name",
    "run.stop_at_step",
    "run.hang_seconds",
    "run.lost_seconds",
    "deepspeed.zero_optimization",
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.memory_budget_gb",
    "training.compile",
    "training.profile",
    "evaluation.",
    "checkpoint.",
    "logging.",
    "data.prepared",
    "data.workers",
)


def differences(saved: Path, loaded: LoadedRecipe) -> list[str]:
    """What differs between a run's saved recipe and this one, as `key: saved there, given here`, but for what may change on resume.

    Raises:
        InputError: the saved recipe is not one.
    """
    try:
        recipe = Recipe.model_validate(_read_yaml(saved))
    except (ValidationError, InputError) as error:
        wrong = "; ".join(_describe(*item) for item in _by_key(error).items()) if isinstance(error, ValidationError) else str(error)
        raise InputError(
            f"{saved}: made by another version of Burnish, or damaged: {wrong.removeprefix(f'{saved}: ')}; go on with the version that "
            "made it, bring the file back, or give another run.name for a new run"
        ) from None
    there = _flat(recipe.model_dump(mode="json"))
    here = _flat(loaded.recipe.model_dump(mode="json"))
    return [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]


LARGEST_RECIPE = 1 << 20  # characters


class _Loader(yaml.SafeLoader):
    """YAML with two changes: numbers such as 1e-3 are numbers (YAML 1.2), and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _construct_mapping(loader: Any, node: Any) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key, _ in node.value:
        if keys.count(key.value) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _load_yaml(text: str) -> Any:
    """What YAML text says, in words, numbers, lists and mappings whose keys are words. Raises ValueError with one line else."""
    try:
        tree = yaml.load(text, _Loader)
        _require_plain(tree)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:500]) from None
    except (RecursionError, TypeError, AttributeError, KeyError, OverflowError):  # brackets in brackets without end, keys that are lists
        raise ValueError("nested too deeply, or a key that is not a word") from None
    return tree


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {str(key)[:40]} is not a word")
            _require_plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _require_plain(inner)
    elif isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"a number of {value.bit_length()} bits, and 63 are the most")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such recipe{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a recipe: {error}") from None
    if len(text) > LARGEST_RECIPE:
        raise InputError(f"{path}: {len(text)} characters, and a recipe has at most {LARGEST_RECIPE}")
    try:
        tree = _load_yaml(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)}), found {type(tree).__name__}")
    return tree


def _override(tree: dict[str, Any], provenance: dict[str, str], override: str) -> str | None:
    """Put one `section.key=value` into the tree; returns what is wrong with it, if anything."""
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return f"{override}: an override is written section.key=value"
    try:
        value = _load_yaml(text)
    except ValueError:
        return f"{override}: the value is not valid YAML"
    for depth, key in enumerate(keys[:-1], start=1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return f"{override}: {'.'.join(keys[:depth])} is a value, not a section"
    tree[keys[-1]] = value
    for leaf in [leaf for leaf in provenance if leaf == dotted or leaf.startswith(dotted + ".")]:
        del provenance[leaf]
    provenance.update({f"{dotted}.{leaf}".rstrip("."): "command line" for leaf in (_leaves(value) if isinstance(value, dict) else [""])})
    return None


def _leaves(tree: dict[str, Any]) -> list[str]:
    return list(_flat(tree))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Other names of what some keys may be, none of which is near enough in its letters
_ALIASES = {
    "float32": "fp32", "single": "fp32", "bfloat16": "bf16", "float16": "bf16", "fp16": "bf16", "half": "bf16", "mixed": "bf16",
    "wsd": "warmup_stable_decay", "trapezoidal": "warmup_stable_decay", "adam": "adamw", "fsam": "functional_sam",
}  # fmt: skip


def _describe(location: tuple[int | str, ...], errors: list[Any]) -> str:
    """What pydantic says of one key as one line: the key, what was found, what was expected, and the nearest right name."""
    path, details = [str(part) for part in location], errors[0]
    dotted, found = ".".join(path), details["input"]
    if details["type"] == "extra_forbidden":
        known = _known_names(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        elsewhere = [f"{section}.{path[-1]}" for section in Recipe.model_fields if path[-1] in _known_names([section])]
        advice = (
            f"did you mean {'.'.join([*path[:-1], near[0]])}?"
            if near
            else f"did you mean {elsewhere[0]}?"
            if elsewhere
            else f"known here: {', '.join(known)}"
        )
        return f"{dotted}: unknown key; {advice}"
    if details["type"] == "missing":
        return f"{dotted}: required, and not given"
    if all(error["type"] == "literal_error" for error in errors):
        expected = " or ".join(error["ctx"]["expected"] for error in errors)
        names = re.findall(r"'([^']*)'", expected)
        meant = _ALIASES.get(str(found).lower())
        near = [meant] if meant in names else difflib.get_close_matches(str(found), names, n=1)
        return f"{dotted}: {found!r} is not one of {expected}" + (f"; did you mean {near[0]}?" if near else "")
    messages = [error["msg"].removeprefix("Input should be ").removeprefix("a valid ") for error in errors]
    if len(errors) > 1:  # each with its own reason why not: what may be given is enough
        messages = [message.partition(", ")[0] for message in messages]
    return f"{dotted}: expected {' or '.join(messages)}, found {found!r}"


def _section_of(section: Any, key: str) -> Any:
    """What lies below a key of a section: a section, one that may be left out included, or None where there are no keys that we know."""
    field = section.model_fields.get(key)
    kinds = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _known_names(location: list[str]) -> list[str]:
    """The keys a section may have, following nested sections."""
    section: Any = Recipe
    for part in location:
        section = None if section is None else _section_of(section, part)
    return [] if section is None else list(section.model_fields)
