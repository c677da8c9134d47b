"""Context pruning put into a model: `attach` is all that a caller needs of this file.

Nothing of a model is forked. A hook before each attention module makes Q_int and K_int of what it reads (`Interaction.attend_next`); the
attention function that transformers calls by name is ours, adds log I (`Interaction.mix`), and tells the cache what is dropped. A forward
pass in which it was not called as often as there are layers to prune is an error, never a silently unpruned result.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.config import PruningConfig
from model.context_pruning import Interaction, Settings
from model.errors import InputError
from model.pretrained import Gather, PretrainedDecoder, acting_window
from model.pruned_cache import PrunedLayer
from model.transformer import Transformer

ATTENTION = "context_pruning"  # the name of our attention function at transformers


def attach(
    model: nn.Module, config: PruningConfig | None = None, seed: int = 0, gather: Gather = lambda parameter: nullcontext()
) -> Settings:
    """Give every layer of a decoder that can be pruned an `Interaction`, and switch pruning on; returns what steers it.

    Args:
        model: a causal language model of transformers, or a `Transformer` of ours, bare or in a `BurnishForCausalLM`.

    Raises:
        InputError: a model that cannot be pruned, and why; or one that is already.
    """
    config = config or PruningConfig()
    network = model if isinstance(model, Transformer) else getattr(model, "network", None)
    ours, outer = isinstance(network, Transformer), model
    if isinstance(model, PretrainedDecoder):
        model = model.model
    if getattr(network if ours else model, "context_pruning_settings", None) is not None:
        raise InputError("the model has context pruning already")
    if not ours and not isinstance(model, PreTrainedModel):
        raise InputError(f"{type(model).__name__}: expected a causal language model of transformers, or one of Burnish's")
    modules = _our_modules(network) if ours else _attention_modules(model)  # pyright: ignore[reportArgumentType]
    width = network.config.width if ours else model.config.get_text_config(decoder=True).hidden_size  # pyright: ignore
    settings = Settings(config, sorted(modules))
    for number, module in modules.items():
        interaction = Interaction(width, settings, number)  # pyright: ignore[reportArgumentType]
        interaction.initialize(seed, gather)
        module.context_pruning = interaction.to(*_device_and_dtype(module, model))  # pyright: ignore[reportArgumentType]
        if ours:
            module.register_forward_pre_hook(_before_our_attention)
        else:
            module.register_forward_pre_hook(_before_attention, with_kwargs=True)
    top: Any = network if ours else model
    if not ours:
        top.set_attn_implementation(ATTENTION)
    holders: list[Any] = [top, outer]
    for holder in holders:
        holder.context_pruning_settings = settings
    top.register_forward_pre_hook(partial(_before_model, None if ours else _learned_positions(top)), with_kwargs=True)
    top.register_forward_hook(_after_model)
    return settings


def _device_and_dtype(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in what a module computes: its weights may be on disk until they are needed (accelerate), or packed into few bits."""
    places = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in module.modules())
    device = torch.device(next((place for place in places if place is not None), next(module.parameters()).device))
    parameters = (*module.parameters(), *model.parameters())
    return device, next(parameter.dtype for parameter in parameters if parameter.is_floating_point() and parameter.itemsize > 1)


# ------------------------------------------------------------------------------------------- in the models of transformers


def _attention_of_transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls by the name `ATTENTION`: ours where the module's hook has been, its own SDPA elsewhere."""
    interaction = getattr(module, "context_pruning", None)
    if interaction is None or interaction.current is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise InputError(f"{type(module).__name__}: attention with {name}, to which no pruning mask can be added")
    mixed = interaction.mix(query, key, value, attention_mask, kwargs.get("scaling"), kwargs.get("dropout", 0.0))
    return mixed.transpose(1, 2), None


