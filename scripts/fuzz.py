"""Mutated recipes, checkpoints and data through the real commands: `python -m scripts.fuzz --recipes 500 --checkpoints 500 --data 200`.

Each case is one file of a good run, changed: bytes flipped, cut, repeated, or replaced by something hostile (a YAML tag that would run a
command, a pickle that would, numbers of 400 digits, ten thousand brackets, paths out of the folder). What reads it is what a user calls:

    recipes        train.py RECIPE --dry-run
    checkpoints    python -m analysis export, and train.py going on from it; the manifest's checksums as they were, or made to fit again
    data           python -m scripts.prepare_data on text, jsonl, gz, zst and parquet; train.py on altered prepared shards

A case ends well with exit code 0, or with 2 and one `error:` message. A traceback, another code, a signal, more than 60 seconds or 6 GiB, a
file made by a hostile payload, or, where the checksums were left as they were, a success with other numbers than the good file's, is
a fault. Each case runs in a process of its own, forked from this one, and is made from the seed, its kind and its number alone. The result
is written as it grows, and the same call again goes on from it. Exit code 1 when there was a fault.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
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
from scripts.soak import environment, free_port, import_before_forks, losses, write_recipe
from training.run_folder import describe_environment

LIMIT, MEMORY = 60, 6 << 30  # seconds and bytes a case may take
STEPS = 2
KINDS = ("recipes", "checkpoints", "data")


@dataclass
class Result:
    """What is written. `faults` is to stay empty."""

    definitions: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)  # of the last command
    cases: dict[str, int] = field(default_factory=dict)  # kind -> how many
    refused: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def in_a_process(work: Callable[[], Any], log: Path) -> tuple[int, str]:
    """(exit code, or minus the signal; what was written to stdout and stderr) of `work`, whose value is the exit code."""
    log.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.environ.update(environment(0, 1, free_port()))
            code = int(work() or 0)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    until = time.monotonic() + LIMIT
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else ""
        if time.monotonic() > until:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return -signal.SIGALRM, log.read_text(errors="replace")
        time.sleep(0.005)


def call(module: str, *words: str) -> Callable[[], Any]:
    """A command line of this repository, run in this process."""

    def work() -> Any:
        import importlib

        sys.argv = [module, *words]
        main = importlib.import_module(module).main
        return main(list(words)) if module == "analysis.__main__" else main()

    return work


# ------------------------------------------------------------------------------------------------------------------ mutations


def mutate(content: bytes, chooser: random.Random) -> bytes:
    """A file with a few bytes changed, cut off, doubled, or exchanged."""
    data = bytearray(content)
    for _ in range(chooser.choice([1, 1, 1, 2, 4])):
        place = chooser.randrange(len(data) + 1)
        match chooser.randrange(6):
            case 0 if data:
                data[min(place, len(data) - 1)] ^= 1 << chooser.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[place : place + chooser.randrange(1, 64)]
            case 3:
                data[place:place] = chooser.randbytes(chooser.randrange(1, 32))
            case 4:
                del data[place : place + chooser.randrange(1, 64)]
            case _:
                other = chooser.randrange(len(data) + 1)
                data[place : place + 8] = data[other : other + 8]
    return bytes(data)


def hostile_values(trap: Path) -> list[Any]:
    return [
        None, True, -1, 0, 1, 2, 3.5, 1e308, -1e308, float("nan"), float("inf"), 10**18, 2**63, 10**400, "", "x", "../../../etc/passwd",
        "/dev/zero", "\x00", "é" * 2000, "x" * 100_000, [], [1, 2, 3], ["a"], {}, {"a": 1}, {"stage": 2}, [[[[[]]]]], "nan", "1e5", "01:30",
        "2026-11-21", "~", "!!python/object/apply:os.system", f"$(touch {trap})", "${HOME}", "{{7*7}}", "<script>",
    ]  # fmt: skip


def hostile_yaml(trap: Path) -> list[str]:
    """Values as text, that a careless loader would act on."""
    laughs = "&a [x, x, x, x, x, x, x, x, x]"
    return [
        f'!!python/object/apply:os.system ["touch {trap}"]', f'!!python/object/new:os.system ["touch {trap}"]', "!!python/name:os.system",
        "!!binary aGVsbG8=", "!!set {a, b}", "*nowhere", laughs, "[" * 2000, "{a: " * 500, "|\n  text", "? [1]: 2", "<<: {a: 1}", "&b *b",
        "\t- x", "'", '"\\', "%YAML 9.9", "---\n...\n---", "9" * 5000, "0x" + "f" * 5000, "1:" * 3000,
    ]  # fmt: skip


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(tree, dict) and tree:
        return [(*path,)] * bool(path) + [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [path]


def mutated_recipe(text: str, chooser: random.Random, trap: Path) -> bytes:
    way = chooser.randrange(4)
    if way == 0:
        return mutate(text.encode(), chooser)
    lines = text.splitlines()
    if way == 1:
        number = chooser.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}{colon} {chooser.choice(hostile_yaml(trap))}"
        return "\n".join(lines).encode()
    if way == 2:
        i, j = chooser.randrange(len(lines)), chooser.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
        return "\n".join(lines).encode()
    tree = yaml.safe_load(text)
    for _ in range(chooser.choice([1, 1, 2, 3])):
        *parents, key = chooser.choice(leaves(tree))
        inner = tree
        for parent in parents:
            inner = inner[parent] if isinstance(inner, dict) and parent in inner else {}
        inner[chooser.choice([key, key, key, "new", 7])] = chooser.choice(hostile_values(trap))
    return yaml.safe_dump(tree, allow_unicode=True).encode()


# ---------------------------------------------------------------------------------------------------------------------- cases


class Fuzz:
    def __init__(self, place: Path, seed: int, result: Result) -> None:
        self.place, self.result, self.seed, self.chooser = place, result, seed, random.Random()
        self.trap, self.log = place / "trap", place / "log"
        self.recipe = write_recipe(place)
        words = [str(self.recipe), "run.name=good", f"training.tokens={STEPS * 768}", "checkpoint.every=1"]
        code, text = in_a_process(call("train", *words), self.log)
        if code:
            raise RuntimeError(text)
        self.run = place / "runs" / "good"
        self.losses = losses(self.run)
        code, text = in_a_process(call("analysis.__main__", "export", str(self.run), "--out", str(place / "good.safetensors")), self.log)
        if code:
            raise RuntimeError(text)
        self.weights = hashlib.sha256((place / "good.safetensors").read_bytes()).hexdigest()

    def case(self, kind: str, number: int) -> None:
        self.chooser.seed(f"{self.seed} {kind} {number}")
        {"recipes": self.recipe_case, "checkpoints": self.checkpoint_case, "data": self.data_case}[kind]()

    def judge(self, kind: str, about: str, code: int, text: str, right: bool = True) -> None:
        """Count a case, and name what is wrong with how it ended."""
        result = self.result
        result.cases[kind] = result.cases.get(kind, 0) + 1
        wrong = None
        if self.trap.exists():
            self.trap.unlink()
            wrong = "a hostile payload ran"
        elif code == -signal.SIGALRM:
            wrong = f"more than {LIMIT} s"
        elif code not in (0, 2):
            wrong = f"exit code {code}"
        elif "Traceback" in text:
            wrong = "a traceback"
        elif code == 2 and "error: " not in text:
            wrong = "exit code 2 without a message"
        elif code == 0 and not right:
            wrong = "success with other numbers"
        if code == 2:
            result.refused[kind] = result.refused.get(kind, 0) + 1
        if wrong:
            result.faults.append(f"{kind}: {wrong}: {about}: {text[-1500:]}")

    def recipe_case(self) -> None:
        file = self.place / "mutated.yaml"
        sources = [self.recipe, *sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))]
        text = self.chooser.choice(sources).read_text()
        content = mutated_recipe(text, self.chooser, self.trap)
        file.write_bytes(content)
        code, said = in_a_process(call("train", str(file), "--dry-run"), self.log)
        self.judge("recipes", f"{content[:3000]!r}", code, said)

    def checkpoint_case(self) -> None:
        """One file of the newest checkpoint changed; read by the analysis, or gone on from."""
        run = self.place / "runs" / "mutated"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.run, run)
        (run / "metrics.jsonl").write_text("")
        newest = sorted((run / "checkpoints").glob("step-*"))[-1]
        file = self.chooser.choice(sorted(p for p in newest.iterdir() if p.is_file()))
        content = file.read_bytes()
        changed = hostile_pickle(self.trap) if self.chooser.random() < 0.1 else mutate(content, self.chooser)
        file.write_bytes(changed)
        refitted = file.name != "manifest.json" and self.chooser.random() < 0.6
        if refitted:
            manifest = json.loads((newest / "manifest.json").read_text())
            manifest["files"][file.name] = {"size": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
            (newest / "manifest.json").write_text(json.dumps(manifest))
        about = f"{file.name}, {len(content)} -> {len(changed)} bytes, checksums {'refitted' if refitted else 'kept'}"
        if self.chooser.random() < 0.5:
            out = self.place / "out.safetensors"
            out.unlink(missing_ok=True)
            code, said = in_a_process(call("analysis.__main__", "export", str(newest), "--out", str(out)), self.log)
            same = out.exists() and hashlib.sha256(out.read_bytes()).hexdigest() == self.weights
            self.judge("checkpoints", f"export: {about}", code, said, right=refitted or same)
        else:
            more = "run.stop_at_step=3" if refitted else f"training.tokens={STEPS * 768}"
            words = [str(self.recipe), "run.name=mutated", f"training.tokens={STEPS * 768}", "checkpoint.every=1", more]
            if refitted:  # go on for a step, from whatever it holds
                shutil.rmtree(sorted((run / "checkpoints").glob("step-*"))[0])
                (run / "recipe.yaml").unlink()
                words[2] = f"training.tokens={(STEPS + 1) * 768}"
            code, said = in_a_process(call("train", *words), self.log)
            found = losses(run) if (run / "metrics.jsonl").exists() else {}
            same = all(self.losses[step] == loss for step, loss in found.items() if step in self.losses)
            self.judge("checkpoints", f"resume: {about}", code, said, right=refitted or same)

    def data_case(self) -> None:
        """A text file changed before it is prepared, or a prepared folder before it is trained on."""
        chooser = self.chooser
        documents = (self.place / "corpus.jsonl").read_bytes()[:60_000]
        documents = documents[: documents.rindex(b"\n") + 1]
        suffix = chooser.choice([".jsonl", ".txt", ".jsonl.gz", ".jsonl.zst", ".parquet", "prepared", "prepared"])
        if suffix == "prepared":
            return self.prepared_case()
        file = self.place / f"mutated{suffix}"
        if suffix == ".jsonl.gz":
            content = gzip.compress(documents, mtime=0)
        elif suffix == ".jsonl.zst":
            import zstandard

            content = zstandard.compress(documents)
        elif suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.table({"text": [json.loads(line)["text"] for line in documents.splitlines()]})
            pq.write_table(table, file)
            content = file.read_bytes()
        else:
            content = documents
        changed = mutate(mutate(content, chooser), chooser)
        file.write_bytes(changed)
        words = [str(self.recipe), f"data.paths=[{file}]", f"data.prepared={self.place / 'tried'}", "data.tokenizer.vocab_size=300"]
        code, said = in_a_process(call("scripts.prepare_data", *words), self.log)
        shutil.rmtree(self.place / "tried", ignore_errors=True)
        file.unlink()
        self.judge("data", f"{suffix}, {len(content)} -> {len(changed)} bytes", code, said)

    def prepared_case(self) -> None:
        source = next(path.parent for path in (self.place / "prepared").glob("*/manifest.json"))
        copy, run = self.place / "prepared_mutated", self.place / "runs" / "prepared"
        for old in (copy, run):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(source, copy)
        file = self.chooser.choice(sorted(p for p in copy.rglob("*") if p.is_file()))
        content = file.read_bytes()
        changed = mutate(content, self.chooser)
        if file.name == "manifest.json" and self.chooser.random() < 0.5:
            manifest = json.loads(content)
            *parents, key = self.chooser.choice(leaves(manifest))
            inner = manifest
            for parent in parents:
                inner = inner[parent]
            inner[key] = self.chooser.choice(hostile_values(self.trap))
            changed = json.dumps(manifest).encode()
        file.write_bytes(changed)
        (copy / ".verified.json").unlink(missing_ok=True)
        words = [str(self.recipe), "run.name=prepared", f"data.prepared={copy}", f"training.tokens={STEPS * 768}"]
        code, said = in_a_process(call("train", *words), self.log)
        found = losses(run) if (run / "metrics.jsonl").exists() else {}
        # shards are checked against the manifest's sums; a changed manifest or tokenizer may describe other data, and then say so
        right = file.suffix != ".bin" or found == self.losses
        self.judge(
            "data", f"prepared {file.relative_to(copy)}: {changed[:2000] if file.suffix == '.json' else len(changed)}", code, said, right
        )


def hostile_pickle(trap: Path) -> bytes:
    """A torch file of the old format, whose unpickling would make a file."""
    import pickle

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {trap}",)

    return pickle.dumps(Touch(), protocol=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help="how many cases, those in --out included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to go on from and to write; default: print only")
    arguments = parser.parse_args()
    result = Result(**json.loads(arguments.out.read_text())) if arguments.out and arguments.out.exists() else Result()
    counts = " ".join(f"--{kind} {getattr(arguments, kind)}" for kind in KINDS)
    result.commands.append(f"python -m scripts.fuzz {counts} --seed {arguments.seed}")
    result.environment = describe_environment(1, torch.device("cpu"))
    result.definitions = {
        "cases": "mutated files that were read",
        "refused": "of them, those that ended with exit code 2 and a message; the others were harmless",
        "faults": "cases that ended in any other way, or in success with other numbers",
    }
    os.environ.update(
        OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
    )
    import_before_forks()
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        fuzz = Fuzz(Path(folder), arguments.seed, result)
        for kind in KINDS:
            for number in range(result.cases.get(kind, 0), getattr(arguments, kind)):
                fuzz.case(kind, number)
                if (number + 1) % 25 == 0 or number + 1 == getattr(arguments, kind):
                    print(f"{kind}: {number + 1}/{getattr(arguments, kind)}, {len(result.faults)} faults", flush=True)
                    if arguments.out:
                        write_json(arguments.out, asdict(result))
    for fault in result.faults:
        print(fault, file=sys.stderr)
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
