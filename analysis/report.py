"""One self-contained HTML page that compares runs: what they are, how they learned, and what happened inside them."""

from __future__ import annotations

import re
import shlex
import statistics
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from analysis import optimizer_step, outliers, run_pictures, trajectory, weights
from analysis.charts import Line, heat_map, layer_colour, line_chart, padded_range
from analysis.checkpoint import Checkpoint
from analysis.fused import heads_of
from analysis.outlier_neurons import Thresholds
from analysis.output import check_writable, short, write_json, write_whole
from analysis.page import facts, folded, folded_html, grid, page, panel, section, table
from analysis.runs import Run, folder_names, read_json, read_metrics
from analysis.tensorboard import write_tensorboard
from analysis.tokens import held_out_tokens
from model.errors import InputError

OUTLIER_TOKENS = 8192  # of the run's held-out text


def write_report(runs: list[Run], out: str | Path | None = None, verify: bool = True) -> list[Path]:
    """Analyse what has not been analysed yet; write the page, overview.png beside it, and what TensorBoard shows of each run.

    The results of each run go to its own report/, or to a folder of its name beside the page: with `out`, and where report/ cannot be
    written.

    Args:
        out: a folder, or an .html file; default: report/ of a single run, else the folder in which all runs lie, else the current one.

    Returns:
        The page and the picture.
    """
    if out is not None:
        target = Path(out)
    elif len(runs) == 1:
        target = runs[0].default_report()
    else:
        parents = {run.path.resolve().parent for run in runs}
        target = parents.pop() if len(parents) == 1 else Path.cwd()
    file = target if target.suffix == ".html" else target / "report.html"
    check_writable(file.parent)
    folders = [
        own if out is None and _can_write(own := run.default_report()) else _beside(file, run, name)
        for run, name in zip(runs, folder_names(runs), strict=True)
    ]
    gathered = [gather(run, folder, verify) for run, folder in zip(runs, folders, strict=True)]
    for run, folder, found in zip(runs, folders, gathered, strict=True):
        shown = run.folder / "tensorboard" if run.folder is not None else None
        if shown is not None and shown.is_dir():
            if _can_write(shown / "report"):
                write_tensorboard(found, folder, shown / "report")
            else:
                print(f"note: {shown}: cannot be written, so TensorBoard does not show this report", file=sys.stderr)
    names = [run["name"] for run in gathered]
    for run in gathered:
        if names.count(run["name"]) > 1:
            run["name"] = run["path"]
    command = f"python -m analysis report {' '.join(shlex.quote(str(run.path)) for run in runs)}"
    if out is not None:
        command += f" --out {shlex.quote(str(out))}"
    picture = run_pictures.overview_picture(gathered, file.with_name("overview.png"))
    return [write_whole(file, render(gathered, command)), picture]


def _beside(page: Path, run: Run, name: str) -> Path:
    folder = page.parent / name
    return folder.with_name(f"{name}-report") if folder.resolve() == run.path.resolve() else folder


def _can_write(folder: Path) -> bool:
    try:
        check_writable(folder)
    except InputError:
        return False
    return True


def gather(run: Run, report: Path, verify: bool = True) -> dict[str, Any]:
    """Everything the page says about a run. Analyses that cannot be made are None, and `notes` say why.

    Args:
        report: the folder of the run's results, of this time and of earlier ones; the run's own report/ is looked into as well.
    """
    notes: list[str] = []
    found: dict[str, dict[str, Any] | None] = {}
    for verb, analyze, draw in (
        (
            "trajectory",
            lambda run: trajectory.analyze_trajectory(run, verify=False, keep=report / "grams.safetensors"),
            run_pictures.trajectory_picture,
        ),
        ("outliers", lambda run: outliers.analyze_outliers(run, OUTLIER_TOKENS, verify=False), run_pictures.outliers_picture),
        ("weights", lambda run: weights.analyze_weights(run, verify=False), run_pictures.weights_picture),
        ("step", lambda run: optimizer_step.analyze_step(run, verify=False), run_pictures.step_picture),
    ):
        found[verb] = _up_to_date(run, report / f"{verb}.json")
        if found[verb] is None:
            result = _up_to_date(run, own / f"{verb}.json") if (own := run.default_report()) != report else None
            if result is None:
                run.open(verify)  # damage stops the report; what follows only says that an analysis does not apply
                try:
                    result = analyze(run)
                except InputError as error:
                    notes.append(f"{verb}: {error}")
                    print(f"note: no {verb}: {error}", file=sys.stderr)
                    continue
            found[verb] = result
            write_json(report / f"{verb}.json", result)
            draw(result, report / f"{verb}.png")
    last = run.last(verify=False)
    configuration = last.path / "model_config.json"
    recipe = run.folder / "recipe.yaml" if run.folder else None
    return {
        "name": run.name,
        "path": str(run.path),
        "metrics": read_metrics(run),
        "unigram_loss": (run.read_json("data.json") or {}).get("validation_unigram_loss"),
        "environment": run.read_json("environment.json") or {},
        "model": read_json(configuration) if configuration.exists() else {},
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe and recipe.exists() else "",
        "data": _data_manifest(run),
        "manifest": last.manifest or {},
        "parameters": sum(shape.numel() for shape in last.shapes.values()),
        "checkpoint": {"step": last.step, "format": last.format, "ranks": last.world_size, "precision": last.precision},
        "trajectory": found["trajectory"],
        "outliers": found["outliers"],
        "weights": found["weights"],
        "step": found["step"],
        "notes": notes,
    }


