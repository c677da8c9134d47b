"""The page stands alone, says what was measured, and is safe whatever a run folder holds; the command line's exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

import analysis.report
import analysis.run_pictures
from analysis.__main__ import main
from analysis.charts import Line, heat_map, line_chart, log_ticks, ticks
from analysis.fused import Heads
from analysis.outlier_neurons import Thresholds
from analysis.outliers import analyze_outliers
from analysis.output import write_json
from analysis.report import _up_to_date
from analysis.runs import find_run, read_metrics
from analysis.trajectory import analyze_trajectory
from model.errors import InputError

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def second_run(run_folder: Path, name: str) -> Path:
    other = run_folder.with_name(name)
    shutil.copytree(run_folder, other)
    return other


def test_report_compares_runs_and_needs_no_network(run_folder, capsys):
    other = second_run(run_folder, "other")
    assert main(["report", str(run_folder), str(other)]) == 0
    report = run_folder.parent / "report.html"
    assert capsys.readouterr().out.splitlines()[0] == str(report)
    assert (run_folder.parent / "overview.png").read_bytes().startswith(b"\x89PNG")
    for run in (run_folder, other):
        written = {"trajectory.json", "trajectory.png", "grams.safetensors", "outliers.json", "outliers.png", "weights.json", "weights.png"}
        assert {p.name for p in (run / "report").iterdir()} == written
    html = report.read_text()
    page = Page(html)
    assert not {"iframe", "img", "object", "embed"} & set(page.tags)
    assert page.tags.count("script") == 1
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value == "data:,", (tag, name, value)
    assert not re.search(r"url\(|@import|https?://", html.replace("http://www.w3.org/2000/svg", ""))
    assert "default-src 'none'" in html
    charts = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(charts) == page.tags.count("svg") == 2 + 2 + 4 + 3 + 2  # loss, norm; outliers; maps; angles, distance, path; spectra
    assert all(charts)
    for expected in ("toy and other", "3.5000", "4.1000", "python train.py recipes/toy.yaml", "0123456789ab", "python -m analysis report"):
        assert expected in page.text, expected


def test_hostile_text_is_escaped(run_folder):
    hostile = "<img src=x onerror=alert(1)>\"'&"
    run = run_folder.with_name(hostile.replace("/", ""))
    os.rename(run_folder, run)
    (run / "environment.json").write_text(
        json.dumps({"command": hostile, "git_commit": hostile, "packages": {hostile: hostile}, "hardware": {"cpu": hostile}})
    )
    (run / "recipe.yaml").write_text(f"# </pre></details><script>alert(1)</script> {hostile}")
    assert main(["report", str(run), "--out", str(run.parent / "page.html")]) == 0
    html = (run.parent / "page.html").read_text()
    page = Page(html)
    assert "img" not in page.tags
    assert page.tags.count("script") == 1  # the page's own, which its policy names by hash: test_page.py
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert hostile in page.text


def test_report_analyses_again_only_when_checkpoints_changed(run_folder):
    assert main(["report", str(run_folder)]) == 0
    report = run_folder / "report"
    assert (report / "report.html").exists()
    marked = json.loads((report / "trajectory.json").read_text()) | {"run": "kept"}
    (report / "trajectory.json").write_text(json.dumps(marked))
    assert main(["report", str(run_folder)]) == 0
    assert json.loads((report / "trajectory.json").read_text())["run"] == "kept"
    elsewhere = run_folder.parent / "elsewhere"  # what the run has already is not measured a second time
    assert main(["report", str(run_folder), "--out", str(elsewhere)]) == 0
    assert json.loads((elsewhere / run_folder.name / "trajectory.json").read_text())["run"] == "kept"
    shutil.rmtree(run_folder / "checkpoints" / "step-00000020")
    assert main(["report", str(run_folder)]) == 0
    assert json.loads((report / "trajectory.json").read_text())["steps"] == [0, 10]
    assert json.loads((report / "outliers.json").read_text())["steps"] == [0, 10]


def test_report_takes_no_result_of_other_settings(run_folder, monkeypatch, capsys):
    """What `outliers` left in the report's folder counts only where it is what the report would measure."""
    text = run_folder / "small.txt"
    text.write_text("some text of another kind " * 40)
    monkeypatch.setattr("analysis.tokens.encoder", lambda source: lambda words: [ord(letter) % 64 for letter in words])
    run, path = find_run(run_folder), run_folder / "report" / "outliers.json"

    def taken(**options: Any) -> bool:
        write_json(path, analyze_outliers(run, progress=False, **options))
        return _up_to_date(run, path) is not None

    assert taken()
    assert capsys.readouterr().err == ""
    assert taken(tokens=10**6)  # of which there are not so many: it is the same
    assert not taken(tokens=64)
    assert not taken(data=[str(text)])
    assert not taken(thresholds=Thresholds(feature_magnitude=3.0))
    assert capsys.readouterr().err.count("made under other settings") == 3
    assert taken()
    # where the prepared text is gone, what was measured on it stays
    shutil.rmtree(run_folder.parents[1] / "prepared")
    assert _up_to_date(run, path) is not None
    assert not taken(data=[str(text)])


