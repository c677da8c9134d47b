"""`python -m analysis context` on tiny random networks, against decoding token by token with the cache that shrinks."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import tests.analysis.tiny_pruned as tiny
from analysis.__main__ import main
from analysis.cache_policies import POLICIES, mean_live, window
from analysis.context_options import METHODS, Options
from analysis.lifetimes import CLASSES, Reads, summarise, token_classes
from analysis.needle import DEPTHS, make_needles, score_needles
from analysis.pruned import open_subject
from analysis.runs import find_run
from analysis.tokens import run_tokenizer, tokenizer_of_transformers
from model.cache import Cache
from model.config import PruningConfig
from model.context_pruning import Decided, observing, settings_of
from model.pruned_cache import PrunedLayer
from model.pruning_hooks import attach
from model.transformer import Transformer

LENGTH, CALIBRATING = 96, 4  # as many texts calibrate as are measured
WORDS = "The quick_brown fox42 jumps(over, the lazy dog)... and\n    then: 1,234 more; self.cache = None # why?\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """base/: a pretrained Llama; llama/, own/: pruned runs; tuned/: a run without pruning; text.txt, more.txt."""
    folder = tmp_path_factory.mktemp("context")
    tiny.write_llama(folder / "base")
    tiny.write_llama_run(folder / "llama", folder / "base")
    tiny.write_llama_run(folder / "tuned", folder / "base", pruned=False, lora=False)
    tiny.write_own_run(folder / "own")
    (folder / "text.txt").write_text(WORDS * 12)
    (folder / "more.txt").write_text("Another text, of other words: " + WORDS[::-1] * 12)
    return folder


def context(place: Path, out: Path, *arguments: str) -> dict[str, Any]:
    data = ["--data", str(place / "text.txt"), str(place / "more.txt"), "--length", str(LENGTH), "--tokens", str(4 * LENGTH)]
    assert main(["context", *arguments, *data, "--out", str(out)]) == 0
    return json.loads((out / "context.json").read_text())


def texts(place: Path, tokenizer: Any) -> list[list[int]]:
    """The windows in turn of each file, each a token longer than `LENGTH`."""
    found: list[list[list[int]]] = []
    for name in ("text.txt", "more.txt"):
        tokens = tokenizer.encode((place / name).read_text())
        found.append([tokens[i : i + LENGTH + 1] for i in range(0, len(tokens) - LENGTH, LENGTH)])
    return [windows[i] for i in range(max(map(len, found))) for windows in found if i < len(windows)]


@torch.no_grad()
def by_decoding(network: Any, rows: list[list[int]]) -> tuple[float, float]:
    """(mean loss, mean live entries), a token at a time with the cache that drops."""
    nll, live = [], []
    for row in rows:
        ours = isinstance(network, Transformer)
        cache: Any = Cache(PrunedLayer) if ours else DynamicCache(config=network.config)
        for now, following in pairwise(row):
            tokens = torch.tensor([[now]])
            logits = network(tokens, cache=cache) if ours else network(tokens, past_key_values=cache, use_cache=True).logits
            nll.append(-float(logits[0, -1].log_softmax(-1)[following]))
            layers = [cache.layer(i) for i in range(2)] if ours else cache.layers
            live.append(sum(int(layer.live()) for layer in layers) / 2)
    return sum(nll) / len(nll), sum(live) / len(live)


@pytest.mark.parametrize("run", ["llama", "own"])
def test_its_numbers_are_those_of_decoding_with_the_cache_that_shrinks(place, tmp_path, run, capsys):
    result = context(place, tmp_path, str(place / run), "--budgets", "0.4", "0.25", "--needle", "1")
    (entry,) = result["checkpoints"]
    subject = open_subject(str(place / run))
    rows = texts(place, run_tokenizer(find_run(place / run)))
    assert len(rows) > 12 and f"the first {CALIBRATING} windows" in entry["calibration_data"]
    measured = rows[CALIBRATING : CALIBRATING + 4]
    assert entry["tokens"] == 4 * LENGTH
    whole = (LENGTH + 1) / 2
    overhead = 4 / (2 * (8 + 8))  # rank over what two key-value heads of 8 and 8 hold
    assert entry["interaction_overhead"] == pytest.approx(overhead)
    pruning = [values for values in entry["points"] if values["method"] == "pruning"]
    assert [values["budget"] for values in pruning] == [None, 0.4, 0.25]
    for values in pruning:
        subject.settings.threshold = values["threshold"]
        loss, live = by_decoding(subject.network, measured)
        assert values["loss"] == pytest.approx(loss, abs=1e-5)
        assert values["live"] == pytest.approx(live)
        assert values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert values["share"] == pytest.approx(live * (1 + overhead) / whole)
        for other in entry["points"]:
            if other["point"] == values["point"] and other["method"] != "pruning":
                assert other["live"] == pytest.approx(mean_live(other["size"], LENGTH))
                assert values["entries"] <= other["live"] < values["entries"] + 1
    own = pruning[0]
    assert own["threshold"] == tiny.THRESHOLD and own["live"] < 0.8 * whole
    for values in pruning[1:]:  # on the calibration text it is the budget
        subject.settings.threshold = values["threshold"]
        _, live = by_decoding(subject.network, rows[:CALIBRATING])
        if values["reached"]:
            assert live * (1 + overhead) / whole == pytest.approx(values["budget"], rel=0.051)
    assert any(values["reached"] for values in pruning[1:])
    with subject.dense(), torch.no_grad():
        tokens = torch.tensor(measured)
        logits = subject.logits(tokens[:, :-1])
        dense = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    assert entry["dense"]["loss"] == pytest.approx(dense, abs=1e-5)
    assert own["ratio"] == pytest.approx(own["perplexity"] / entry["dense"]["perplexity"])
    assert {values["method"] for values in entry["points"]} == set(METHODS) == {"pruning", *POLICIES}
    if run == "llama":  # LoRA off is the pretrained model
        plain = open_subject(str(place / "base"))
        with plain.dense(), torch.no_grad():
            before = torch.nn.functional.cross_entropy(plain.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        assert entry["without_adapters"]["loss"] == pytest.approx(float(before), abs=1e-5)
        assert abs(entry["without_adapters"]["loss"] - dense) > 1e-3
    else:
        assert entry["without_adapters"] is None
    said = capsys.readouterr().out
    assert "sinks_window" in said
    assert {path.name for path in tmp_path.iterdir()} == {"context.json", "context.png", "lifetimes.png", "lifetimes.html"}


def test_checkpoints_side_by_side_are_compared_at_the_entries_of_the_one_that_prunes(place, tmp_path):
    names = [str(place / name) for name in ("tuned", "llama", "base")]
    result = context(place, tmp_path, *names, "--budgets", "0.3", "--methods", "tova", "pruning", "window")
    tuned, llama, base = result["checkpoints"]
    assert [entry["name"] for entry in result["checkpoints"]] == ["tuned", "llama", "base"]
    assert [entry["prunes"] for entry in result["checkpoints"]] == [False, True, False]
    for entry in (tuned, base):
        assert [(v["method"], v["point"], v["size"]) for v in entry["points"]] == [
            (v["method"], v["point"], v["size"]) for v in llama["points"] if v["method"] != "pruning"
        ]
        assert {v["method"] for v in entry["points"]} == {"tova", "window"}
    assert base["dense"]["loss"] == pytest.approx(llama["without_adapters"]["loss"], abs=1e-5)
    # alone, with nothing that prunes, the budgets themselves are the entries
    (alone,) = context(place, tmp_path, names[2], "--budgets", "0.5", "1", "--methods", "h2o")["checkpoints"]
    whole = (LENGTH + 1) / 2
    half, all_of_it = alone["points"]
    assert whole / 2 <= half["live"] < whole / 2 + 1
    assert all_of_it["live"] == pytest.approx(whole)
    assert all_of_it["loss"] == pytest.approx(alone["dense"]["loss"], abs=1e-6)
    assert half["loss"] != pytest.approx(alone["dense"]["loss"], abs=1e-4)


@pytest.mark.parametrize("threshold", [-50.0, 50.0])
def test_a_network_that_decides_nothing_is_measured_as_one_without_pruning(threshold, place, tmp_path):
    """It keeps everything, or its sinks and window alone."""
    tiny.write_llama_run(tmp_path / "fixed", place / "base", seed=4)
    description = tmp_path / "fixed" / "checkpoints" / "step-00000005" / "context_pruning.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), "threshold": threshold}))
    names = [str(tmp_path / "fixed"), str(place / "llama")]
    fixed, llama = context(place, tmp_path / "out", *names, "--budgets", "--methods", "pruning", "window")["checkpoints"]
    assert not fixed["prunes"] and llama["prunes"] and "lifetimes" not in fixed
    assert [v["size"] for v in fixed["points"]] == [v["size"] for v in llama["points"] if v["method"] == "window"]


def test_the_window_is_that_of_mistral():
    """transformers' own sliding-window attention, as another implementation."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(**shape, vocab_size=64, sliding_window=5)).eval()
    tiny.randomize(windowed, "proj", 1, 0.3)
    whole = MistralForCausalLM(MistralConfig(**shape, vocab_size=64, sliding_window=None)).eval()
    whole.load_state_dict(windowed.state_dict())
    attach(whole, PruningConfig(rank=1)).policy = window(5)
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = whole(tokens, use_cache=False).logits
        torch.testing.assert_close(found, windowed(tokens, use_cache=False).logits, rtol=0, atol=1e-5)
        settings_of(whole).policy = None
        assert (whole(tokens, use_cache=False).logits - found).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------------------ needles


