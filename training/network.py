"""The network that a recipe asks for: ours or a pretrained one, with what it learns to drop of its context."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from model.config import ModelConfig
from model.errors import InputError
from model.pretrained import Gather, PretrainedDecoder, PretrainedModel
from model.transformer import Transformer
from training.recipe import ContextPruningSection, Recipe

Network = Transformer | PretrainedDecoder


def make_network(
    config: ModelConfig | PretrainedModel,
    pruning: ContextPruningSection | None = None,
    seed: int = 0,
    gather: Gather = lambda parameter: nullcontext(),
) -> Network:
    """Its parameters are not filled yet, but for those that decide about the context; what is not trained is frozen.

    Raises:
        InputError: a network whose context cannot be pruned, or decisions to begin with that cannot be read or are of another structure.
    """
    network = PretrainedDecoder(config) if isinstance(config, PretrainedModel) else Transformer(config)
    if pruning is not None:
        from model.pruning_hooks import attach  # transformers takes seconds to import

        attach(network, pruning.structure(), seed, gather)
        if pruning.start is not None and isinstance(network, PretrainedDecoder):
            from model.pruning_files import begin_with

            try:
                begin_with(network.model, pruning.start, gather)
            except InputError as error:
                raise InputError(f"context_pruning.start: {error}") from None
        for name, parameter in network.named_parameters():
            if ".context_pruning." in name:
                parameter.requires_grad_(pruning.decisions == "learned")
            elif pruning.trainable != "all":
                parameter.requires_grad_(".lora_" in name)
    return network


def require_compiler(recipe: Recipe) -> None:
    """On a CPU torch.compile writes C++, in the first step. Raises InputError where this machine has nothing that compiles it."""
    if not recipe.training.compile or torch.cuda.is_available():
        return
    from torch._inductor import cpp_builder, exc  # takes seconds to import

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):
        raise InputError(
            "training.compile: needs a C++ compiler on a CPU, and none was found (g++, or what the environment variable CXX names); "
            "install one, or leave it out"
        ) from None


def mend_rotary(decoder: PretrainedDecoder) -> None:
    """Compute the rotary frequencies of a decoder of transformers again, in float32.

    DeepSpeed's zero.Init, within which a ZeRO-3 network is made, has every new tensor in the type of the weights: in bf16 they come out
    wrong by a hundredth, which at position 1,000 is turns. To be called outside of it.
    """
    for module in decoder.model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            exact: Any = type(module)(module.config)  # pyright: ignore[reportCallIssue]
            for name, buffer in exact.named_buffers(recurse=False):
                setattr(module, name, buffer.to(getattr(module, name).device))