def test_report_takes_no_trajectory_of_other_heads(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    for step in (1, 2):
        GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_attention_heads=4)).save_pretrained(tmp_path / f"step{step}")
    run, path = find_run(tmp_path), tmp_path / "report" / "trajectory.json"
    for heads, taken in ((None, True), (Heads(4, 4), True), (Heads(8, 8), False)):
        write_json(path, analyze_trajectory(run, progress=False, heads=heads))
        assert (_up_to_date(run, path) is not None) == taken
    for step in (1, 2):
        (tmp_path / f"step{step}" / "config.json").unlink()
    assert _up_to_date(run, path) is not None  # nothing says that they are others


def test_report_says_what_it_could_not_do(run_folder):
    for step in ("00000010", "00000020"):
        shutil.rmtree(run_folder / "checkpoints" / f"step-{step}")
    (run_folder / "data.json").unlink()
    (run_folder / "metrics.jsonl").unlink()
    assert main(["report", str(run_folder)]) == 0
    text = Page((run_folder / "report" / "report.html").read_text()).text
    assert "no trajectory: " in text
    assert "at least two checkpoints" in text
    assert "no outliers: " in text


def test_report_on_checkpoints_of_another_trainer(deepspeed_checkpoints, tmp_path):
    """A DeepSpeed save folder knows neither model nor data: the page says what it can."""
    run = tmp_path / "foreign"
    shutil.copytree(deepspeed_checkpoints / "3" / "stage3-bf16", run)
    assert main(["report", str(run)]) == 0
    text = Page((run / "report" / "report.html").read_text()).text
    assert "no outliers: " in text
    assert "ZeRO 3, 3 ranks; weights read in fp32" in text
    assert "2 checkpoints; the start is step 1, not its initial weights" in text


def test_verbs_write_where_they_are_told(run_folder, capsys):
    other = second_run(run_folder, "other")
    out = run_folder.parent / "out"
    assert main(["trajectory", str(run_folder), str(other), "--out", str(out)]) == 0
    assert main(["outliers", str(run_folder / "checkpoints" / "step-00000010")]) == 0
    written = ("trajectory.json", "trajectory.png", "grams.safetensors")
    assert {str(p.relative_to(out)) for p in out.rglob("*.*")} == {f"{run}/{file}" for run in ("toy", "other") for file in written}
    assert json.loads((run_folder / "report" / "step-00000010" / "outliers.json").read_text())["steps"] == [10]
    assert "random walk" in capsys.readouterr().out


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "analysis", *arguments], cwd=ROOT, capture_output=True, text=True)


