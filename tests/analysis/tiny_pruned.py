"""Small random networks with context pruning, on disk as train.py leaves them: a pretrained Llama with LoRA, and one of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model.config import ModelConfig, PruningConfig
from model.parametrization import initialize
from model.pretrained import LoraShape, PretrainedDecoder, describe, load, pretrained_weights
from model.pruning_hooks import attach
from model.transformer import Transformer
from tests.analysis.conftest import write_checkpoint

VOCABULARY = 257
PRUNING = PruningConfig(rank=4, bias=0.2, sinks=1, window=2)
THRESHOLD = 0.1


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A token a byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({**{letter: i for i, letter in enumerate(alphabet)}, "<end>": 256}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def randomize(model: torch.nn.Module, names: str, seed: int, std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def write_llama(folder: Path) -> None:
    """A pretrained model in a folder of transformers, weights large enough for attention to choose."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=160, tie_word_embeddings=True))
    randomize(model, "proj", 1, 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_llama_run(run: Path, base: Path, pruned: bool = True, lora: bool = True, seed: int = 2) -> Any:
    """RUN/checkpoints/step-00000005 of a fine-tune of `base`; the network itself."""
    shape = describe(str(base), None, LoraShape(rank=2, alpha=4.0) if lora else None)
    network = PretrainedDecoder(shape)
    load(network, pretrained_weights(str(base)))
    if pruned:
        attach(network, PRUNING, seed).threshold = THRESHOLD
    randomize(network, ".lora_", seed, 0.1)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not lora or ".lora_" in name or ".context_pruning." in name)
    _write(run, network, pruned)
    write_tokenizer(run / "tokenizer")
    return network.eval()


def write_own_run(run: Path, seed: int = 3) -> Transformer:
    """The same of a network of ours, trained whole."""
    network = Transformer(ModelConfig(width=32, depth=2, heads=4, kv_heads=2, vocab_size=VOCABULARY, sequence_length=160))
    initialize(network, seed)
    randomize(network, "attention", seed, 0.3)
    attach(network, PRUNING, seed).threshold = THRESHOLD
    _write(run, network, True)
    write_tokenizer(run / "tokenizer")
    return network.eval()


def _write(run: Path, network: Any, pruned: bool) -> None:
    step = run / "checkpoints" / "step-00000005"
    write_checkpoint(step, network, 5)
    state = torch.load(step / "mp_rank_00_model_states.pt", weights_only=True)
    owners: dict[int, str] = {}
    state["shared_params"] = {}  # name: owner of a tied weight, as DeepSpeed writes it
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if owners.setdefault(id(parameter), name) != name:
            state["shared_params"][name] = owners[id(parameter)]
    frozen = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
    state["frozen_param_fragments"], state["frozen_param_shapes"] = frozen, {name: p.shape for name, p in frozen.items()}
    torch.save(state, step / "mp_rank_00_model_states.pt")
    (step / "manifest.json").unlink()
    if isinstance(network, PretrainedDecoder):
        (step / "model_config.json").rename(step / "pretrained.json")
    if pruned:
        (step / "context_pruning.json").write_text(json.dumps(network.context_pruning_settings.describe()))
