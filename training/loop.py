"""The loop, straight down: find the ranks, check everything, prepare the data, build, resume, train."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from model.activation_statistics import watch_residuals
from model.config import ModelConfig
from model.errors import InputError
from model.pretrained import PretrainedModel
from model.transformer import IGNORED_TARGET
from training import checkpoint, early_stop, faults
from training.curvature import Curvature
from training.data import Batch, Feed, PreparedData, Sequences, open_prepared, prepare, require_step
from training.distributed import Ranks, TrainingStoppedError, discover, reduce_moments, sum_over_ranks
from training.engine import Engine, start_distributed
from training.loss_spikes import LossSpikes
from training.metrics import MFU_DEFINITION, Metrics, PeakMemory, duration, peak_flops
from training.network import require_compiler
from training.optimizers import describe_groups, learning_rate
from training.plan import accumulation_steps, memory_advice, passes, plan, with_memory_budget
from training.profiling import profiled
from training.recipe import Recipe, model_config
from training.recipe_file import LoadedRecipe
from training.run_folder import check_run_folder, describe_environment, open_run_folder, write_json
from training.saver import Saver
from training.sharpness_aware import Outcome, is_split, take_step
from training.stop_request import StopRequest
from training.watchdog import Watchdog

if TYPE_CHECKING:
    from training.context_pruning import PruningController


def train(loaded: LoadedRecipe) -> int:
    """Train a recipe to its end, or on from its newest whole checkpoint, whatever ranks and ZeRO stage wrote that.

    Returns:
        The exit code: 0, or 75 when it was stopped on request and the same launch again goes on.

    Raises:
        InputError: the recipe, the data, the run folder or a checkpoint is wrong; no weight has been made yet, or what was
            made is saved.
        TrainingStoppedError: gradients were non-finite for too many steps in a row, or there were too many loss spikes.
    """
    recipe, run, training = loaded.recipe, loaded.run_folder, loaded.recipe.training

    # What can be wrong is found before anything is made.
    ranks = discover()
    faults.requested()
    accumulation_steps(recipe, ranks.world_size)
    require_compiler(recipe)
    check_run_folder(loaded)
    data = corpus_of(loaded)
    require_step(data, training.tokens_per_step, training.sequence_length)
    config = model_config(recipe, data.vocab_size)
    lock = open_run_folder(loaded) if ranks.is_first else None
    try:
        device = start_distributed(ranks)
        watching = Watchdog(run, ranks, recipe.run.hang_seconds, recipe.run.lost_seconds)
        with watching as watchdog, Saver(run, recipe, ranks, watchdog) as saver:
            return _train(loaded, data, config, ranks, device, watchdog, saver)
    finally:
        if lock is not None:
            lock.release()


def _train(
    loaded: LoadedRecipe,
    data: PreparedData,
    config: ModelConfig | PretrainedModel,
    ranks: Ranks,
    device: torch.device,
    watchdog: Watchdog,
    saver: Saver,
) -> int:
    recipe, run, training = loaded.recipe, loaded.run_folder, loaded.recipe.training
    total_steps = training.tokens // training.tokens_per_step
    last_step = min(total_steps, recipe.run.stop_at_step or total_steps)
    require_same_corpus(data, ranks)
    stop = StopRequest()
    watchdog.progress("looking for the newest whole checkpoint")
    newest = checkpoint.newest_whole(run, ranks, tokens_per_step=training.tokens_per_step)
    start_step = newest.manifest["step"] if newest is not None else 0
    if newest is not None and start_step >= last_step:
        if ranks.is_first:
            print(f"{run}: complete at step {start_step} of {total_steps}; nothing to do")
        return 0

    # Build. From here on memory counts.
    metrics = Metrics(run, recipe.logging, ranks, last_step, start_step)
    memory = PeakMemory(device)
    watchdog.progress("building the model")
    recipe = with_memory_budget(recipe, device.type)
    predicted = plan(recipe, config, ranks.world_size, data.manifest)
    with memory_advice(predicted, "the building of the model"):
        engine = Engine(recipe, config, accumulation_steps(recipe, ranks.world_size), ranks, device)
    spikes, skipped_in_a_row = LossSpikes(training.loss_spikes, device), 0
    if newest is not None:
        checkpoint.load(engine, newest)
        skipped_in_a_row = restore(newest, spikes)
    order = recipe.run.seed if recipe.data.seed is None else recipe.data.seed
    sequences = Sequences(data, "train", training.sequence_length, order, shuffle=True, document_masks=recipe.data.document_masks)
    feed = Feed(sequences, training.tokens_per_step // training.sequence_length, ranks, training.micro_batch_size, device.type == "cuda")
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
    if recipe.checkpoint.first and newest is None:
        saver.save(engine, step=0, tokens=0, state={})

    pruning = None
    if recipe.context_pruning is not None:
        from training.context_pruning import PruningController  # transformers takes seconds to import

        pruning = PruningController(engine.model.context_pruning_settings, recipe.context_pruning, device)
        if newest is not None:
            state = newest.manifest["state"].get("context_pruning")
            if state is not None or start_step > 0:  # the checkpoint before the first step has none
                pruning.restore(state or {})
    curvature = Curvature(engine, data, recipe) if recipe.evaluation.curvature_every else None
    warned, stopped = False, False
    clock, clock_tokens, waited = time.perf_counter(), 0, 0.0
    step = start_step - 1
    while step + 1 < last_step and not stopped:
        step += 1
        watchdog.progress(f"step {step + 1}")
        faults.before_step(step + 1, ranks.rank)
        data_step = step + spikes.data_ahead
        batches, valid_targets = feed.step(data_step)
        valid_tokens = float(max(valid_targets, 1))
        faults.spoil(batches, data_step + 1, data.vocab_size)
        if pruning is not None:
            if step == 0:
                found = pruning.begin(engine, batches, total_steps)
                if found is not None:
                    metrics.say(found)
            pruning.before_step(step, total_steps)
            engine.interactions_alone = pruning.settings.from_attention
        measured = (
            recipe.logging.outliers_every > 0
            and recipe.model.pretrained is None
            and (step % recipe.logging.outliers_every == 0 or step + 1 == last_step)
        )
        done, tokens = step + 1, (step + 1) * training.tokens_per_step
        logged = (
            done % recipe.logging.every == 0 or done == last_step or step == start_step or is_split(recipe.optimizer, step, total_steps)
        )
        watch = watch_residuals(engine.model) if measured else nullcontext()
        if faults.asked_for("nan", done, ranks.rank):
            valid_tokens = math.nan
        recorded = profiled(run / "profile", done, ranks.is_first and done in training.profile)
        with memory_advice(predicted, f"step {done}"), recorded:
            outcome = take_step(engine, batches, valid_tokens, step, total_steps, logged, watch, spikes.accept)
        result = outcome.result
        pruned = {} if pruning is None else pruning.after_step(step, total_steps)
        clock_tokens += training.tokens_per_step

        if outcome.refused:
            metrics.record({"step": done, "tokens": tokens, "loss_spike": spikes.loss, "loss_spike_limit": spikes.limit()})
            metrics.say(f"step {done}: loss spike: {spikes.loss:.4f}, the limit was {spikes.limit():.4f} ({training.loss_spikes.action})")
            spikes.count_spike(done)
            if training.loss_spikes.action == "rewind":
                saver.wait()
                back_at = rewind(engine, run, spikes, pruning, done, training.loss_spikes.rewind_steps, metrics)
                if back_at < done:
                    step = back_at - 1
                    continue
        elif result.applied:
            skipped_in_a_row = 0
            spikes.remember()
        else:
            skipped_in_a_row += 1
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
                "loss_spikes": spikes.count if training.loss_spikes.action != "none" else None,
                "peak_memory_bytes": memory.bytes(),
                "data_wait_seconds": feed.waited - waited,
                **outcome.values,
                **pruned,
            }
            metrics.record(values)
            metrics.progress(done, values)
            if outcome.buried and not warned:
                warned = True
                metrics.say(f"step {done}: {outcome.buried}")
            clock, clock_tokens, waited = time.perf_counter(), 0, feed.waited

        if outcome.watched is not None:  # the weights before this step, on its tokens
            reduce_moments(outcome.watched)
            measures = {place: moments.measures() for place, moments in outcome.watched.items()}
            metrics.record_activations(step, step * training.tokens_per_step, measures)

        aside = time.perf_counter()
        stopped = stop.after_step(saver.failed)
        if done % recipe.evaluation.every == 0 or done == total_steps:
            watchdog.progress(f"evaluating after step {done}")
            evaluated = evaluate_with_pruning(engine, data, recipe, pruning)
            validation_loss = evaluated["validation_loss"]
            metrics.record({"step": done, "tokens": tokens, **evaluated})
            metrics.say(
                f"step {done}/{last_step}  validation loss {validation_loss:.4f}  (a unigram model: {data.validation_unigram_loss:.4f})"
            )
        if curvature is not None and done % (recipe.evaluation.curvature_every or 1) == 0:
            rate = learning_rate(recipe.optimizer, step, total_steps)
            try:
                metrics.record({"step": done, "tokens": tokens, **curvature.measure(rate)})
            except ArithmeticError as error:  # on every rank alike
                metrics.say(f"step {done}: no curvature: {error}")
        if done % recipe.checkpoint.every == 0 or done == last_step or stopped:
            watchdog.progress(f"saving step {done}")
            state: dict[str, Any] = {"skipped_in_a_row": skipped_in_a_row, "loss_spikes": spikes.state()}
            if pruning is not None:
                state["context_pruning"] = pruning.state()
            saver.save(engine, done, tokens, state)
        if stopped or done == last_step:
            saver.wait()
        for saved in saver.finished():
            metrics.record(saved.record())
            metrics.say(f"step {saved.step}/{last_step}  saved {saved.folder}")
        clock += time.perf_counter() - aside  # evaluating and saving do not count as training time

    feed.close()
    ended = step + 1
    stopped = stopped and ended < last_step
    metrics.say(
        f"{run}: {'stopped on request' if stopped else 'done'}, step {ended} of {total_steps} in "
        f"{duration(time.perf_counter() - metrics.started)}; "
        f"peak memory of this rank: {memory.bytes() / 2**20:,.0f} MiB {memory.what}; "
        f"tensors planned: {predicted.memory.total / 2**20:,.0f} MiB{'; the same launch again goes on' if stopped else ''}"
    )
    metrics.close()
    return early_stop.EXIT_CODE if stopped else 0


def restore(found: checkpoint.Found, spikes: LossSpikes) -> int:
    """What the loop remembers beside weights and optimizer: fills `spikes`, and returns the steps skipped in a row.

    Raises:
        InputError: the manifest's state is not one that `train` wrote.
    """
    state = found.manifest["state"]
    try:
        spikes.restore(state.get("loss_spikes", {}))
        return int(state.get("skipped_in_a_row", 0))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{found.folder}/manifest.json: its state cannot be read: {type(error).__name__}: {error}") from None


def rewind(engine: Engine, run: Path, spikes: LossSpikes, pruning: PruningController | None, done: int, back: int, metrics: Metrics) -> int:
    """Load the newest whole checkpoint at least `back` steps before step `done`, and pass over the data since; returns its step.

    Later checkpoints are put aside. Where there is none to go back to, nothing is loaded and `done` is returned: the step's update, which
    was not made, is left out.
    """
    tokens_per_step = engine.recipe.training.tokens_per_step
    found = checkpoint.newest_whole(run, engine.ranks, at_most=max(0, done - back), tokens_per_step=tokens_per_step)
    if found is None:
        metrics.say(f"step {done}: no checkpoint of step {max(0, done - back)} or before to go back to: its update is left out instead")
        return done
    checkpoint.load(engine, found)
    to_step, state = found.manifest["step"], found.manifest["state"]
    aside = checkpoint.put_aside(run, to_step, engine.ranks)
    spikes.go_back(done, to_step, state.get("loss_spikes", {}))
    if pruning is not None and "context_pruning" in state:
        pruning.restore(state["context_pruning"])
    metrics.say(f"step {done}: back to step {to_step}, past the data of {done - to_step} steps ({spikes.data_ahead} in all)")
    if aside:
        metrics.say(f"step {done}: put aside, each until its step is saved again: {', '.join(aside)} in {run / 'checkpoints'}")
    metrics.record({"step": done, "rewound_to_step": to_step, "data_steps_passed_over": spikes.data_ahead})
    return to_step


def corpus_of(loaded: LoadedRecipe) -> PreparedData:
    """The prepared corpus of a run: the one it began with, if it has begun, even where the source has changed since.

    Raises:
        InputError: that corpus is gone, and what would be prepared now has other content; or the run's note of it is damaged.
    """
    recipe, record = loaded.recipe, loaded.run_folder / "data.json"
    if not record.exists():
        return prepare(recipe.data, recipe.training.sequence_length)
    try:
        begun_with = json.loads(record.read_text(encoding="utf-8"))
        folder, content = Path(begun_with["prepared"]), begun_with["content_hash"]
        there = folder.exists()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{record}: damaged: {type(error).__name__}: {error}; it says which prepared corpus the run began with: bring the file back, "
            "or delete it if the text of data.source is still what it was then"
        ) from None
    if there:
        return open_prepared(folder)
    data = prepare(recipe.data, recipe.training.sequence_length)
    if data.manifest["content_hash"] != content:
        raise InputError(
            f"{loaded.run_folder}: began with the tokens of {folder}, which are gone, and the text of data.source "
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


def evaluate_with_pruning(engine: Engine, data: PreparedData, recipe: Recipe, pruning: PruningController | None) -> dict[str, Any]:
    """Validation loss; of a network that prunes its context: as it generates, with hard decisions, and beside it soft and not at all."""
    if pruning is None:
        return {"validation_loss": evaluate(engine, data, recipe)}
    values: dict[str, Any] = {}
    ways: dict[str, Literal["hard", "soft", "dense"]] = {
        "validation_loss": "hard",
        "validation_loss_soft": "soft",
        "validation_loss_dense": "dense",
    }
    if pruning.section.decisions == "fixed":  # hard in training too
        del ways["validation_loss_soft"]
    for name, how in ways.items():
        with pruning.evaluating(how):
            values[name] = evaluate(engine, data, recipe)
            if how == "hard":
                values["validation_kept_share"] = pruning.take_measured()[1]
    return values


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
        raise TrainingStoppedError(
            f"stopped at step {done}: {in_a_row} steps in a row had non-finite gradients (training.max_skipped_steps); "
            "lower optimizer.learning_rate, or look at the data of these steps"
        )


def _headline(loaded: LoadedRecipe, data: PreparedData, engine: Engine, parameters: int, start_step: int, total_steps: int) -> str:
    training, ranks = loaded.recipe.training, engine.ranks
    network = loaded.recipe.model.pretrained or loaded.recipe.model.block
    resumed = f", from step {start_step}" if start_step else ""
    return (
        f"{loaded.run_folder}: {parameters:,} parameters, {network}, {total_steps} steps{resumed}, ZeRO-{engine.stage}, "
        f"{training.precision}, {engine.device.type}\n"
        f"{describe_groups(engine.model, loaded.recipe.optimizer)}\n"
        f"tokens per step {training.tokens_per_step:,} = {ranks.world_size} ranks x {training.micro_batch_size} micro-batch x "
        f"{engine.accumulation} accumulation x {training.sequence_length} length; {data.train_tokens:,} training tokens, "
        f"{training.tokens / data.train_tokens:.2f} epochs"
    )