def _up_to_date(run: Run, path: Path) -> dict[str, Any] | None:
    """The result in this file, unless there is none, a checkpoint came, went or changed since, or its settings are not the report's."""
    opened = run.open(verify=False)
    if not path.exists() or any(file.stat().st_mtime > path.stat().st_mtime for checkpoint in opened for file in checkpoint.files()):
        return None
    try:
        result = read_json(path)
    except InputError:
        return None
    steps = [checkpoint.step for checkpoint in opened]
    same = result["steps"] == steps if "steps" in result else result.get("step") == steps[-1] and not result.get("compared_with")
    if result.get("format") != 1 or not same:
        return None
    if _as_the_report_measures(run, opened[0], result):
        return result
    print(f"note: {path}: made under other settings than the report's, and so made again", file=sys.stderr)
    return None


def _as_the_report_measures(run: Run, first: Checkpoint, result: dict[str, Any]) -> bool:
    """Whether a verb's options were those that the report takes, where they change what it shows."""
    if result["verb"] == "trajectory":
        known = heads_of(first)  # where the files do not say, --heads says more than the report could
        return known is None or result.get("heads") == [known.heads, known.kv_heads]
    if result["verb"] != "outliers":
        return True
    if result.get("thresholds") != asdict(Thresholds()):
        return False
    try:
        sequences, origin = held_out_tokens(run, None, OUTLIER_TOKENS, result["sequence_length"])
    except InputError:  # the prepared text is gone, so there will be no better result
        return result["data"].startswith("validation split of ")
    return (result["data"], result["tokens"]) == (origin, sequences[:, 1:].numel())


def _data_manifest(run: Run) -> dict[str, Any]:
    prepared = (run.read_json("data.json") or {}).get("prepared")
    manifest = Path(prepared) / "manifest.json" if isinstance(prepared, str) else None
    return read_json(manifest) if manifest is not None and manifest.exists() else {}


def render(runs: list[dict[str, Any]], command: str) -> str:
    """The page. `runs` as `gather` returns them."""
    colours = [f"var(--run-{i % 6})" for i in range(len(runs))]
    title = " and ".join(run["name"] for run in runs) if len(runs) < 3 else f"{len(runs)} runs compared"
    parts = [
        f"<header><h1>{escape(title)}</h1>"
        '<p class="lead">What these training runs are, how well they learned, and what happened inside them, read from the checkpoints '
        "they left on disk. Point at a map or a curve for its values (or use the arrow keys); "
        "press a column's head to sort by it.</p></header>",
        _summary(runs),
        _losses(runs, colours),
        _outliers(runs, colours),
        _trajectories(runs, colours),
        _weights(runs, colours),
        _steps(runs, colours),
        _identities(runs, colours),
        _commands(runs, command),
    ]
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts.append(f"<footer>Written by Burnish, <code>python -m analysis report</code>, {stamp}. This page needs no network.</footer>")
    return page(title, "\n".join(parts))


