"""Rank discovery under each launcher's environment."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.errors import InputError
from training.distributed import Ranks, TrainingStoppedError, discover, one_clear_line, sum_over_ranks
from training.engine import gpu_of

ROOT = Path(__file__).resolve().parents[2]


def test_torchrun() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert discover(env) == Ranks(5, 8, 1, 4)


def test_deepspeed_launcher() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert discover(env) == Ranks(1, 2, 1, 2)


def test_srun() -> None:
    env = {
        "SLURM_JOB_ID": "412345", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NODELIST": "node07,node09",
    }  # fmt: skip
    assert discover(env) == Ranks(9, 16, 1, 8)
    assert env["MASTER_ADDR"] == "node07" and 20000 <= int(env["MASTER_PORT"]) < 40000
    assert env["RANK"] == "9" and env["WORLD_SIZE"] == "16" and env["LOCAL_RANK"] == "1"


def test_inside_a_slurm_batch_script_plain_python_is_one_rank() -> None:
    env = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert discover(env) == Ranks(0, 1, 0, 1)


def test_a_rank_takes_its_own_gpu_or_the_only_one_that_slurm_shows_it() -> None:
    third = Ranks(11, 16, 3, 8)
    assert gpu_of(third, 8, {}) == 3
    assert gpu_of(third, 1, {"SLURM_STEP_ID": "0"}) == 0
    for visible, environment in ((1, {}), (2, {"SLURM_STEP_ID": "0"})):
        with pytest.raises(InputError, match=f"rank 11 is number 3 on its host, of 8, and {visible} GPUs are visible to it"):
            gpu_of(third, visible, environment)


def test_plain_python() -> None:
    env: dict[str, str] = {}
    assert discover(env) == Ranks(0, 1, 0, 1)
    assert env["MASTER_ADDR"] == "127.0.0.1" and int(env["MASTER_PORT"]) > 0


@pytest.mark.parametrize("env", [{"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_a_contradictory_environment_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(InputError, match="launcher environment"):
        discover(env)


def test_sum_keeps_float64() -> None:
    small = 1 + 2.0**-40
    assert sum_over_ranks(torch.tensor(3.0), small, device=torch.device("cpu")) == [3.0, small]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("x: wrong; do y"), 2, "x: wrong; do y"),
        (TrainingStoppedError("stopped at step 7"), 1, "stopped at step 7"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), 2, "a/b: No space left; make room or allow writing, and launch again"),
        (OSError(errno.EISDIR, "Is a directory", "a/b"), 2, "a/b: Is a directory; move it out of the way, and launch again"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a/b"), 2, "a/b: File name too long; give a shorter name, and launch again"),
    ],
)
def test_one_clear_line(error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    codes = []
    monkeypatch.setattr("training.distributed.leave", codes.append)
    monkeypatch.delenv("RANK", raising=False)
    with one_clear_line():
        raise error
    assert codes == [code] and capsys.readouterr().err == f"error: {said}\n"


def test_nobody_who_reads_ends_a_command_without_a_word() -> None:
    """As `python train.py ... | head` does: what was printed is more than was read."""
    program = "from training.distributed import one_clear_line\nwith one_clear_line():\n    print('x' * AMOUNT)\nprint('after')"
    for amount in (10, 10**6):  # left in Python's buffer until the end, and not
        process = subprocess.Popen(
            [sys.executable, "-c", program.replace("AMOUNT", str(amount))], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


def test_a_pipe_of_our_own_that_breaks_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.distributed.leave", lambda code: pytest.fail("it was taken for standard output"))
    with pytest.raises(BrokenPipeError), one_clear_line():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.ENOENT, "No such file", "a/b")])
def test_a_fault_of_ours_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.distributed.leave", lambda code: pytest.fail("it was taken for another's"))
    with pytest.raises(type(error)), one_clear_line():
        raise error
