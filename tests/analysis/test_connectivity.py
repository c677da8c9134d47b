"""Barriers against closed forms and exact curvature, maps against one network after another, and what a person types."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.__main__ import main
from analysis.connectivity import End, Line, Options, analyze_connectivity, barrier, parts_of
from analysis.decoders import run_decoder
from analysis.runs import find_run
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from tests.analysis.conftest import CONFIG, write_checkpoint
from tests.analysis.test_alignment import hidden_copy, make


def test_a_barrier_in_numbers() -> None:
    found = barrier([0.0, 0.25, 0.5, 0.75, 1.0], [1.0, 2.0, 4.0, 3.0, 2.0])
    assert found["barrier"] == pytest.approx(4.0 - 1.5)
    assert found["excess_at"] == 0.5
    assert found["rise"] == pytest.approx(4.0 - 1.5)
    assert found["lowest"] == {"at": 0.0, "loss": 1.0}

    valley = barrier([0.0, 0.5, 1.0], [2.0, 1.0, 4.0])
    assert valley["barrier"] == 0.0
    assert valley["excess"] == pytest.approx(1.0 - 3.0)
    assert valley["lowest"] == {"at": 0.5, "loss": 1.0}

    wall = barrier([0.0, 0.5, 1.0], [2.0, float("nan"), 4.0])
    assert wall["barrier"] is None and wall["excess"] is None and wall["rise"] is None and wall["losses"] == [2.0, None, 4.0]


def end_of(model: Transformer) -> End:
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return End("", "", None, {}, lambda name: weights[name])


def test_the_excess_is_what_curvature_along_the_line_makes_it() -> None:
    """excess(a) = - integral of g(a, s) d^T H(theta_s) d over s, g = s (1 - a) up to a and a (1 - s) after, H by automatic
    differentiation in float64: an identity of calculus that this module knows nothing of."""
    config = ModelConfig(width=8, depth=1, heads=2, vocab_size=11, sequence_length=6, mlp_width=8, init_std=0.3)
    models = [Transformer(config) for _ in range(2)]
    for seed, model in enumerate(models):
        initialize(model, seed)
        model.double()
    tokens = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
    a, b = (end_of(model) for model in models)
    walker = copy.deepcopy(models[0])
    line = Line(run_decoder(walker), [tokens], lambda: None)
    places = torch.linspace(0, 1, 9).tolist()
    losses = []
    for place in places:
        line.place(a, b, place)
        losses.append(line.loss())
    measured = [loss - (1 - s) * losses[0] - s * losses[-1] for s, loss in zip(places, losses, strict=True)]

    names = [name for name, _ in models[0].named_parameters()]

    def along(s: Tensor) -> Tensor:
        weights = {name: torch.lerp(a.tensor(name), b.tensor(name), s) for name in names}
        logits = functional_call(models[0], weights, (tokens[:, :-1],), tie_weights=True)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    with sdpa_kernel(SDPBackend.MATH):
        curvature = torch.stack([hessian(along)(s) for s in grid])  # d^T H d, since s moves along d
    for place, excess in zip(places, measured, strict=True):
        kernel = torch.where(grid <= place, grid * (1 - place), place * (1 - grid))
        assert excess == pytest.approx(float(-(kernel * curvature).mean()), abs=2e-4 * max(map(abs, measured)))
    assert max(map(abs, measured)) > 0.01


@pytest.fixture
def two_ends(run_folder: Path) -> tuple[Path, list[Path]]:
    """run_folder beside two networks of one configuration and unrelated weights."""
    paths = []
    for seed in (3, 4):
        model = Transformer(CONFIG)
        initialize(model, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5.0)
        paths.append(run_folder / "checkpoints" / f"step-{100 + seed:08d}")
        write_checkpoint(paths[-1], model, 100 + seed)
    return run_folder, paths


def test_a_line_between_two_checkpoints_is_that_of_their_weights(two_ends: tuple[Path, list[Path]]) -> None:
    run, paths = two_ends
    result = analyze_connectivity([find_run(path) for path in paths], Options(points=5, tokens=64), progress=False)
    states = [torch.load(path / "mp_rank_00_model_states.pt")["module"] for path in paths]
    tokens = torch.cat([torch.from_file(str(f), dtype=torch.int16, size=f.stat().st_size // 2) for f in _shards(run)]).long()
    count = result["tokens"]
    length = CONFIG.sequence_length

    def loss(state: dict[str, Tensor]) -> float:
        model = Transformer(CONFIG)
        model.load_state_dict(state)
        sequences = [tokens[i : i + length + 1] for i in range(0, count, length)]
        with torch.no_grad():
            return sum(float(F.cross_entropy(model(s[None, :-1])[0], s[1:], reduction="sum")) for s in sequences) / count

    pair = result["pairs"][0]
    for place, found in zip(pair["at"], pair["losses"], strict=True):
        assert found == pytest.approx(loss({n: (1 - place) * states[0][n] + place * states[1][n] for n in states[0]}), rel=1e-5)
    flat = [torch.cat([state[n].flatten() for n in state if n != "unembedding.weight"]) for state in states]
    assert pair["distance"] == pytest.approx(float((flat[1] - flat[0]).norm()), rel=1e-5)
    assert pair["cosine"] == pytest.approx(float(F.cosine_similarity(*flat, dim=0)), rel=1e-4)

    part = pair["parts"]["layer 1"]
    moved = {n: states[1][n] if n.startswith("blocks.1.") else states[0][n] for n in states[0]}
    assert part["swapped"] == pytest.approx(loss(moved) - loss(states[0]), abs=1e-5)
    assert sum(found["weights"] for found in pair["parts"].values()) == len(flat[0])


def _shards(run: Path) -> list[Path]:
    data = json.loads((run / "data.json").read_text())
    return sorted(Path(data["prepared"]).glob("validation-*.bin"))


def test_a_run_is_a_map_over_its_checkpoints(run_folder: Path) -> None:
    assert main(["connectivity", str(run_folder), "--tokens", "64"]) == 0
    result = json.loads((run_folder / "report" / "connectivity.json").read_text())
    assert [end["step"] for end in result["ends"]] == [0, 10, 20]
    excess = torch.tensor(result["excess_map"])
    assert torch.equal(excess, excess.T) and (excess.diagonal() == 0).all()
    # steps 0, 10 and 20 lie on a line: the middle of the outer two is the one between
    outer = next(pair for pair in result["pairs"] if (pair["from"], pair["to"]) == (0, 2))
    assert outer["losses"][1] == pytest.approx(result["ends"][1]["loss"], rel=1e-6)
    assert (run_folder / "report" / "connectivity.png").stat().st_size > 10_000


def test_a_hidden_copy_lies_behind_a_barrier_that_alignment_takes_away(run_folder: Path, tmp_path: Path) -> None:
    network = make(0, vocab_size=CONFIG.vocab_size)
    tokens = torch.cat([torch.from_file(str(f), dtype=torch.int16, size=f.stat().st_size // 2) for f in _shards(run_folder)]).long()
    batch, optimizer = tokens[:193].unfold(0, 17, 16), torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):  # of a network that knows nothing the middle of two may be better than either
        optimizer.zero_grad()
        (network(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel()).backward()
        optimizer.step()
    sources = []
    for seed in (1, 2):
        write_checkpoint(tmp_path / str(seed) / "step-00000001", hidden_copy(network, seed), 1)
        sources.append(find_run(tmp_path / str(seed) / "step-00000001"))
        sources[-1].folder = run_folder  # whose data they are measured on
    result: dict[str, Any] = analyze_connectivity(sources, Options(points=5, tokens=64, align=True), progress=False)
    pair = result["pairs"][0]
    assert result["ends"][0]["loss"] < 2.0
    assert pair["barrier"] > 0.5
    assert pair["aligned"]["barrier"] < 1e-3
    assert pair["aligned"]["cosine"] > 0.9999
    assert pair["aligned"]["logits_deviation"] < 1e-3
    assert max(part["barrier"] for part in pair["aligned"]["parts"].values()) < 1e-3


def test_parts_are_layers_and_what_lies_outside() -> None:
    names = ["embedding.weight", "blocks.0.mlp.up.weight", "blocks.10.attention.key.weight", "final_norm.weight", "model.layers.3.x"]
    assert list(parts_of(names)) == ["embedding", "layer 0", "layer 10", "norms", "layer 3"]


def save_llama(folder: Path, seed: int, width: int = 32) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def test_hugging_face_decoders(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    from analysis.decoders import Pretrained, find_decoder

    monkeypatch.setattr(Pretrained, "encoder", lambda self: lambda text: [ord(c) % 64 for c in text])
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and so on. " * 4)
    paths = [save_llama(tmp_path / name, seed) for seed, name in enumerate(("one", "other"))]
    result = analyze_connectivity([find_decoder(p) for p in paths], Options(points=3, tokens=64, data=[str(text)]), progress=False)
    models = [LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    with torch.no_grad():
        for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            parameter.copy_((parameter + other) / 2)
        tokens = torch.tensor([[ord(c) % 64 for c in text.read_text()]])
        length = result["sequence_length"]
        sequences = torch.cat([tokens[:, i : i + length + 1] for i in range(0, result["tokens"], length)])
        expected = models[0](input_ids=sequences, labels=sequences, use_cache=False).loss
    assert result["pairs"][0]["losses"][1] == pytest.approx(float(expected), rel=1e-5)
    assert {"layer 0", "layer 1", "embedding"} <= set(result["pairs"][0]["parts"])
    with pytest.raises(InputError, match="--align: only networks of Burnish's own"):
        analyze_connectivity([find_decoder(p) for p in paths], Options(tokens=64, data=[str(text)], align=True), progress=False)


def test_what_cannot_be_drawn_is_one_line(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert main(["connectivity", *arguments]) == 2
        return capsys.readouterr().err

    steps = sorted((run_folder / "checkpoints").iterdir())
    assert "a line has two ends" in said(str(steps[-1]))
    assert "at least 3" in said(str(run_folder), "--points", "2")
    assert "at least 1" in said(str(run_folder), "--tokens", "0")
    assert "--every 0" in said(str(run_folder), "--every", "0")
    assert "a line has two ends" in said(str(run_folder), "--every", "15")  # step 0 alone
    assert "of one run" in said(str(steps[-1]), str(steps[-2]), "--every", "10")

    wide = Transformer(ModelConfig(**{**CONFIG.to_dict(), "mlp_width": 40}))
    initialize(wide, 0)
    write_checkpoint(tmp_path / "wide" / "step-00000001", wide, 1)
    message = said(str(steps[-1]), str(tmp_path / "wide" / "step-00000001"))
    assert "not of one network" in message and "mlp.up.weight is (40, 16), and (64, 16) there" in message

    other = Transformer(ModelConfig(**{**CONFIG.to_dict(), "rope_base": 500.0}))
    initialize(other, 0)
    write_checkpoint(tmp_path / "other" / "step-00000001", other, 1)
    assert "configuration is another" in said(str(steps[-1]), str(tmp_path / "other" / "step-00000001"))

    broken = Transformer(CONFIG)
    initialize(broken, 0)
    with torch.no_grad():
        broken.final_norm.weight.fill_(float("nan"))
    write_checkpoint(tmp_path / "broken" / "step-00000001", broken, 1)
    assert "its loss over these tokens is nan" in said(str(steps[-1]), str(tmp_path / "broken" / "step-00000001"))
    assert not (tmp_path / "connectivity").exists()
