"""A decoder of transformers where our own network would stand: the same call, the same summed loss.

shape = describe("HuggingFaceTB/SmolLM2-135M")     # or a folder, a GGUF file, package:NAME (model/hub.py)
decoder = PretrainedDecoder(shape)                 # its architecture
load(decoder, pretrained_weights(shape.source))    # and its weights
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activation_checkpointing import ActivationCheckpointing, keep_products_and_attention
from model.config import ModelConfig
from model.errors import InputError, one_line
from model.hub import locate, open_decoder
from model.linear_cross_entropy import IGNORED_TARGET
from model.parametrization import generator_of

Gather = Callable[[nn.Parameter], AbstractContextManager]
Share = Callable[[dict[str, Tensor] | None], dict[str, Tensor]]


@dataclass(frozen=True)
class LoraShape:
    """Low-rank adapters (peft) on the linear maps of the blocks; what they are added to is frozen."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0


@dataclass(frozen=True)
class PretrainedModel:
    """What `ModelConfig` is for our own network.

    Attributes:
        source: where the weights come from.
        huggingface: the content of its config.json.
        sequence_length: the longest text that it accepts.
        generation: the content of its generation_config.json, if it has one: what ends a text, and how to sample.
    """

    source: str
    huggingface: dict[str, Any]
    sequence_length: int
    lora: LoraShape | None = None
    generation: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def warnings(self) -> list[str]:
        return []

    @property
    def vocab_size(self) -> int:
        return int(self.huggingface["vocab_size"])

    def shape(self) -> ModelConfig:
        """Our network of the same size, for the plan of memory and FLOPs."""
        known = self.transformers_config()
        heads, width = known.num_attention_heads, known.hidden_size
        mlp_width = (
            getattr(known, "intermediate_size", None) or getattr(known, "ffn_dim", None) or getattr(known, "n_inner", None) or 4 * width
        )
        gated = known.model_type in ("llama", "mistral", "qwen2", "qwen3", "phi3")
        return ModelConfig(
            vocab_size=self.vocab_size,
            width=width,
            depth=known.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(known, "num_key_value_heads", None) or heads,
            head_dim=getattr(known, "head_dim", None) or width // heads,
            mlp_width=mlp_width,
            sequence_length=self.sequence_length,
            activation="swiglu" if gated else "gelu",
            norm="rms_norm" if gated else "layer_norm",
            tied_embeddings=bool(known.tie_word_embeddings),
        )

    def transformers_config(self) -> Any:
        from transformers import AutoConfig

        fields = dict(self.huggingface)
        try:
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{self.source}: its config.json is of no model that transformers knows: {error}") from None


def describe(source: str, sequence_length: int | None = None, lora: LoraShape | None = None) -> PretrainedModel:
    """What a pretrained model is, from its configuration alone. Raises InputError where there is none, or it is no decoder."""
    from transformers import AutoConfig, GenerationConfig

    where, arguments = locate(source)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **arguments)
    except Exception as error:  # no connection, no such name, broken files: libraries raise what they like
        raise InputError(f"model.pretrained: no model can be read from {source}: {one_line(error)}") from None
    if config.is_encoder_decoder:
        raise InputError(f"model.pretrained: {source} is an encoder and a decoder; expected a decoder alone")
    fields = json.loads(config.to_json_string(use_diff=False))
    for name in ("quantization_config", "torch_dtype", "dtype", "_name_or_path", "transformers_version", "architectures"):
        fields.pop(name, None)
    longest = longest_text(config)
    if sequence_length is not None and longest is not None and sequence_length > longest:
        raise InputError(f"training.sequence_length: {sequence_length} is over the {longest} that {source} accepts")
    generation = None
    if "gguf_file" not in arguments:
        with suppress(OSError, ValueError):  # some have none
            generation = json.loads(GenerationConfig.from_pretrained(where).to_json_string())
    return PretrainedModel(source, fields, sequence_length or longest or 0, lora, generation)


