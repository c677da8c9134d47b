"""Launches that are moved, stopped, killed, hung and fed bad numbers: each goes on as if nothing had happened, or says what is wrong.

survival_worker.py makes the launches, in one go; here is what must have come of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.shards import open_checkpoint
from model.transformer import Transformer
from tests.distributed.conftest import ROOT, records
from tests.distributed.resharding_worker import LAYOUTS
from tests.distributed.survival_worker import RUNS
from training.data import Sequences, open_prepared
from training.recipe import model_config
from training.recipe_file import load_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1600)]  # two minutes on a quiet machine, far more on a busy one
ROUNDING = 2e-6  # relative: float32 sums taken in another order


@pytest.fixture(scope="module")
def seen(workplace: Path) -> dict[str, Any]:
    out = workplace / "survival.json"
    command = [sys.executable, "-m", "tests.distributed.survival_worker", str(workplace / "recipe.yaml"), str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text())


def test_every_launch_left_whole_checkpoints_alone(seen: dict[str, Any]) -> None:
    for key, launch in seen.items():
        assert not any(launch["checkpoints"].values()), (key, launch["checkpoints"])


def test_from_ranks_to_ranks_and_stage_to_stage_in_one_run(seen: dict[str, Any]) -> None:
    """2 -> 1 -> 3 -> 2 ranks, ZeRO 1 -> 3 -> 2 -> 0, with widths that divide by none of them: the losses of the run that stayed."""
    reference = seen["reference"]["losses"]
    assert sorted(map(int, reference)) == list(range(1, 9))
    assert seen["moved 4"]["losses"] == pytest.approx(reference, rel=ROUNDING)
    for number, (ranks, stage) in enumerate([(2, 1), (1, 3), (3, 2), (2, 0)], start=1):
        launch = seen[f"moved {number}"]
        assert launch["codes"] == [0] * ranks and f"ZeRO-{stage}" in launch["log"]
        assert number == 1 or f"from step {2 * (number - 1)}," in launch["log"]


def test_sharpness_aware_steps_and_their_second_moment_move_too(seen: dict[str, Any]) -> None:
    """Preconditioned Functional-SAM on every second step, stopped after an odd one: the direction needs AdamW's second moment."""
    assert seen["sharp 2"]["losses"] == pytest.approx(seen["sharp"]["losses"], rel=10 * ROUNDING)
    assert seen["sharp"]["losses"] != pytest.approx(seen["reference"]["losses"], rel=1e-3)


def test_sigterm_to_one_rank_saves_and_exits_with_75(seen: dict[str, Any]) -> None:
    stopped, again = seen["stopped"], seen["stopped again"]
    assert stopped["codes"] == [75, 75] and "stopped on request" in stopped["log"]
    assert list(stopped["checkpoints"]) == ["step-00000004"]  # asked before step 3, known to all after step 4
    assert again["codes"] == [0, 0] and again["losses"] == seen["reference"]["losses"]


def test_a_killed_rank_is_named_and_the_run_goes_on(seen: dict[str, Any]) -> None:
    killed = seen["killed"]
    assert killed["codes"] == [1, -9]
    line = killed["log"].splitlines()[-1]
    assert line.startswith("error: lost in the middle of step 6: rank 1 on ") and "Traceback" not in killed["log"]
    assert seen["killed again"]["losses"] == seen["reference"]["losses"]


@pytest.mark.parametrize("where", ["kill_saving", "kill_written", "kill_renaming"])
def test_killed_inside_a_save(where: str, seen: dict[str, Any]) -> None:
    """The checkpoint before stays; what was half-written is not taken for one, and is gone after the next save."""
    assert seen[where]["codes"] == [-9] and list(seen[where]["checkpoints"]) == ["step-00000004"]
    again = seen[f"{where} again"]
    assert again["codes"] == [0] and "from step 4," in again["log"]
    assert again["losses"] == pytest.approx(seen["reference"]["losses"], rel=ROUNDING)


