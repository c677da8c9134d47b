"""Decoding with a cache that shrinks against the dense cache: `python -m scripts.benchmark_generation`.

One random Llama of --layers layers in one process; its own attention, the same with pruning that drops nothing, and with pruning that
leaves 20% of the context, take turns at each length and batch: a prompt of that length in chunks, then --decode tokens. Medians of the
time a token takes, and the most bytes that the cache held at any time, prompt included, as ratios to the dense cache.

What is dropped is random but learned-like: each row and layer drops other tokens at other times, by a threshold that leaves 20% after the
prompt. The time of a chunk or token depends on how many are left, not on which.

Bytes depend on the depth, since one layer at a time holds a chunk that it has not pruned yet: --bytes counts them alone, without a clock,
with a network as deep as the real one but narrow, whose cache has the same shape:

    python -m scripts.benchmark_generation --bytes --layers 30 --lengths 1024 4096
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from analysis.output import write_json
from model.config import PruningConfig
from model.context_pruning import Settings, find_threshold
from model.pruned_cache import PrunedLayer
from model.pruning_hooks import attach
from scripts.generate import cache_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], metavar="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=576, help="of SmolLM2-135M, whose layers these are by default")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32, help="of the interaction queries and keys; as in the recipe for SmolLM2-135M")
    parser.add_argument("--kept", type=float, default=0.2, help="share of the context that is left (default: 0.2)")
    parser.add_argument("--decode", type=int, default=24, help="tokens a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=256, metavar="N", help="tokens of the prompt at once (default: 256)")
    parser.add_argument("--bytes", action="store_true", help="count the bytes of the cache alone")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, settings = build(arguments, device)
    results = []
    for batch in arguments.batches:
        for length in arguments.lengths:
            results.append(compare(model, settings, batch, length, arguments))
            ratios = ", ".join(f"{name} {value:.3f}" for name, value in results[-1].items() if isinstance(value, float))
            print(f"batch {batch}, length {length}: {ratios}", file=sys.stderr)
    result = {
        "command": "python -m scripts.benchmark_generation " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "clock": "wall" if device.type == "cuda" else "processor time",
        "precision": arguments.precision,
        "results": results,
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)
    return 0


def build(arguments: argparse.Namespace, device: torch.device) -> tuple[Any, Settings]:
    torch.manual_seed(0)
    head_dim, heads = arguments.width // arguments.heads, arguments.kv_heads if arguments.bytes else arguments.heads
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=heads * head_dim,
        intermediate_size=head_dim if arguments.bytes else 1536 * arguments.width // 576,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=2 * max(arguments.lengths) + 64,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    # large beside what layers add, so that the tokens of a text stay as different in deep layers as trained ones do
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    settings = attach(model, PruningConfig(rank=arguments.rank, bias=0.0, window=1))
    return model.to(device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32).eval(), settings


@torch.no_grad()
def compare(model: Any, settings: Settings, batch: int, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    tokens = torch.randint(1024, (batch, length), device=model.device, generator=torch.Generator(model.device).manual_seed(length))
    settings.enabled = True
    threshold = threshold_of(model, settings, tokens[:1], arguments.kept, arguments.chunk)
    subjects = {"dense": (False, 0.0), "nothing dropped": (True, -1e9), "pruned": (True, threshold)}
    if arguments.bytes:
        del subjects["dense"], subjects["nothing dropped"]
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    prefill, largest, kept = dict.fromkeys(subjects, 0.0), dict.fromkeys(subjects, 0), {}
    for round_ in range(1 if arguments.bytes else arguments.rounds):
        for name, (settings.enabled, settings.threshold) in subjects.items():
            took, prefill[name], largest[name], cache = one_round(model, tokens, arguments.decode, arguments.chunk)
            seconds[name].append(took)
            if name == "pruned" and round_ == 0:
                live = torch.stack([layer.live() for layer in cache.layers]).float()  # (layers, batch)
                kept = {
                    "kept share": float(live.mean()) / (length + arguments.decode),
                    "live of the fullest row / mean": float(live.amax(1).mean() / live.mean()),
                }
            del cache
    if arguments.bytes:
        config = model.config
        a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        largest["dense"] = batch * (length + arguments.decode) * a_token
        ratio = {"largest cache, pruned / dense": largest["pruned"] / largest["dense"]}
        return {"batch": batch, "length": length, **kept, "largest_cache_bytes": largest, **ratio}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "batch": batch,
        "length": length,
        **kept,
        "tokens_per_second": {name: batch / value for name, value in median.items()},
        "prefill_seconds": prefill,
        "largest_cache_bytes": largest,
        "speed, pruned / dense": median["dense"] / median["pruned"],
        "speed, nothing dropped / dense": median["dense"] / median["nothing dropped"],
        "largest cache, pruned / dense": largest["pruned"] / largest["dense"],
    }


def threshold_of(model: Any, settings: Settings, tokens: torch.Tensor, kept: float, chunk_size: int) -> float:
    """What leaves this share of the context after the prompt."""

    def share(threshold: float) -> float:
        settings.threshold = threshold
        cache: Any = DynamicCache(config=model.config)
        for chunk in tokens.split(chunk_size, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        return statistics.mean(float(layer.live().float().mean()) for layer in cache.layers) / tokens.shape[1]

    return find_threshold(share, kept, 0.0)[0]


def one_round(model: Any, tokens: torch.Tensor, decode: int, chunk_size: int) -> tuple[float, float, int, Any]:
    """(seconds a decoded token, seconds of the prompt, most bytes that the cache held at any time, the cache)."""
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    cache, largest = DynamicCache(config=model.config), 0

    def look(module: Any, arguments: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, cache_bytes(cache))

    # each layer is looked at where its cache has all the new tokens and has dropped none of them yet
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: look(m, a, None)) for layer in model.model.layers]
    update = PrunedLayer.update

    def watched(self: PrunedLayer, *arguments: Any, **kwargs: Any) -> Any:
        result = update(self, *arguments, **kwargs)
        look(None, None, None)
        return result

    PrunedLayer.update = watched
    try:
        start = clock()
        for chunk in tokens.split(chunk_size, dim=1):
            logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
        wait(model)
        between = clock()
    finally:
        PrunedLayer.update = update
        for hook in hooks:
            hook.remove()
    for _ in range(decode):
        logits = model(logits.argmax(-1), past_key_values=cache).logits
    wait(model)
    return (clock() - between) / decode, between - start, max(largest, cache_bytes(cache)), cache


def wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
