"""What each parameter starts from, and which are weight-decayed: one rule a tensor, by the module that owns it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from model.blocks import Block
from model.config import ModelConfig
from model.transformer import Transformer

Gather = Callable[[nn.Parameter], AbstractContextManager]


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, owning module, parameter) for each parameter once; a tied weight counts under its first name."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{module_name}.{leaf}" if module_name else leaf, module, parameter


def initialize(model: Transformer, seed: int, gather: Gather = lambda parameter: nullcontext()) -> None:
    """Fill every parameter in place.

    Each tensor is drawn on the CPU in float32 from a generator of its own, seeded by (seed, name), and then cast: the values
    depend on neither device, dtype, number of ranks, ZeRO stage, nor on which other parameters exist.

    Args:
        gather: wraps a parameter while it is written, so that a sharded one is whole inside (training/engine.py).
    """
    with torch.no_grad():
        for name, module, parameter in owned_parameters(model):
            with gather(parameter):
                parameter.copy_(_initial_value(name, module, parameter.shape, model.config, seed))


def _initial_value(name: str, module: nn.Module, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    leaf = name.rpartition(".")[2]
    if isinstance(module, Block):  # residual gains
        assert config.residual_gain is not None
        return torch.full(shape, config.residual_gain)
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
        return torch.ones(shape) if leaf == "weight" else torch.zeros(shape)
    if leaf == "bias":
        return torch.zeros(shape)
    standard_deviation = config.init_std
    if config.scaled_output_init and name.endswith((".attention.output.weight", ".mlp.down.weight")):
        # 2 depth branches add up in the residual stream (GPT-2); a block with a residual gain has that for it
        standard_deviation /= math.sqrt(2 * config.depth)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, standard_deviation, generator=generator)


def is_decayed(name: str, module: nn.Module) -> bool:
    """Weight decay acts on matrices: not on norms, residual gains, biases or learned positions."""
    return isinstance(module, (nn.Linear, nn.Embedding)) and name.endswith("weight") and not name.startswith("position_embedding")