def test_nothing_hidden_is_left(seen: dict[str, Any], workplace: Path) -> None:
    for name in ("kill_saving", "kill_written", "kill_renaming"):
        assert not [path.name for path in (workplace / RUNS / name / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_hung_rank_ends_the_run_with_every_stack(seen: dict[str, Any], workplace: Path) -> None:
    hung = seen["hung"]
    assert hung["codes"] == [1, 1]
    assert "error: stopped: no progress for" in hung["log"] and "since step 6" in hung["log"]
    assert re.search(r"rank 0 on .*: .* in _forward_backward, waiting in all_reduce", hung["log"])
    assert re.search(r"rank 1 on .*: faults.py:\d+ in before_step", hung["log"])
    for rank, function in ((0, "all_reduce"), (1, "before_step")):
        assert f"in {function}" in (workplace / RUNS / "hung" / "stacks" / f"rank-{rank:05d}.txt").read_text()


def test_a_frozen_rank_is_named(seen: dict[str, Any]) -> None:
    """SIGSTOP: it can say nothing itself."""
    frozen = seen["frozen"]
    assert frozen["codes"] == [1, -9]  # the second by the launcher
    assert re.search(r"error: stopped: no sign of life for 3 s from rank 1 on ", frozen["log"])
    assert "no stack: it is stopped, dead, or cut off" in frozen["log"]


def test_a_run_that_is_suspended_whole_goes_on_when_it_wakes(seen: dict[str, Any]) -> None:
    """For longer than a rank may give no sign of life, and get no further."""
    assert seen["suspended"]["codes"] == [0, 0], seen["suspended"]["log"]
    assert seen["suspended"]["seconds"] > 8
    assert seen["suspended"]["losses"] == seen["reference"]["losses"]


def test_what_is_written_beside_training_is_the_step_it_is_named_after(seen: dict[str, Any], workplace: Path) -> None:
    """Weights and moments, bit for bit those of a save at once, though the weights went on while it was written; and the same losses."""
    assert seen["beside"]["codes"] == [0, 0] and seen["beside"]["losses"] == seen["reference"]["losses"]
    assert list(seen["beside"]["checkpoints"]) == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    for step in (4, 8):
        there, here = (open_checkpoint(workplace / RUNS / name / "checkpoints" / f"step-{step:08d}") for name in ("reference", "beside"))
        for name in there.shapes:
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(there.tensor(name, kind), here.tensor(name, kind)), (step, name, kind)
    saved = {r["step"]: r for r in records(workplace / RUNS / "beside") if "save_seconds" in r}
    assert list(saved) == [2, 4, 6, 8] and all(0 < r["save_wait_seconds"] <= r["save_seconds"] + 0.1 for r in saved.values())
    at_once = [r for r in records(workplace / RUNS / "reference") if "save_seconds" in r]
    assert [r["step"] for r in at_once] == [4, 8] and all(r["save_seconds"] == r["save_wait_seconds"] for r in at_once)


def test_a_death_while_a_checkpoint_is_written_beside_loses_nothing_older(seen: dict[str, Any]) -> None:
    killed = seen["beside killed"]
    assert killed["codes"] == [1, -9] and list(killed["checkpoints"]) == ["step-00000002"]
    assert "rank 1 on " in killed["log"] and "Traceback" not in killed["log"]
    assert "from step 2," in seen["beside killed again"]["log"]
    assert seen["beside killed again"]["losses"] == seen["reference"]["losses"]


def test_stopping_an_error_and_a_rewind_wait_for_what_is_written_beside(seen: dict[str, Any], workplace: Path) -> None:
    stopped = seen["beside stopped"]
    assert stopped["codes"] == [75, 75] and list(stopped["checkpoints"]) == [f"step-{step:08d}" for step in (2, 4, 6)]
    assert seen["beside too many"]["codes"] == [1, 1] and "steps in a row had non-finite" in seen["beside too many"]["log"]
    assert list(seen["beside too many"]["checkpoints"]) == ["step-00000002", "step-00000004"]
    assert "step 6: back to step 4," in seen["beside rewound"]["log"]
    assert seen["beside rewound"]["losses"] == seen["rewound"]["losses"]


def test_a_save_beside_training_that_hangs_ends_the_run(seen: dict[str, Any], workplace: Path) -> None:
    hung = seen["beside hung"]
    assert hung["codes"] == [1, 1] and list(hung["checkpoints"]) == ["step-00000002"]
    assert re.search(r"error: stopped: no progress for \d+ s, since saving step 4 beside training", hung["log"])
    assert "in at_save" in (workplace / RUNS / "beside_hung" / "stacks" / "rank-00001.txt").read_text()


def test_an_error_of_a_save_beside_training_ends_the_run_on_every_rank(seen: dict[str, Any]) -> None:
    vanished = seen["beside vanished"]
    assert vanished["codes"] == [2, 2] and "Traceback" not in vanished["log"]
    assert re.search(
        r"error: .*a checkpoint could not be written: .*Step 4 is not saved; the last whole checkpoint is \S+2\b", vanished["log"]
    )
    assert list(vanished["checkpoints"]) == ["step-00000002"]


def test_a_clock_that_jumps_changes_nothing(seen: dict[str, Any]) -> None:
    """Neither the newest checkpoint, the losses, the time left nor the watchdog go by the wall clock."""
    assert seen["clock"]["codes"] == [0, 0] == seen["clock again"]["codes"]
    assert "from step 4," in seen["clock again"]["log"]
    assert seen["clock again"]["losses"] == seen["reference"]["losses"]
    left = re.findall(r"tok/s  (\S+) left", seen["clock"]["log"] + seen["clock again"]["log"])
    assert len(left) == 8 and all(re.fullmatch(r"\d+s|\dm\d\ds", time) for time in left), left
    assert seen["clock hung"]["codes"] == [1, 1] and "error: stopped: no progress for" in seen["clock hung"]["log"]


def test_a_full_and_a_read_only_disk(seen: dict[str, Any]) -> None:
    """A real file system: one clear line, the whole checkpoints stay, and with room the run goes on."""
    if seen["disk"]["refused"]:
        pytest.skip(f"mounting a small disk is not permitted here: {seen['disk']['refused']}")
    for key in ("full", "read-only"):
        assert seen[key]["codes"] == [2] and "Traceback" not in seen[key]["log"], seen[key]["log"]
        assert seen[key]["log"].count("error: ") == 1
        assert "step-00000002" in seen[key]["checkpoints"] and len(seen[key]["checkpoints"]) < 4
    assert re.search(r"error: .*(disk full|No space left).*the last whole checkpoint is", seen["full"]["log"])
    assert "Read-only file system" in seen["read-only"]["log"]
    again = seen["full again"]
    assert again["codes"] == [0] and again["losses"] == pytest.approx(seen["reference"]["losses"], rel=ROUNDING)


def test_skips_in_a_row_are_counted_across_a_resume(seen: dict[str, Any], workplace: Path) -> None:
    assert seen["nan"]["codes"] == [0, 0] and "(1 in a row)" in seen["nan"]["log"]
    again = seen["nan again"]
    assert again["codes"] == [1, 1] and "Traceback" not in again["log"]
    assert "error: stopped at step 7: 2 steps in a row had non-finite gradients" in again["log"]
    assert [r["skipped_steps"] for r in records(workplace / RUNS / "nan_stopped") if "skipped_steps" in r][-1] == 2


def test_a_checkpoint_before_the_first_update_has_no_moments_to_read(seen: dict[str, Any]) -> None:
    """The first step was skipped, so it holds none; the run goes on as the one that was not stopped there."""
    assert seen["nothing yet"]["codes"] == [0, 0] == seen["nothing yet again"]["codes"]
    assert "from step 1," in seen["nothing yet again"]["log"]
    expected = {step: loss for step, loss in seen["first skipped"]["losses"].items() if step != "1"}
    assert {step: loss for step, loss in seen["nothing yet again"]["losses"].items() if step != "1"} == expected


def test_a_skipped_spike_leaves_the_step_out(seen: dict[str, Any]) -> None:
    """The same losses as where the step's gradient was not finite, which is another way to leave it out; at every kind of optimizer."""
    expected = {step: loss for step, loss in seen["nan"]["losses"].items() if step != "6"}
    for stage, tolerance in ((2, 0.0), (0, ROUNDING), (3, ROUNDING)):
        spike = seen[f"spike {stage}"]
        assert spike["codes"] == [0, 0] and "step 6: loss spike:" in spike["log"]
        found = {step: loss for step, loss in spike["losses"].items() if step != "6"}
        assert found == pytest.approx(expected, rel=tolerance, abs=0), stage


def test_a_rewound_run_goes_back_and_passes_over_the_data(seen: dict[str, Any], workplace: Path) -> None:
    """Step 5, taken again from the checkpoint of step 4, has the loss of that model on what would have been the seventh step's data."""
    run = workplace / RUNS / "rewound"
    assert "step 6: back to step 4, past the data of 2 steps (2 in all)" in seen["rewound"]["log"]
    assert [r["step"] for r in records(run) if "loss" in r] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    recipe = load_recipe(run / "recipe.yaml").recipe
    data = open_prepared(json.loads((run / "data.json").read_text())["prepared"])
    model = Transformer(model_config(recipe, data.vocab_size))
    open_checkpoint(run / "checkpoints" / "step-00000004").load_into(model)
    batch = Sequences(data, "train", 64, seed=recipe.run.seed, shuffle=True).batch(6 * 12, 12)
    with torch.no_grad():
        loss = model(batch.tokens, batch.targets).item() / 768
    assert seen["rewound"]["losses"]["5"] == pytest.approx(loss, rel=ROUNDING)
    manifest = json.loads((run / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert manifest["state"]["loss_spikes"]["data_ahead"] == 2


def test_a_rewind_survives_a_stop(seen: dict[str, Any], workplace: Path) -> None:
    """Stopped after step 4 of the second try, with the steps 4 and 6 of the first saved before: the next launch goes on from the second."""
    assert "step 8: back to step 2, past the data of 6 steps (6 in all)" in seen["rewound far"]["log"]
    stopped = seen["rewound and stopped"]
    assert stopped["codes"] == [75, 75] and list(stopped["checkpoints"]) == ["step-00000002", "step-00000004"]
    assert "put aside, each until its step is saved again: .abandoned-step-00000004, .abandoned-step-00000006 in " in stopped["log"]
    again = seen["rewound again"]
    assert again["codes"] == [0, 0] and "from step 4," in again["log"]
    assert again["losses"] == seen["rewound far"]["losses"]
    for name in ("rewound_far", "rewound_and_stopped"):  # every step has been saved again
        kept = sorted(path.name for path in (workplace / RUNS / name / "checkpoints").iterdir())
        assert kept == [f"step-{step:08d}" for step in (2, 4, 6, 8)]


def test_where_no_checkpoint_is_old_enough_to_go_back_to_the_step_is_left_out(seen: dict[str, Any]) -> None:
    found = seen["no way back"]
    assert found["codes"] == [0, 0] and "step 6: no checkpoint of step 5 or before to go back to" in found["log"]
    assert found["losses"] == seen["spike 2"]["losses"]


def test_too_many_spikes_stop_the_run(seen: dict[str, Any]) -> None:
    assert seen["too many"]["codes"] == [1] and "Traceback" not in seen["too many"]["log"]
    assert "error: stopped at step 7: more than 2 loss spikes within 8 steps" in seen["too many"]["log"]


@pytest.fixture(scope="module")
def reloaded(seen: dict[str, Any], workplace: Path) -> dict[str, Any]:
    """Largest differences between checkpoints that 2 ranks wrote and the ones that 3 wrote after reading those."""
    for task, ranks in (("write", 2), ("read", 3)):
        assert seen[f"resharding {task}"]["codes"] == [0] * ranks, seen[f"resharding {task}"]["log"][-5000:]
    return json.loads((workplace / "resharding" / "differences.json").read_text())


def test_weights_and_moments_keep_their_bits_from_any_stage_to_any(reloaded: dict[str, Any]) -> None:
    """fp32 and bf16, 4 x 4 stages and offload, 2 -> 3 ranks: masters and both moments, as the files written afterwards hold them."""
    cases = [f"{precision} {a} -> {b}" for precision in ("fp32", "bf16") for a in range(4) for b in range(4)]
    cases += [f"fp32 {a} -> {layout}" for a in range(4) for layout in LAYOUTS]
    assert {case: reloaded[case] for case in cases} == dict.fromkeys(cases, 0.0)


@pytest.mark.parametrize("kind", ["adafactor", "muon", "soap"])
def test_other_optimizers_change_ranks_at_stage_0(kind: str, reloaded: dict[str, Any]) -> None:
    """Weights and every tensor of the state, bit for bit."""
    assert reloaded[f"{kind} fp32"] == 0.0 and reloaded[f"{kind} bf16"] == 0.0