def _summary(runs: list[dict[str, Any]]) -> str:
    columns = []
    for run in runs:
        network = run["trajectory"]["network"] if run["trajectory"] else {}
        peak, place, step = outliers.largest_kurtosis(run["outliers"]) if run["outliers"] else (None, "", 0)
        memory = _last(run, "peak_memory_bytes")
        tokens = run["manifest"].get("tokens") or _last(run, "tokens")
        rates = [record["tokens_per_second"] for record in run["metrics"] if "tokens_per_second" in record]
        where = f'<br><span class="note">{escape(place)}, step {step}</span>' if peak is not None else ""
        columns.append(
            [
                f"<b>{_number(_last(run, 'validation_loss'), 4)}</b>",
                _number(run["unigram_loss"], 4),
                f"<b>{_number(peak, 2)}</b>{where}",
                _number(network.get("omega"), 3),
                _number(network.get("omega_relative"), 3),
                _number(network.get("straightness"), 3),
                short(run["parameters"]),
                short(tokens) if tokens else "–",
                f"{statistics.median(rates):,.0f}" if rates else "–",
                f"{memory / 2**20:,.0f} MiB" if memory else "–",
            ]
        )
    walks = sorted({f"{run['trajectory']['null_values']['random_walk']['omega_relative']:.2f}" for run in runs if run["trajectory"]})
    labels = [
        ("Validation loss", "cross-entropy, nats a token, at the last evaluation; lower is better"),
        ("Unigram loss", "of a model that knows only how frequent each token is: a run must get below it"),
        (
            "Largest kurtosis",
            "over layers and checkpoints; 1 when all channels are used alike, large values are what breaks int8 inference",
        ),
        ("ω from the origin", "mean cosine between checkpoints; 1 when the weights never turned"),
        ("ω from the start", f"the same for displacements; a straight line gives 1, a random walk {' or '.join(walks) or '2/3'}"),
        ("Straightness", "distance covered over length of the path; a straight line gives 1"),
        ("Parameters", "tied weights counted once"),
        ("Training tokens", ""),
        ("Tokens a second", "median over the logged steps, all ranks together"),
        ("Peak memory", "of the first rank"),
    ]
    head = ["", *(run["name"] for run in runs), ""]
    rows = [[escape(label), *(column[i] for column in columns), escape(meaning)] for i, (label, meaning) in enumerate(labels)]
    return section(
        "In short",
        "",
        table(head, rows, text_columns=[len(head) - 1]),
        *(f'<p class="note">{escape(run["name"])}: no {escape(note)}</p>' for run in runs for note in run["notes"]),
    )


def _losses(runs: list[dict[str, Any]], colours: list[str]) -> str:
    lines = []
    for run, colour in zip(runs, colours, strict=True):
        lines.append(Line(run["name"], _curve(run, "loss"), colour, faint=True))
        lines.append(Line(run["name"], _curve(run, "validation_loss"), colour, dots=True))
    unigrams = sorted({run["unigram_loss"] for run in runs if run["unigram_loss"] is not None})
    level = (unigrams[0], "unigram model") if len(unigrams) == 1 else None
    chart = line_chart(lines, "Training and validation loss over tokens, all runs", "tokens", "nats a token", level=level)
    norms = [Line(run["name"], _curve(run, "grad_norm"), colour) for run, colour in zip(runs, colours, strict=True)]
    return section(
        "Learning",
        "A run has learned more than word frequencies once its validation loss is below the dashed line.",
        grid(
            panel("Loss", chart, caption="Thin: training, a batch each. Dots: validation, on text held out."),
            panel("Gradient norm", line_chart(norms, "Gradient norm over tokens, all runs", "tokens", "norm before clipping", log=True)),
        ),
    )


