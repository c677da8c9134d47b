"""The repository as a whole: imports point one way, recipes are valid, and what the README tells people to type works."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import train
from scripts.check_imports import violations
from scripts.recipe_schema import SCHEMA_PATH, schema_text
from tests.training.tiny_pretrained import save_tiny_llama
from training.plan import plan
from training.recipe import model_config
from training.recipe_file import MAY_CHANGE_ON_RESUME, load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# How each command of the README's ```bash blocks is tested. A new command needs a line here.
#   "as it is"      run by a test of this file
#   "dry run"       run by a test of this file with --dry-run
#   "help"          the program and its verb are there: run with --help
#   "make"          the target is there; .ci/run goes through `make test`
#   FILE::TEST      that test runs the same
#   "elsewhere"     needs what a test machine lacks: a network, a cluster, a GPU
README_COMMANDS = {
    "git clone": "elsewhere",
    "cd burnish": "elsewhere",
    "make quickstart": "make",
    "make test": "make",
    "make benchmark": "make",
    "make setup": "make",
    "make setup PYTHON=python3.12": "make",
    "make quickstart SETUP=skip": "make",
    "pip install": "elsewhere",
    ". .venv/bin/activate": "elsewhere",
    "python train.py recipes/python_10m.yaml --dry-run --ranks 8": "as it is",
    "python train.py recipes/python_10m.yaml": "dry run",
    "python train.py recipes/python_10m.yaml optimizer.learning_rate=1e-3 training.precision=fp32": "dry run",
    "deepspeed train.py recipes/python_10m.yaml": "tests/distributed/test_training.py::test_other_launchers",
    "torchrun --nproc_per_node=8 train.py recipes/python_10m.yaml": "tests/distributed/test_training.py::test_other_launchers",
    "srun --ntasks-per-node=8 --gpus-per-node=8 python train.py recipes/fineweb_outlier_protected_1b.yaml": "elsewhere",
    "deepspeed --hostfile hosts train.py recipes/fineweb_outlier_protected_1b.yaml": "elsewhere",
    "python train.py --resume runs/python_10m": "tests/distributed/test_training.py::test_resume_is_bit_exact",
    "python -m scripts.prepare_data recipes/python_10m.yaml": "help",
    "python -m analysis trajectory runs/python_10m": "help",
    "python -m analysis export runs/python_10m --out exported": "help",
    "python -m analysis signal recipes/python_10m.yaml --depth 8 32": "help",
    "python -m analysis outliers runs/python_10m --data my_text.txt": "help",
    "python -m analysis quantization runs/quickstart_pre_norm runs/quickstart_outlier_protected --out int8": "help",
    "python -m analysis connectivity runs/quickstart_pre_norm": "help",
    "python -m analysis report runs/quickstart_pre_norm runs/quickstart_outlier_protected --out compared": "help",
}


def readme_commands() -> list[str]:
    """Each command line of the README's ```bash blocks, comments removed and continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [" ".join(line.partition(" #")[0].split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [command for line in commands for command in line.split(" && ")]


def how_tested(command: str) -> str | None:
    """The entry of a command, or of the longest beginning of it that the table marks as out of reach."""
    if command in README_COMMANDS:
        return README_COMMANDS[command]
    return next((how for known, how in README_COMMANDS.items() if how == "elsewhere" and command.startswith(known + " ")), None)


def run(command: str, *more: str) -> subprocess.CompletedProcess[str]:
    words = command.split()
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:], *more], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_readme_command_is_tested() -> None:
    commands = readme_commands()
    assert len(commands) > 10
    unknown = [command for command in commands if how_tested(command) is None]
    assert not unknown, f"say in README_COMMANDS how these are tested: {unknown}"
    unused = [known for known in README_COMMANDS if not any(command == known or command.startswith(known + " ") for command in commands)]
    assert not unused, f"no longer in the README: {unused}"


@pytest.mark.parametrize("command", [command for command, how in README_COMMANDS.items() if how in ("as it is", "dry run", "help")])
def test_readme_command_runs(command: str) -> None:
    how = README_COMMANDS[command]
    if how == "help":  # the words up to the first path are the program and its verb
        command = command.partition(" runs/")[0].partition(" recipes/")[0]
    done = run(command, *{"as it is": [], "dry run": ["--dry-run"], "help": ["--help"]}[how])
    assert done.returncode == 0, done.stderr


