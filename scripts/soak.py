"""Kill a run again and again, and see that nothing is lost: `python -m scripts.soak --kills 200 --out docs/evidence/soak_cpu.json`.

A small run is launched; at a random moment one rank or all are ended: SIGKILL after a random time, SIGKILL inside a save (at its start,
when the files are written, before the rename), or SIGTERM. It is launched again, until it is through; then the next run begins. After
each death:

  * every checkpoint that was there is still there and whole: its files have the sizes and checksums of its manifest;
  * the next launch says that it goes on from the newest one;
  * a launch that was asked to stop exits with 75 on every rank, with a checkpoint of the step it stopped at.

After each run its losses are compared with those of a run that nobody disturbed: bit for bit where ranks and stage stay the same, to
float32 rounding where every launch draws another number of ranks (1 to 3) and another ZeRO stage (0 to 3). Half of the launches write
their checkpoints beside training (checkpoint.asynchronous), and some of these take three seconds for one.

    --exits N      also start two-rank ZeRO-3 runs, N in all, from a fresh interpreter each, and count ranks that do not exit with 0

The ranks are real processes with files, sockets and signals of their own, forked from this one, which has torch and DeepSpeed imported,
so that a launch takes a second; those of --exits are started from nothing. The result is written after every run, and the same call again
goes on from it. Exit code 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from analysis.output import write_json
from training.run_folder import describe_environment

STEPS, TOLERANCE, LIMIT = 24, 2e-6, 180  # steps of a run; relative difference of losses; seconds until a launch counts as hung
KILLS_INSIDE_A_SAVE = ("kill_saving", "kill_written", "kill_renaming")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """What is written. `faults` lists in words what went wrong; it is to stay empty."""

    definitions: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)  # of the last command
    runs: int = 0
    launches: int = 0
    deaths: dict[str, int] = field(default_factory=dict)  # how -> how often
    checkpoints_checked: int = 0
    checkpoints_lost: int = 0
    losses_compared: int = 0
    losses_wrong: int = 0
    largest_relative_difference: float = 0.0
    layouts: dict[str, int] = field(default_factory=dict)  # "2 ranks, stage 3" -> launches
    asynchronous: int = 0  # launches with checkpoint.asynchronous
    clean_exits: int = 0
    unclean_exits: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Strike:
    """A signal to some processes, `delay` seconds after the log holds the words `after`."""

    processes: list[int]
    signal: int
    after: str
    delay: float


def write_recipe(folder: Path) -> Path:
    """A network of 60 thousand parameters whose sizes divide by nothing, on random words."""
    chooser = random.Random(0)
    words = ["".join(chooser.choices("abcdefghijklmnop", k=chooser.randint(2, 7))) for _ in range(300)]
    with open(folder / "corpus.jsonl", "w") as file:
        for _ in range(1500):
            file.write(json.dumps({"text": " ".join(chooser.choices(words, k=chooser.randint(5, 30))) + ".\n"}) + "\n")
    recipe = {
        "run": {"folder": str(folder / "runs"), "lost_seconds": 20},
        "model": {"width": 36, "depth": 2, "heads": 2, "mlp_width": 75, "block": "outlier_protected"},
        "data": {
            "source": "files", "paths": [str(folder / "corpus.jsonl")], "validation_fraction": 0.1,
            "prepared": str(folder / "prepared"), "tokenizer": {"vocab_size": 401}, "workers": 1,
        },
        "training": {"tokens": STEPS * 768, "tokens_per_step": 768, "micro_batch_size": 2, "sequence_length": 64, "precision": "fp32"},
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {"every": 1000, "tokens": 64},
        "checkpoint": {"every": 3, "keep_last": 3},
        "logging": {"every": 1, "tensorboard": False, "outliers_every": 0},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def import_before_forks() -> None:
    """What a rank would import; DeepSpeed and torch take the last when they are given an optimizer, which costs seconds."""
    for module in ("train", "training.loop", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(module)


def fork_ranks(work: Callable[[], object], ranks: int, log: Path, faults: str = "") -> list[int]:
    """Start `work` in a forked process for each rank, with what a launcher tells it, output to `log`; returns their numbers."""
    port, processes = free_port(), []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.environ.update(environment(rank, ranks, port))
                if faults:
                    os.environ["BURNISH_FAULTS"] = faults
                work()
            except BaseException:  # what would be a traceback
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
            os._exit(1)
        processes.append(process)
    return processes


def training(*words: str) -> Callable[[], None]:
    """`train.py WORDS`, to be forked; it ends its process itself."""

    def work() -> None:
        import train

        sys.argv = ["train.py", *words]
        train.main()

    return work


def wait(processes: list[int], log: Path, strike: Strike | None = None, limit: float = LIMIT) -> list[int]:
    """Exit codes (minus the signal) of all; `strike` ends some of them on the way.

    Does what a launcher does: when one ends badly, the others are given ten seconds and then killed.
    """
    codes: dict[int, int] = {}
    failed = due = None
    started = time.monotonic()
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
                    failed = failed or (time.monotonic() if codes[process] else None)
        if strike is not None and due is None and log.exists() and strike.after in log.read_text():
            due = time.monotonic() + strike.delay
        if strike is not None and due is not None and time.monotonic() >= due:
            for process in strike.processes:
                if process not in codes:
                    os.kill(process, strike.signal)
            strike = None
        hung = time.monotonic() - started > limit
        if hung or (failed is not None and time.monotonic() - failed > 10):
            for process in processes:
                if process not in codes:
                    os.kill(process, signal.SIGKILL)
            if hung:
                raise TimeoutError(log.read_text()[-2000:])
        time.sleep(0.02)
    return [codes[process] for process in processes]


def visible(run: Path) -> dict[str, str]:
    """{checkpoint: what is wrong with it, or nothing}."""
    found = {}
    for folder in sorted((run / "checkpoints").glob("step-*")):
        problem = ""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name, expected in manifest["files"].items():
                content = (folder / name).read_bytes()
                if (len(content), hashlib.sha256(content).hexdigest()) != (expected["size"], expected["sha256"]):
                    problem = f"{name} is not what the manifest says"
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
        found[folder.name] = problem
    return found


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def disturbed_run(name: str, same_layout: bool, recipe: Path, chooser: random.Random, seconds: float, result: Result) -> None:
    """Launch, end, look, launch again, until the run is through."""
    run = recipe.parent / "runs" / name
    for launch in range(1000):
        ranks, stage = (2, 2) if same_layout else (chooser.randint(1, 3), chooser.randint(0, 3))
        log = recipe.parent / f"{name}.{launch}.log"
        before = visible(run) if run.exists() else {}
        newest = max((int(folder.removeprefix("step-")) for folder in before), default=0)
        way = chooser.choice(["SIGKILL to one rank", "SIGKILL to all ranks", "inside a save", "SIGTERM"])
        faults = ""
        if way == "inside a save":
            faults = f"{chooser.choice(KILLS_INSIDE_A_SAVE)}@{min(STEPS, (newest // 3 + 1) * 3)}:{chooser.randrange(ranks)}"
            if "renaming" in faults:
                faults = faults.partition(":")[0]  # the first rank renames
        asynchronous = chooser.random() < 0.5
        if asynchronous and chooser.random() < 0.3:  # a slow disk, so that a death falls into a save
            faults = ",".join(filter(None, (faults, f"slow_saving@{min(STEPS, (newest // 3 + 1) * 3)}:{chooser.randrange(ranks)}")))
        words = [str(recipe), f"run.name={name}", f"deepspeed.zero_optimization.stage={stage}", f"checkpoint.asynchronous={asynchronous}"]
        processes = fork_ranks(training(*words), ranks, log, faults)
        strike = None
        if way != "inside a save" and newest < STEPS:
            # while it starts, or in one of the next steps, which may evaluate or save
            step = chooser.randint(newest, min(STEPS - 1, newest + 8))
            after = f"step {step:>{len(str(STEPS))}}/" if step > newest else chooser.choice(["", "tokens per step"])
            struck = processes if way == "SIGKILL to all ranks" else [chooser.choice(processes)]
            number = signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL
            strike = Strike(struck, number, after, chooser.uniform(0, seconds / STEPS * 2 if after else seconds / 2))
        try:
            codes = wait(processes, log, strike)
        except TimeoutError as error:
            result.faults.append(f"{name}, launch {launch}: hung: {error}")
            return
        result.launches += 1
        result.asynchronous += asynchronous
        layout = f"{ranks} ranks, stage {stage}"
        result.layouts[layout] = result.layouts.get(layout, 0) + 1
        text, after = log.read_text(), visible(run)
        result.checkpoints_checked += len(after)
        bad = {folder: problem for folder, problem in after.items() if problem}
        gone = [folder for folder in before if folder not in after and folder >= max(after, default="")]
        result.checkpoints_lost += len(bad) + len(gone)
        if bad or gone or "passed over" in text:
            result.faults.append(f"{name}, launch {launch} ({way}, {faults}): damaged {bad}, gone {gone}")
        if newest and f"from step {newest}," not in text and "complete at step" not in text and "tokens per step" in text:
            result.faults.append(f"{name}, launch {launch}: did not go on from step {newest}: {text[-1500:]}")
        if codes == [0] * ranks:
            break
        if way == "SIGTERM" and codes != [75] * ranks and "tokens per step" in text:  # before that it dies as any process does
            result.faults.append(f"{name}, launch {launch}: SIGTERM, exit codes {codes}: {text[-1500:]}")
        elif way != "SIGTERM" and -signal.SIGKILL not in codes:
            result.faults.append(f"{name}, launch {launch}: {way}, exit codes {codes}: {text[-1500:]}")
        how = faults.partition("@")[0] if way == "inside a save" else way
        result.deaths[how] = result.deaths.get(how, 0) + 1


def compare(reference: dict[int, float], found: dict[int, float], name: str, exactly: bool, result: Result) -> None:
    result.losses_compared += len(reference)
    for step, loss in reference.items():
        difference = abs(found.get(step, float("inf")) - loss) / loss
        result.largest_relative_difference = max(result.largest_relative_difference, difference)
        if difference > (0.0 if exactly else TOLERANCE):
            result.losses_wrong += 1
            result.faults.append(f"{name}: loss of step {step} is {found.get(step)}, undisturbed {loss}")


def exits(count: int, recipe: Path, result: Result, keep: Callable[[], None]) -> None:
    """Two-rank ZeRO-3 runs of three steps, each rank from a fresh interpreter, until there are so many."""
    for number in range((result.clean_exits + result.unclean_exits) // 2, count):
        port = free_port()
        words = [
            f"run.name=exit{os.getpid()}_{number}",
            "deepspeed.zero_optimization.stage=3",
            "training.tokens=2304",
            "checkpoint.every=1000",
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, "train.py", str(recipe), *words], cwd=ROOT, env={**os.environ, **environment(rank, 2, port)},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        for process in processes:
            try:
                output, _ = process.communicate(timeout=4 * LIMIT)
            except subprocess.TimeoutExpired:  # it hung: as bad as any other way not to exit
                process.kill()
                output, _ = process.communicate()
            result.clean_exits += process.returncode == 0
            result.unclean_exits += process.returncode != 0
            if process.returncode != 0:
                result.faults.append(f"a ZeRO-3 rank exited with {process.returncode}: {output[-1500:]}")
        keep()
        print(f"exits: {number + 1}/{count} runs, {result.unclean_exits} ranks unclean", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="go on until so many launches have been ended, those in --out included")
    parser.add_argument("--exits", type=int, default=0, help="ZeRO-3 runs whose exit codes are counted, those in --out included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to go on from and to write; default: print only")
    arguments = parser.parse_args()
    result = Result()
    if arguments.out and arguments.out.exists():
        result = Result(**json.loads(arguments.out.read_text()))
    result.commands.append(f"python -m scripts.soak --kills {arguments.kills} --exits {arguments.exits} --seed {arguments.seed}")
    result.environment = describe_environment(3, torch.device("cpu"))
    result.definitions = {
        "deaths": "launches ended before they were through, by how",
        "checkpoints_lost": "checkpoints that a death left damaged, or that vanished without a newer one",
        "losses_wrong": "losses that differ from the undisturbed run's: at all with ranks and stage unchanged, "
        f"else by more than {TOLERANCE:g} of them",
        "clean_exits": "ranks of two-rank ZeRO-3 runs that exited with 0",
    }
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")

    def keep() -> None:
        if arguments.out:
            write_json(arguments.out, asdict(result))

    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        recipe = write_recipe(Path(folder))
        if arguments.exits:
            exits(arguments.exits, recipe, result, keep)
        if sum(result.deaths.values()) < arguments.kills:
            import_before_forks()
            log = recipe.parent / "reference.log"
            if any(wait(fork_ranks(training(str(recipe), "run.name=reference"), 2, log), log)):
                raise RuntimeError(log.read_text())
            manifest = recipe.parent / "runs" / "reference" / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json"
            seconds = manifest.stat().st_mtime - (recipe.parent / "runs" / "reference" / "data.json").stat().st_mtime
            reference = losses(recipe.parent / "runs" / "reference")
            chooser = random.Random(arguments.seed + 1000 * result.runs)
            while sum(result.deaths.values()) < arguments.kills:
                same, name = result.runs % 2 == 0, f"run{result.runs}"
                disturbed_run(name, same, recipe, chooser, seconds, result)
                compare(reference, losses(recipe.parent / "runs" / name), name, same, result)
                result.runs += 1
                keep()
                print(
                    f"run {result.runs}: {sum(result.deaths.values())}/{arguments.kills} deaths, "
                    f"{result.checkpoints_lost} checkpoints lost, {result.losses_wrong} losses wrong, {len(result.faults)} faults",
                    flush=True,
                )
    for fault in result.faults:
        print(fault, file=sys.stderr)
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
