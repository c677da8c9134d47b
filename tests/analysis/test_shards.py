"""The shard reader against what DeepSpeed itself gathered, and against damaged and hostile files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import analysis.checkpoint
from analysis.__main__ import main
from analysis.curvature import analyze_curvature
from analysis.decoders import open_decoder
from analysis.export import export
from analysis.files import read_in_order
from analysis.grams import increment_grams
from analysis.report import gather
from analysis.runs import find_run
from analysis.shards import Checkpoint, open_checkpoint
from analysis.signal import find_networks
from analysis.weights import analyze_weights
from model.errors import InputError
from model.transformer import Transformer
from tests.analysis.conftest import CONFIG, LAYOUTS, ZOO
from tests.analysis.make_checkpoints import Toy

pytestmark = pytest.mark.distributed


def step_folder(root: Path, world_size: int, layout: str, step: int = 2) -> Path:
    return root / str(world_size) / layout / f"step-{step:08d}"


def truth_of(root: Path, world_size: int, layout: str, step: int = 2) -> dict:
    return torch.load(root / str(world_size) / layout / f"truth-{step}.pt")


@pytest.mark.parametrize(("world_size", "layout"), ZOO)
def test_equal_to_what_deepspeed_gathers(deepspeed_checkpoints, layout, world_size):
    for step in (1, 2):
        checkpoint = open_checkpoint(step_folder(deepspeed_checkpoints, world_size, layout, step))
        truth = truth_of(deepspeed_checkpoints, world_size, layout, step)
        assert (checkpoint.step, checkpoint.zero_stage, checkpoint.precision) == (step, int(layout[5]), "fp32")
        assert checkpoint.world_size == world_size
        assert set(checkpoint.shapes) == truth["parameters"].keys() | truth["frozen"].keys()
        for name, expected in {**truth["parameters"], **truth["frozen"]}.items():
            assert torch.equal(checkpoint.tensor(name), expected.float()), name
        for kind in ("exp_avg", "exp_avg_sq"):
            for name, expected in truth[kind].items():
                assert torch.equal(checkpoint.tensor(name, kind), expected), (kind, name)
        assert torch.equal(checkpoint.buffers["offset"].float(), truth["buffers"]["offset"].float())
        assert checkpoint.frozen == {"frozen.weight"}
        assert checkpoint.aliases == {"head.weight": "embedding.weight"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_segments_cover_each_element_once_and_are_views_of_the_file(deepspeed_checkpoints, layout):
    checkpoint = open_checkpoint(step_folder(deepspeed_checkpoints, 3, layout))
    for name, shape in checkpoint.shapes.items():
        position = 0
        for offset, values in checkpoint.segments(name):
            assert (offset, values.dim()) == (position, 1)
            position += values.numel()
        assert position == shape.numel()
        middle = torch.empty(shape.numel() // 2, dtype=torch.float64)
        checkpoint.read(name, shape.numel() // 3, middle)
        whole = checkpoint.tensor(name).flatten().double()
        assert torch.equal(middle, whole[shape.numel() // 3 :][: len(middle)])


def test_padding_of_stage_3_is_never_read(deepspeed_checkpoints, tmp_path):
    """DeepSpeed leaves uninitialised memory there; filled with NaN and 1e30 the reader must not notice."""
    truth = truth_of(deepspeed_checkpoints, 3, "stage3-fp32")
    for poison in (float("nan"), 1e30):
        folder = tmp_path / str(poison)
        shutil.copytree(step_folder(deepspeed_checkpoints, 3, "stage3-fp32"), folder)
        path = folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
        state = torch.load(path, weights_only=False)
        poisoned = 0
        for flat, shapes in zip(state["optimizer_state_dict"]["fp32_flat_groups"], param_shapes(folder), strict=True):
            start = 0
            for shape in shapes.values():
                chunk = -(-shape.numel() // 3)
                valid = max(0, min(chunk, shape.numel() - 2 * chunk))
                flat.data[start + valid : start + chunk] = poison
                poisoned += chunk - valid
                start += chunk
        assert poisoned > 0
        torch.save(state, path)
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.shapes:
            assert torch.equal(checkpoint.tensor(name), {**truth["parameters"], **truth["frozen"]}[name]), name


def param_shapes(folder: Path) -> list[dict]:
    return torch.load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]


def test_inner_products_across_layouts(deepspeed_checkpoints):
    """Stage 2 on two ranks times stage 3 on three, from the shards, against whole tensors in float64."""
    two = [step_folder(deepspeed_checkpoints, 2, "stage2-fp32", step) for step in (1, 2)]
    three = [step_folder(deepspeed_checkpoints, 3, "stage3-fp32", step) for step in (1, 2)]
    mixed = increment_grams([open_checkpoint(path) for path in (two[0], three[1])], memory_megabytes=0.001, progress=False)
    for name, gram in mixed.items():
        a, b = (truth_of(deepspeed_checkpoints, w, layout, s) for w, layout, s in ((2, "stage2-fp32", 1), (3, "stage3-fp32", 2)))
        first, second = ({**t["parameters"], **t["frozen"]}[name].double().flatten() for t in (a, b))
        basis = torch.stack([first, second - first])
        torch.testing.assert_close(gram, basis @ basis.T, rtol=1e-12, atol=1e-15)


def test_no_deepspeed_is_imported(deepspeed_checkpoints):
    path = step_folder(deepspeed_checkpoints, 2, "stage2-fp32")
    code = (
        f"import sys; sys.modules['deepspeed'] = None; from analysis.shards import open_checkpoint; print(open_checkpoint({str(path)!r}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "zero_stage=2" in done.stdout


def test_load_into_fills_a_model_with_tied_weights(deepspeed_checkpoints):
    for layout in ("stage2-bf16", "stage3-fp32"):
        truth = truth_of(deepspeed_checkpoints, 3, layout)
        model = Toy()
        open_checkpoint(step_folder(deepspeed_checkpoints, 3, layout)).load_into(model)
        assert model.head.weight is model.embedding.weight
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, {**truth["parameters"], **truth["frozen"]}[name].float()), name
    model.position = torch.nn.Parameter(torch.zeros(3))
    checkpoint = open_checkpoint(step_folder(deepspeed_checkpoints, 3, "stage2-fp32"))
    with pytest.raises(InputError, match=r"not this model's weights: .*position"):
        checkpoint.load_into(model)


def test_a_hostile_pickle_does_not_run(deepspeed_checkpoints, tmp_path):
    folder, proof = tmp_path / "step", tmp_path / "proof"
    shutil.copytree(step_folder(deepspeed_checkpoints, 2, "stage2-fp32"), folder)

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    state["client"] = Payload()
    torch.save(state, path)
    pickle.loads(pickle.dumps(Payload()))  # the payload does work
    assert proof.exists()
    proof.unlink()
    with pytest.raises(InputError, match=r"zero_pp_rank_1_mp_rank_00_optim_states.pt: refused.*system"):
        open_checkpoint(folder)
    assert not proof.exists()


@pytest.mark.parametrize("layout", ["stage2-fp32", "stage3-bf16"])
def test_a_missing_rank_is_named(deepspeed_checkpoints, tmp_path, layout):
    folder = tmp_path / "step"
    shutil.copytree(step_folder(deepspeed_checkpoints, 3, layout), folder)
    missing = next(folder.glob("*rank_1_mp*optim_states.pt"))
    missing.unlink()
    with pytest.raises(InputError, match=f"3 ranks wrote this checkpoint; missing: {missing.name}"):
        open_checkpoint(folder)


def test_a_truncated_shard_is_named_without_a_manifest(deepspeed_checkpoints, tmp_path):
    folder = tmp_path / "step"
    shutil.copytree(step_folder(deepspeed_checkpoints, 2, "stage2-fp32"), folder)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{path.name}: truncated or damaged"):
        open_checkpoint(folder)


def test_shards_of_another_model_are_refused(deepspeed_checkpoints, tmp_path):
    folder = tmp_path / "step"
    shutil.copytree(step_folder(deepspeed_checkpoints, 2, "stage2-fp32"), folder)
    path = folder / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["param_shapes"][0]["embedding.weight"] = torch.Size([12, 7])
    torch.save(state, path)
    with pytest.raises(InputError, match="the shards hold 203 elements for parameter group 0, and its parameters have 196"):
        open_checkpoint(folder)


def test_manifest_finds_truncation_alteration_and_absence(run_folder):
    folder = run_folder / "checkpoints" / "step-00000010"
    path = folder / "mp_rank_00_model_states.pt"
    original = path.read_bytes()
    open_checkpoint(folder).verify()

    path.write_bytes(original[:-7])
    with pytest.raises(InputError, match=rf"{path.name}: truncated: {len(original) - 7} bytes, and manifest.json expects {len(original)}"):
        open_checkpoint(folder)
    altered = bytearray(original)
    altered[len(original) // 2] ^= 1
    path.write_bytes(altered)
    with pytest.raises(InputError, match=rf"{path.name}: altered since it was saved: sha256"):
        open_checkpoint(folder).verify()
    path.write_bytes(original)
    (folder / "model_config.json").unlink()
    with pytest.raises(InputError, match=r"model_config.json: missing"):
        open_checkpoint(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"../../../data.json": {"size": 1, "sha256": ""}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="outside the checkpoint"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: replace(folder / "mp_rank_00_model_states.pt").symlink_to("nowhere"), "mp_rank_00_model_states.pt: "),
        (lambda folder: replace(folder / "model.safetensors").mkdir(), "model.safetensors: cannot be read: Is a directory"),
        (lambda folder: replace(folder / "mp_rank_00_model_states.pt").symlink_to("mp_rank_00_model_states.pt"), "cannot be read"),
    ],
    ids=["dangling", "folder", "loop"],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_listed(run_folder, capsys, spoil, message):
    folder = run_folder / "checkpoints" / "step-00000010"
    (folder / "manifest.json").unlink()
    if "safetensors" in message:
        (folder / "mp_rank_00_model_states.pt").unlink()
    spoil(folder)
    assert main(["inspect", str(run_folder)]) == 2
    said = capsys.readouterr()
    assert message in said.out and "cannot be read: " in said.out
    assert said.out.count("sound (checksums and values)") == 2
    assert "1 of the checkpoints cannot be trusted" in said.err


def replace(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def test_a_manifest_without_a_checksum_is_damaged(run_folder, capsys):
    folder = run_folder / "checkpoints" / "step-00000010"
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["model_config.json"]["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(run_folder)]) == 2
    said = capsys.readouterr().out
    assert "manifest.json: damaged: no sha256 of model_config.json" in said and said.count("sound (") == 2


def test_a_file_is_hashed_once_and_others_not_at_all(run_folder, monkeypatch, tmp_path):
    """By what reads files, from outside: what each verb has hashed, by the step it belongs to."""
    hashed: list[str] = []
    original = analysis.checkpoint._sha256
    monkeypatch.setattr("analysis.checkpoint._sha256", lambda file, bar: (hashed.append(file.parent.name), original(file, bar))[1])
    monkeypatch.setattr("analysis.checkpoint._CHECKSUMS", {})
    files = 2  # that a manifest lists
    run = find_run(run_folder)
    for use in (
        lambda: analyze_weights(run, progress=False),
        lambda: export(run, tmp_path / "out.safetensors"),
        lambda: open_decoder(run),
        lambda: list(find_networks([str(run_folder)], [], [], 0, True)),
        lambda: analyze_curvature(run, 16, 2, 1, progress=False),
    ):
        use()
        assert hashed == ["step-00000020"] * files
        hashed.clear()
        analysis.checkpoint._CHECKSUMS.clear()
    gather(run, run.default_report())
    assert sorted(hashed) == sorted(["step-00000000", "step-00000010", "step-00000020"] * files)
    # one that changed is hashed again
    damaged = run_folder / "checkpoints" / "step-00000010" / "model_config.json"
    damaged.write_text(damaged.read_text().replace("64", "46"))
    with pytest.raises(InputError, match=r"model_config.json: altered since it was saved"):
        run.open()


def test_long_checksums_show_one_bar_over_bytes(run_folder, monkeypatch, capsys):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "delay": 0, "mininterval": 0})
            bars.append(self)

    monkeypatch.setattr("analysis.checkpoint._CHECKSUMS", {})
    monkeypatch.setattr("analysis.checkpoint.tqdm", Bar)
    find_run(run_folder).open()
    manifests = [json.loads(path.read_text())["files"] for path in (run_folder / "checkpoints").glob("step-*/manifest.json")]
    size = sum(entry["size"] for files in manifests for entry in files.values())
    assert [(bar.total, bar.n) for bar in bars] == [(size, size)]
    said = capsys.readouterr()
    assert said.out == "" and "checksums: 100%" in said.err


def test_bf16_masters_that_cannot_be_told_apart_are_not_guessed(tmp_path):
    """Without ZeRO the masters have no names; two groups with equal weights leave no way to tell which is which."""
    ones = torch.ones(4)
    module = {"a": ones.bfloat16(), "b": ones.bfloat16(), "c": torch.arange(1.0, 5.0).bfloat16()}

    def saved(groups: list[list[torch.Tensor]]) -> Checkpoint:
        numbers = iter(range(9))
        adam = {"state": {}, "param_groups": [{"params": [next(numbers) for _ in group]} for group in groups]}
        optimizer = {"fp32_groups": groups, "optimizer_state_dict": adam}
        state = {"module": dict(module), "buffer_names": [], "global_steps": 1, "mp_world_size": 1, "optimizer": optimizer}
        torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
        return open_checkpoint(tmp_path)

    same_group = saved([[ones + 1e-4, ones + 2e-4], [torch.arange(1.0, 5.0) + 1e-5]])
    assert same_group.precision == "fp32"
    assert torch.equal(same_group.tensor("b"), ones + 2e-4)
    assert torch.equal(same_group.tensor("c"), torch.arange(1.0, 5.0) + 1e-5)
    two_groups = saved([[ones + 1e-4], [ones + 2e-4, torch.arange(1.0, 5.0)]])
    assert two_groups.precision == "bf16"
    assert torch.equal(two_groups.tensor("b"), ones)


def test_a_path_may_be_a_run_a_step_or_a_save_folder(deepspeed_checkpoints, run_folder):
    assert [path.name for path in find_run(run_folder).checkpoints] == ["step-00000000", "step-00000010", "step-00000020"]
    step = find_run(run_folder / "checkpoints" / "step-00000010")
    assert (step.name, step.folder) == ("toy/step-00000010", run_folder.resolve())
    save = find_run(deepspeed_checkpoints / "2" / "stage2-fp32")
    assert [checkpoint.step for checkpoint in save.open()] == [1, 2]
    for path, problem in (
        (run_folder / "nothing", "no such file"),
        (run_folder / "data.json", "found a file"),
        (run_folder.parent, "no checkpoint here"),
    ):
        with pytest.raises(InputError, match=problem):
            find_run(path)


def test_memory_stays_small_however_large_the_file(tmp_path):
    """Opening and reading a slice of a 200 MB checkpoint adds no anonymous memory to speak of."""
    model = torch.nn.Linear(5000, 10000, bias=False)
    state = {"module": {"weight": model.weight.detach()}, "buffer_names": [], "global_steps": 1, "mp_world_size": 1, "optimizer": None}
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    code = (
        "import torch, re\nfrom analysis.shards import open_checkpoint\n"
        "anonymous = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        f"before = anonymous()\nc = open_checkpoint({str(tmp_path)!r})\nout = torch.empty(1000)\nc.read('weight', 49_000_000, out)\n"
        "total = sum(float(s.values.sum()) for s in c.segments('weight'))\nprint(anonymous() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60


def test_a_model_of_this_repository_round_trips(run_folder):
    checkpoint = open_checkpoint(run_folder / "checkpoints" / "step-00000020")
    model = Transformer(CONFIG)
    checkpoint.load_into(model)
    assert checkpoint.aliases == {"unembedding.weight": "embedding.weight"}
    saved = torch.load(checkpoint.path / "mp_rank_00_model_states.pt")["module"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert sum(shape.numel() for shape in checkpoint.shapes.values()) == sum(p.numel() for p in model.parameters())


def test_reading_ahead_changes_nothing_and_takes_any_memory(tmp_path: Path) -> None:
    values = torch.arange(10_000, dtype=torch.float32)
    torch.save(values, tmp_path / "values.pt")
    mapped = torch.load(tmp_path / "values.pt", mmap=True, weights_only=True)
    for part in (mapped, mapped[5_001:5_002], mapped[:0], values, torch.empty(0)):
        before = part.clone()
        read_in_order(part)
        assert torch.equal(part, before)
