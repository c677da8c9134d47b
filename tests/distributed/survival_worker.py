"""Run by test_survival.py: launches that are stopped, killed, hung, moved and fed bad numbers; what came of each goes to a JSON file.

python -m tests.distributed.survival_worker RECIPE OUT.json

The ranks are forked from this process, which has imported what they need (scripts/soak.py).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scripts.soak import fork_ranks, import_before_forks, training, visible, wait
from tests.distributed import resharding_worker
from tests.distributed.conftest import losses

RUNS = "survival_runs"  # apart from those of the session's other tests
LIMIT = 500  # seconds a launch may take on a machine that others use too


class Launches:
    def __init__(self, recipe: Path) -> None:
        self.recipe, self.number = recipe, 0
        self.done: dict[str, Any] = {}

    def __call__(
        self,
        key: str,
        name: str,
        ranks: int,
        *overrides: str,
        stage: int = 2,
        faults: str = "",
        jumping_clock: bool = False,
        suspended: float = 0.0,
    ) -> None:
        """One launch of the run `name`, all of it suspended for some seconds after its third step; what is seen is kept under `key`."""
        self.number += 1
        log = self.recipe.parent / f"launch{self.number}.log"
        words = [f"run.name={name}", f"run.folder={self.recipe.parent / RUNS}", f"deepspeed.zero_optimization.stage={stage}", *overrides]
        began = time.monotonic()
        work = training(str(self.recipe), *words)
        processes = fork_ranks(with_a_jumping_clock(work) if jumping_clock else work, ranks, log, faults)
        if suspended:
            threading.Thread(target=suspend, args=(processes, log, suspended), daemon=True).start()
        codes = wait(processes, log, limit=LIMIT)
        run = self.recipe.parent / RUNS / name
        self.done[key] = {
            "codes": codes,
            "log": log.read_text(),
            "losses": losses(run) if (run / "metrics.jsonl").exists() else {},
            "checkpoints": visible(run),
            "seconds": time.monotonic() - began,
        }
        print(f"{key}: {codes} in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def suspend(processes: list[int], log: Path, seconds: float) -> None:
    """Stop all ranks when the log holds the third step, and let them go on `seconds` later, as Slurm does to a job."""
    while not (log.exists() and re.search(r"step +3/", log.read_text())):
        time.sleep(0.01)
    for number, pause in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0.0)):
        for process in processes:
            os.kill(process, number)
        time.sleep(pause)


def with_a_jumping_clock(work: Callable[[], None]) -> Callable[[], None]:
    """`work` in a process whose wall clock is a day ahead, or a day behind, or right, from one look at it to the next."""

    def started() -> None:
        right, jumps = time.time, itertools.cycle((86400.0, -86400.0, 0.0))
        time.time = lambda: right() + next(jumps)
        time.time_ns = lambda: int(1e9 * time.time())
        work()

    return started


def main() -> None:
    recipe, out = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    import_before_forks()
    launch = Launches(recipe)

    launch("reference", "reference", 2)
    # from ranks to ranks and from stage to stage, in one run
    for key, ranks, stage, stop in (("moved 1", 2, 1, 2), ("moved 2", 1, 3, 4), ("moved 3", 3, 2, 6), ("moved 4", 2, 0, 8)):
        launch(key, "moved", ranks, f"run.stop_at_step={stop}", stage=stage)
    launch("sharp", "sharp", 2, *SHARP)
    launch("sharp 1", "sharp_moved", 3, *SHARP, "run.stop_at_step=5", stage=3)
    launch("sharp 2", "sharp_moved", 1, *SHARP, stage=0)

    launch("stopped", "stopped", 2, faults="stop@3:1")
    launch("stopped again", "stopped", 2)
    launch("killed", "killed", 2, "run.lost_seconds=2", faults="kill@6:1")
    launch("killed again", "killed", 2)
    for kind in ("kill_saving", "kill_written", "kill_renaming"):
        launch(kind, kind, 1, faults=f"{kind}@8")
        launch(f"{kind} again", kind, 1)
    launch("hung", "hung", 2, "run.hang_seconds=4", faults="hang@6:1")
    launch("suspended", "suspended", 2, "run.hang_seconds=4", "run.lost_seconds=2", suspended=8.0)
    launch("frozen", "frozen", 2, "run.lost_seconds=3", faults="freeze@6:1")

    for key, (ranks, words, faults) in BESIDE.items():
        launch(key, key.replace(" ", "_"), ranks, "checkpoint.asynchronous=true", "checkpoint.every=2", *words, faults=faults)
    launch("beside killed again", "beside_killed", 2, "checkpoint.asynchronous=true", "checkpoint.every=2")

    full_disk(launch, recipe.parent)

    # the clock of the disk went back between two checkpoints, and each rank's goes back and forth
    calm = ("checkpoint.every=2", "run.hang_seconds=60", "run.lost_seconds=30")
    launch("clock", "clock", 2, *calm, "run.stop_at_step=4", jumping_clock=True)
    for step, when in ((2, 4e9), (4, 1e9)):
        folder = recipe.parent / RUNS / "clock" / "checkpoints" / f"step-{step:08d}"
        for path in (*folder.iterdir(), folder):
            os.utime(path, (when, when))
    launch("clock again", "clock", 2, *calm, "checkpoint.asynchronous=true", jumping_clock=True)
    launch("clock hung", "clock_hung", 2, "run.hang_seconds=4", faults="hang@6:1", jumping_clock=True)

    launch("nan", "nan", 2, faults="nan@6:1")
    launch("nan stopped", "nan_stopped", 2, "checkpoint.every=2", "run.stop_at_step=6", "training.max_skipped_steps=2", faults="nan@6:1")
    launch("nan again", "nan_stopped", 2, "checkpoint.every=2", "training.max_skipped_steps=2", "run.stop_at_step=null", faults="nan@7:0")
    launch("first skipped", "first_skipped", 2, faults="nan@1")
    launch("nothing yet", "nothing_yet", 2, "run.stop_at_step=1", faults="nan@1")
    launch("nothing yet again", "nothing_yet", 2)
    for stage in (0, 2, 3):
        launch(f"spike {stage}", f"spike{stage}", 2, *SPIKES, "training.loss_spikes.action=skip", stage=stage, faults="spike@6")
    launch("rewound", "rewound", 2, *SPIKES, "training.loss_spikes.action=rewind", "checkpoint.every=2", faults="spike@6")
    # far enough back that the stop, asked for before the spike, comes before the step of a checkpoint that was put aside
    launch("rewound far", "rewound_far", 2, *REWIND_FAR, faults="spike@8")
    launch("rewound and stopped", "rewound_and_stopped", 2, *REWIND_FAR, faults="spike@8,stop@8:1")
    launch("rewound again", "rewound_and_stopped", 2, *REWIND_FAR)
    launch("no way back", "no_way_back", 2, *SPIKES, "training.loss_spikes.action=rewind", "checkpoint.every=8", faults="spike@6")
    launch("too many", "too_many", 1, *SPIKES, "training.loss_spikes.action=skip", faults="spike@5,spike@6,spike@7")

    # the checkpoints of 2 ranks, read and written again by 3
    for ranks, task in ((2, "write"), (3, "read")):
        log = out.with_name(f"resharding_{task}.log")
        codes = wait(fork_ranks(partial(resharding_worker.run, task, str(recipe), out.parent / "resharding"), ranks, log), log, limit=LIMIT)
        launch.done[f"resharding {task}"] = {"codes": codes, "log": log.read_text(), "losses": {}, "checkpoints": {}}
    out.write_text(json.dumps(launch.done))


def full_disk(launch: Launches, place: Path) -> None:
    """A run on a disk of its own that is full after a checkpoint, then read-only, then larger. Needs leave to mount."""
    disk = place / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True, text=True)
    launch.done["disk"] = {"refused": mounted.stderr.strip() if mounted.returncode else "", "checkpoints": {}}
    if mounted.returncode:
        return
    try:
        (place / RUNS / "full").symlink_to(disk)
        # 0.7 MB a checkpoint: there is room for two and a half, and Burnish's own estimate says so before the third is begun
        launch("full", "full", 1, "checkpoint.every=2")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        launch("read-only", "full", 1, "checkpoint.every=2")
        subprocess.run(["mount", "-o", "remount,rw,size=20m", str(disk)], check=True)
        launch("full again", "full", 1, "checkpoint.every=2")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


SHARP = (
    "optimizer.sharpness_aware=functional_sam",
    "optimizer.sharpness.precondition=true",
    "optimizer.sharpness.every=2",
    "optimizer.sharpness.radius=0.5",
)
SPIKES = (
    "training.loss_spikes.warmup=4", "training.loss_spikes.window=8", "training.loss_spikes.rewind_steps=1",
    "training.loss_spikes.limit=2", "training.loss_spikes.threshold=1.0",
)  # fmt: skip
REWIND_FAR = (*SPIKES[:2], *SPIKES[3:], "training.loss_spikes.rewind_steps=6", "training.loss_spikes.action=rewind", "checkpoint.every=2")

# checkpoints written beside training: the one of step 4 takes three seconds, which is the time of many steps
BESIDE = {
    "beside": (2, (), "slow_saving@4:1"),
    "beside killed": (2, ("run.lost_seconds=2",), "slow_saving@4:1,kill@6:1"),
    "beside stopped": (2, (), "slow_saving@4:1,stop@5"),
    "beside too many": (2, ("training.max_skipped_steps=1",), "slow_saving@4:1,nan@5"),
    "beside rewound": (2, (*SPIKES, "training.loss_spikes.action=rewind"), "slow_saving@4:1,spike@6"),
    "beside hung": (2, ("run.hang_seconds=4",), "hang_saving@4:1"),
    "beside vanished": (2, (), "lose_saving@4:1"),
}


if __name__ == "__main__":
    main()
