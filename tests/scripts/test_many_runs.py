"""What scripts that train many runs share: nothing known is lost, nothing else is read, nothing fails unseen."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from model.errors import InputError
from model.transformer import Transformer
from scripts.ablate_trajectories import effects
from scripts.compare_recipes import main as compare_recipes
from scripts.many_runs import Results, common_corpus, run_python
from tests.analysis.conftest import CONFIG, write_checkpoint


def prepared(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"content_hash": content}))
    return folder


def test_a_later_call_knows_what_an_earlier_one_found(tmp_path: Path) -> None:
    first = Results(tmp_path / "deep" / "results.json")
    first.header["command"] = "x"
    first.set("a", loss=1.5)
    first.set("a", sharpness=2.0)
    first.set("b", loss=2.5)
    again = Results(tmp_path / "deep" / "results.json")
    assert again.runs == {"a": {"loss": 1.5, "sharpness": 2.0}, "b": {"loss": 2.5}}
    assert again.header == {"command": "x"}


def test_runs_of_another_text_are_not_mixed_in(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "corpus").write_text(str(prepared(tmp_path / "one", "1")))
    results = Results(tmp_path / "results.json")
    assert common_corpus(runs, results, "never read", []) == tmp_path / "one"
    results.set("a", loss=1.0)
    (runs / "corpus").write_text(str(prepared(tmp_path / "two", "2")))
    with pytest.raises(SystemExit, match="read another text"):
        common_corpus(runs, Results(tmp_path / "results.json"), "never read", [])


def test_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.belong_to(overrides=["a=1"], base=2)
    results.set("a", loss=1.0)
    again = Results(tmp_path / "results.json")
    again.belong_to(overrides=["a=1"], base=2)
    with pytest.raises(InputError, match=r"results.json: holds runs with base 2, not 3: name another --out"):
        again.belong_to(overrides=["a=1"], base=3)


def test_recipes_are_compared_under_the_overrides_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Launched again with others it trains nothing and shows nothing; a results file that kept none was made without."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.distributed.leave", sys.exit)
    trained: list[list[str]] = []
    diverging: set[float] = set()

    def train(name: str, arguments: list[str], may_say: str) -> bool:
        trained.append(arguments)
        folder = tmp_path / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder / "checkpoints" / "step-00000001", Transformer(CONFIG), 1)
        (folder / "environment.json").write_text("{}")
        places = {"layer 0": {"kurtosis": 2.0}}
        rate = float(next(a for a in reversed(arguments) if a.startswith("optimizer.learning_rate=")).partition("=")[2])
        if rate in diverging:
            return False
        record = {"step": 1, "validation_loss": 3.25 + abs(math.log2(rate / 0.01)), "activations": places}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return True

    monkeypatch.setattr("scripts.compare_recipes.run_python", train)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "corpus").write_text(str(prepared(tmp_path / "text", "1")))
    recipe = str(Path(__file__).parents[2] / "recipes" / "blocks_pre_norm.yaml")

    def compare(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["compare_recipes", *arguments, "--runs", "runs", "--out", "out.json", "--rounds", "1"])
        try:
            return compare_recipes()
        except SystemExit as stopped:
            return int(stopped.code or 0)

    faster = ("--overrides", "optimizer.learning_rate=0.01")
    assert compare(recipe, *faster) == compare(recipe, *faster) == 0
    assert len(trained) == 1 and "optimizer.learning_rate=0.01" in trained[0]
    assert capsys.readouterr().out.count("| 3.250 |") == 2
    assert compare(recipe) == 2
    said = capsys.readouterr()
    assert said.err == "error: out.json: holds runs with overrides ['optimizer.learning_rate=0.01'], not []: name another --out\n"
    assert said.out == "" and len(trained) == 1
    header = json.loads((tmp_path / "out.json").read_text())
    del header["overrides"]
    (tmp_path / "out.json").write_text(json.dumps(header))
    assert (compare(recipe), compare(recipe, *faster)) == (0, 2)
    assert compare(recipe, "typo.yaml") == 2 and "typo.yaml" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "out.json").unlink()
    trained.clear()
    capsys.readouterr()
    assert compare(recipe, "--learning-rates", "0.04", "0.02", "--seeds", "2", "3") == 0
    assert [[a for a in one if a.startswith(("run.seed", "optimizer"))] for one in trained] == [
        ["run.seed=100", "optimizer.learning_rate=0.04"],
        ["run.seed=100", "optimizer.learning_rate=0.02"],
        ["run.seed=100", "optimizer.learning_rate=0.01"],  # the best so far was the least
        ["run.seed=100", "optimizer.learning_rate=0.005"],
        ["run.seed=2", "optimizer.learning_rate=0.01"],
        ["run.seed=3", "optimizer.learning_rate=0.01"],
    ]
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "blocks_pre_norm" in line and "|" in line]
    assert row.startswith("| `blocks_pre_norm` | 0.01 | 2 | 3.250 ± 0.000 | 2.00 ± 0.00 | ")
    (tmp_path / "out.json").unlink()
    trained.clear()
    diverging |= {0.005, 0.01}
    assert compare(recipe, "--learning-rates", "0.02", "0.01") == 0  # beyond it nothing lower is tried
    assert [[a for a in one if a.startswith(("run.seed", "optimizer"))][-1] for one in trained] == [
        f"optimizer.learning_rate={rate}" for rate in (0.02, 0.01, 0.04, 0.02)
    ]
    assert compare(recipe, "--learning-rates", "0.005", "0.01") == 2
    assert "diverges at every one of --learning-rates: give smaller ones" in capsys.readouterr().err
    (tmp_path / "out.json").unlink()
    assert compare(recipe, "--overrides", "optimizer.learning_rate=0.01", "--seeds", "0", "1") == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "blocks_pre_norm" in line and "|" in line]
    assert row.startswith("| `blocks_pre_norm` | 0.01 | 2, 2 diverged |  |  | ")


def test_a_failure_is_told_and_one_that_is_a_result_is_not(tmp_path: Path) -> None:
    fails = ["-c", "import sys; print('loss 3'); print('diverged at 7'); sys.exit(1)"]
    assert run_python("good", ["-c", "print('said')"], tmp_path / "logs" / "good.log")
    assert (tmp_path / "logs" / "good.log").read_text() == "said\n"
    assert not run_python("diverges", fails, may_say=r"diverged at \d+")
    with pytest.raises(SystemExit, match=r"(?s)fails: failed with exit code 1.*diverged at 7"):
        run_python("fails", fails, may_say="another reason")
    with pytest.raises(SystemExit, match="exit code 2"):
        run_python("refused", ["-c", "import sys; print('diverged at 7'); sys.exit(2)"], may_say="diverged")


def test_an_effect_is_between_runs_that_differ_in_one_factor_alone() -> None:
    def run(momentum: float, decay: float, seed: int, value: float) -> dict:
        settings = {"momentum": momentum, "weight_decay": decay, "learning_rate": 0.002, "batch": 512}
        return {"settings": settings, "seed": seed, "figures": {"omega": value}}

    grid = [run(0.0, 0.0, 0, 1.0), run(0.9, 0.0, 0, 1.5), run(0.0, 1.0, 0, 3.0), run(0.9, 0.0, 1, 100.0)]
    found = effects(grid, "omega")
    assert found["momentum"] == {"mean": 0.5, "deviation": 0.0, "pairs": 1, "up": 1}
    assert found["weight_decay"]["mean"] == 2.0
    assert "batch" not in found