def test_needles_tell_the_code_once_and_ask_at_the_end(place):
    tokenizer = run_tokenizer(find_run(place / "own"))
    fillers = torch.tensor([tokenizer.encode("x" * 201), tokenizer.encode("y" * 201)])
    needles = make_needles(tokenizer, fillers, 3)
    assert needles.tokens.shape == (3 * len(DEPTHS), 201) and needles.answer == 7
    codes = set()
    for row, depth in zip(needles.tokens, needles.depths, strict=True):
        text = "".join(tokenizer.pieces(row.tolist()))
        code = text[-7:]
        assert code[0] == " " and code[1:].isdigit()
        assert text.count(code) == 2 and text.endswith("\nThe secret code is" + code)
        filler = text.replace("\nThe secret code is" + code, "").replace(". Remember it.\n", "")
        assert set(filler) in ({"x"}, {"y"})
        assert text.index("\nThe") == round(depth * len(filler))
        codes.add(code)
    assert len(codes) == 3 * len(DEPTHS)
    nll = torch.rand(15, 200)
    correct = torch.ones(15, 200, dtype=torch.bool)
    correct[0, -1] = correct[4, -7] = correct[7, -8] = False  # the last is before the code
    scores = score_needles(needles, nll, correct)
    assert scores["exact"] == pytest.approx(13 / 15)
    assert [found["exact"] for found in scores["by_depth"]] == pytest.approx([2 / 3, 2 / 3, 1, 1, 1])
    assert scores["log_probability"] == pytest.approx(-float(nll[:, -7:].mean()))


