"""What shaped attention and the simplified blocks cost: `python -m scripts.benchmark_blocks [--lengths 1024 4096] [--out FILE.json]`.

In one process and in turns: forward and backward pass of one attention layer, softmax against shaped, at each length; then a whole
training step of a network of each block, at the same width and depth. Medians, and ratios to softmax and to pre-norm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from analysis.output import write_json
from model.attention import Attention, Context
from model.config import SIZES, ModelConfig
from model.parametrization import initialize
from model.transformer import Transformer
from scripts.benchmark_outliers import VOCAB, take_turns, training_step

BLOCKS: dict[str, dict[str, Any]] = {
    "pre_norm": {},
    "shaped": {"attention": "shaped"},
    "simplified": {"block": "simplified"},
    "simplified_parallel": {"block": "simplified_parallel"},
    "outlier_protected": {"block": "outlier_protected"},
    "outlier_protected, shaped": {"block": "outlier_protected", "attention": "shaped"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="of the single layer")
    parser.add_argument("--length", type=int, default=512, help="of the training step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    layers = {length: layer_ratio(arguments, length, device, dtype) for length in arguments.lengths}
    tokens = torch.randint(VOCAB, (arguments.batch, arguments.length), device=device)
    steps = take_turns({name: training_step(fields, arguments, tokens)[1] for name, fields in BLOCKS.items()}, arguments.rounds, device)
    medians = {name: statistics.median(seconds) for name, seconds in steps.items()}
    result = {
        "command": "python -m scripts.benchmark_blocks " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "attention layer, shaped / softmax, forward and backward, by length": layers,
        "median_seconds of a training step": medians,
        "step / pre_norm's": {name: seconds / medians["pre_norm"] for name, seconds in medians.items()},
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)
    return 0


def layer_ratio(arguments: argparse.Namespace, length: int, device: torch.device, dtype: torch.dtype) -> float:
    """Time of a shaped attention layer over that of a softmax one: projections, attention, and both passes."""

    def layer(attention: str) -> Callable[[], None]:
        shape: dict[str, Any] = {**SIZES[arguments.size], "depth": 1, "vocab_size": 1, "sequence_length": length, "attention": attention}
        network = Transformer(ModelConfig(**shape))
        initialize(network, 0)
        module = network.blocks[0].attention.to(device, dtype)
        assert isinstance(module, Attention)
        if arguments.compile:
            module.compile()
        x = torch.randn(arguments.batch, length, shape["width"], device=device, dtype=dtype, requires_grad=True)
        toward = torch.randn_like(x)
        return lambda: module(x, x, Context()).backward(toward)

    seconds = take_turns({attention: layer(attention) for attention in ("softmax", "shaped")}, arguments.rounds, device)
    return statistics.median(seconds["shaped"]) / statistics.median(seconds["softmax"])


if __name__ == "__main__":
    sys.exit(main())
