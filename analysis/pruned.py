"""What `analysis context` compares, opened the same way whoever made it: a network with its context pruning, or with none.

    a run or checkpoint of train.py, with context_pruning.json beside the shards or without
    a folder that model.pruning_files.save or `analysis export` wrote: the whole model, or the adapters alone
    any decoder of transformers: a folder, a GGUF file, package:NAME, a name on the hub

A network without pruning is attached to all the same, with decisions that drop nothing, so that cache policies run through one path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.checkpoint import Checkpoint
from analysis.decoders import is_of_transformers, read_config
from analysis.runs import Run, find_run, read_json
from analysis.tokens import Tokenizer, run_tokenizer, tokenizer_of_transformers
from model import pruning_files
from model.config import PruningConfig
from model.context_pruning import Policy, Settings, structure_of
from model.errors import InputError
from model.hub import open_decoder, open_tokenizer
from model.pretrained import LoraShape, PretrainedDecoder, PretrainedModel, longest_text, without_lora
from model.pruning_hooks import attach
from model.transformer import Transformer

NEVER = PruningConfig(rank=1, window=1 << 40)  # every token is within the window
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Subject:
    """A network to measure, in evaluation mode.

    Attributes:
        network: tokens (batch, length) int64 -> logits, or an object that has them.
        prunes: it learned what to drop.
        adapted: it has LoRA adapters, which can be switched off.
        threshold: that it came with.
        longest: tokens that it accepts.
        run: where its own data are found, if train.py made it.
    """

    name: str
    network: nn.Module
    settings: Settings
    prunes: bool
    adapted: bool
    threshold: float
    longest: int
    vocab_size: int
    tokenizer: Tokenizer
    run: Run | None

    def logits(self, tokens: Tensor, last: int = 0) -> Tensor:
        """tokens (batch, length) -> logits (batch, length, vocab_size); of the last so many alone, where asked and the network can."""
        tokens = tokens.to(next(self.network.parameters()).device)
        if isinstance(self.network, Transformer):
            return self.network(tokens)
        return self.network(tokens, use_cache=False, logits_to_keep=last).logits

    @contextmanager
    def dense(self, adapters: bool = True) -> Iterator[None]:
        """Without pruning; and, if asked, without LoRA adapters."""
        with self.settings.switched_off(), nullcontext() if adapters else without_lora(self.network):
            yield

    @contextmanager
    def with_policy(self, policy: Policy) -> Iterator[None]:
        """With a cache policy in the place of the decisions."""
        self.settings.policy = policy
        try:
            yield
        finally:
            self.settings.policy = None

    def entry_widths(self) -> list[int]:
        """Of each pruned layer, the numbers that a token's keys and values take, over all key-value heads."""
        widths = []

        def look(query: Tensor, key: Tensor, value: Tensor, scale: float | None, allowed: Tensor) -> tuple[Tensor, Tensor]:
            widths.append(key.shape[1] * (key.shape[3] + value.shape[3]))
            return torch.zeros_like(query[..., :1]).expand(*query.shape[:3], value.shape[3]), allowed.sum(-1)

        with torch.no_grad(), self.with_policy(look):
            self.logits(torch.zeros(1, 2, dtype=torch.int64), last=1)
        return widths


def open_subject(path: str, precision: str = "fp32", verify: bool = True) -> Subject:
    """What a path or name on the command line stands for.

    Raises:
        InputError: no model there, a damaged one, or one whose attention cannot be pruned, and so not take a policy either.
    """
    folder = Path(path).expanduser()
    if (folder / pruning_files.TENSORS).exists():
        subject = _saved(folder)
    elif is_of_transformers(path):
        subject = _plain(path)
    else:
        subject = _of_run(find_run(folder), verify)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject.network.to(device, PRECISIONS[precision]).eval()
    return subject


def learned_to_prune(path: str) -> bool:
    """Whether what lies there has context pruning, from its files alone. Raises InputError when there is no model."""
    folder = Path(path).expanduser()
    if (folder / pruning_files.TENSORS).exists():
        return True
    return not is_of_transformers(path) and is_pruned(find_run(folder).oldest_first()[-1])


def is_pruned(checkpoint: Path) -> bool:
    """Whether it is a checkpoint of train.py with context pruning."""
    return (checkpoint / pruning_files.DESCRIPTION).exists() and not (checkpoint / pruning_files.TENSORS).exists()


def build(checkpoint: Checkpoint) -> tuple[Transformer | PretrainedDecoder, bool]:
    """The network of a checkpoint of train.py, float32, filled from the shards, with what steers its pruning: (network, it prunes).

    Raises:
        InputError: it says of no network, or its weights are another's.
    """
    folder = checkpoint.path
    try:
        if (folder / "pretrained.json").exists():
            fields = read_json(folder / "pretrained.json")
            lora = None if fields["lora"] is None else LoraShape(**fields.pop("lora"))
            network = PretrainedDecoder(PretrainedModel(**{**fields, "lora": lora}))
        elif (folder / "model_config.json").exists():
            network = Transformer(read_config(checkpoint))
        else:
            raise InputError(f"{folder}: neither model_config.json nor pretrained.json, which train.py writes: no network can be built")
        prunes = (folder / pruning_files.DESCRIPTION).exists()
        description = read_json(folder / pruning_files.DESCRIPTION) if prunes else {}
        structure = structure_of(description) if prunes else NEVER
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{folder}: its description of the network is damaged: {type(error).__name__}: {error}") from None
    if prunes:
        try:
            attach(network, structure).take(description)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        checkpoint.load_into(network)
    else:
        checkpoint.load_into(network)
        attach(network, structure)
    return network.eval(), prunes


def _of_run(run: Run, verify: bool) -> Subject:
    checkpoint = run.last(verify)
    network, prunes = build(checkpoint)
    settings, config = network.context_pruning_settings, network.config
    adapted = isinstance(config, PretrainedModel) and config.lora is not None
    longest = config.sequence_length
    if isinstance(config, PretrainedModel):
        longest = longest_text(config.transformers_config()) or longest
    tokenizer = run_tokenizer(run)
    network = network.model if isinstance(network, PretrainedDecoder) else network
    return Subject(run.name, network, settings, prunes, adapted, settings.threshold, longest, config.vocab_size, tokenizer, run)


def _saved(folder: Path) -> Subject:
    description = pruning_files.read_description(folder)
    network = pruning_files.load(folder)
    settings = network.context_pruning_settings
    whole = (folder / "config.json").exists()
    tokenizer = _tokenizer(str(folder) if whole else description["base"])
    return _of_transformers(folder.resolve().name, network, settings, True, description["lora"] is not None, tokenizer)


def _plain(source: str) -> Subject:
    network = open_decoder(source)
    name = source.removeprefix("package:") if source.startswith("package:") else Path(source).name
    return _of_transformers(name, network, attach(network, NEVER), False, False, _tokenizer(source))


def _of_transformers(name: str, network: Any, settings: Settings, prunes: bool, adapted: bool, tokenizer: Tokenizer) -> Subject:
    config = network.config.get_text_config(decoder=True)
    longest = longest_text(config) or 1 << 30
    vocabulary = network.get_output_embeddings().weight.shape[0]
    return Subject(name, network, settings, prunes, adapted, settings.threshold, longest, vocabulary, tokenizer, None)


def _tokenizer(source: str) -> Tokenizer:
    return tokenizer_of_transformers(open_tokenizer(source))
