"""A decoder as the analyses see it, whoever made it: ours from a checkpoint, or one of Hugging Face's.

    source = find_decoder("runs/X")          # a Run; or a Pretrained, of all that model/hub.py takes
    decoder = open_decoder(source)
    decoder.logits(tokens)
    with watch(decoder, look): ...           # look(place, x) at the residual stream entering each layer, and the unembedding
    groups = projection_groups(decoder, tokens)

Nothing here names a family of models: the layers are the one list of modules that is as long as the configuration says, and
what a linear map is for follows from the order in which it is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.runs import Run, find_run, read_json
from analysis.shards import Checkpoint
from model import hub
from model.config import ModelConfig
from model.errors import InputError
from model.transformer import Transformer

_BLOCK = re.compile(r"blocks\.(\d+)\.")
LONGEST_SEQUENCE = 1024  # of a Hugging Face model, whose configuration may allow sequences that no machine here would hold


@dataclass
class Decoder:
    """One network, in float32, in evaluation mode. `copy.deepcopy` copies all of it, weights included.

    Attributes:
        network: tokens (batch, length) int64 -> logits, or an object that has them.
        layers: the decoder layers, in order.
        unembedding: the linear map to logits.
        sequence_length: the longest sequence to run.
    """

    network: nn.Module
    layers: nn.ModuleList
    unembedding: nn.Linear
    width: int
    vocab_size: int
    sequence_length: int

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (batch, length) -> logits (batch, length, vocab_size)."""
        output = self.network(tokens.to(self.device))
        return output if isinstance(output, Tensor) else output.logits

    @torch.no_grad()
    def summed_loss(self, tokens: Tensor) -> float:
        """Cross-entropy of each next token of (sequences, length + 1) int64, summed, in nats; of our own networks a chunk of logits at a
        time."""
        tokens = tokens.to(self.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if isinstance(self.network, Transformer):
            return self.network(inputs, targets).item()
        return F.cross_entropy(self.logits(inputs).float().flatten(0, 1), targets.flatten(), reduction="sum").item()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def name(self, module: nn.Module) -> str:
        """Where a module is in the network, such as `blocks.3.mlp.up`."""
        return next(name for name, candidate in self.network.named_modules() if candidate is module)


@dataclass
class Pretrained:
    """A decoder of transformers, by what `model.hub` takes: a folder with config.json and weights (one that `export` wrote of ours too), a
    GGUF file, `package:NAME`, or a name on the Hugging Face hub."""

    path: str

    @property
    def name(self) -> str:
        if self.path.startswith("package:"):
            return self.path.removeprefix("package:")
        place = Path(self.path).expanduser()
        return place.stem if place.suffix == ".gguf" else place.resolve().name

    def default_report(self) -> Path:
        """Where results go unless told otherwise: report/ beside the weights, or of a model that is not a place here, in a folder of its
        name."""
        place = Path(self.path).expanduser()
        if not place.exists():
            return Path(self.name) / "report"
        return (place.parent if place.is_file() else place) / "report"

    def encoder(self) -> Callable[[str], list[int]]:
        """What turns text into this model's tokens. Raises InputError where no tokenizer can be read."""
        tokenizer = hub.open_tokenizer(self.path)
        return lambda text: tokenizer.encode(text, add_special_tokens=False)

    def load(self) -> Decoder:
        """The network with its weights, float32. Raises InputError when it is not a causal language model, or of an unknown build."""
        model = hub.open_decoder(self.path)
        ours = getattr(model, "network", None)
        if isinstance(ours, Transformer):
            decoder = run_decoder(ours)
        else:
            model.config.use_cache = False
            decoder = huggingface_decoder(model, self.path)
        decoder.network.to("cuda" if torch.cuda.is_available() else "cpu")
        return decoder


def is_of_transformers(path: str) -> bool:
    """A folder, a GGUF file, package:NAME, or else a name on the hub, if nothing of that name is on this machine."""
    place = Path(path).expanduser()
    if path.startswith("package:") or not place.exists():
        return True
    return place.suffix == ".gguf" or (place / "config.json").exists() or (place.is_dir() and any(place.glob("*.gguf")))


def find_decoder(path: str | Path) -> Run | Pretrained:
    """What a path or name stands for: a run or checkpoint of ours, or a decoder of transformers.

    Raises:
        InputError: nothing there that is a model, nor on the hub.
    """
    if not is_of_transformers(str(path)):
        return find_run(path)
    hub.locate(str(path))
    return Pretrained(str(path))


def open_decoder(source: Run | Pretrained, verify: bool = True) -> Decoder:
    """The decoder of a source; of a run, its last checkpoint."""
    if isinstance(source, Pretrained):
        return source.load()
    return run_decoder(build_model(source.last(verify)))


def build_model(checkpoint: Checkpoint) -> Transformer:
    """The network of model_config.json, filled from the shards, float32, on the GPU where there is one."""
    model = Transformer(model_config_of(checkpoint))
    checkpoint.load_into(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def refilled(decoder: Decoder, checkpoint: Checkpoint) -> Decoder:
    """A run's decoder with the weights of another of its checkpoints: itself, so that one network is in memory; a new one where the
    configuration is another.
    """
    if not isinstance(decoder.network, Transformer) or decoder.network.config != model_config_of(checkpoint):
        return run_decoder(build_model(checkpoint))
    checkpoint.load_into(decoder.network)
    return decoder


def model_config_of(checkpoint: Checkpoint) -> ModelConfig:
    """What model_config.json says. Raises InputError where there is none, or a pretrained model was trained on."""
    path = checkpoint.path / "model_config.json"
    if (checkpoint.path / "pretrained.json").exists():
        raise InputError(
            f"{checkpoint.path}: began with model.pretrained: `python -m analysis export {checkpoint.path} --out X`, then this verb on X "
            "with --data"
        )
    if not path.exists():
        raise InputError(f"{path}: missing, so the network cannot be built; this verb reads checkpoints that train.py wrote")
    return read_config(checkpoint)


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """model_config.json of a checkpoint, of the sizes that its weights have: a network of others, which may fill the memory, is not built.

    Raises:
        InputError: not a configuration, or one of another network; the first size that differs is named.
    """
    path = checkpoint.path / "model_config.json"
    try:
        config = ModelConfig(**read_json(path))
    except (TypeError, OverflowError) as error:
        raise InputError(f"{path}: not a model configuration: {error}") from None

    def size(name: str, dimension: int) -> int | None:
        shape = checkpoint.shapes.get(checkpoint.aliases.get(name, name), ())
        return shape[dimension] if len(shape) > dimension else None

    assert config.head_dim is not None and config.kv_heads is not None
    block = "blocks.0."
    sizes = {
        "vocab_size": (config.vocab_size, size("embedding.weight", 0)),
        "width": (config.width, size("embedding.weight", 1)),
        "depth": (config.depth, len({match[1] for match in map(_BLOCK.match, checkpoint.shapes) if match})),
        "mlp_width": (config.mlp_width, size(f"{block}mlp.up.weight", 0)),
        "heads x head_dim": (config.heads * config.head_dim, size(f"{block}attention.query.weight", 0)),
        "kv_heads x head_dim": (config.kv_heads * config.head_dim, size(f"{block}attention.key.weight", 0)),
    }
    if config.positions == "learned":
        sizes["sequence_length"] = (config.sequence_length, size("position_embedding.weight", 0))
    for name, (said, found) in sizes.items():
        if said != found or not isinstance(said, int):
            has = "none of that name" if found is None else str(found)
            raise InputError(
                f"{path}: {name} {said}, and the weights beside it have {has}: these are not this model's weights; restore the right file"
            )
    return config


def run_decoder(model: Transformer) -> Decoder:
    """Our own `Transformer` as a Decoder."""
    config = model.config
    return Decoder(model.eval(), model.blocks, model.unembedding, config.width, config.vocab_size, config.sequence_length)


def huggingface_decoder(model: Any, name: str) -> Decoder:
    """A transformers causal language model as a Decoder. GPT-2's transposed `Conv1D` become `nn.Linear`.

    Raises:
        InputError: its layers cannot be told from its configuration.
    """
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape, bias=child.bias is not None, device=child.weight.device, dtype=child.weight.dtype)
                linear.weight, linear.bias = nn.Parameter(child.weight.detach().T.contiguous()), child.bias
                setattr(parent, child_name, linear)
    config = model.config.get_text_config()
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers]
    unembedding = model.get_output_embeddings()
    if len(lists) != 1 or not isinstance(unembedding, nn.Linear):
        raise InputError(
            f"{name}: its decoder layers cannot be told: {len(lists)} lists of {config.num_hidden_layers} modules, "
            f"and an output embedding of type {type(unembedding).__name__}; expected one list and a Linear"
        )
    length = min(config.max_position_embeddings, LONGEST_SEQUENCE)
    return Decoder(model.eval(), lists[0], unembedding, config.hidden_size, unembedding.out_features, length)


