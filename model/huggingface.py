"""A Burnish network as a transformers model.

    import model.huggingface                                     # makes the class known to transformers
    model = AutoModelForCausalLM.from_pretrained("exported")     # a folder that `python -m analysis export` wrote
    model.generate(**AutoTokenizer.from_pretrained("exported")("def ", return_tensors="pt"))

The network itself is wrapped, not written again: every block variant of `ModelConfig` exports as it is. Its cache is the network's
own (model/cache.py), which shaped attention needs a sum of values in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.cache import Cache
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.pruned_cache import PrunedLayer
from model.transformer import Transformer


class BurnishConfig(PretrainedConfig):
    """`ModelConfig` as a transformers configuration: its fields lie under `network`, the names transformers looks for beside it."""

    model_type = "burnish"

    def __init__(self, network: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.network = network
        if network is not None:
            shape = ModelConfig(**network)
            kwargs = {
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.width,
                "num_hidden_layers": shape.depth,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "max_position_embeddings": shape.sequence_length,
                "tie_word_embeddings": shape.tied_embeddings,
                **kwargs,
            }
        super().__init__(**kwargs)


class BurnishForCausalLM(PreTrainedModel, GenerationMixin):
    """`Transformer` behind the interface of transformers: logits, a mean loss where there are labels, and `generate`."""

    config_class = BurnishConfig
    _tied_weights_keys = {"network.unembedding.weight": "network.embedding.weight"}  # noqa: RUF012  # counts where the config ties them
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # its cache cannot be cut back, which transformers then says where assisted decoding is asked for

    def __init__(self, config: BurnishConfig) -> None:
        super().__init__(config)
        if config.network is None:
            raise InputError("config.json has no `network`: it is not of a model that Burnish exported")
        self.network = Transformer(ModelConfig(**config.network))
        if not self.network.embedding.weight.is_meta:  # a new model, not one about to be read: it starts as in training, seed 0
            initialize(self.network, seed=0)
            for parameter in self.network.parameters():
                parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """transformers calls this for parameters that no file held: a model in part trained and in part random is not handed out."""
        if any(not parameter.is_meta for parameter in module.parameters(recurse=False)):
            names = [name for name, own in self.named_modules() if own is module]
            raise InputError(f"the folder's weights are not all there: {', '.join(names)} has none")

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.network.embedding = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module:
        return self.network.unembedding

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.network.unembedding = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits (batch, length, vocab_size), of the last `logits_to_keep` positions where that is above 0.

        Args:
            input_ids: (batch, length), int64.
            attention_mask: (batch, length, those in the cache included): 0 marks padding, on either side.
            past_key_values: a cache of the tokens before these, which are added to it; begins as `model.cache.Cache()`.
            labels: (batch, length): the tokens themselves, -100 where nothing is to be predicted; shifted here, as transformers has it.
            use_cache, return_dict: accepted because transformers passes them; `generate` makes the cache.

        Raises:
            InputError: padding on the left, where positions are learned: a text would not start at position 0; or within a text.
        """
        documents = None
        if attention_mask is not None and not attention_mask.all():
            if self.network.config.positions == "learned" and not attention_mask[:, 0].all():
                raise InputError("padding on the left shifts learned positions: set tokenizer.padding_side = 'right'")
            changes = attention_mask.diff(dim=1)
            if ((changes > 0).any(dim=1) & (changes < 0).any(dim=1)).any():
                raise InputError("attention_mask: padding stands on one side of a text, not within it or on both")
            documents = attention_mask.long()  # text sees text and padding sees padding; RoPE knows distances alone
        logits = self.network(input_ids, document_ids=documents, cache=past_key_values)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)  # pyright: ignore[reportArgumentType]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` hands to `forward`: the last `next_sequence_length` tokens, which the cache does not hold; None: all."""
        if attention_mask is not None and (attention_mask.diff(dim=1) < 0).any():
            raise InputError("padding on the right stands between a text and what follows it: set tokenizer.padding_side = 'left'")
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """`generate` calls it for its cache, which is in `model_kwargs` afterwards: ours, which has the sum of values too."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, Cache):
            raise InputError(f"past_key_values: {type(cache).__name__}, expected a model.cache.Cache, or none")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # pyright: ignore[reportAttributeAccessIssue]
        if cache is None and generation_config.use_cache:
            pruning = self.network.context_pruning_settings
            model_kwargs["past_key_values"] = Cache(PrunedLayer) if pruning is not None and pruning.enabled else Cache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:  # transformers would make one of its own
        return False

    def _reorder_cache(self, past_key_values: Cache, beam_idx: Tensor) -> Cache:  # beam search calls it
        past_key_values.reorder(beam_idx)
        return past_key_values


def transformers_config(config: ModelConfig, dtype: torch.dtype = torch.float32, **extra: Any) -> BurnishConfig:
    """The configuration that goes beside exported weights of this dtype; `extra`: eos_token_id and the like."""
    return BurnishConfig(network=config.to_dict(), dtype=dtype, architectures=["BurnishForCausalLM"], **extra)


AutoConfig.register(BurnishConfig.model_type, BurnishConfig, exist_ok=True)
AutoModelForCausalLM.register(BurnishConfig, BurnishForCausalLM, exist_ok=True)