def _outliers(runs: list[dict[str, Any]], colours: list[str]) -> str:
    shown = [(run, run["outliers"], colour) for run, colour in zip(runs, colours, strict=True) if run["outliers"]]
    values = [m["kurtosis_minus_one"] for _, result, _ in shown for c in result["checkpoints"] for m in c["places"].values()]
    positive = [value for value in values if value is not None and value > 0]
    live = _live_outliers(runs, colours)
    if not positive:
        return section("Outliers while training", _LIVE, grid(*live)) if live else ""
    y_range = padded_range(positive, log=True)
    panels, rows = [], []
    for run, result, colour in shown:
        places = result["places"]
        lines = [
            Line(
                place,
                [(c["step"], c["places"][place]["kurtosis_minus_one"]) for c in result["checkpoints"]],
                "var(--soft)" if place == "unembedding" else layer_colour(i / max(1, len(places) - 2)),
                dots=True,
                dashed=place == "unembedding",
            )
            for i, place in enumerate(places)
        ]
        chart = line_chart(
            lines, f"Kurtosis minus one by layer over training, {run['name']}", "step", "kurtosis − 1", True, y_range=y_range
        )
        caption = f"{result['tokens']:,} tokens of held-out text; width {result['width']}, so kurtosis is at most {result['width']}."
        panels.append(panel(run["name"], chart, colour, caption))
        peak, place, step = outliers.largest_kurtosis(result)
        last = result["checkpoints"][-1]["places"]
        final = max(((m["kurtosis"], p) for p, m in last.items() if m["kurtosis"] is not None), default=None)  # None: it diverged
        ratio = max((m["max_median_ratio_max"] or 0.0) for m in last.values())
        rms = [m["activation_rms"] or 0.0 for m in last.values()]
        rows.append(
            [
                f'<span class="swatch" style="background:{colour}"></span>{escape(run["name"])}',
                "-" if peak is None else f"{peak:.2f} ({escape(place)}, step {step})",
                "-" if final is None else f"{final[0]:.2f} ({escape(final[1])})",
                f"{ratio:.1f}",
                f"{min(rms):.2g} to {max(rms):.2g}",
            ]
        )
    return section(
        "Outliers, layer by layer",
        "Each line is the residual stream entering attention of one layer, violet first to orange last; dashed, what enters the "
        "unembedding. Kurtosis − 1 is 0 when all channels carry the same power. All panels share one logarithmic scale. "
        "Definition: arXiv 2405.19279, equation 1.",
        grid(*panels),
        table(
            ["run", "largest kurtosis", "largest at the last step", "largest / median activation, last step", "activation RMS, last step"],
            rows,
            sortable=True,
        ),
        *([f"<p>{_LIVE}</p>", grid(*live)] if live else []),
    )


_LIVE = "While training, measured on the training tokens of the step itself, over all ranks; the worst of the layers:"


def _live_outliers(runs: list[dict[str, Any]], colours: list[str]) -> list[str]:
    """Panels of what metrics.jsonl says of the residual stream, more often than there are checkpoints; none where it says nothing."""
    panels = []
    for measure, title, log in (("kurtosis_minus_one", "Kurtosis − 1", True), ("input_correlation_rms", "Input correlation, RMS", False)):
        lines = []
        for run, colour in zip(runs, colours, strict=True):
            points = [
                (record["tokens"], max((m[measure] or 0.0) for place, m in record["activations"].items() if place != "unembedding"))
                for record in run["metrics"]
                if "activations" in record
            ]
            if points:
                lines.append(Line(run["name"], points, colour, dots=len(points) <= 40))
        if lines:
            chart = line_chart(lines, f"{title} of the worst layer over training tokens, all runs", "tokens", title.lower(), log=log)
            panels.append(panel(title, chart))
    return panels