def damage_shard(run: Path) -> None:
    path = run / "checkpoints" / "step-00000010" / "mp_rank_00_model_states.pt"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("verb", ["trajectory", "outliers", "report"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such file or folder"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint here"),
        (lambda run: [shutil.rmtree(p) for p in (run / "checkpoints").glob("step-*")], "this run has no checkpoint yet"),
        (damage_shard, "mp_rank_00_model_states.pt: altered since it was saved"),
    ],
    ids=["no-such-path", "not-a-run", "no-checkpoint", "damaged"],
)
def test_bad_input_is_one_line_and_leaves_nothing(run_folder, verb, spoil, message, capsys):
    spoil(run_folder)
    out = run_folder.parent / "out"
    assert main([verb, str(run_folder), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert captured.out == ""
    assert not out.exists()


def test_exit_code_and_no_traceback_from_the_command_line(tmp_path):
    done = run_command("trajectory", str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert run_command("trajectories", "x").returncode == 2
    help_text = run_command("--help").stdout
    assert all(verb in help_text for verb in ("trajectory", "outliers", "report"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trajectory", "RUN", "--memory-megabytes", "nan"], "argument --memory-megabytes: nan: expected a finite number"),
        (["trajectory", "RUN", "--memory-megabytes", "inf"], "argument --memory-megabytes: inf: expected a finite number"),
        (["trajectory", "RUN", "--memory-megabytes", "-1"], "argument --memory-megabytes: -1: expected a number above 0"),
        (["outliers", "RUN", "--feature-magnitude", "nan"], "argument --feature-magnitude: nan: expected a finite number"),
        (["export", "RUN", "--shard-gigabytes", "x"], "argument --shard-gigabytes: x: expected a finite number"),
        (["covariance", "--slopes", "nan", "1"], "argument --slopes: nan: expected a finite number"),
    ],
)
def test_numbers_that_are_none(run_folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(run_folder) if word == "RUN" else word for word in arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


@pytest.mark.parametrize("verb", ["trajectory", "outliers", "inspect", "signal", "context"])
def test_a_path_that_is_too_long_is_bad_input(tmp_path, capsys, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    assert main([verb, "x" * 300]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "File name too long" in line


def test_an_unwritable_folder_is_bad_input(run_folder, capsys):
    (run_folder / "report").write_text("a file where a folder should be")
    assert main(["trajectory", str(run_folder)]) == 2
    err = capsys.readouterr().err
    assert "cannot be written" in err and err.endswith("; give --out a place that can be\n")


VERBS = ("trajectory", "outliers", "quantization", "curvature", "report", "step", "weights", "signal", "context", "covariance")


@pytest.mark.parametrize("verb", VERBS)
def test_an_unwritable_folder_is_named_before_the_work(run_folder, monkeypatch, capsys, verb):
    for name in ("runs.open_checkpoint", "shards.open_checkpoint", "covariance.analyze_covariance", "signal.analyze_signal"):
        monkeypatch.setattr(f"analysis.{name}", lambda *_: pytest.fail("too early"))
    taken = run_folder.parent / "taken"
    taken.touch()
    for out in (taken, taken / "below"):
        assert main([verb, *[str(run_folder)] * (verb != "covariance"), "--out", str(out)]) == 2
        assert f"{out}: cannot be written" in capsys.readouterr().err


def test_what_was_measured_is_said_though_the_disk_fills_up(run_folder, monkeypatch, capsys):
    def fail(path: Path, value: object) -> None:
        raise InputError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr("analysis.output.write_json", fail)
    assert main(["weights", str(run_folder)]) == 2
    assert capsys.readouterr().out.startswith("toy: step 20, |theta|")


def test_report_elsewhere_leaves_the_run_as_it_is(run_folder, capsys, monkeypatch):
    """What the user measured under his own settings stays, and a run on a disk that takes nothing can be reported."""
    other, out = second_run(run_folder, "other"), run_folder.parent / "out"
    (run_folder / "report").mkdir()
    (run_folder / "report" / "outliers.json").write_text(json.dumps({"format": 1, "verb": "outliers", "steps": [0, 10, 20]}))
    before = {path: path.read_bytes() for run in (run_folder, other) for path in run.rglob("*") if path.is_file()}
    assert main(["report", str(run_folder), str(other), "--out", str(out)]) == 0
    assert {path: path.read_bytes() for run in (run_folder, other) for path in run.rglob("*") if path.is_file()} == before
    assert {path.name for path in out.iterdir()} == {"report.html", "overview.png", "toy", "other"}
    assert {"trajectory.json", "outliers.json", "outliers.png"} <= {path.name for path in (out / "toy").iterdir()}
    marked = json.loads((out / "toy" / "trajectory.json").read_text()) | {"run": "kept"}
    (out / "toy" / "trajectory.json").write_text(json.dumps(marked))
    assert main(["report", str(run_folder), "--out", str(out / "page.html")]) == 0
    assert json.loads((out / "toy" / "trajectory.json").read_text())["run"] == "kept"
    # a run where nothing can be written: beside the page, which for several is in the folder that holds them
    (run_folder / "tensorboard").mkdir()
    check = analysis.report.check_writable

    def locked(folder: Path) -> None:
        if run_folder in (folder, *folder.parents):
            raise InputError(f"{folder}: cannot be written: Read-only file system")
        check(folder)

    monkeypatch.setattr("analysis.report.check_writable", locked)
    capsys.readouterr()
    assert main(["report", str(run_folder), str(other)]) == 0
    assert f"note: {run_folder / 'tensorboard'}: cannot be written" in capsys.readouterr().err
    assert (run_folder / "report" / "outliers.json").read_bytes() in before.values()
    assert (run_folder.parent / "toy-report" / "outliers.json").exists() and (other / "report" / "outliers.json").exists()


def test_report_of_runs_that_lie_apart_goes_into_the_current_folder(run_folder, monkeypatch):
    apart = run_folder.parents[1] / "elsewhere" / "deep"
    shutil.copytree(run_folder, apart)
    here = run_folder.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(["report", str(run_folder), str(apart)]) == 0
    assert {path.name for path in here.iterdir()} == {"report.html", "overview.png"}


@pytest.mark.parametrize("place", ["", "checkpoints/step-00000010", "checkpoints"])
def test_a_folder_that_may_not_be_read_is_one_line(run_folder, place):
    """As a user without root's rights."""
    locked = run_folder / place
    locked.chmod(0)
    try:
        python = "import sys; from analysis.__main__ import main; sys.exit(main(sys.argv[1:]))"
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", python]
        for verb in ("inspect", "trajectory"):
            done = subprocess.run([*command, verb, str(run_folder)], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 2, done.stderr
            assert "Traceback" not in done.stderr
            assert "Permission denied" in done.stdout + done.stderr
            if verb == "inspect" and "step" in place:
                assert done.stdout.count("sound") == 2  # the others are looked at all the same
                assert f"DAMAGED: {locked}" in done.stdout
    finally:
        locked.chmod(0o755)


def test_inspect_lists_a_folder_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    """Of checkpoints that another trainer named."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"x": torch.randn(3, 2)}, tmp_path / name / "model.safetensors")
    exists = Path.exists

    def locked(path: Path, **options: Any) -> bool:
        if path.parent == tmp_path / "a":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", locked)
    assert main(["inspect", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "Permission denied" in out and out.count("sound") == 1


@pytest.fixture
def figures(monkeypatch) -> dict[str, Figure]:
    """The pictures that are drawn, by their files' names."""
    drawn: dict[str, Figure] = {}
    save = analysis.run_pictures.save_figure

    def keep(figure: Figure, path: Path) -> Path:
        drawn[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr("analysis.run_pictures.save_figure", keep)
    return drawn


def sayings(figure: Figure) -> list[str]:
    """What stands in the panels, title first."""
    return [f"{axis.get_title(loc='left')}: {' '.join(text.get_text().split())}" for axis in figure.axes for text in axis.texts]


@pytest.mark.filterwarnings("error:No artists with labels")
def test_an_empty_panel_says_why_it_is_empty(run_folder, figures, tmp_path, capsys):
    (run_folder / "data.json").unlink()
    (run_folder / "metrics.jsonl").unlink()
    assert main(["report", str(run_folder)]) == 0
    kurtosis, *_ = [text for text in sayings(figures["overview.png"]) if text.startswith("Kurtosis")]
    assert "no outliers: " in kurtosis and "no data.json beside the checkpoints" in kurtosis
    assert "Loss, nats a token: no metrics.jsonl that says a loss" in sayings(figures["overview.png"])
    (tail,) = sayings(figures["weights.png"])
    assert tail.startswith("Tail exponent by layer: none: ") and "at least 10" in tail
    assert main(["report", str(run_folder / "checkpoints" / "step-00000010")]) == 0
    assert "Path from the start: no trajectory: " in "".join(sayings(figures["overview.png"]))
    save_file({"a": torch.randn(7)}, tmp_path / "vector.safetensors")
    assert main(["weights", str(tmp_path / "vector.safetensors")]) == 0
    assert [text.partition(": ")[2] for text in sayings(figures["weights.png"])] == ["no matrices"] + ["no matrices in layers"] * 2
    for step in (1, 2):
        save_file({"a": torch.ones(7)}, tmp_path / f"step{step}.safetensors")
    shutil.rmtree(run_folder.parent)
    (tmp_path / "vector.safetensors").unlink()
    assert main(["trajectory", str(tmp_path)]) == 0
    assert [text.partition(": ")[2] for text in sayings(figures["trajectory.png"])] == ["the weights did not move"] * 2


def test_labels_lie_within_the_picture(run_folder, figures):
    assert main(["trajectory", str(run_folder)]) == 0
    figure = figures["trajectory.png"]
    figure.canvas.draw()
    for axis in figure.axes:
        box = axis.xaxis.label.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, axis.get_xlabel()


def test_an_interruption_is_one_word(run_folder, monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("analysis.weights.analyze_weights", interrupt)
    assert main(["weights", str(run_folder)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_metrics_of_a_resumed_run(run_folder):
    path = run_folder / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 2, "loss": 3}\n{"step": 2, "validation_loss": 2}\n{"step": 3, "lo'
    )
    assert read_metrics(find_run(run_folder)) == [{"step": 1, "loss": 5}, {"step": 2, "loss": 3, "validation_loss": 2}]


def test_axes_have_round_ticks():
    assert ticks(0.1, 10) == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert ticks(-1, 1) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert log_ticks(0.03, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    assert log_ticks(1e-3, 1e3) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10, 100, 1000])


def test_charts_leave_gaps_and_thin_large_maps():
    chart = line_chart([Line("a", [(0, 1.0), (1, None), (2, 2.0), (3, 3.0)], "red")], "alt", "x", "y")
    assert chart.count("<polyline") == 2
    assert "nothing to draw" in line_chart([Line("a", [(0, -1.0)], "red")], "alt", "x", "y", log=True)
    count = 100
    values: list[list[float | None]] = [[1.0] * count for _ in range(count)]
    drawn = heat_map(values, list(range(count)), "alt", 0.0)
    shown = json.loads(unescape(re.search('data-map="([^"]*)"', drawn)[1]))
    assert drawn.count("<rect") == 48 * 48 + 64  # and the colour bar
    assert len(shown["values"]) == len(shown["steps"]) == 48
    assert shown["steps"][0] == 0 and shown["steps"][-1] == count - 1


def test_report_shows_what_training_measured(run_folder):
    """Kurtosis and input correlation of metrics.jsonl, the worst layer at each measured step, the unembedding left out."""
    places = {"layer 0": {"kurtosis_minus_one": 2.0, "input_correlation_rms": 0.25}, "layer 1": {"kurtosis_minus_one": 17.25}}
    places["layer 1"]["input_correlation_rms"] = None
    places["unembedding"] = {"kurtosis_minus_one": 99.5, "input_correlation_rms": 0.875}
    with open(run_folder / "metrics.jsonl", "a") as file:
        for step in (0, 20):
            file.write(json.dumps({"step": step, "tokens": 100 * step, "largest_kurtosis": 18.25, "activations": places}) + "\n")
    run = find_run(run_folder)
    (record,) = [r for r in read_metrics(run) if r["step"] == 20]
    assert record["activations"] == places and record["largest_kurtosis"] == 18.25
    assert main(["report", str(run_folder)]) == 0
    page = Page((run_folder / "report" / "report.html").read_text())
    charts = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert sum("over training tokens" in chart for chart in charts) == 2
    series = [json.loads(value) for _, name, value in page.attributes if name == "data-series"]
    drawn = {point[3] for chart in series for line in chart for point in line["points"]}
    assert {17.25, 0.25} <= drawn and not {2.0, 99.5, 0.875} & drawn


def test_tensorboard_has_recipe_figures_and_pictures(run_folder):
    """Read back by TensorBoard itself; a second report leaves one event file, not two."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    (run_folder / "tensorboard").mkdir()
    (run_folder / "recipe.yaml").write_text("model: {size: nano}\noptimizer: {learning_rate: 1.0e-3, betas: [0.9, 0.95]}\n")
    for _ in range(2):
        assert main(["report", str(run_folder)]) == 0
    folder = run_folder / "tensorboard" / "report"
    assert len(list(folder.iterdir())) == 1
    events = EventAccumulator(str(folder)).Reload()
    trajectory = json.loads((run_folder / "report" / "trajectory.json").read_text())["network"]
    (loss,) = events.Scalars("report/validation_loss")
    (omega,) = events.Scalars("report/omega_from_the_start")
    assert (loss.step, loss.value) == (20, 3.5)
    assert omega.value == pytest.approx(trajectory["omega_relative"], rel=1e-6)
    assert set(events.Tags()["images"]) == {"report/trajectory", "report/outliers", "report/weights"}
    (image,) = events.Images("report/trajectory")
    assert image.encoded_image_string.startswith(b"\x89PNG") and image.width > 1000
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["model.size"].string_value == "nano" and settings["optimizer.learning_rate"].number_value == 1e-3
    assert settings["optimizer.betas"].string_value == "[0.9, 0.95]"
