"""A tiny random Llama on disk, with a byte-level tokenizer, as a pretrained model of Hugging Face would lie there."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers


def tiny_tokenizer(eos_token: str | None = "<|endoftext|>") -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2's, with a handful of merges."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos_token)


def save_tiny_llama(folder: Path, seed: int = 0) -> None:
    tokenizer = tiny_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=36,
        intermediate_size=51,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
