"""Do activations keep their size when the network grows? A few training steps at several widths or depths, from one recipe.

    python -m scripts.coordinate_check recipes/X.yaml --widths 64 128 256 512 --parametrizations standard mup
    python -m scripts.coordinate_check recipes/X.yaml --depths 2 4 8 16 32 --parametrizations mup depth_mup complete_p

For each parametrisation and size a network is made as `train.py` would make it, with its optimizer, and trained on one batch. Before each
step the mean magnitude of what each module puts out is noted; its power of the size is the slope of log2 value over log2 size. A
parametrisation passes when no slope is beyond 0.25 from the third step on: before that CompleteP's residual stream falls by depth^-1/2.
It fails when a value is not finite, at any step, or is 0 where its slope would be judged.
Logits are judged by how far those of the targets have moved: at the start muP's go by width^-1/2, and so for many steps do those of
tokens that are nowhere to be predicted. Exit code: 0 all pass, 1 some do not.

The base is --base, else the recipe's own or the smallest size. No clipping, and the learning rate is the recipe's peak from the first
step on. It takes the tensors' scales at their word, not the learning rate's transfer: that is scripts/transfer_sweep.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from analysis.output import write_json
from analysis.study_pictures import coordinate_picture
from model.errors import InputError
from model.parametrization import initialize
from model.section import resizing
from model.transformer import Transformer
from training.optimizers import make_optimizer
from training.recipe import Recipe
from training.recipe_file import load_recipe

LARGEST_SLOPE, FIRST_STEP = 0.25, 3
MODULES = ("residual", "attention", "mlp", "scores", "logits", "logits_moved")
JUDGED = tuple(module for module in MODULES if module != "logits")
DEFINITIONS = {
    "values": "mean magnitude, by module, before step s = 0, 1, ..: residual, what leaves the last block; attention and mlp, what those "
    "modules of the last block put out; scores, its scaled products of queries and keys, before positions turn them; logits; logits_moved, "
    "how far those of the targets are from step 0's",
    "slopes": "least-squares slope of log2 value over log2 size, values averaged over seeds as logarithms; null where a value is 0 or null",
    "null": "a value that is not finite with one of the seeds",
    "passes": f"no |slope| over {LARGEST_SLOPE:g} from step {FIRST_STEP} on, of {', '.join(JUDGED)}; and no problem",
    "largest_late_slope": "the largest of those |slope|; null where none is defined",
    "problem": f"the first value that is not finite, or that is 0 from step {FIRST_STEP} on, which leaves a slope undefined; null: none is",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_arguments(parser)
    parser.add_argument("--parametrizations", nargs="+", metavar="NAME", help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=8, help="values are taken before each (default: 8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sequences", type=int, default=8, help="in the batch (default: 8)")
    parser.add_argument("--length", type=int, default=64, help="of a sequence, in tokens (default: 64)")
    parser.add_argument("--data", metavar="FILE", help="text, read as bytes; default: uniform random tokens")
    parser.add_argument("--out", default="coordinate_check/coordinate_check.json", help="results; the picture goes beside it")
    arguments = parser.parse_intermixed_args()
    try:
        result = check(arguments)
        path = write_json(Path(arguments.out), result)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    for name, found in result["parametrizations"].items():
        if found["problem"] is not None:
            print(f"  {name}: {found['problem']}")
    print(f"  {path}")
    picture = path.with_suffix(".png")
    if can_be_drawn(result):
        print(f"  {coordinate_picture(result, picture)}")
    else:
        picture.unlink(missing_ok=True)  # an older result's
    return 0 if all(found["passes"] for found in result["parametrizations"].values()) else 1


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, what differs from it, and the widths or depths that it is taken at."""
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--widths", type=int, nargs="+", metavar="N")
    size.add_argument("--depths", type=int, nargs="+", metavar="L")
    parser.add_argument("--base", type=int, metavar="SIZE", help="at which all are the standard; default: the recipe's, or the smallest")