@contextmanager
def watch(decoder: Decoder, look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within it, each forward pass calls look(place, x (batch, length, width)) for `layer 0`, `layer 1`, .. and `unembedding`.

    `layer i` is the residual stream that enters decoder layer i, before any norm; `unembedding` is what the unembedding reads.
    """

    def hook(place: str) -> Callable[..., None]:
        return lambda module, args, kwargs: look(place, args[0] if args else kwargs["hidden_states"])

    modules = {**{f"layer {i}": layer for i, layer in enumerate(decoder.layers)}, "unembedding": decoder.unembedding}
    handles = [module.register_forward_pre_hook(hook(place), with_kwargs=True) for place, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Projections(NamedTuple):
    """The linear maps of one layer, by what they are for."""

    attention_inputs: list[nn.Linear]  # query, key, value
    attention_output: list[nn.Linear]  # none in a simplified block
    mlp_expansion: list[nn.Linear]  # and the gate
    mlp_contraction: list[nn.Linear]


@torch.no_grad()
def projection_groups(decoder: Decoder, name: str) -> list[Projections]:
    """What each linear map of each layer is for: of a Burnish network by name, else from one forward pass over two tokens.

    There, maps that read the same tensor, one after the other, belong together. The last to be called contracts the MLP, the ones
    before it expand it, before those comes attention's output, and everything earlier reads into attention.

    Raises:
        InputError: a layer is not made of such maps (experts, for example).
    """
    if isinstance(decoder.network, Transformer):
        return [_burnish_projections(block) for block in decoder.network.blocks]
    calls: list[list[tuple[nn.Linear, Tensor]]] = [[] for _ in decoder.layers]

    def note(module: nn.Linear, layer: int) -> Any:
        return module.register_forward_pre_hook(lambda _, args: calls[layer].append((module, args[0])))

    linears = [(module, i) for i, layer in enumerate(decoder.layers) for module in layer.modules() if isinstance(module, nn.Linear)]
    handles = [note(module, i) for module, i in linears]
    try:
        decoder.logits(torch.zeros(1, 2, dtype=torch.int64))
    finally:
        for handle in handles:
            handle.remove()
    result = []
    for i, called in enumerate(calls):
        groups: list[list[nn.Linear]] = []
        before = None
        for module, x in called:
            if x is not before:
                groups.append([])
            groups[-1].append(module)
            before = x
        if len(groups) < 4 or len({id(module) for module, _ in called}) != len(called):
            raise InputError(f"{name}: layer {i} is not attention and one MLP made of linear maps, so its inputs cannot be told apart")
        *attention, output, expansion, contraction = groups
        result.append(Projections([module for group in attention for module in group], output, expansion, contraction))
    return result


def _burnish_projections(block: Any) -> Projections:
    def linear(*modules: nn.Module | None) -> list[nn.Linear]:
        return [module for module in modules if isinstance(module, nn.Linear)]

    attention, mlp = block.attention, block.mlp
    inputs, output = linear(attention.query, attention.key, attention.value), linear(attention.output)
    return Projections(inputs, output, linear(mlp.up, mlp.gate), linear(mlp.down))