def test_the_equation_in_the_readme_is_what_its_command_prints() -> None:
    (shown,) = re.findall(r"^    (tokens per step .*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    (command,) = [command for command in readme_commands() if command.endswith("--dry-run --ranks 8")]
    assert shown in run(command).stdout.splitlines()


@pytest.mark.parametrize("command", [command for command, how in README_COMMANDS.items() if how == "make"])
def test_readme_target_exists(command: str) -> None:
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", sorted({how for how in README_COMMANDS.values() if "::" in how}))
def test_the_test_of_a_readme_command_exists(where: str) -> None:
    path, _, name = where.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_passes_a_dry_run(
    path: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The plan is printed, nothing is written, and the first line points editors to the schema."""
    places = [f"run.folder={tmp_path}/runs", f"data.prepared={tmp_path}/prepared"]
    if load_recipe(path).recipe.model.pretrained is not None:  # there is no hub here: a tiny model stands in
        save_tiny_llama(tiny := tmp_path_factory.mktemp("tiny"))
        places += [f"model.pretrained={tiny}", "training.sequence_length=64"]
    if load_recipe(path).recipe.data.source == "files":  # a text of your own
        places += [f"data.paths=[{path}]"]
    monkeypatch.setattr("sys.argv", ["train.py", str(path), *places, "--dry-run"])
    train.main()
    assert "tokens per step" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_batch_equation_in_a_comment_is_true(path: Path) -> None:
    """A recipe that spells out its batch says what the plan says."""
    for ranks, micro, accumulation, length in re.findall(
        r"= (\d+) ranks? x (\d+) micro-batch x (\d+) accumulation x (\d+) length", path.read_text()
    ):
        recipe = load_recipe(path).recipe
        batch = plan(recipe, model_config(recipe, recipe.data.tokenizer.vocab_size), int(ranks)).batch
        assert (batch.micro_batch_size, batch.accumulation, batch.sequence_length) == (int(micro), int(accumulation), int(length))


def test_every_program_of_scripts_can_be_imported() -> None:
    """Evidence is made by some of them alone, where a renamed function would show only then."""
    for path in sorted((ROOT / "scripts").glob("[!_]*.py")):
        importlib.import_module(f"scripts.{path.stem}")


def test_schema_is_up_to_date() -> None:
    assert SCHEMA_PATH.read_text() == schema_text(), "run python -m scripts.recipe_schema"


def test_schema_knows_every_key_of_the_recipes() -> None:
    """Each key of each recipe is a property of the schema, so that an editor marks a mistyped one."""
    schema = yaml.safe_load(schema_text())  # JSON is YAML
    sections = schema["$defs"]
    assert schema["additionalProperties"] is False
    for path in RECIPES:
        for name, section in yaml.safe_load(path.read_text()).items():
            if name != "deepspeed":
                choices = schema["properties"][name].get("anyOf", [schema["properties"][name]])  # a section that may be left out
                definition = sections[choices[0].get("$ref", f"/{name.title()}Section").rpartition("/")[2]]
                assert definition["additionalProperties"] is False
                assert set(section) <= set(definition["properties"]), f"{path.name}: {name}"


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("model/blocks.py", "import os\nimport training.data\n", "model/blocks.py:2: model must not import training.data"),
        ("analysis/maps.py", "def f():\n    from training import loop\n", "analysis/maps.py:2: analysis must not import training"),
        ("analysis/maps.py", "import deepspeed.comm as dist\n", "analysis/maps.py:1: analysis must not need deepspeed"),
        ("training/deep/x.py", "from ... import scripts\n", "training/deep/x.py:1: training must not import scripts"),
        ("train.py", "import analysis\n", "train.py:1: train must not import analysis"),
        ("scripts/x.py", "from tests.conftest import y\n", "scripts/x.py:1: scripts must not import tests.conftest"),
        ("model/x.py", "import sentencepiece\n", "model/x.py:1: model must not need sentencepiece"),
        ("model/x.py", "import torch\n\ntorch.distributed.barrier()\n", "model/x.py:3: model must not need torch.distributed"),
        ("model/x.py", "from torch import distributed as d\n", "model/x.py:1: model must not need torch.distributed"),
        ("model/x.py", "import torch.distributed.nn as d\n", "model/x.py:1: model must not need torch.distributed"),
        ("model/x.py", "from torch.distributed import nn\n", "model/x.py:1: model must not need torch.distributed"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path: Path, file: str, text: str, expected: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert violations(tmp_path) == [expected]


def test_right_imports_are_left_alone(tmp_path: Path) -> None:
    for file, text in {
        "training/loop.py": "from model import config\nfrom . import data\nimport deepspeed\nimport modeling\nimport torch.distributed\n",
        "analysis/report.py": "import model.config\nimport torch\n",
        "scripts/all.py": "import training, analysis, model, train\n",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path) == []


def test_the_page_lists_what_may_change_on_resume() -> None:
    listed = re.search(r"What may change: (.*?)\.\n", (ROOT / "docs" / "run_folder.md").read_text(), flags=re.DOTALL)
    assert listed is not None
    assert sorted(re.findall(r"`([\w.]+)`", listed[1])) == sorted(key.removesuffix(".") for key in MAY_CHANGE_ON_RESUME)


def test_the_result_of_a_script_appears_when_it_is_whole() -> None:
    """What --out names is written beside and renamed: a script that is ended while it writes leaves what was there."""
    directly = re.compile(r"\bout\.write_text\(|open\((arguments\.)?out\b|write_text\(json\.dumps\((result|summary|described)\b")
    assert [path.name for path in (ROOT / "scripts").glob("*.py") if directly.search(path.read_text())] == []


def test_every_declared_package_has_a_pin() -> None:
    """`make setup` gives everybody the same versions: each dependency of pyproject.toml is pinned, within its range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"
    oldest = [Requirement(line) for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if line and not line.startswith("#")]
    ranges = {Requirement(text).name: Requirement(text) for text in project["dependencies"]}
    for requirement in oldest:
        (pin,) = requirement.specifier
        assert ranges[requirement.name].specifier.contains(pin.version)
