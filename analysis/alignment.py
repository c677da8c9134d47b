"""Two of our networks in the same coordinates: the symmetry of one that brings its weights nearest the other's.

Independently trained networks differ by symmetries of their function, so a straight line between their weights says nothing until
these are taken out (arXiv 2506.22712 names them; weight matching as in 2209.04836). Of a block there are

    the residual stream     any orthogonal matrix, once the scales of RMSNorms are multiplied into the matrices that read them and
                            the unembedding is no longer tied; a permutation with LayerNorm, and with post_norm's scaled norms,
                            since these speak of single channels. None in simplified blocks, whose heads read channels as they stand
    MLP                     a permutation of the hidden units (SwiGLU's gate goes along)
    heads                   a permutation of the groups that share a key and a value, and of the queries within a group
    value and output        any orthogonal matrix within a head
    query and key           an orthogonal matrix within a head; with RoPE rotations of its planes alone; none under QK-norm with
                            trainable scales, or LayerNorm's, which speak of single channels too

Each is chosen in turn, given the others, such that the inner product of the two networks' weights is largest: by a singular value
decomposition (orthogonal Procrustes), an assignment, or for a plane in closed form. So the distance only falls, until it stands still.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from model.config import ModelConfig
from model.errors import InputError
from model.transformer import Transformer

MOST_ROUNDS = 100
STANDS_STILL = 1e-6  # of the inner product, in a round


class Aligned(NamedTuple):
    """What `align` found.

    Attributes:
        fixed, moved: the networks with the scales of their norms folded, the second in the first's coordinates. Both are new.
        rounds: until nothing moved.
        cosine: of the two networks' weights, folded, before and after.
        in_place: by layer, the share of MLP units and of groups of heads that were not permuted.
    """

    fixed: Transformer
    moved: Transformer
    rounds: int
    cosine: tuple[float, float]
    in_place: list[dict[str, float]]


@torch.no_grad()
def align(fixed: Transformer, other: Transformer, progress: Callable[[int], None] = lambda done: None) -> Aligned:
    """The symmetry of `other` that brings it nearest `fixed`, from the better of two starts: as it is, and by its embeddings.

    Args:
        progress: called after every round with how many there were.

    Raises:
        InputError: two configurations, or context pruning.
    """
    if fixed.config != other.config:
        raise InputError("only networks of one configuration can be aligned")
    if fixed.context_pruning_settings is not None or other.context_pruning_settings is not None:
        raise InputError("networks with context pruning are not aligned: their decisions read queries and keys of their own")
    a = folded(fixed)
    before = _Pair(a, folded(other)).cosine()
    best: _Pair | None = None
    rounds = 0
    for start in ("as it is", "by its embeddings") if residual_freedom(a.config) != "none" else ("as it is",):
        pair = _Pair(a, folded(other))
        if start == "by its embeddings":
            pair.turn_residual(["embedding.weight"])
        reached = pair.inner()
        for _ in range(MOST_ROUNDS):
            for i in range(a.config.depth):
                pair.match_heads(i)
                pair.match_mlp(i)
            pair.turn_residual()
            rounds += 1
            progress(rounds)
            last, reached = reached, pair.inner()
            if reached - last <= STANDS_STILL * abs(reached):
                break
        if best is None or reached > best.inner():
            best = pair
    assert best is not None
    return Aligned(a, best.network, rounds, (before, best.cosine()), best.in_place())


def residual_freedom(config: ModelConfig) -> str:
    """Of the residual stream: "orthogonal", "permutation" or "none"."""
    if config.is_simplified:
        return "none"
    scaled_outside = config.block == "post_norm" and config.norm == "rms_norm"
    return "permutation" if config.norm == "layer_norm" or scaled_outside else "orthogonal"


def query_key_freedom(config: ModelConfig) -> str:
    """Of queries and keys within a head: "orthogonal", "rotations" (of RoPE's planes) or "none"."""
    if config.qk_norm == "layer_norm" or (config.qk_norm == "rms_norm" and config.qk_norm_gains == "trainable"):
        return "none"
    return "rotations" if config.positions == "rope" else "orthogonal"


@torch.no_grad()
def folded(network: Transformer) -> Transformer:
    """The same function, a new network: untied, and where the residual stream may turn, no RMSNorm and no gain speaks of a channel."""
    result = Transformer(dataclasses.replace(network.config, tied_embeddings=False)).to(network.embedding.weight)
    weights = dict(network.state_dict())
    result.load_state_dict(weights)  # a tied unembedding is there under its own name
    if residual_freedom(network.config) != "orthogonal":
        return result.eval()

    def into(scale: Any, *readers: Any) -> None:
        """A norm's scale into the columns of the matrices that read it."""
        if getattr(scale, "weight", None) is not None:
            for reader in readers:
                reader.weight.mul_(scale.weight)
            scale.weight.fill_(1.0)

    def out_of(gain: Any, writer: Any) -> None:
        """A gain a channel into the rows of the matrix before it."""
        if isinstance(gain, nn.Parameter) and gain.numel() > 1:
            writer.weight.mul_(gain[:, None])
            if writer.bias is not None:
                writer.bias.mul_(gain)
            gain.fill_(1.0)

    blocks: Any = result.blocks
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        readers = [attention.query, attention.key] * block.normed_query_key + [attention.value] * block.normed_value
        into(block.attention_norm, *readers)
        into(block.mlp_norm, *(m for m in (mlp.up, mlp.gate) if m is not None))
        out_of(block.attention_gain, attention.output)
        out_of(block.mlp_gain, mlp.down)
    into(result.final_norm, result.unembedding)
    return result.eval()


class _Pair:
    """A fixed network's weights, and another's that are moved in place; every `match` and `turn` makes their inner product larger."""

    def __init__(self, fixed: Transformer, network: Transformer) -> None:
        self.network, self.config = network, network.config
        self.a, self.b = ({name: p.detach() for name, p in side.named_parameters()} for side in (fixed, network))
        assert self.config.kv_heads is not None and self.config.mlp_width is not None
        self.units = [torch.arange(self.config.mlp_width) for _ in range(self.config.depth)]
        self.groups = [torch.arange(self.config.kv_heads) for _ in range(self.config.depth)]
        self.residual = [(name, axis) for name in self.b if (axis := self._residual_axis(name)) is not None]

    def _residual_axis(self, name: str) -> int | None:
        """Along which axis a parameter meets the residual stream; None: nowhere."""
        part = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        if part.startswith(("attention.output.", "mlp.down.")):
            return 0
        readers = ("attention.query.weight", "attention.key.weight", "attention.value.weight", "mlp.up.weight", "mlp.gate.weight")
        if part in readers or part.startswith(("embedding.", "position_embedding.", "unembedding.")):
            return 1
        channels = part.startswith(("attention_norm.", "mlp_norm.", "after_", "final_norm.", "attention_gain", "mlp_gain"))
        # where the stream turns these are all ones: `folded`
        return 0 if channels and residual_freedom(self.config) == "permutation" and self.b[name].numel() > 1 else None

    def inner(self) -> float:
        return sum(float(torch.sum(self.a[name] * self.b[name], dtype=torch.float64)) for name in self.b)

    def cosine(self) -> float:
        squares = [sum(float(torch.sum(p * p, dtype=torch.float64)) for p in side.values()) for side in (self.a, self.b)]
        return self.inner() / (squares[0] * squares[1]) ** 0.5

    def in_place(self) -> list[dict[str, float]]:
        def share(order: Tensor) -> float:
            return float((order == torch.arange(len(order))).double().mean())

        return [{"mlp_units": share(units), "heads": share(groups)} for units, groups in zip(self.units, self.groups, strict=True)]

    def turn_residual(self, names: list[str] | None = None) -> None:
        """The residual stream's turn R, by all that meets it or by some of it: x becomes R x."""
        freedom = residual_freedom(self.config)
        if freedom == "none":
            return
        cross = sum(
            _rows(self.a[name], axis) @ _rows(self.b[name], axis).T for name, axis in self.residual if names is None or name in names
        )
        assert isinstance(cross, Tensor)
        if freedom == "permutation":
            order = _assign(cross)
            for name, axis in self.residual:
                self.b[name].copy_(self.b[name].index_select(axis, order))
            return
        turn = procrustes(cross)
        for name, axis in self.residual:
            old = self.b[name]
            old.copy_(turn @ old if axis == 0 else old @ turn.T)

    def match_mlp(self, i: int) -> None:
        """The order of a layer's hidden units."""
        axes = {"up.weight": 0, "up.bias": 0, "gate.weight": 0, "gate.bias": 0, "down.weight": 1}
        present = [(f"blocks.{i}.mlp.{name}", axis) for name, axis in axes.items() if f"blocks.{i}.mlp.{name}" in self.b]
        cross = sum(_rows(self.a[name], axis) @ _rows(self.b[name], axis).T for name, axis in present)
        assert isinstance(cross, Tensor)
        order = _assign(cross)
        for name, axis in present:
            self.b[name].copy_(self.b[name].index_select(axis, order))
        self.units[i] = self.units[i][order.cpu()]

    def match_heads(self, i: int) -> None:
        """The order of a layer's groups of heads, and each one's turns of value and output, and of query and key."""
        a, b = self._heads(self.a, i), self._heads(self.b, i)
        groups = range(len(self.groups[i]))
        if self.config.is_simplified:  # each head reads channels as they stand
            found = {(g, g): self._match_group(a, b, g, g) for g in groups}
            order = torch.arange(len(groups))
        else:
            found = {(g, h): self._match_group(a, b, g, h) for g in groups for h in groups}
            order = _assign(torch.tensor([[found[g, h][0] for h in groups] for g in groups])).cpu()
        new = {name: value.clone() for name, value in b.items()}
        for g, h in enumerate(order.tolist()):
            _, queries, value_turn, key_turn = found[g, h]
            for name, value in b.items():
                one = value[h]
                if name in ("query", "output", "query_bias") or name.endswith("gain"):
                    one = one[queries]
                if name in ("value", "value_bias", "output"):
                    one = torch.einsum("ij,...jk->...ik", value_turn, one)
                elif name in ("query", "key", "query_bias", "key_bias"):
                    one = torch.einsum("ij,...jk->...ik", key_turn, one)
                new[name][g] = one
        self._put_heads(i, new)
        self.groups[i] = self.groups[i][order]

    def _heads(self, weights: dict[str, Any], i: int) -> dict[str, Tensor]:
        """A layer's attention by groups: key and value (groups, head_dim, width), query and output (groups, queries, head_dim, width),
        biases likewise with a last dimension of 1, shaped attention's gains (groups, queries)."""
        config, prefix = self.config, f"blocks.{i}.attention."
        groups, head_dim = config.kv_heads, config.head_dim
        assert groups is not None and head_dim is not None
        queries = config.heads // groups
        found: dict[str, Tensor] = {}
        for kind in ("query", "key", "value", "output"):
            inner = (groups, queries, head_dim) if kind in ("query", "output") else (groups, head_dim)
            if (weight := weights.get(f"{prefix}{kind}.weight")) is not None:
                found[kind] = (weight.T if kind == "output" else weight).unflatten(0, inner)
            if kind != "output" and (bias := weights.get(f"{prefix}{kind}.bias")) is not None:
                found[f"{kind}_bias"] = bias.unflatten(0, inner)[..., None]
        for gain in ("identity_gain", "softmax_gain", "centering_gain"):
            if (values := weights.get(prefix + gain)) is not None:
                found[gain] = values.unflatten(0, (groups, queries))
        return found

    def _put_heads(self, i: int, heads: dict[str, Tensor]) -> None:
        prefix = f"blocks.{i}.attention."
        for name, value in heads.items():
            if name.endswith("gain"):
                self.b[prefix + name].copy_(value.flatten())
            elif name.endswith("_bias"):
                self.b[f"{prefix}{name.removesuffix('_bias')}.bias"].copy_(value.flatten())
            else:
                matrix = value.flatten(0, -2)
                self.b[f"{prefix}{name}.weight"].copy_(matrix.T if name == "output" else matrix)

    def _match_group(self, a: dict[str, Tensor], b: dict[str, Tensor], g: int, h: int) -> tuple[float, Tensor, Tensor, Tensor]:
        """How large the inner product of group g of one and group h of the other can be, and by which order of the queries (queries,),
        turn of the value and turn of the key (head_dim, head_dim)."""
        per_query = [n for n in ("query", "query_bias", "output", "identity_gain", "softmax_gain", "centering_gain") if n in b]
        count, size = b["query"].shape[1:3]
        order = torch.arange(count, device=b["query"].device)
        freedom, values = query_key_freedom(self.config), [n for n in ("value", "value_bias") if n in b]
        keys = [n for n in ("key", "key_bias") if n in b]
        best = -torch.inf
        while True:
            # the turns, given the order of the queries ...
            value_turn = torch.eye(size, device=order.device)
            if "output" in b and "value" in b:
                cross = sum(a[n][g] @ b[n][h].T for n in values) + torch.einsum("qik,qjk->ij", a["output"][g], b["output"][h][order])
                value_turn = procrustes(cross)
            cross = sum(a[n][g] @ b[n][h].T for n in keys)
            for n in ("query", "query_bias"):
                if n in b:
                    cross = cross + torch.einsum("qik,qjk->ij", a[n][g], b[n][h][order])
            assert isinstance(cross, Tensor)
            key_turn = torch.eye(size).to(cross)
            if freedom != "none":
                key_turn = plane_rotations(cross) if freedom == "rotations" else procrustes(cross)
            # ... and the order, given the turns
            shared = sum(torch.sum(a[n][g] * (value_turn @ b[n][h])) for n in values)
            shared = shared + sum(torch.sum(a[n][g] * (key_turn @ b[n][h])) for n in keys)
            pairs = torch.zeros(count, count, device=order.device)
            for n in per_query:
                turned = value_turn @ b[n][h] if n == "output" else key_turn @ b[n][h] if n.startswith("query") else b[n][h]
                pairs += a[n][g].reshape(count, -1) @ turned.reshape(count, -1).T
            order = _assign(pairs)
            total = float(shared + pairs[torch.arange(count), order].sum())
            if count == 1 or total <= best + STANDS_STILL * abs(best):
                return total, order, value_turn, key_turn
            best = total


def procrustes(cross: Tensor) -> Tensor:
    """The orthogonal matrix of the largest inner product with `cross` (n, n)."""
    u, _, v = torch.linalg.svd(cross)
    return u @ v


def plane_rotations(cross: Tensor) -> Tensor:
    """Of matrices that turn each of RoPE's planes, channels i and i + n / 2, the one of the largest inner product with `cross` (n, n)."""
    half = len(cross) // 2
    first, second = torch.arange(half), torch.arange(half, 2 * half)
    cosine = cross[first, first] + cross[second, second]
    sine = cross[second, first] - cross[first, second]
    length = torch.hypot(cosine, sine)
    still = length == 0
    cosine, sine = torch.where(still, 1.0, cosine / length), torch.where(still, 0.0, sine / length)
    turn = torch.zeros_like(cross)
    turn[first, first] = turn[second, second] = cosine
    turn[second, first], turn[first, second] = sine, -sine
    return turn


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """(n, everything else), with what meets the space along `axis` first."""
    return tensor.movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _assign(scores: Tensor) -> Tensor:
    """The order (n,) that makes sum_i scores[i, order[i]] largest, on the scores' device."""
    return torch.from_numpy(linear_sum_assignment(scores.double().cpu().numpy(), maximize=True)[1]).to(scores.device)