def longest_text(config: Any) -> int | None:
    """Tokens of the longest text that a model of transformers is made for, by its configuration; None: it does not say."""
    longest = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in scaling.values() if isinstance(part, dict)] or [scaling]  # one for all layers, or one a kind
    if longest is not None:
        for part in parts:  # YaRN and others: the positions trained on, times a factor
            longest = max(longest, int((part.get("factor") or 1) * (part.get("original_max_position_embeddings") or longest)))
    return longest


def acting_window(config: Any) -> int | None:
    """How many tokens the layers with a window see, by a model's configuration; None: all, since no text is longer than it."""
    window, longest = getattr(config, "sliding_window", None), longest_text(config)
    return None if window is None or (longest is not None and window >= longest) else window


def layer_masks(config: Any, allowed: Tensor) -> Tensor | dict[str, Tensor]:
    """What transformers takes as attention_mask for documents packed in a row: (batch, 1, length, length) bool, or one for each kind of
    layer, within its window.

    Args:
        allowed: (batch, length, length) bool, who may look at whom in a layer without a window.

    Raises:
        InputError: layers of a kind that no mask keeps within a document.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    if others := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise InputError(
            f"data.document_masks: {config.model_type} has layers of {others[0]}, which no mask keeps within a document: set it to false"
        )
    positions = torch.arange(allowed.shape[1], device=allowed.device)
    windowed = allowed if window is None else allowed & (positions[:, None] - positions < window)
    masks = {"full_attention": allowed[:, None], "sliding_attention": windowed[:, None]}
    return masks if len(kinds) > 1 else masks[kinds.pop()]


class PretrainedDecoder(nn.Module):
    """`Transformer`'s call around a causal language model of transformers."""

    def __init__(self, shape: PretrainedModel) -> None:
        super().__init__()
        self.config = shape
        self.model = architecture(shape)
        self.context_pruning_settings: Any = None
        self._activation_checkpointing = ActivationCheckpointing()

    @property
    def activation_checkpointing(self) -> ActivationCheckpointing:
        """Of no layer or of all of them, which is what transformers can do."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, chosen: ActivationCheckpointing) -> None:
        self._activation_checkpointing = chosen
        if any(chosen):
            options = {} if chosen.full else {"context_fn": keep_products_and_attention}
            self.model.gradient_checkpointing_enable({"use_reentrant": False, **options})

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's layers."""
        depth = self.config.transformers_config().num_hidden_layers
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
        if len(lists) != 1:
            raise InputError(f"{self.config.source}: {len(lists)} lists of {depth} layers in its network, expected one")
        return lists[0]

    @property
    def unembedding(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, tokens: Tensor, targets: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Logits, or the summed loss; arguments and results as of `Transformer.forward`."""
        logits = self.logits(tokens, document_ids)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
        if self.context_pruning_settings is not None:
            loss = self.context_pruning_settings.objective(loss, logits, targets, lambda: self.dense_logits(tokens, document_ids))
        return loss

    def logits(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        arguments: dict[str, Any] = {}
        if document_ids is not None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            same = document_ids[:, :, None] == document_ids[:, None, :]
            starts = same.int().argmax(-1)
            config = self.model.config.get_text_config(decoder=True)
            arguments["attention_mask"] = layer_masks(config, same & (positions[:, None] >= positions))
            arguments["position_ids"] = positions - starts
        return self.model(input_ids=tokens, use_cache=False, **arguments).logits

    @torch.no_grad()
    def dense_logits(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """Of the network without pruning and, where there are LoRA adapters, without them: the network as it was."""
        training = self.training
        self.eval()
        try:
            with self.context_pruning_settings.switched_off(), without_lora(self.model):
                return self.logits(tokens, document_ids)
        finally:
            self.train(training)


def architecture(shape: PretrainedModel) -> Any:
    """The network of transformers, its weights not set; with the LoRA adapters that `shape` asks for."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():  # `load` fills them, and a sharded parameter could not be drawn here
            model = AutoModelForCausalLM.from_config(shape.transformers_config(), attn_implementation="sdpa", trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise InputError(f"model.pretrained: {shape.source}: {one_line(error)}") from None
    model.tie_weights()  # which transformers does where it initialises
    if shape.generation is not None:
        model.generation_config = GenerationConfig.from_dict(shape.generation)
    else:
        model.generation_config.pad_token_id = model.config.pad_token_id
    if shape.lora is not None:
        add_lora(model, shape.lora)
    return model


def add_lora(model: nn.Module, shape: LoraShape) -> None:
    """Adapters on every linear map of the blocks, made by peft, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=shape.dropout,
        target_modules=sorted(linear_maps(model)),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    inject_adapter_in_model(config, model)


def linear_maps(model: Any) -> set[str]:
    """Names of the linear maps of the blocks, as they are called without LoRA adapters on them."""
    return {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not model.get_output_embeddings()
        and ".lora_" not in name
        and ".context_pruning." not in name
    }


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """LoRA adapters, if there are any, switched off."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # pyright: ignore[reportCallIssue]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones by each of their names, and the buffers that are saved with them, such as a router's correction."""
    return model.state_dict(keep_vars=True)


def pretrained_weights(source: str) -> dict[str, Tensor]:
    """The tensors of a pretrained model by transformers' names, float32, on the CPU. Raises InputError."""
    try:
        model = open_decoder(source)
    except InputError as error:
        raise InputError(f"model.pretrained: {error}") from None
    return weights_of(model)


def check_weights(decoder: PretrainedDecoder, weights: dict[str, Tensor]) -> None:
    """Raises InputError where what `load` takes from the weights is not among them, or has another shape."""
    for name, tensor in (*decoder.model.named_parameters(), *_saved_buffers(decoder).items()):
        if ".context_pruning." in name or ".lora_" in name:
            continue
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # at ZeRO stage 3 a parameter itself is flat
        found = weights.get(_name_there(name))
        if found is None or tuple(found.shape) != shape:
            raise InputError(f"{decoder.config.source}: {name} is {shape}, found {None if found is None else tuple(found.shape)}")


@torch.no_grad()
def load(
    decoder: PretrainedDecoder,
    weights: dict[str, Tensor] | None,
    gather: Gather = lambda parameter: nullcontext(),
    seed: int = 0,
    share: Share = lambda buffers: buffers or {},
) -> None:
    """Fill the decoder's parameters, but those that decide about the context, and the buffers that are saved with them.

    LoRA's first factor is drawn as peft draws it, but from a generator of its own, seeded by (seed, name): the same on any number of ranks.
    The second is 0.

    Args:
        weights: from `pretrained_weights`; None on ranks whose copy is not taken, under ZeRO-3 all but the first.
        gather: wraps a parameter while it is written, so that a sharded one is whole inside.
        share: returns the buffers among the weights, where `weights` is None those of the first.

    Raises:
        InputError: as `check_weights`. Where other ranks have no weights, these are to hear of it before: they would wait in `gather`.
    """
    if weights is not None:
        check_weights(decoder, weights)
    for name, parameter in decoder.model.named_parameters():
        if ".context_pruning." in name:
            continue
        with gather(parameter):
            if ".lora_B." in name:
                parameter.zero_()
                continue
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator_of(seed, name)))
                continue
            if weights is not None:
                parameter.copy_(weights[_name_there(name)])
    if buffers := _saved_buffers(decoder):
        # no `gather` brings these to the ranks without weights
        shared = share(None if weights is None else {_name_there(name): weights[_name_there(name)] for name in buffers})
        for name, buffer in buffers.items():
            buffer.copy_(shared[_name_there(name)])


def _saved_buffers(decoder: PretrainedDecoder) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights_of(decoder.model).items() if not isinstance(tensor, nn.Parameter)}


def _name_there(name: str) -> str:
    """A tensor's name in the pretrained model, which has no adapters."""
    return name.replace(".base_layer.", ".")
