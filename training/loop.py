"""The loop, straight down: find the ranks, check everything, prepare the data, build, resume, train."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model.activation_statistics import watch_residuals
from model.errors import InputError
from model.transformer import IGNORED_TARGET
from training import checkpoint
from training.curvature import Curvature
from training.data import Batch, PreparedData, Sequences, open_prepared, prepare, require_step, step_rows
from training.distributed import Ranks, discover, raise_together, reduce_moments, sum_over_ranks
from training.engine import Engine, start_distributed
from training.metrics import MFU_DEFINITION, Metrics, PeakMemory, duration, peak_flops
from training.optimizers import describe_groups, learning_rate
from training.plan import accumulation_steps, passes, plan
from training.recipe import LoadedRecipe, Recipe, model_config, zero_stage
from training.run_folder import check_run_folder, describe_environment, open_run_folder, write_json
from training.sharpness_aware import Outcome, take_step


def train(loaded: LoadedRecipe) -> None:
    """Train a recipe to its end, or on from its newest checkpoint.

    Raises:
        InputError: the recipe, the data, the run folder or a checkpoint is wrong; no weight has been made yet, or what was
            made is saved.
        RuntimeError: gradients were non-finite for too many steps in a row.
    """
    recipe, run = loaded.recipe, loaded.run_folder
    training = recipe.training

    # What can be wrong is found before anything is made.
    ranks = discover()
    accumulation = accumulation_steps(recipe, ranks.world_size)
    check_run_folder(loaded)
    data = corpus_of(loaded)
    require_step(data, training.tokens_per_step, training.sequence_length)
    config = model_config(recipe, data.vocab_size)
    lock = open_run_folder(loaded) if ranks.is_first else None
    total_steps = training.tokens // training.tokens_per_step
    last_step = min(total_steps, recipe.run.stop_at_step or total_steps)

    device = start_distributed(ranks)
    require_same_corpus(data, ranks)
    newest = manifest = None
    problem = None
    if whole := checkpoint.checkpoints(run):
        try:
            newest, manifest = whole[-1], checkpoint.read_manifest(whole[-1])
            checkpoint.check_layout(newest, manifest, zero_stage(recipe), ranks)
        except InputError as error:
            problem = str(error)
    raise_together(problem)
    start_step = 0
    if newest is not None and manifest is not None:
        start_step = manifest["step"]
        if start_step >= last_step:
            if ranks.is_first:
                print(f"{run}: complete at step {start_step} of {total_steps}; nothing to do")
            return
        checkpoint.verify(newest, manifest, ranks)

    # Build. From here on memory counts.
    metrics = Metrics(run, recipe.logging, ranks, last_step, start_step)
    memory = PeakMemory(device)
    engine = Engine(recipe, config, accumulation, ranks, device)
    if newest is not None:
        checkpoint.load(engine, newest)
    sequences = Sequences(data, "train", training.sequence_length, recipe.run.seed, shuffle=True, document_masks=recipe.data.document_masks)
    predicted = plan(recipe, config, ranks.world_size, data.manifest)
    for warning in config.warnings():
        metrics.say(f"warning: {warning}")
    if ranks.is_first:
        environment = describe_environment(ranks.world_size, device)
        environment["predicted_peak_memory_bytes"] = predicted.memory.total
        write_json(run / "environment.json", environment)
        record = {"prepared": str(data.folder.resolve()), "content_hash": data.manifest["content_hash"]}
        write_json(run / "data.json", {**record, "validation_unigram_loss": data.validation_unigram_loss})
        data.copy_tokenizer(run / "tokenizer")
        metrics.say(_headline(loaded, data, engine, predicted.parameters.total, start_step, total_steps))
    peak = peak_flops(device)
    if peak is not None:
        metrics.say(MFU_DEFINITION)
    if recipe.checkpoint.first and start_step == 0:
        checkpoint.save(engine, run, step=0, tokens=0)

    curvature = Curvature(engine, data, recipe) if recipe.evaluation.curvature_every else None
    skipped_in_a_row, warned = 0, False
    clock, clock_tokens = time.perf_counter(), 0
    for step in range(start_step, last_step):
        rows = step_rows(
            step, training.tokens_per_step // training.sequence_length, ranks.rank, ranks.world_size, training.micro_batch_size
        )
        batches = [sequences.rows(numbers) for numbers in rows]
        valid_tokens = _valid_tokens(batches, training.tokens_per_step, recipe.data.document_masks, device)
        measured = recipe.logging.outliers_every > 0 and (step % recipe.logging.outliers_every == 0 or step + 1 == last_step)
        done, tokens = step + 1, (step + 1) * training.tokens_per_step
        logged = done % recipe.logging.every == 0 or done == last_step or step == start_step
        watch = watch_residuals(engine.model) if measured else nullcontext()
        outcome = take_step(engine, batches, valid_tokens, step, total_steps, logged, watch)
        result = outcome.result
        clock_tokens += training.tokens_per_step

        skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
        if not result.applied:
            _report_skip(engine, batches, outcome, metrics, done, tokens, skipped_in_a_row, training.max_skipped_steps)

        if logged:
            loss, loss_tokens = sum_over_ranks(outcome.loss_sum, outcome.loss_tokens, device=device)
            elapsed = time.perf_counter() - clock
            tokens_per_second = clock_tokens / elapsed
            values = {
                "step": done,
                "tokens": tokens,
                "loss": loss / max(loss_tokens, 1),
                "learning_rate": learning_rate(recipe.optimizer, step, total_steps),
                "grad_norm": result.grad_norm,
                "tokens_per_second": tokens_per_second,
                "mfu": tokens_per_second * predicted.flops_per_token * passes(recipe, step, total_steps) / (ranks.world_size * peak)
                if peak
                else None,
                "skipped_steps": engine.skipped_steps,
                "peak_memory_bytes": memory.bytes(),
                **outcome.values,
            }
            metrics.record(values)
            metrics.progress(done, values)
            if outcome.buried and not warned:
                warned = True
                metrics.say(f"step {done}: {outcome.buried}")
            clock, clock_tokens = time.perf_counter(), 0

        if outcome.watched is not None:  # the weights before this step, on its tokens
            reduce_moments(outcome.watched)
            measures = {place: moments.measures() for place, moments in outcome.watched.items()}
            metrics.record_activations(step, step * training.tokens_per_step, measures)

        aside = time.perf_counter()
        if done % recipe.evaluation.every == 0 or done == total_steps:
            validation_loss = evaluate(engine, data, recipe)
            metrics.record({"step": done, "tokens": tokens, "validation_loss": validation_loss})
            metrics.say(
                f"step {done}/{last_step}  validation loss {validation_loss:.4f}  (a unigram model: {data.validation_unigram_loss:.4f})"
            )
        if curvature is not None and done % (recipe.evaluation.curvature_every or 1) == 0:
            rate = learning_rate(recipe.optimizer, step, total_steps)
            metrics.record({"step": done, "tokens": tokens, **curvature.measure(rate)})
        if done % recipe.checkpoint.every == 0 or done == last_step:
            folder = checkpoint.save(engine, run, done, tokens)
            metrics.say(f"step {done}/{last_step}  saved {folder}")
            if ranks.is_first:
                checkpoint.remove_old(run, recipe.checkpoint.keep_last, recipe.checkpoint.keep_every)
        clock += time.perf_counter() - aside  # evaluating and saving do not count as training time

    metrics.say(
        f"{run}: done, step {last_step} of {total_steps} in {duration(time.perf_counter() - metrics.started)}; "
        f"peak memory of this rank: {memory.bytes() / 2**20:,.0f} MiB {memory.what}; "
        f"tensors planned: {predicted.memory.total / 2**20:,.0f} MiB"
    )
    metrics.close()
    if lock is not None:
        lock.close()


def corpus_of(loaded: LoadedRecipe) -> PreparedData:
    """The prepared corpus of a run: the one it began with, if it has begun, even where the source has changed since.

    Raises:
        InputError: that corpus is gone, and what would be prepared now has other content.
    """
    recipe, record = loaded.recipe, loaded.run_folder / "data.json"
    if not record.exists():
        return prepare(recipe.data, recipe.training.sequence_length)
    begun_with = json.loads(record.read_text())
    if Path(begun_with["prepared"]).exists():
        return open_prepared(begun_with["prepared"])
    data = prepare(recipe.data, recipe.training.sequence_length)
    if data.manifest["content_hash"] != begun_with["content_hash"]:
        raise InputError(
            f"{loaded.run_folder}: began with the tokens of {begun_with['prepared']}, which are gone, and the text of data.source "
            "has changed since; bring that folder back, or start a new run with another run.name"
        )
    return data


def require_same_corpus(data: PreparedData, ranks: Ranks) -> None:
    """Hosts that share no disk prepare data each for itself; raise InputError on every rank if their texts differ."""
    contents: list[str] = [data.manifest["content_hash"]]
    if ranks.world_size > 1:
        contents = [""] * ranks.world_size
        dist.all_gather_object(contents, data.manifest["content_hash"])
    other = [rank for rank, content in enumerate(contents) if content != contents[0]]
    if other:
        raise InputError(
            f"{data.folder}: rank {other[0]} prepared other text than rank 0; prepare on one host and share the folder (data.prepared)"
        )


def evaluate(engine: Engine, data: PreparedData, recipe: Recipe) -> float:
    """Mean loss a token, in nats, over the first `evaluation.tokens` of the validation split. Every rank calls it."""
    length, size, ranks = recipe.training.sequence_length, recipe.training.micro_batch_size, engine.ranks
    sequences = Sequences(data, "validation", length, seed=0, shuffle=False, document_masks=recipe.data.document_masks)
    count = max(1, min(len(sequences), recipe.evaluation.tokens // length))
    loss_sum, valid = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    # Every rank runs the same number of forwards, since ZeRO-3 gathers weights in each; past the end nothing counts.
    for first in range(0, count, size * ranks.world_size):
        numbers = np.arange(first + ranks.rank * size, first + (ranks.rank + 1) * size)
        batch = sequences.rows(np.minimum(numbers, count - 1))
        batch.targets[torch.from_numpy(numbers >= count)] = IGNORED_TARGET
        loss_sum += engine.summed_loss(batch)
        valid += batch.valid_tokens
    loss, tokens = sum_over_ranks(loss_sum, valid, device=engine.device)
    return loss / tokens


def _valid_tokens(batches: list[Batch], tokens_per_step: int, document_masks: bool, device: torch.device) -> float:
    """Targets that count in this step, over all ranks and micro-batches."""
    if not document_masks:
        return float(tokens_per_step)
    (valid,) = sum_over_ranks(sum(batch.valid_tokens for batch in batches), device=device)
    return max(valid, 1.0)


def _report_skip(
    engine: Engine, batches: list[Batch], outcome: Outcome, metrics: Metrics, done: int, tokens: int, in_a_row: int, limit: int
) -> None:
    """Say that a step was skipped, where its non-finite gradients come from, and stop when there are too many in a row."""
    where = (
        "only those at the perturbed weights, so optimizer.sharpness.radius is too large"
        if outcome.ascent_was_finite
        else engine.name_non_finite(batches)
    )
    metrics.say(f"step {done}: skipped, gradients are not finite ({in_a_row} in a row): {where}")
    metrics.record({"step": done, "tokens": tokens, "skipped_steps": engine.skipped_steps})
    if in_a_row >= limit:
        metrics.close()
        raise RuntimeError(
            f"stopped at step {done}: {in_a_row} steps in a row had non-finite gradients (training.max_skipped_steps); "
            "lower optimizer.learning_rate, or look at the data of these steps"
        )


def _headline(loaded: LoadedRecipe, data: PreparedData, engine: Engine, parameters: int, start_step: int, total_steps: int) -> str:
    training, ranks = loaded.recipe.training, engine.ranks
    resumed = f", from step {start_step}" if start_step else ""
    return (
        f"{loaded.run_folder}: {parameters:,} parameters, {loaded.recipe.model.block}, {total_steps} steps{resumed}, ZeRO-{engine.stage}, "
        f"{training.precision}, {engine.device.type}\n"
        f"{describe_groups(engine.model, loaded.recipe.optimizer)}\n"
        f"tokens per step {training.tokens_per_step:,} = {ranks.world_size} ranks x {training.micro_batch_size} micro-batch x "
        f"{engine.accumulation} accumulation x {training.sequence_length} length; {data.train_tokens:,} training tokens, "
        f"{training.tokens / data.train_tokens:.2f} epochs"
    )