# ---------------------------------------------------------------------------------------------------------------- lifetimes


def test_who_dropped_whom_is_what_the_layers_decided(place):
    """Reads against the decisions themselves, of a text long enough to be decided on in several pieces."""
    subject = open_subject(str(place / "llama"))
    network: Any = subject.network
    tokens = torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(0))
    import model.context_pruning as mechanism

    rows, mechanism.ROWS = mechanism.ROWS, 64
    seen: list[Decided] = []
    reads = Reads(150)
    try:
        with torch.no_grad(), observing(network, reads), observing(network, seen.append):
            network(tokens, use_cache=False)
    finally:
        mechanism.ROWS = rows
    counts = reads.counts()
    assert counts.shape == (2, 2, 150) and len(seen) == 2 * 3
    dropped = 0
    for number, layer in enumerate(subject.settings.layers):
        first: dict[tuple[int, int], int] = {}
        place_of_row = 0
        for decided in [d for d in seen if d.layer == layer]:
            for row in range(decided.log_keep.shape[1]):
                for b, j in (decided.log_keep[:, row] == -torch.inf).nonzero().tolist():
                    if j < place_of_row:
                        first.setdefault((b, j), place_of_row)
                place_of_row += 1
        for b in range(2):
            for j in range(150):
                assert int(counts[number, b, j]) == first.get((b, j), 150) - j
        dropped += len(first)
    assert dropped > 100


def test_lifetimes_by_class_layer_and_position():
    length, horizon = 10, 5
    reads = torch.tensor([[[10, 3, 8, 1, 5, 2, 4, 3, 2, 1]], [[10, 9, 8, 7, 6, 5, 4, 3, 2, 1]]])
    classes = [["word", "number", "word", "number", "punctuation"] + ["whitespace"] * 5]
    found = summarise(reads, classes, [0, 7])
    assert found["horizon"] == horizon
    assert found["tokens"] == {**dict.fromkeys(CLASSES, 0), "word": 2, "number": 2, "punctuation": 1}
    first, second = found["layers"]
    assert (first["layer"], second["layer"]) == (0, 7)
    # of tokens 0 to 4, tokens 1, 3 and 4 were read by 3, 1 and 5 queries: token 4 is dropped by the last, the fifth after it
    assert first["dropped_share"] == pytest.approx(3 / 5) and first["median_lifetime"] == 4.0
    assert first["classes"]["number"] == {"dropped_share": 1.0, "median_lifetime": 0.0}
    assert first["classes"]["word"] == {"dropped_share": 0.0, "median_lifetime": None}
    assert second["dropped_share"] == 0.0
    assert second["read_by_later_tokens"] == pytest.approx([1.0] * 9)
    assert first["read_by_later_tokens"] == pytest.approx([9 / 9, 2 / 8, 7 / 7, 0, 4 / 5, 1 / 4, 3 / 3, 2 / 2, 1 / 1])
    assert found["positions"] == list(range(length - 1))


