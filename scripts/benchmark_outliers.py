"""What the Outlier-Protected block and the watching of outliers cost: `python -m scripts.benchmark_outliers`.

A pre-norm and an Outlier-Protected network of the same shape take turns in one process: a forward pass, and a whole training step.
Then training steps that measure the activations' outliers take turns with steps that do not. Medians and ratios, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from model.activation_statistics import watch_residuals
from model.config import SIZES, ModelConfig
from model.parametrization import initialize
from model.transformer import Transformer
from training.recipe import LoggingSection

VOCAB = 16384


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.randint(VOCAB, (arguments.batch, arguments.length), device=device)
    subjects: dict[str, Callable[[], None]] = {}
    for block in ("pre_norm", "outlier_protected"):
        model, step = training_step({"block": block}, arguments, tokens)
        subjects[f"{block} forward"] = lambda model=model: forward(model, tokens)
        subjects[f"{block} step"] = step
    subjects["outlier_protected step, measured"] = lambda: measured(model, step)
    seconds = take_turns(subjects, arguments.rounds, device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    every = LoggingSection().outliers_every
    extra = medians["outlier_protected step, measured"] - medians["outlier_protected step"]
    result: dict[str, Any] = {
        "command": "python -m scripts.benchmark_outliers " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "median_seconds": medians,
        "forward, pre_norm / outlier_protected": medians["pre_norm forward"] / medians["outlier_protected forward"],
        "step, pre_norm / outlier_protected": medians["pre_norm step"] / medians["outlier_protected step"],
        "share of training time that measuring takes": extra / (every * medians["outlier_protected step"]),
        "steps between measurements": every,
    }
    print(json.dumps(result, indent=2))
    return 0


def training_step(fields: dict[str, Any], arguments: argparse.Namespace, tokens: torch.Tensor) -> tuple[Transformer, Callable[[], None]]:
    """A network with these fields of the model and what takes one AdamW step with it."""
    shape: dict[str, Any] = {**SIZES[arguments.size], "vocab_size": VOCAB, "sequence_length": arguments.length, **fields}
    model = Transformer(ModelConfig(**shape))
    initialize(model, 0)
    model.to(tokens.device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    if arguments.compile:
        for layer in model.blocks:
            layer.compile()
    return model, adamw_step(model, tokens)


def adamw_step(model: Transformer, tokens: torch.Tensor) -> Callable[[], None]:
    """What takes one AdamW step with a network on these tokens, (batch, length)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        (model(tokens, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def forward(model: Transformer, tokens: torch.Tensor) -> None:
    model(tokens, tokens)


def measured(model: Transformer, step: Callable[[], None]) -> None:
    with watch_residuals(model) as moments:
        step()
    for place in moments.values():
        place.measures()


def take_turns(subjects: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each round for each subject, on a CPU of processor time; the first round warms up and does not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # what other jobs on the machine take does not count
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for round_ in range(rounds + 1):
        for name, run in subjects.items():
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(clock() - start)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
