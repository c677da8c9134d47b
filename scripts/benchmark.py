"""Tokens per second of Burnish, with each of its methods, beside its peers: one command, one process group, in turn.

    python -m scripts.benchmark [--size 17m] [--precision fp32] [--rounds 5] [--out FILE.json] [section.key=value ...]
    torchrun --nproc_per_node 2 -m scripts.benchmark ...
    python -m scripts.benchmark --size 130m 320m 1b 7b --precision bf16 --minutes 9 training.compile=true     # one GPU, its whole table

Subjects, each built anew for its turn, on random tokens in batches of one shape; a step is a forward and a backward pass, clipping and
AdamW, and reads no value but the last loss. All ours are `training.engine` and `training.sharpness_aware`, as the loop has them:
    pre_norm, outlier_protected, shaped, simplified     blocks of one size; pre_norm is what the peers train
    sam, functional_sam                                 pre_norm with two passes a step: tokens count once
    selective_checkpointing, full_checkpointing         pre_norm whose blocks keep their products, or their input alone
    loop                                                `training.loop.train` itself, data, logging and TensorBoard included (small sizes)
    products_and_attention                              nothing but the matrix products and the attention of a step: what its shape allows
Peers:
    bare_pytorch        our network in a bare loop: whole logits, autocast for bf16, DistributedDataParallel if there are ranks
    bare_deepspeed      the same in a bare DeepSpeed loop
    hf_trainer          transformers.Trainer on a LlamaForCausalLM of the same width, depth, heads and parameters (its SwiGLU is narrower);
                        it and litgpt run in processes of their own
    litgpt              litgpt's GPT of that shape, in a loop of the calls of its pretrain.py; --litgpt names the python of its venv:
                        python -m venv runs/litgpt && runs/litgpt/bin/pip install litgpt
Rounds are interleaved, each begins with another subject, and figures are medians of ratios within a round, so that a machine whose speed
drifts treats all alike. The ceiling is the fastest of a few large matrix products in that precision, measured in every round; a share
of it counts 6 N_matmul + 12 depth width length FLOPs a token. On a GPU the table has MFU and peak memory. Several sizes come one after
another, each with an equal share of what is left of --minutes and a file of its own, FILE_SIZE.json; a subject that the first round has no
time for, the machine no memory, or that fails, is named and left out. 7b is there to be seen to fit, alone, by the plan's own choice of
checkpointing.
With --clock processor times are those of the process on its cores: what other programs do disturbs that less.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.output import write_json
from analysis.study_pictures import benchmark_picture
from model.activation_checkpointing import ActivationCheckpointing
from model.config import ModelConfig
from model.errors import InputError, one_line
from model.linear_cross_entropy import chunk_rows
from model.parametrization import initialize
from model.transformer import Transformer
from training.data import Batch
from training.distributed import Ranks, discover, largest_over_ranks, leave, one_clear_line
from training.engine import Engine, deepspeed_config, start_distributed
from training.loop import train
from training.metrics import peak_flops
from training.optimizers import make_optimizer
from training.plan import count_parameters, flops_per_token, passes
from training.recipe import Recipe
from training.recipe_file import LoadedRecipe, load_recipe
from training.run_folder import describe_environment
from training.sharpness_aware import take_step
from training.token_shards import FORMAT, SPLITS
from training.tokenizer import token_dtype


@dataclass(frozen=True)
class Shape:
    """What all subjects of a size train: a network, and batches of micro_batch x length tokens a rank."""

    model: dict[str, Any]
    vocabulary: int
    length: int
    micro_batch: int
    steps: int  # counted ones of a turn
    recipe: dict[str, Any] = field(default_factory=dict)  # sections beside
    subjects: tuple[str, ...] | None = None  # None: all that can run


SHAPES = {
    "1m": Shape({"width": 128, "depth": 4, "heads": 4}, 4096, 512, 8, 8),
    "17m": Shape({"width": 384, "depth": 6, "heads": 6}, 16384, 512, 8, 4),
    "100m": Shape({"width": 768, "depth": 12, "heads": 12}, 16384, 512, 4, 3),
    "130m": Shape({"size": "130m"}, 50304, 2048, 16, 12),
    "320m": Shape({"size": "320m"}, 50304, 2048, 8, 12),
    "1b": Shape({"size": "1b"}, 50304, 2048, 4, 8),
    "7b": Shape(
        {"size": "7b"}, 50304, 2048, 4, 3,
        {"training": {"activation_checkpointing": "auto"}, "deepspeed": {"zero_optimization": {"stage": 0}}}, ("pre_norm",),
    ),
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "pre_norm": {},
    "outlier_protected": {"model": {"block": "outlier_protected"}},
    "shaped": {"model": {"attention": "shaped"}},
    "functional_sam": {"optimizer": {"sharpness_aware": "functional_sam"}},
    "simplified": {"model": {"block": "simplified"}},
    "sam": {"optimizer": {"sharpness_aware": "sam"}},
    "selective_checkpointing": {"training": {"activation_checkpointing": "selective"}},
    "full_checkpointing": {"training": {"activation_checkpointing": True}},
}
BOUND = "products_and_attention"
PEERS = ("bare_pytorch", "bare_deepspeed", "hf_trainer", "litgpt")
LARGEST_LOOP = 50_000_000  # parameters: the loop ends by saving a checkpoint
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all of ours; peers follow in precision and compile")
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["17m"])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a turn after {WARM_UP} that are not counted")
    parser.add_argument("--subjects", nargs="+", choices=[*OURS, "loop", BOUND, *PEERS], help="default: all that can run here")
    parser.add_argument("--minutes", type=float, help="begin no round that would, as long as the longest, end after this")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--litgpt", type=Path, default=Path("runs/litgpt/bin/python"), help="python of an environment that has litgpt")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON, and a picture beside it")
    with one_clear_line():
        benchmark(parser.parse_intermixed_args())
    leave(0)


class Bench:
    """What every subject is given: the recipe of the baseline, the ranks, and how steps are counted and timed."""

    def __init__(self, arguments: argparse.Namespace, size: str, ranks: Ranks, device: torch.device, scratch: Path) -> None:
        shape = SHAPES[size]
        self.vocabulary, self.length, self.micro_batch = shape.vocabulary, shape.length, shape.micro_batch
        self.arguments, self.size, self.ranks, self.device, self.scratch = arguments, size, ranks, device, scratch
        self.steps = arguments.steps or shape.steps
        self.tokens_per_step = self.micro_batch * self.length * ranks.world_size
        self.memory: dict[str, int] = {}  # peak bytes on the GPU, by subject
        self.checkpointing: dict[str, ActivationCheckpointing] = {}  # by subject
        self.base = scratch / f"{size}.yaml"
        tree = {
            "run": {"folder": str(scratch)},
            "model": shape.model,
            "data": {"tokenizer": {"vocab_size": self.vocabulary}},
            "training": {
                "tokens": 10**6 * self.tokens_per_step, "tokens_per_step": self.tokens_per_step, "micro_batch_size": self.micro_batch,
                "sequence_length": self.length, "precision": arguments.precision, **shape.recipe.get("training", {}),
            },
            "deepspeed": shape.recipe.get("deepspeed", {"zero_optimization": {"stage": 2}}),
            "logging": {"outliers_every": 0},  # what no subject measures is not to be planned for either
        }  # fmt: skip
        if ranks.is_first:
            self.base.write_text(json.dumps(tree))
        dist.barrier()
        self.recipe = self.loaded().recipe
        self.config = self.network(self.recipe)

    def loaded(self, *more: str) -> LoadedRecipe:
        return load_recipe(self.base, [*self.arguments.overrides, *more])

    def network(self, recipe: Recipe) -> ModelConfig:
        return recipe.model.config(self.vocabulary, recipe.training.sequence_length)

    def batch(self) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(self.vocabulary, (self.micro_batch, self.length + 1))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return (inputs.pin_memory(), targets.pin_memory()) if self.device.type == "cuda" else (inputs, targets)  # as the loop's are

    def timed(self, step: Callable[[int], Tensor]) -> list[float]:
        """Seconds of each step after the first ones; on a GPU of all of them together, since only the end waits for it."""
        for number in range(WARM_UP):
            float(step(number))
        clock, seconds = (time.process_time if self.arguments.clock == "processor" else time.perf_counter), []
        cuda, count = self.device.type == "cuda", self.steps
        for first in range(0, count, count if cuda else 1):
            started = clock()
            for number in range(first, count if cuda else first + 1):
                loss = step(WARM_UP + number)
            float(loss)  # pyright: ignore[reportPossiblyUnboundVariable]
            seconds += [(clock() - started) / (count if cuda else 1)]
        return seconds

    @property
    def compiled(self) -> bool:
        return self.recipe.training.compile


def benchmark(arguments: argparse.Namespace) -> None:
    ranks = discover()
    device = start_distributed(ranks)
    with contextlib.ExitStack() as stack:
        scratch: list[str] = [stack.enter_context(tempfile.TemporaryDirectory())] if ranks.is_first else [""]
        dist.broadcast_object_list(scratch)
        began = time.perf_counter()
        for number, size in enumerate(arguments.size):
            share = None
            if arguments.minutes is not None:
                share = (60 * arguments.minutes - (time.perf_counter() - began)) / (len(arguments.size) - number)
            out: Path | None = arguments.out
            if out is not None and len(arguments.size) > 1:
                out = out.with_name(f"{out.stem}_{size}{out.suffix}")
            in_rounds(Bench(arguments, size, ranks, device, Path(scratch[0])), share, out)


def in_rounds(bench: Bench, share: float | None, out: Path | None) -> None:
    """All subjects of a size in turn, round after round, within `share` seconds."""
    rounds, device, is_first = bench.arguments.rounds, bench.device, bench.ranks.is_first
    parameters = count_parameters(bench.config)
    flops = flops_per_token(bench.config, parameters, bench.length)
    subjects, absent = choose(bench, parameters.total)
    if not subjects:
        raise InputError(f"--subjects: none of them can run here: {absent}")
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    ceilings: list[float] = []
    began, longest, last_turn = time.perf_counter(), 0.0, 0.0
    result: dict[str, Any] = {}
    for turn in range(rounds):
        turn_began = time.perf_counter()
        names, offset = list(subjects), turn * max(1, len(subjects) // rounds)
        ceilings.append(ceiling(bench))
        for name in names[offset % len(names) :] + names[: offset % len(names)]:
            if turn == 0 and name != names[0] and is_time_up(time.perf_counter() - began + last_turn, share, device):
                why = "--minutes left no time for it"
            else:
                started = time.perf_counter()
                why = take_turn(bench, name, subjects[name], seconds[name])
                last_turn = time.perf_counter() - started
            if why is not None:
                absent[name] = why
                del subjects[name], seconds[name]
            elif is_first:
                rate = bench.tokens_per_step / seconds[name][-1]
                print(f"{bench.size}  round {turn + 1}/{rounds}  {name:<24}{rate:>12,.0f} tokens/s", flush=True)
                if out and turn == 0:  # should the machine be needed for something else
                    measured = {name: times for name, times in seconds.items() if times}
                    write_json(out, summarise(bench, measured, ceilings, flops, parameters.total, absent))
        if is_first and seconds:
            result = summarise(bench, seconds, ceilings, flops, parameters.total, absent)
            if out:
                write_json(out, result)
        now = time.perf_counter()
        longest = max(longest, now - turn_began)
        if not subjects or is_time_up(now - began + longest, share, device):
            break
    if is_first:
        report(bench.size, result, absent, out)


def take_turn(bench: Bench, name: str, subject: Callable[[], list[float]], seconds: list[float]) -> str | None:
    """Add the median of a turn's steps to `seconds`; or why there is none, of one rank alone: no memory, or a fault of this subject,
    which is to cost the others nothing."""
    cuda, device = bench.device.type == "cuda", bench.device
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    why = None
    try:
        seconds.append(statistics.median(subject()))
    except Exception as error:
        if bench.ranks.world_size > 1:  # the others wait for this one
            raise
        if isinstance(error, torch.OutOfMemoryError):
            why = "out of memory"
        else:
            why = f"{type(error).__name__}: {one_line(error)}"
            if not isinstance(error, InputError):
                traceback.print_exc()
    if why is not None:  # out here, where the traceback no longer holds what the subject had in memory
        clear(device)
        return why
    if cuda:
        bench.memory[name] = max(bench.memory.get(name, 0), torch.cuda.max_memory_allocated(device))
    clear(device)
    dist.barrier()
    return None


def is_time_up(seconds: float, share: float | None, device: torch.device) -> bool:
    """Whether so many seconds are more than the share, as the slowest rank sees it, on every rank alike."""
    return share is not None and largest_over_ranks(round(seconds), device) > share


def choose(bench: Bench, parameters: int) -> tuple[dict[str, Callable[[], list[float]]], dict[str, str]]:
    """What runs here, in order, and of the others why they do not."""
    absent = {}
    runs: dict[str, Callable[[], list[float]]] = {name: lambda name=name: ours(bench, name) for name in OURS}
    runs |= {"bare_pytorch": lambda: bare_pytorch(bench), "bare_deepspeed": lambda: bare_deepspeed(bench), "loop": lambda: loop(bench)}
    runs |= {name: lambda name=name, python=python: peer(bench, name, python) for name, python in python_of(bench).items()}
    runs[BOUND] = lambda: products_and_attention(bench)
    # first what the comparison needs, should there be time for no more, and what takes a moment; the Trainer takes longest to begin
    first = ("pre_norm", "bare_pytorch", BOUND, "bare_deepspeed", "litgpt", "outlier_protected", "shaped", "functional_sam", "hf_trainer")
    found = {name: runs[name] for name in (*first, *runs)}
    if parameters > LARGEST_LOOP:
        absent["loop"] = f"more than {LARGEST_LOOP:,} parameters: its checkpoints would be most of the time"
    if bench.arguments.clock == "processor":
        absent["loop"] = "its figures are by the clock on the wall"
    if bench.ranks.world_size > 1:
        absent |= dict.fromkeys(("hf_trainer", "litgpt"), "measured on one rank")
    if bench.device.type == "cpu" and bench.compiled:
        absent["litgpt"] = "not compiled on a CPU"
    if not bench.arguments.litgpt.exists():
        absent.setdefault("litgpt", f"{bench.arguments.litgpt} does not exist: see --help")
    wanted = [name for name in SHAPES[bench.size].subjects or found if name in (bench.arguments.subjects or found)]
    return {name: run for name, run in found.items() if name in wanted and name not in absent}, {
        n: w for n, w in absent.items() if n in wanted
    }


def python_of(bench: Bench) -> dict[str, str]:
    """The peers in processes of their own, and which python runs each."""
    return {"litgpt": str(bench.arguments.litgpt), "hf_trainer": sys.executable}


def ours(bench: Bench, name: str) -> list[float]:
    overrides = [f"{section}.{key}={value}" for section, values in OURS[name].items() for key, value in values.items()]
    recipe = bench.loaded(*overrides).recipe
    engine = Engine(recipe, bench.network(recipe), 1, bench.ranks, bench.device)
    bench.checkpointing[name] = engine.model.activation_checkpointing
    batches = [[Batch(*bench.batch(), None)] for _ in range(4)]

    def step(number: int) -> Tensor:
        return take_step(engine, batches[number % 4], float(bench.tokens_per_step), number, 10**6, logged=False).loss_sum

    seconds = bench.timed(step)
    engine.deepspeed.destroy()
    return seconds


def loop(bench: Bench) -> list[float]:
    """Seconds a step of each logged stretch of `training.loop.train`, the first left out."""
    name, every, never = f"loop{time.monotonic_ns()}", 2, 10**9
    steps = WARM_UP + every * -(-bench.steps // every)
    loaded = bench.loaded(
        f"run.name={name}", f"training.tokens={steps * bench.tokens_per_step}", f"logging.every={every}", f"evaluation.every={never}",
        f"checkpoint.every={never}", f"data.prepared={random_corpus(bench)}", "evaluation.tokens=1",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        train(loaded)
    dist.barrier()
    records = [json.loads(line) for line in (bench.scratch / name / "metrics.jsonl").read_text().splitlines()]
    return [bench.tokens_per_step / r["tokens_per_second"] for r in records if r["step"] > WARM_UP and "tokens_per_second" in r]


def random_corpus(bench: Bench) -> Path:
    """A prepared corpus of random tokens, for the loop alone."""
    folder = bench.scratch / f"random_corpus_{bench.size}"
    if bench.ranks.is_first and not folder.exists():
        (folder / "tokenizer").mkdir(parents=True)
        dtype, splits = token_dtype(bench.vocabulary), {}
        for split in SPLITS:
            tokens = np.random.default_rng(0).integers(bench.vocabulary, size=64 * bench.tokens_per_step + 1, dtype=dtype)
            tokens.tofile(folder / f"{split}-00000.bin")
            digest = hashlib.sha256(tokens.tobytes()).hexdigest()
            splits[split] = {"tokens": len(tokens), "shards": [{"file": f"{split}-00000.bin", "tokens": len(tokens), "sha256": digest}]}
        manifest = {
            "format": FORMAT,
            "vocab_size": bench.vocabulary,
            "end_of_text": 0,
            "dtype": dtype.name,
            "content_hash": "random",
            **splits,
        }
        (folder / "manifest.json").write_text(json.dumps({**manifest, "validation_unigram_loss": None}))
    dist.barrier()
    return folder


class WholeLogits(nn.Module):
    """Our network with the loss as a bare loop has it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.network = Transformer(bench.config)
        initialize(self.network, 0)
        if bench.compiled:
            for block in self.network.blocks:
                block.compile()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.network(tokens).float().flatten(0, 1), targets.flatten())