def test_classes_of_tokens():
    text = "The| state|-of| the|.|\n\n    |self|.for|ward|(|x|,| |4|2|)| foo|_|bar| =| 3|.|14| don|'t| camel|Case| --|>| \ufffd| a1| end|."
    text += "| f|(|€"
    expected = "word word word word punctuation whitespace identifier identifier identifier punctuation word punctuation whitespace number "
    expected += "number punctuation identifier identifier identifier punctuation number number number word word identifier identifier "
    expected += "punctuation punctuation other identifier word punctuation identifier punctuation punctuation"
    assert token_classes(text.split("|")) == expected.split()


def test_pieces_are_the_text(place):
    tokenizer = run_tokenizer(find_run(place / "own"))
    assert "".join(tokenizer.pieces(tokenizer.encode(WORDS))) == WORDS

    class Metaspace:
        def decode(self, tokens, **ignored):
            return {1: "the", 2: "re"}[tokens[0]]

        def convert_ids_to_tokens(self, token):
            return {1: "▁the", 2: "re"}[token]

    assert tokenizer_of_transformers(Metaspace()).pieces([1, 2]) == [" the", "re"]


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line(place, tmp_path, capsys):
    run, base = str(place / "llama"), str(place / "base")
    (tmp_path / "short.txt").write_text("short")
    text = ["--data", str(place / "text.txt")]
    for arguments, problem in (
        ([base, "--methods", "pruning", *text], "no context pruning, and --methods asks for nothing else"),
        ([run, "--data", str(tmp_path / "short.txt"), "--length", "48"], "no file has one text of 49 tokens"),
        ([run, "--length", "48"], "no data.json beside the checkpoints"),
        ([base, "--length", "48"], "give --data FILES"),
        ([run, *text, "--budgets", "0.5", "0"], "--budgets: 0, expected"),
        ([run, *text, "--budgets", "1.5"], "--budgets: 1.5, expected"),
        ([run, *text, "--budgets", "nan"], "--budgets: nan, expected"),
        ([run, *text, "--methods", "snapkv"], "--methods: 'snapkv' is none; there are pruning, window"),
        ([run, *text, "--length", "1"], "--length: 1, expected at least 2"),
        ([run, *text, "--length", "500"], "accepts at most 160 tokens"),
        ([run, *text, "--length", "20", "--needle"], "no room for the sentence"),
        ([str(tmp_path / "nowhere"), *text], "no such file or folder"),
        ([str(tmp_path), *text], "no checkpoint here"),
    ):
        assert main(["context", *arguments, "--out", str(tmp_path / "out")]) == 2, arguments
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and problem in said, said
    assert not (tmp_path / "out").exists()


def test_damaged_descriptions_are_named(place, tmp_path, capsys):
    import shutil

    for file, change, problem in (
        ("context_pruning.json", {"structure": {"rank": 0}}, "context_pruning.rank: 0"),
        ("context_pruning.json", {"threshold": "high"}, "description of the network is damaged"),
        ("context_pruning.json", {"structure": {"unheard_of": 1}}, "description of the network is damaged"),
        ("context_pruning.json", {"structure": {"rank": 6}}, "has shape"),
        ("context_pruning.json", {"layers": [0]}, "prunes layers"),
        ("pretrained.json", {"lora": None}, "more"),
    ):
        run = tmp_path / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(place / "llama", run)
        path = run / "checkpoints" / "step-00000005" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert main(["context", str(run), "--data", str(place / "text.txt"), "--length", "48", "--out", str(tmp_path / "out")]) == 2
        assert problem in capsys.readouterr().err


def test_options_are_those_of_the_command_line():
    from analysis.__main__ import parse

    parsed = parse(["context", "x"])
    assert Options(**{name: getattr(parsed, name) for name in vars(Options())}) == Options(
        budgets=list(Options.budgets), methods=list(Options.methods)
    )
