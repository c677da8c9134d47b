"""Static per-tensor int8, simulated: what "Understanding and Minimising Outlier Features" (arXiv 2405.19279, section 6) quantises.

The recipe is that of Bondarenko et al. (arXiv 2306.12929) and their code: weights symmetric, the range searched for the least squared
error; activations asymmetric, the range a running percentile over a few training batches and then frozen; one range a tensor. Of a
layer it rounds the outputs of query, key, value and output projection, the scores before masking, the softmax, the context, the
activated hidden layer of the MLP, its output, both residual sums, and every norm's output; before the layers, the embeddings. The
unembedding stays in floating point. Rotated queries and keys are not rounded a second time: the recipe's model has no rotation.

The forward pass itself is left as it is. `intercept` sees residual sums and attention's inside as PyTorch is called for them, so our
blocks and Hugging Face's are treated alike; a layer that shows neither is refused by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from analysis.decoders import Decoder, Projections
from model.errors import InputError

# quantise(site, x, counted) -> x on its grid. `counted` (broadcastable to x, bool) marks what a range may see; None: everything.
Quantise = Callable[[str, Tensor, Tensor | None], Tensor]

_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__, torch.addcmul}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SOFTMAXES = {torch.softmax, Tensor.softmax, F.softmax}


# ---------------------------------------------------------------------------------------------------------- grids


def asymmetric(x: Tensor, low: float, high: float, bits: int = 8) -> Tensor:
    """x rounded to the grid of `2^bits` levels over [low, high], which is widened to hold 0, as 0 must be on the grid.

    scale = (high - low) / (2^bits - 1), zero = round(-low / scale), x_hat = scale (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero)
    """
    levels = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / levels, 1e-12)
    zero = round(-low / scale)
    return (x / scale).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(scale)


def symmetric(x: Tensor, largest: Tensor | float, bits: int = 8) -> Tensor:
    """x rounded to multiples of largest / (2^(bits - 1) - 1), from -2^(bits - 1) to 2^(bits - 1) - 1 of them."""
    top = 2 ** (bits - 1) - 1
    scale = torch.as_tensor(largest, dtype=x.dtype, device=x.device).clamp_min(1e-12) / top
    return (x / scale).round_().clamp_(-top - 1, top).mul_(scale)


@torch.no_grad()
def quantise_weight(weight: Tensor, bits: int = 8, candidates: int = 100) -> Tensor:
    """The symmetric grid, among `candidates` ranges up to the largest weight, whose squared error is least; weight on that grid."""
    largest = weight.abs().max().clamp_min(1e-12)
    ranges = [largest * i / candidates for i in range(1, candidates + 1)]
    top = 2 ** (bits - 1) - 1
    buffer = torch.empty_like(weight)  # one for all candidates: fresh memory each time would cost more than the arithmetic
    errors = []
    for candidate in ranges:
        scale = candidate / top
        torch.div(weight, scale, out=buffer).round_().clamp_(-top - 1, top).mul_(scale).sub_(weight)
        errors.append(torch.linalg.vector_norm(buffer))
    return symmetric(weight, ranges[int(torch.stack(errors).argmin())], bits)


def percentile_range(x: Tensor, percentile: float) -> tuple[float, float]:
    """The (100 - percentile)th and the percentile-th percentile of all of x, between ranks as numpy interpolates. x 1-D, any length."""
    above = (1 - percentile / 100) * (x.numel() - 1)  # how far from the end the percentile lies
    count = min(math.floor(above) + 2, x.numel())
    if count > x.numel() // 8:
        ordered = x.sort().values
        smallest, largest = ordered[:count], ordered.flip(0)[:count]
    else:
        smallest, largest = x.topk(count, largest=False).values, x.topk(count).values

    def at(extremes: Tensor) -> float:
        near, far = extremes[min(math.floor(above), count - 1)].item(), extremes[min(math.floor(above) + 1, count - 1)].item()
        return near + (far - near) * (above - math.floor(above))

    return at(smallest), at(largest)


class StaticRanges:
    """One range a site: the running mean, with momentum, of each batch's percentiles; then frozen.

    As in the recipe's code, a batch is rounded on its way even while ranges are estimated, so that later sites see what they will see.
    """

    def __init__(self, percentile: float = 99.999, momentum: float = 0.9, bits: int = 8) -> None:
        self.percentile, self.momentum, self.bits = percentile, momentum, bits
        self.ranges: dict[str, tuple[float, float]] = {}
        self.frozen = False

    def __call__(self, site: str, x: Tensor, counted: Tensor | None = None) -> Tensor:
        if not self.frozen:
            seen = x.flatten() if counted is None else x[counted.expand_as(x)]
            found = percentile_range(seen, self.percentile)
            before = self.ranges.get(site, found)
            low, high = (self.momentum * old + (1 - self.momentum) * new for old, new in zip(before, found, strict=True))
            self.ranges[site] = (low, high)
        return asymmetric(x, *self.ranges[site], self.bits)


# ----------------------------------------------------------------------------------------------------- interception


class _Attention(TorchFunctionMode):
    """Within a layer, takes over what modules do not show: residual sums, scores, softmax, context."""

    def __init__(self, quantise: Quantise) -> None:
        super().__init__()
        self.quantise = quantise
        self.layer: int | None = None  # the layer that is running
        self.depth = 0  # how many of its submodules are
        self.counts: dict[str, int] = {}

    def enter(self, layer: int, *_: Any) -> None:
        self.layer, self.depth, self.counts = layer, 0, {}

    def leave(self, *_: Any) -> None:
        self.layer = None

    def descend(self, by: int, *_: Any) -> None:
        self.depth += by

    def site(self, kind: str) -> str:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"layer {self.layer} {kind} {self.counts[kind]}"

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.layer is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _ADDITIONS and self.depth == 0 and _same_shapes(args):  # the layer itself adds: a residual sum
            return self.quantise(self.site("residual sum"), result, None)
        if func in _PRODUCTS and self.depth > 0 and result.dim() == 4:  # attention written out
            return self.quantise(self.site("scores" if "softmax" not in self.counts else "context"), result, None)
        if func in _SOFTMAXES and self.depth > 0 and result.dim() == 4:
            return self.quantise(self.site("softmax"), result, result > 0)
        return result

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`F.scaled_dot_product_attention` written out (dropout aside: this is evaluation), its three results rounded."""
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        added: Tensor | float = 0.0
        if is_causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        elif attn_mask is None:
            visible = torch.ones((), dtype=torch.bool, device=scores.device)
        elif attn_mask.dtype == torch.bool:
            visible = attn_mask
        else:
            visible, added = attn_mask > torch.finfo(attn_mask.dtype).min / 2, attn_mask
        scores = self.quantise(self.site("scores"), scores, visible)
        probabilities = (scores + added).masked_fill(~visible, -torch.inf).softmax(dim=-1)
        probabilities = self.quantise(self.site("softmax"), probabilities, visible)
        return self.quantise(self.site("context"), probabilities @ value, None)