def axis_and_sizes(arguments: argparse.Namespace) -> tuple[str, list[int]]:
    """("width" or "depth", the sizes given). Raises InputError for fewer than two."""
    axis, sizes = ("width", arguments.widths) if arguments.widths else ("depth", arguments.depths)
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise InputError(f"--{axis}s {' '.join(map(str, sizes))}: expected at least two different positive sizes")
    return axis, sizes


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds. Raises InputError for a recipe or sizes that make no network."""
    axis, sizes = axis_and_sizes(arguments)
    if arguments.steps <= FIRST_STEP:
        raise InputError(f"--steps {arguments.steps}: expected more than {FIRST_STEP}, from where on slopes are judged")
    recipe = load_recipe(arguments.recipe, arguments.overrides).recipe
    names = arguments.parametrizations or [recipe.model.parametrization]
    base = arguments.base or (recipe.model.base_width if axis == "width" else recipe.model.base_depth) or min(sizes)
    # every network is built on paper first, so that nothing is refused after minutes
    recipes = {
        name: {size: sized_recipe(arguments.recipe, arguments.overrides, name, axis, size, base) for size in sizes} for name in names
    }
    found: dict[str, Any] = {}
    jobs = [(name, size, seed) for name in names for size in sizes for seed in arguments.seeds]
    values: dict[tuple[str, int], list[dict[str, list[float]]]] = {}
    for name, size, seed in tqdm(jobs, desc="coordinate check", unit="network"):
        sized = recipes[name][size]
        batch = tokens_of(sized, arguments)
        values.setdefault((name, size), []).append(train(sized, batch, arguments.steps, seed))
    for name in names:
        of_sizes = {size: average(values[name, size]) for size in sizes}
        slopes = {module: [slope(sizes, [of_sizes[s][module][t] for s in sizes]) for t in range(arguments.steps)] for module in MODULES}
        late = [abs(value) for module in JUDGED for value in slopes[module][FIRST_STEP:] if value is not None]
        problem = problem_of(of_sizes, axis)
        found[name] = {
            "passes": problem is None and max(late) <= LARGEST_SLOPE,
            "largest_late_slope": max(late, default=None),
            "problem": problem,
            "values": {str(size): of_sizes[size] for size in sizes},
            "slopes": slopes,
        }
    return {
        "format": 1,
        "command": " ".join(["python -m scripts.coordinate_check", *sys.argv[1:]]),
        "definitions": DEFINITIONS,
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "axis": axis,
        "sizes": sizes,
        "seeds": arguments.seeds,
        "learning_rate": recipe.optimizer.learning_rate,
        "tokens": f"{arguments.sequences} x {arguments.length}, " + (f"bytes of {arguments.data}" if arguments.data else "uniform random"),
        "torch": torch.__version__,
        "parametrizations": found,
    }


def sized_recipe(path: str, overrides: list[str], parametrization: str, axis: str, size: int, base: int) -> Recipe:
    """The recipe at a size under a parametrisation."""
    return load_recipe(path, [*overrides, *size_overrides(path, overrides, parametrization, axis, size, base)]).recipe


def size_overrides(path: str, overrides: list[str], parametrization: str, axis: str, size: int, base: int) -> list[str]:
    """What makes a recipe one of that size and parametrisation: `model.key=value` for each field that changes.

    base: the base width or depth along that axis; along the other it is the recipe's own, or the size that the recipe has.
    """
    section = load_recipe(path, overrides).recipe.model
    changes: dict[str, Any] = {
        "parametrization": parametrization,
        "base_width": None,
        "base_depth": None,
        **resizing(section, **{axis: size}),
    }
    if parametrization == "standard":
        changes["base_head_dim"] = None
    else:
        changes["base_width"] = base if axis == "width" else section.base_width or section.width
    if parametrization in ("depth_mup", "complete_p"):
        changes["base_depth"] = base if axis == "depth" else section.base_depth or section.depth
    return [f"model.{key}={json.dumps(value)}" for key, value in changes.items()]


def tokens_of(recipe: Recipe, arguments: argparse.Namespace) -> Tensor:
    """The batch, (sequences, length + 1) int64: the same at every size."""
    count, vocab_size = arguments.sequences * (arguments.length + 1), recipe.data.tokenizer.vocab_size
    if arguments.data is None:
        tokens = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    else:
        try:
            tokens = torch.tensor(list(Path(arguments.data).read_bytes()[:count]))
        except OSError as error:
            raise InputError(f"{arguments.data}: cannot be read: {error.strerror}") from None
        if len(tokens) < count or vocab_size < 256:
            raise InputError(f"{arguments.data}: expected {count} bytes or more, and a vocabulary of at least 256")
    return tokens.view(arguments.sequences, -1)


def train(recipe: Recipe, batch: Tensor, steps: int, seed: int) -> dict[str, list[float]]:
    """Module -> its mean magnitude before each step, of one network trained on one batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer(recipe.model.config(recipe.data.tokenizer.vocab_size, recipe.training.sequence_length))
    initialize(model, seed)
    model.to(device)
    optimizer = make_optimizer(model, recipe.optimizer, sharded=recipe.optimizer.kind == "adamw")
    if hasattr(optimizer, "ready"):
        optimizer.ready = True  # pyright: ignore[reportAttributeAccessIssue]
    batch = batch.to(device)
    values: dict[str, list[float]] = {module: [] for module in MODULES}
    of_targets: list[Tensor] = []

    def note(module: str, x: Tensor) -> None:
        x = x.detach().float()
        values[module].append(float(x.abs().mean()))
        if module == "logits":
            of_targets.append(x.gather(2, batch[:, 1:, None]))
            values["logits_moved"].append(float((of_targets[-1] - of_targets[0]).abs().mean()))

    for _ in range(steps):
        with watching(model, note):
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values