def _trajectories(runs: list[dict[str, Any]], colours: list[str]) -> str:
    shown = [(run, run["trajectory"], colour) for run, colour in zip(runs, colours, strict=True) if run["trajectory"]]
    if not shown:
        return ""
    panels, angles, lengths, paths = [], [], [], []
    for run, result, colour in shown:
        network, steps = result["network"], result["steps"]
        maps = "".join(
            f"<div><h3>{heading}, ω = {_number(network[omega], 3)}</h3>"
            + heat_map(network[key], at, f"Cosines between checkpoints seen {heading}, {run['name']}", run_pictures.map_floor(network[key]))
            + "</div>"
            for heading, key, omega, at in (
                ("from the origin", "trajectory_map", "omega", steps),
                ("from the start", "relative_map", "omega_relative", steps[1:]),
            )
        )
        start = "its initial weights" if result["starts_at_initialisation"] else f"step {steps[0]}, not its initial weights"
        uneven = "" if result["evenly_spaced"] else " The checkpoints are not evenly spaced, which moves ω: compare equal steps only."
        caption = f"{len(steps)} checkpoints; the start is {start}. A random walk on these checkpoints has ω = "
        caption += (
            f"{result['null_values']['random_walk']['omega_relative']:.3f} from the start (2/3 with many), a straight line 1.{uneven}"
        )
        panels.append(panel(run["name"], f'<div class="maps">{maps}</div>', colour, caption))
        angles.append(Line(run["name"], list(zip(steps[1:-1], network["consecutive_update_angles"], strict=True)), colour, dots=True))
        lengths.append(Line(run["name"], list(zip(steps, network["displacement_norms"], strict=True)), colour, dots=True))
        if network["principal_components"]:
            shares, points = network["principal_components"]["shares"], network["principal_components"]["coordinates"]
            label = f"{run['name']} ({', '.join(f'{share:.0%}' for share in shares[:2])} of the variance)"
            paths.append(Line(label, [(point[0], [*point, 0.0][1]) for point in points], colour, dots=True))
    kinds = list(dict.fromkeys(kind for _, result, _ in shown for kind in result["kinds"]))
    rows = [
        [f'<span class="swatch" style="background:{colour}"></span>{escape(run["name"])}', _number(result["network"]["omega_relative"], 3)]
        + [_number(result["kinds"].get(kind, {}).get("omega_relative"), 3) for kind in kinds]
        for run, result, colour in shown
    ]
    return section(
        "The path through weight space",
        "Each cell is the cosine between two checkpoints taken as one long vector: bright means the same direction. Seen from the origin "
        "the map shows how far weights turned; seen from the start, whether training kept going one way. Computed from the float32 shards "
        "as they lie on disk. After arXiv 2403.07379.",
        grid(*panels),
        grid(
            panel(
                "Angle between consecutive updates",
                line_chart(angles, "Angle between consecutive updates over training", "step", "degrees", level=(90.0, "random walk: 90")),
                caption="0: straight on. 90: unrelated. Above 90: turning back.",
            ),
            panel("Distance from the start", line_chart(lengths, "Distance from the first checkpoint over training", "step", "|θ − θ₀|")),
            panel(
                "The path in the plane of its first two principal components",
                line_chart(paths, "Paths along their first two principal components", "first component", "second component"),
                caption="Each run in a plane of its own. A random walk draws a parabola too: its components are cosines.",
            ),
        ),
        "<h3>ω from the start, by kind of parameter</h3>",
        table(["run", "network", *kinds], rows, sortable=True),
        *(_tensor_table(run["name"], result) for run, result, _ in shown),
    )


def _tensor_table(name: str, result: dict[str, Any]) -> str:
    columns = [
        ("parameters", "parameters", 0),
        ("omega", "ω origin", 4),
        ("omega_relative", "ω start", 4),
        ("straightness", "straightness", 4),
        ("length", "length", 3),
        ("mean_consecutive_update_angle", "angle between updates, degrees", 1),
        ("participation_ratio", "participation ratio", 2),
    ]
    rows = [[escape(tensor), *(_number(found[key], digits) for key, _, digits in columns)] for tensor, found in result["tensors"].items()]
    return folded_html(f"{name}: each tensor's path", table(["tensor", *(label for _, label, _ in columns)], rows, sortable=True))


def _weights(runs: list[dict[str, Any]], colours: list[str]) -> str:
    shown = [(run, run["weights"], colour) for run, colour in zip(runs, colours, strict=True) if run["weights"]]
    if not shown:
        return ""
    panels, tables = [], []
    for run, result, colour in shown:
        matrices = {name: found for name, found in result["tensors"].items() if found.get("spectrum")}
        last = max([found["layer"] for found in matrices.values() if found["layer"] is not None], default=0)
        lines = [
            Line(
                name,
                list(enumerate(found["spectrum"], 1)),
                "var(--soft)" if found["layer"] is None else layer_colour(found["layer"] / max(1, last)),
                dashed=found["layer"] is None,
                unnamed=True,
            )
            for name, found in matrices.items()
        ]
        chart = line_chart(lines, f"Largest singular values of each matrix, {run['name']}", "number", "singular value", log=True)
        caption = f"Step {result['step']}. Violet: the first layer, orange: the last; dashed: embeddings."
        panels.append(panel(run["name"], chart, colour, caption))
        columns = [("norm", 3), ("spectral_norm", 3), ("stable_rank", 1), ("entropy_rank", 1), ("tail_exponent", 2)]
        rows = [
            [escape(name), " × ".join(map(str, found["shape"])), *(_number(found[key], digits) for key, digits in columns)]
            for name, found in matrices.items()
        ]
        head = ["matrix", "shape", "norm", "spectral norm", "stable rank", "entropy rank", "tail exponent"]
        tables.append(folded_html(f"{run['name']}: every matrix", table(head, rows, sortable=True)))
    return section(
        "Spectra of the weights",
        "The largest 32 singular values of each matrix at the last checkpoint. Stable and entropy rank say how many directions carry a "
        "matrix; a tail exponent below about 4 is a heavy tail.",
        grid(*panels),
        *tables,
    )