@contextmanager
def intercept(decoder: Decoder, groups: list[Projections], quantise: Quantise) -> Iterator[None]:
    """Within it, each forward pass hands every tensor of the recipe to `quantise` and goes on with what that returns."""
    mode = _Attention(quantise)
    handles = []

    def after(module: nn.Module, site: str) -> None:
        handles.append(module.register_forward_hook(lambda *call: quantise(site, call[-1], None)))

    def before(module: nn.Module, site: str) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (quantise(site, args[0], None), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": quantise(site, kwargs["hidden_states"], None)}

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    before(decoder.layers[0], "embeddings")
    for group in groups:
        for module in (*group.attention_inputs, *group.attention_output, *group.mlp_contraction):
            after(module, f"{decoder.name(module)} output")
        before(group.mlp_contraction[0], f"{decoder.name(group.mlp_contraction[0])} input")  # expansion and activation in one
    for name, module in decoder.network.named_modules():
        if "norm" in type(module).__name__.lower():
            after(module, f"{name} output")
    for i, layer in enumerate(decoder.layers):  # after the hooks above: what they do is not the layer's own doing
        handles.append(layer.register_forward_pre_hook(partial(mode.enter, i)))
        handles.append(layer.register_forward_hook(mode.leave, always_call=True))
        for module in layer.modules():
            if module is not layer:
                handles.append(module.register_forward_pre_hook(partial(mode.descend, 1), prepend=True))
                handles.append(module.register_forward_hook(partial(mode.descend, -1)))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _same_shapes(args: tuple[Any, ...]) -> bool:
    return len(args) >= 2 and all(isinstance(x, Tensor) for x in args[:2]) and args[0].shape == args[1].shape and args[0].dim() >= 2


@torch.no_grad()
def check_sites(decoder: Decoder, groups: list[Projections], name: str) -> None:
    """Raises InputError when a layer does its sums or its attention in a way that `intercept` does not see."""
    sites: list[str] = []

    def collect(site: str, x: Tensor, counted: Tensor | None) -> Tensor:
        sites.append(site)
        return x

    with intercept(decoder, groups, collect):
        decoder.logits(torch.zeros(1, 4, dtype=torch.int64))
    for i in range(len(decoder.layers)):
        for kind, expected in (("scores", 1), ("softmax", 1), ("context", 1), ("residual sum", 2)):
            if sum(site.startswith(f"layer {i} {kind}") for site in sites) != expected:
                raise InputError(
                    f"{name}: layer {i} computes its {kind} in a way that cannot be seen from outside (by a fused kernel, say), so static "
                    "quantisation as in the paper does not apply; leave w8a8_static out of --recipes"
                )


# --------------------------------------------------------------------------------------------------------- the recipe


@torch.no_grad()
def quantise_weights(decoder: Decoder, groups: list[Projections], bits: int = 8) -> Decoder:
    """A copy whose layers' linear maps and embeddings hold values of an int8 grid; the unembedding, even a tied one, does not."""
    modules = [module for group in groups for maps in group for module in maps]
    names = [decoder.name(module) for module in modules]
    decoder = copy.deepcopy(decoder)
    decoder.unembedding.weight = nn.Parameter(decoder.unembedding.weight.detach().clone())
    chosen = [decoder.network.get_submodule(name) for name in names]
    chosen += [module for module in decoder.network.modules() if isinstance(module, nn.Embedding)]
    for module in chosen:
        module.weight.copy_(quantise_weight(module.weight, bits))  # pyright: ignore
    return decoder


@torch.no_grad()
def calibrate(decoder: Decoder, groups: list[Projections], batches: list[Tensor], percentile: float, bits: int = 8) -> StaticRanges:
    """The ranges of every site after these batches of tokens (sequences, length), in their order."""
    ranges = StaticRanges(percentile, bits=bits)
    with intercept(decoder, groups, ranges):
        for batch in batches:
            decoder.logits(batch)
    ranges.frozen = True
    return ranges