def _before_attention(module: Any, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make the interaction queries and keys of what an attention module is about to read, and have its cache be one that shrinks."""
    interaction: Interaction = module.context_pruning
    if not interaction.settings.enabled:
        interaction.current = None  # which a pass that was broken off may have left
        return
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else arguments[0]
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    interaction.attend_next(x, None if cache is None else _pruned_layer(cache, module.layer_idx))


def _pruned_layer(cache: Any, number: int) -> PrunedLayer:
    """The cache's layer of this number, put in the place of an empty one of transformers' own."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while len(cache.layers) <= number and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[number]
    if isinstance(layer, PrunedLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):  # the second of a window that is longer than any text
        raise InputError(
            f"a cache of {type(layer).__name__} holds every token: context pruning needs the default (cache_implementation='dynamic')"
        )
    if layer.is_initialized and layer.keys is not None and layer.keys.numel():
        raise InputError("past_key_values: filled without context pruning; begin with a new cache")
    if getattr(cache, "offloading", False):
        raise InputError("cache_implementation='offloaded' does not go with context pruning: use the default")
    cache.layers[number] = PrunedLayer()
    return cache.layers[number]


def _before_model(longest: int | None, module: Any, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    settings: Settings = module.context_pruning_settings
    if not settings.enabled:
        # a teacher's pass runs between a pruned forward pass and its backward pass, which still needs what the forward pass recorded
        return
    settings.calls = 0
    settings.live.clear()
    settings.above.clear()
    settings.kept.clear()
    settings.kept_hard.clear()
    settings.need_losses.clear()
    tokens = kwargs.get("input_ids", arguments[0] if arguments else None)
    if longest is None or not isinstance(tokens, Tensor):
        return
    cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
    length = tokens.shape[1] + (cache.get_seq_length() if cache is not None else 0)
    if length > longest and positions is not None:
        length = int(positions.max()) + 1  # padding has none of its own
    if length > longest:
        raise InputError(f"a text of {length} tokens: this model takes at most {longest} (max_position_embeddings)")


def _learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has an embedding of; None: it has none, and no end of its own."""
    longest, tokens = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    if longest is None:
        return None
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    # some families have two rows more, which no position has
    return longest if any(longest <= table.num_embeddings <= longest + 2 for table in tables) else None


def _after_model(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
    settings: Settings = module.context_pruning_settings
    if settings.enabled and settings.calls != len(settings.layers):
        raise InputError(
            f"context pruning acted in {settings.calls} of {len(settings.layers)} layers: the model's attention implementation was changed "
            f"after it was attached; model.set_attn_implementation({ATTENTION!r}) brings it back"
        )


def _attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The self-attention of each layer that can be pruned. Raises InputError where that is none."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise InputError(f"{type(model).__name__}: an encoder and a decoder; context pruning is for decoders alone")
    if not model._supports_attention_backend:
        raise InputError(
            f"{type(model).__name__}: not supported: its attention is not called through transformers' attention interface "
            "(_supports_attention_backend is missing), so nothing can be added to its scores"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise InputError(f"{type(model).__name__}: not supported: its attention scores are soft-capped, and SDPA has no such kernel")
    found: dict[int, nn.Module] = {}
    skipped = []
    for name, module in model.named_modules():
        number = getattr(module, "layer_idx", None)
        if not isinstance(number, int) or "Attention" not in type(module).__name__ or getattr(module, "is_cross_attention", False):
            continue
        kinds = getattr(config, "layer_types", None)
        kind = kinds[number] if kinds else "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        if kind != "full_attention" and not (kind == "sliding_attention" and acting_window(config) is None):
            skipped.append(f"{name}: a window")
        elif getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False):
            skipped.append(f"{name}: shares its cache")
        elif hasattr(module, "sinks"):
            skipped.append(f"{name}: learned sinks")
        elif number in found:
            raise InputError(f"{type(model).__name__}: not supported: two attention modules of layer {number}")
        else:
            found[number] = module
    if not found:
        why = f" ({'; '.join(skipped[:3])})" if skipped else " (no module called Attention with a layer_idx)"
        raise InputError(f"{type(model).__name__}: no layer whose context could be pruned{why}")
    return found


# ------------------------------------------------------------------------------------------------------------- our own


def _before_our_attention(module: Any, arguments: tuple[Any, ...]) -> None:
    """As `_before_attention`, for model/attention.py: x, x_value, context, cache."""
    interaction: Interaction = module.context_pruning
    if not interaction.settings.enabled:
        interaction.current = None
        return
    x, _, _, layer = arguments
    if layer is not None and not isinstance(layer, PrunedLayer):
        raise InputError("a cache made without context pruning: begin with Cache(PrunedLayer)")
    interaction.attend_next(x, layer)


def _our_modules(network: Transformer) -> dict[int, nn.Module]:
    if network.config.attention == "shaped":
        raise InputError(
            "model.attention: shaped subtracts the mean of all values, those of dropped tokens too: context pruning needs softmax"
        )
    if network.config.attention_softcap is not None:
        raise InputError("model.attention_softcap: its scores are capped, and the fused kernel that pruning adds to has no cap")
    if network.config.attention_window is not None:
        raise InputError("model.attention_window: its tokens leave the context by themselves; leave context pruning out")
    return {number: block.attention for number, block in enumerate(network.blocks)}  # pyright: ignore[reportReturnType]


AttentionInterface.register(ATTENTION, _attention_of_transformers)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