@contextmanager
def watching(model: Transformer, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within it, a forward pass calls note(module, its output) for each of MODULES but the last."""
    block: Any = model.blocks[-1]
    head: Any = model.unembedding
    queries: list[Tensor] = []

    def keep_query(_: Any, args: Any, query: Tensor) -> None:
        queries.append(query.detach())

    def scores(_: Any, args: Any, key: Tensor) -> None:
        query = queries.pop()
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        note("scores", torch.einsum("bqhd,bkhd->bhqk", query, key) * block.attention.scale)

    handles = [
        block.register_forward_hook(lambda _, args, x: note("residual", x)),
        block.attention.register_forward_hook(lambda _, args, x: note("attention", x)),
        block.mlp.register_forward_hook(lambda _, args, x: note("mlp", x)),
        block.attention.query_norm.register_forward_hook(keep_query),
        block.attention.key_norm.register_forward_hook(scores),
        head.register_forward_hook(lambda _, args, x: note("logits", x)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def average(runs: list[dict[str, list[float]]]) -> dict[str, list[float | None]]:
    """Geometric mean over seeds, by module and step; 0 where one is 0, None where one is not finite."""

    def mean(values: tuple[float, ...]) -> float | None:
        if not all(map(math.isfinite, values)):
            return None
        return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0

    return {module: [mean(values) for values in zip(*(run[module] for run in runs), strict=True)] for module in MODULES}


def slope(sizes: list[int], values: list[float | None]) -> float | None:
    """Least-squares slope of log2 value over log2 size; None where a value is 0 or None."""
    positive = [value for value in values if value]
    if len(positive) < len(values):
        return None
    x, y = [math.log2(size) for size in sizes], [math.log2(value) for value in positive]
    return statistics.linear_regression(x, y).slope


def problem_of(values: dict[int, dict[str, list[float | None]]], axis: str) -> str | None:
    """The first of the values, size -> module -> one a step, that leaves the check without a verdict, in words; None where none does."""
    steps = len(next(iter(values.values()))["residual"])
    for step, size, module in itertools.product(range(steps), values, MODULES):
        value = values[size][module][step]
        if value is None:
            return f"{module} is not finite at step {step}, {axis} {size}"
        if value == 0 and step >= FIRST_STEP and module in JUDGED:
            return f"{module} is 0 at step {step}, {axis} {size}, so its slope is undefined"
    return None


def can_be_drawn(result: dict[str, Any]) -> bool:
    """Whether each panel of the picture has a value: an axis without one cannot be logarithmic."""
    return all(
        any(value for values in found["values"].values() for value in values[module])
        for found in result["parametrizations"].values()
        for module in MODULES
    )


def table(result: dict[str, Any]) -> str:
    """For the terminal and docs/signal_propagation.md: slopes at a few steps, and the verdict."""
    steps = result_steps(result)
    titles = [f"slope over {result['axis']} at steps {', '.join(map(str, steps))}", *MODULES, ""]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, found in result["parametrizations"].items():
        cells = [" ".join("-" if slopes[s] is None else f"{slopes[s]:.2f}" for s in steps) for slopes in found["slopes"].values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {'passes' if found['passes'] else 'fails'} |")
    return "\n".join(lines)


def result_steps(result: dict[str, Any]) -> list[int]:
    last = len(next(iter(result["parametrizations"].values()))["slopes"]["residual"]) - 1
    return sorted({0, 1, FIRST_STEP, last})


if __name__ == "__main__":
    sys.exit(main())