def _steps(runs: list[dict[str, Any]], colours: list[str]) -> str:
    rows = []
    for run, colour in zip(runs, colours, strict=True):
        for kind, found in run["step"]["kinds"].items() if run["step"] else []:
            rows.append(
                [
                    f'<span class="swatch" style="background:{colour}"></span>{escape(run["name"])}',
                    escape(kind),
                    _number(found["relative_update"], 6),
                    _number(found["angle_to_weights"], 1),
                    _number(found["angle_to_displacement"], 1),
                    f"{found['sign_like']:.1%}",
                    _number(found["curvature_percentiles"][2], 1),
                ]
            )
    if not rows:
        return ""
    head = ["run", "kind", "|u| / |θ|", "degrees to the weights", "to the displacement", "sign-like", "median of log₁₀ squared gradient"]
    return section(
        "The last step",
        "Rebuilt from Adam's moments in the last checkpoint. Sign-like: coordinates that move by the sign of their gradient.",
        table(head, rows, sortable=True),
    )


def _identities(runs: list[dict[str, Any]], colours: list[str]) -> str:
    panels = []
    for run, colour in zip(runs, colours, strict=True):
        model, environment, data, saved = run["model"], run["environment"], run["data"], run["checkpoint"]
        hardware = environment.get("hardware") or {}
        shape = (
            f"{model.get('block', '')}, width {model.get('width')}, depth {model.get('depth')}, {model.get('heads')} heads" if model else ""
        )
        machine = hardware.get("accelerator") or f"{hardware.get('cpu', 'CPU')}, {hardware.get('cpu_cores', '?')} cores"
        commit = str(environment.get("git_commit") or "")[:12] + (", with uncommitted changes" if environment.get("git_changed") else "")
        tokens = run["manifest"].get("tokens")
        training, documents = (data.get("train") or {}).get("tokens"), data.get("documents")
        text = str(data.get("source", ""))
        if isinstance(training, int) and isinstance(documents, int):
            text += f": {short(training)} training tokens of {documents:,} documents"
        panels.append(
            panel(
                run["name"],
                facts(
                    [
                        ("Model", shape),
                        ("Parameters", f"{run['parameters']:,}, tied weights once"),
                        ("Details", ", ".join(f"{key} {model[key]}" for key in _DETAILS if key in model)),
                        ("Data", text),
                        (
                            "Trained on",
                            f"{saved['step']:,} steps" + (f", {short(tokens)} tokens" if tokens else ""),
                        ),
                        ("Saved as", f"{saved['format']}, {saved['ranks']} ranks; weights read in {saved['precision']}"),
                        ("Hardware", machine if hardware else ""),
                        ("Software", ", ".join(f"{name} {number}" for name, number in (environment.get("packages") or {}).items())),
                        ("Commit", commit),
                        ("Folder", run["path"]),
                    ]
                )
                + (folded("The whole recipe", run["recipe"]) if run["recipe"] else ""),
                colour,
            )
        )
    return section("What each run is", "As its folder records it.", grid(*panels))


_DETAILS = ("norm", "positions", "activation", "tied_embeddings", "qk_norm", "vocab_size", "sequence_length")


def _commands(runs: list[dict[str, Any]], command: str) -> str:
    lines = [
        f"{re.sub(r' --local_rank=[0-9]+', '', str(run['environment']['command']))}   # on {run['environment'].get('world_size', 1)} ranks"
        for run in runs
        if run["environment"].get("command")
    ]
    definitions = {**trajectory.DEFINITIONS, **outliers.DEFINITIONS, **weights.DEFINITIONS, **optimizer_step.DEFINITIONS}
    return section(
        "How to get this again",
        "The commands that made these runs, as each rank saw its own, and this page. The numbers are in trajectory.json, outliers.json, "
        "weights.json and step.json of each run's report folder, or of a folder of its name beside this page.",
        f"<pre>{escape(chr(10).join([*lines, command]))}</pre>",
        folded("What every number means", "\n".join(f"{name}: {text}" for name, text in definitions.items())),
    )


def _curve(run: dict[str, Any], key: str) -> list[tuple[float, float | None]]:
    return [(record["tokens"], record[key]) for record in run["metrics"] if key in record and "tokens" in record]


def _last(run: dict[str, Any], key: str) -> float | None:
    return next((record[key] for record in reversed(run["metrics"]) if key in record), None)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
