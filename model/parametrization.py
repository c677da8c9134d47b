"""What each parameter starts from and how it learns: one rule a tensor, by the module that owns it.

The parametrizations are those of CompleteP (arXiv 2505.01618, table 1), with m_N = width / base width, m_L = depth / base depth, and
alpha 0 for mup, 1/2 for depth_mup, 1 for complete_p. Factors on what the standard parametrization has:

    initial standard deviation      matrices of the blocks m_N^-1/2                              `initialize`
    learning rate                   matrices of the blocks m_N^-1 m_L^(alpha-1),
                                    norms, biases, gains of the blocks m_L^(alpha-1)             `learning_factors`
    weight decay                    matrices of the blocks m_N                                   `learning_factors`
    Adam's epsilon                  blocks m_N^-1 m_L^-alpha, all else m_N^-1                    `learning_factors`
    both residual branches          m_L^-alpha                                                   model/blocks.py
    logits                          1 / m_N                                                      model/transformer.py
    attention scores                sqrt(base d_k) / d_k, which is 8 / d_k for heads of 64       model/attention.py

Epsilon outside the blocks is not in that table: gradients there carry the logits' 1 / m_N, and the authors' code has it since (commit
3904404 of EleutherAI/nanoGPT-mup). Each is a plain number that follows from `ModelConfig`, so sharding, compiling, saving and exporting
keep it; at the base all are 1.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from model.attention import Attention
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


def initialize(model: Transformer, seed: int, gather: Gather | None = None) -> None:
    """Fill every parameter in place.

    Each tensor is drawn on the CPU in float32 from a generator of its own, seeded by (seed, name), and then cast: the values
    depend on neither device, dtype, number of ranks, ZeRO stage, nor on which other parameters exist.

    Args:
        gather: wraps a parameter while it is written, so that a sharded one is whole inside (training/engine.py); one after another then,
            since ranks gather together. Else several are drawn at a time: a generator has one thread.
    """

    def fill(name: str, module: nn.Module, parameter: nn.Parameter) -> None:
        with torch.no_grad(), gather(parameter) if gather else nullcontext():
            parameter.copy_(_initial_value(name, module, parameter.shape, model.config, seed))

    # those of context pruning begin by themselves: model/context_pruning.py
    owned = [one for one in owned_parameters(model) if ".context_pruning." not in one[0]]
    if gather is not None:
        for one in owned:
            fill(*one)
        return
    with ThreadPoolExecutor(min(DRAWN_AT_ONCE, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda one: fill(*one), owned))


DRAWN_AT_ONCE = 8  # tensors, each whole in float32 on its way


def _initial_value(name: str, module: nn.Module, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    leaf = name.rpartition(".")[2]
    if isinstance(module, Block):  # residual gains
        assert config.residual_gain is not None
        return torch.full(shape, config.residual_gain)
    if isinstance(module, Attention):  # the gains of shaped attention
        return torch.ones(shape)
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
        return torch.ones(shape) if leaf == "weight" else torch.zeros(shape)
    if leaf == "bias" or (name.endswith(".attention.query.weight") and config.query_init == "zero"):
        return torch.zeros(shape)
    if config.is_simplified and name.endswith(".attention.value.weight"):
        return torch.eye(*shape)
    standard_deviation = config.init_std
    if is_hidden(name, module):
        standard_deviation /= math.sqrt(config.width_ratio)
    if config.scaled_output_init and name.endswith((".attention.output.weight", ".mlp.down.weight")):
        # 2 depth branches add up in the residual stream (GPT-2); a block with a residual gain has that for it, and so has a
        # parametrization that follows the depth
        standard_deviation /= math.sqrt(2 * (config.base_depth or config.depth))
    return torch.empty(shape).normal_(0.0, standard_deviation, generator=generator_of(seed, name))


def generator_of(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers that depend on a seed and a parameter's name alone: not on ranks, nor on what else there is."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def is_hidden(name: str, module: nn.Module) -> bool:
    """Matrices from width to width, those of the blocks: muP has a rule of their own for them."""
    return isinstance(module, nn.Linear) and name.startswith("blocks.") and name.endswith("weight")


@dataclass(frozen=True)
class LearningFactors:
    """On the recipe's learning rate, weight decay and epsilon."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    epsilon: float = 1.0


def learning_factors(name: str, module: nn.Module, config: ModelConfig, by_root: bool = False) -> LearningFactors:
    """How a parameter of this network learns, by the table above.

    Args:
        by_root: m_N^-1/2 where the table has m_N^-1: of an optimizer whose step is in proportion to the weights' own size (Adafactor),
            of which m_N^-1/2 is in the initial values already, or orthogonal (Muon, matched to AdamW's root mean square): its spectral
            norm grows with the root of the width, and AdamW's, whose entries agree in sign, with the width. Step x decay stays free of
            the width in any case.
    """
    width, depth, alpha = config.width_ratio, config.depth_ratio, config.depth_exponent
    if not name.startswith("blocks."):
        return LearningFactors(epsilon=1 / width)
    rate, epsilon = depth ** (alpha - 1) if alpha else 1.0, depth**-alpha / width
    if not is_hidden(name, module):
        return LearningFactors(rate, 1.0, epsilon)
    by_width = math.sqrt(width) if by_root else width
    return LearningFactors(rate / by_width, by_width, epsilon)


def is_decayed(name: str, module: nn.Module) -> bool:
    """Weight decay acts on matrices: not on norms, residual gains, biases or learned positions."""
    return isinstance(module, (nn.Linear, nn.Embedding)) and name.endswith("weight") and not name.startswith("position_embedding")
