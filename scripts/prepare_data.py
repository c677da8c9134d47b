"""Prepare a recipe's data ahead of training: `python -m scripts.prepare_data recipes/X.yaml [section.key=value ...]`.

Training does the same by itself when the data is not there; this is for doing it once, on one machine, before a large run.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from training.early_stop import answer_at_once

if TYPE_CHECKING:
    from training.data import PreparedData


def summary(prepared: PreparedData) -> str:
    manifest = prepared.manifest
    tokens = prepared.train_tokens + prepared.validation_tokens
    return "\n".join(
        [
            f"prepared    {prepared.folder}",
            f"documents   {manifest['documents']:,} ({manifest['duplicates']:,} duplicates, {manifest['empty']:,} empty and "
            f"{manifest['unreadable']:,} unreadable left out)",
            f"text        {manifest['bytes'] / 1e6:,.1f} MB, content hash {manifest['content_hash'][:16]}",
            f"tokens      {prepared.train_tokens:,} train, {prepared.validation_tokens:,} validation, "
            f"{manifest['bytes'] / tokens:.2f} bytes a token",
            f"vocabulary  {prepared.vocab_size:,}",
            f"unigram     {prepared.validation_unigram_loss:.4f} nats a token on validation: a model must do better than this",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    from model.errors import InputError, of_a_file  # what is imported from here on takes seconds
    from training.data import prepare, require_step
    from training.recipe_file import load_recipe

    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides).recipe
        start = time.perf_counter()
        prepared = prepare(recipe.data)
        require_step(prepared, recipe.training.tokens_per_step, recipe.training.sequence_length)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {of_a_file(error)}", file=sys.stderr)
        return 2
    print(summary(prepared))
    print(f"seconds     {time.perf_counter() - start:.1f}")
    return 0


if __name__ == "__main__":
    answer_at_once("the data was not ready yet, and nothing half-done is used")
    sys.exit(main())