def bare_pytorch(bench: Bench) -> list[float]:
    model = WholeLogits(bench).to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    forward = nn.parallel.DistributedDataParallel(model) if bench.ranks.world_size > 1 else model
    batches = [tuple(t.to(bench.device) for t in bench.batch()) for _ in range(4)]

    def step(number: int) -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.arguments.precision == "bf16"):
            loss = forward(*batches[number % 4])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return bench.timed(step)


def bare_deepspeed(bench: Bench) -> list[float]:
    import deepspeed  # after training.engine, which tells it the accelerator

    model = WholeLogits(bench)
    config = deepspeed_config(bench.recipe, count_parameters(bench.config).total, 1, bench.ranks.world_size)
    optimizer = make_optimizer(model.network, bench.recipe.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    batches = [tuple(t.to(bench.device) for t in bench.batch()) for _ in range(4)]

    def step(number: int) -> Tensor:
        loss = engine(*batches[number % 4])
        engine.backward(loss)
        engine.step()
        return loss.detach()

    seconds = bench.timed(step)
    engine.destroy()
    return seconds


def products_and_attention(bench: Bench) -> list[float]:
    """The products of a step, forward and backward, and its attention, by the same kernels as the network's, in memory that is there."""
    config, dtype = bench.config, torch.bfloat16 if bench.arguments.precision == "bf16" else torch.float32
    assert config.head_dim is not None and config.kv_heads is not None and config.mlp_width is not None
    width, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    tokens, ups = bench.micro_batch * bench.length, 2 if config.activation == "swiglu" else 1
    rows = min(tokens, chunk_rows(bench.vocabulary, bench.device.type))
    products = [  # (rows, in, out), and how many
        ((tokens, width, queries), config.depth), ((tokens, width, keys), 2 * config.depth), ((tokens, queries, width), config.depth),
        ((tokens, width, config.mlp_width), ups * config.depth), ((tokens, config.mlp_width, width), config.depth),
        ((rows, width, bench.vocabulary), -(-tokens // rows)),
    ]  # fmt: skip

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=bench.device)

    buffers = [(made(m, k), made(n, k), made(m, n), made(m, k), made(n, k)) for (m, k, n), _ in products]
    query, incoming = (made(bench.micro_batch, bench.length, config.heads, config.head_dim).transpose(1, 2) for _ in range(2))
    key, value = (made(bench.micro_batch, bench.length, config.kv_heads, config.head_dim).transpose(1, 2) for _ in range(2))
    for tensor in (query, key, value):
        tensor.requires_grad_()

    def step(number: int) -> Tensor:
        for (x, weight, y, to_x, to_weight), (_, count) in zip(buffers, products, strict=True):
            for _ in range(count):
                torch.mm(x, weight.T, out=y)
                torch.mm(y, weight, out=to_x)
                torch.mm(y.T, x, out=to_weight)
        for _ in range(config.depth):
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=keys != queries)
            torch.autograd.grad(mixed, (query, key, value), incoming)
        return buffers[-1][-1][0, 0]

    return bench.timed(step)


def peer(bench: Bench, name: str, python: str) -> list[float]:
    """A peer in a process of its own, for which this one waits."""
    config = bench.config
    shape = {
        "width": config.width, "depth": config.depth, "heads": config.heads, "mlp_width": config.mlp_width, "vocabulary": bench.vocabulary,
        "length": bench.length, "micro_batch": bench.micro_batch, "steps": bench.steps, "warm_up": WARM_UP, "compile": bench.compiled,
        "precision": bench.arguments.precision, "clock": bench.arguments.clock, "threads": torch.get_num_threads(),
    }  # fmt: skip
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    if bench.device.type == "cuda":  # of several GPUs the Trainer would take all
        environment["CUDA_VISIBLE_DEVICES"] = visible_alone(bench.device.index, environment.get("CUDA_VISIBLE_DEVICES"))
    command = [python, str(Path(__file__).with_name("benchmark_peer.py")), name, json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode and "out of memory" in done.stderr.lower():
        raise torch.OutOfMemoryError(name)
    if done.returncode:
        raise InputError(f"{name}: its process ended with exit code {done.returncode}: {done.stderr.strip()[-1000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["peak_memory_bytes"] is not None:
        bench.memory[name] = found["peak_memory_bytes"]
    return found["seconds"]


def visible_alone(index: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES that leaves GPU number `index` of those that it leaves now."""
    return visible.split(",")[index].strip() if visible else str(index)


def ceiling(bench: Bench) -> float:
    """FLOP/s of the fastest of a few matrix products, by the clock on the wall."""
    dtype = torch.bfloat16 if bench.arguments.precision == "bf16" else torch.float32
    cuda, width, best = bench.device.type == "cuda", bench.config.width, 0.0
    for m, k, n in [(8192, 8192, 8192)] if cuda else [(2048, 2048, 2048), (bench.micro_batch * bench.length, width, 4 * width)]:
        a, b = torch.randn(m, k, dtype=dtype, device=bench.device), torch.randn(n, k, dtype=dtype, device=bench.device)
        out = F.linear(a, b)
        for _ in range(5):
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            torch.mm(a, b.T, out=out)
            if cuda:
                torch.cuda.synchronize()
            best = max(best, 2 * m * k * n / (time.perf_counter() - started))
    return best


def clear(device: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summarise(
    bench: Bench,
    seconds: dict[str, list[float]],
    ceilings: list[float],
    flops: int,
    parameters: int,
    absent: dict[str, str],
) -> dict[str, Any]:
    """What is written; `seconds` are those of the rounds so far."""
    arguments, peers = bench.arguments, [name for name in PEERS if name in seconds]
    best = min(peers, key=lambda name: statistics.median(seconds[name])) if peers else None

    def ratio(name: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    peak, rows = peak_flops(bench.device), {}
    for name in seconds:
        rate = bench.tokens_per_step / statistics.median(seconds[name])
        row: dict[str, Any] = {"tokens_per_second": rate, "spread": [bench.tokens_per_step / f(seconds[name]) for f in (max, min)]}
        row |= {f"over_{peer}": ratio(name, peer) for peer in peers}
        work = passes(bench.loaded(*(f"{s}.{k}={v}" for s, d in OURS.get(name, {}).items() for k, v in d.items())).recipe, 1, 10**6)
        per_rank = rate * flops * work / bench.ranks.world_size
        if arguments.clock == "wall":
            row["share_of_matmul_ceiling"] = per_rank / statistics.median(ceilings)
            if peak:
                row["mfu"] = per_rank / peak
        if BOUND in seconds:
            row[f"over_{BOUND}"] = ratio(name, BOUND)
        if name in bench.memory:
            row["peak_memory_bytes"] = bench.memory[name]
        if any(bench.checkpointing.get(name, ())):
            row["activation_checkpointing"] = bench.checkpointing[name]._asdict()
        rows[name] = row
    return {
        "what": "medians over rounds; over_PEER: tokens per second over that peer's, the median of the ratios within a round",
        "clock": arguments.clock,
        "size": bench.size,
        "parameters": parameters,
        "flops_per_token": flops,
        "precision": arguments.precision,
        "tokens_per_step": bench.tokens_per_step,
        "sequence_length": bench.length,
        "overrides": arguments.overrides,
        "peers": peers,
        "best_peer": best,
        "subjects": rows,
        "absent": absent,
        "seconds_per_step": seconds,
        "matmul_ceiling_flops": ceilings,
        "environment": describe_environment(bench.ranks.world_size, bench.device),
    }


def table_line(name: str, row: dict[str, Any], best_peer: str | None) -> str:
    cells = [f"{name:<24}{row['tokens_per_second']:>12,.0f} tokens/s"]
    if best_peer:
        cells.append(f"{row['over_' + best_peer]:.3f} of {best_peer}")
    if f"over_{BOUND}" in row and name != BOUND:
        cells.append(f"{row['over_' + BOUND]:.3f} of products and attention alone")
    if "mfu" in row:
        cells.append(f"MFU {row['mfu']:.1%}")
    if "peak_memory_bytes" in row:
        cells.append(f"{row['peak_memory_bytes'] / 1e9:.1f} GB")
    if "activation_checkpointing" in row:
        cells.append("{full} blocks recomputed in full, {selective} selectively".format(**row["activation_checkpointing"]))
    return "   ".join(cells)


def report(size: str, result: dict[str, Any], absent: dict[str, str], out: Path | None) -> None:
    """For the terminal, and as a picture beside the JSON."""
    for name, row in result.get("subjects", {}).items():
        print(f"{size}  {table_line(name, row, result['best_peer'])}")
    for name, why in absent.items():
        print(f"{size}  {name}: not run: {why}")
    if out and result:
        benchmark_picture(result, out.with_suffix(".png"))
        print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
