"""What scripts that train many runs share: nothing known is lost, nothing else is read, nothing fails unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.ablate_trajectories import effects
from scripts.many_runs import Results, common_corpus, run_python


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
