"""How fast preparing data tokenises, against SentencePiece alone: `python -m scripts.benchmark_tokenizing [--out FILE]`.

Both encode the same Python code with the same model, in turns, in one run. SentencePiece alone is one process that holds all
texts in memory and calls the fastest form of `encode`; ours is the whole stage of `training.token_shards.tokenize`: start the
workers, read the files, drop duplicates, encode, count, write the shards to disk. The ratio is ours over SentencePiece
alone times the workers, of medians over the rounds; the ratio of processor times says the same on a busy machine. A
tokenizer is trained first; that takes no part.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from analysis.output import write_json
from model.errors import InputError
from training.recipe import DataSection
from training.sources import PythonSource, ReadCounts, read_documents
from training.token_shards import sample_text, tokenize
from training.tokenizer import train_sentencepiece


def processor_seconds() -> float:
    """Processor time of this process and its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def benchmark(megabytes: float, vocab_size: int, workers: int, rounds: int) -> dict[str, Any]:
    tokenizer_section = {"vocab_size": vocab_size, "sample_megabytes": min(16.0, megabytes)}
    data = DataSection.model_validate({"max_megabytes": megabytes, "workers": workers, "tokenizer": tokenizer_section})
    source = PythonSource()
    tokenizer = train_sentencepiece(sample_text(data, source, ReadCounts()), vocab_size)
    texts = [document.text for document in read_documents(source, megabytes, ReadCounts())]
    strings = [text.decode() for text in texts]
    size = sum(map(len, texts)) / 1e6
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    forms: dict[str, Callable[[], Any]] = {
        "list of str to lists": lambda: processor.encode(strings, num_threads=1),
        "list of str to arrays": lambda: processor.encode(strings, num_threads=1, return_type="numpy"),
        "list of bytes to arrays": lambda: processor.encode(texts, num_threads=1, return_type="numpy"),
        "one str at a time": lambda: [processor.encode(text, return_type="numpy") for text in strings],
    }
    alone: dict[str, list[float]] = {form: [] for form in forms}
    alone_processor: dict[str, list[float]] = {form: [] for form in forms}
    ours: list[float] = []
    ours_processor: list[float] = []
    tokens = 0
    for _ in range(rounds):
        for form, encode in forms.items():
            start, processor_start = time.perf_counter(), processor_seconds()
            encode()
            alone[form].append(size / (time.perf_counter() - start))
            alone_processor[form].append(processor_seconds() - processor_start)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "tokenizer").mkdir()
            tokenizer.save(folder / "tokenizer")
            start, processor_start = time.perf_counter(), processor_seconds()
            content = tokenize(data, source, tokenizer, folder, int(size * 1e6))
            ours.append(size / (time.perf_counter() - start))
            ours_processor.append(processor_seconds() - processor_start)
            tokens = content["train"]["tokens"] + content["validation"]["tokens"]
    medians = {form: statistics.median(rates) for form, rates in alone.items()}
    best = max(medians, key=lambda form: medians[form])
    rate = statistics.median(ours)
    return {
        "megabytes": size,
        "documents": len(texts),
        "tokens": tokens,
        "vocab_size": vocab_size,
        "workers": workers,
        "rounds": rounds,
        "sentencepiece_megabytes_per_second": medians,
        "sentencepiece_best": best,
        "ours_megabytes_per_second": rate,
        "ours_tokens_per_second": rate * tokens / size,
        "ratio": rate / (medians[best] * workers),
        "processor_time_ratio": min(statistics.median(seconds) for seconds in alone_processor.values()) / statistics.median(ours_processor),
        "all_rounds": {"sentencepiece": alone, "ours": ours},
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor() or platform.machine()},
        "versions": {"python": platform.python_version(), "sentencepiece": sentencepiece.__version__},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=48.0, help="text to tokenise")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    try:
        result = benchmark(arguments.megabytes, arguments.vocab_size, arguments.workers, arguments.rounds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for form, rate in result["sentencepiece_megabytes_per_second"].items():
        print(f"SentencePiece alone, one process, {form:24s} {rate:7.2f} MB/s")
    print(f"ours, {result['workers']} workers, files to shards {result['ours_megabytes_per_second']:25.2f} MB/s")
    print(f"ratio to the best of SentencePiece x {result['workers']}: {result['ratio']:.3f}")
    print(f"ratio of processor times, SentencePiece alone to ours: {result['processor_time_ratio']:.3f}")
    if arguments.out:
        write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
