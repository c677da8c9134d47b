"""Folders of other trainers, which put DeepSpeed's own files one level deeper than DeepSpeed does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analysis.__main__ import main
from analysis.decoders import Pretrained, find_decoder
from analysis.formats.deepspeed import DeepSpeedCheckpoint
from analysis.runs import find_run
from analysis.shards import is_checkpoint, open_checkpoint
from model.errors import InputError
from model.transformer import Transformer
from tests.analysis.conftest import CONFIG, write_checkpoint


def trainer_folder(source: Path, folder: Path, tag: str, weights: bool) -> Path:
    """What Hugging Face's Trainer makes of a DeepSpeed folder; with `weights`, 16-bit ones of ZeRO 1 and 2 too."""
    shutil.copytree(source, folder / tag)
    (folder / "latest").write_text(tag)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({}, folder / "rng_state.pth")
    torch.save({}, folder / "training_args.bin")
    if weights:
        whole = open_checkpoint(source)
        save_file({name: whole.tensor(name).bfloat16() for name in whole.shapes}, folder / "model.safetensors")
    return folder


def small(folder: Path, step: int) -> Path:
    torch.manual_seed(step)
    write_checkpoint(folder, Transformer(CONFIG), step)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "weights"), [("stage2-bf16", True), ("stage3-bf16", False)])
def test_folders_of_hugging_faces_trainer(deepspeed_checkpoints, tmp_path, capsys, layout, weights):
    source, out = deepspeed_checkpoints / "2" / layout, tmp_path / "out"
    for step in (1, 2):
        trainer_folder(source / f"step-{step:08d}", out / f"checkpoint-{step}", f"global_step{step}", weights)
    truth = torch.load(source / "truth-2.pt")
    for found in (open_checkpoint(out / "checkpoint-2"), find_run(out / "checkpoint-2").last(), find_run(out).last()):
        assert (found.step, found.precision, found.path.name, found.named) == (2, "fp32", "global_step2", out / "checkpoint-2")
        for name, expected in truth["parameters"].items():
            assert torch.equal(found.tensor(name), expected.float())
            assert torch.equal(found.tensor(name, "exp_avg_sq"), truth["exp_avg_sq"][name].float())
    assert find_run(out).checkpoints == [out / "checkpoint-1", out / "checkpoint-2"]
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    beside = ", and not the weights that lie beside it" if weights else ""
    assert f"  read: global_step2/, DeepSpeed's files{beside}\n" in said and said.count("Adam's moments") == 2
    assert main(["trajectory", str(out), "--out", str(tmp_path / "maps")]) == 0
    checkpoints = json.loads((tmp_path / "maps" / "trajectory.json").read_text())["checkpoints"]
    assert [checkpoint["step"] for checkpoint in checkpoints] == [1, 2]
    assert main(["step", str(out / "checkpoint-2"), "--out", str(tmp_path / "maps")]) == 0
    assert main(["weights", str(out), "--out", str(tmp_path / "maps")]) == 0
    assert main(["export", str(out), "--out", str(tmp_path / "one.safetensors")]) == 0
    assert open_checkpoint(tmp_path / "one.safetensors").precision == "fp32"
    source_of_model = find_decoder(out / "checkpoint-2")  # which runs the model, as before
    assert isinstance(source_of_model, Pretrained) and source_of_model.path == str(out / "checkpoint-2")


@pytest.mark.distributed
def test_folders_of_lightning(deepspeed_checkpoints, tmp_path):
    for step in (1, 2):
        folder = tmp_path / "out" / f"epoch=0-step={step}.ckpt"
        shutil.copytree(deepspeed_checkpoints / "2" / "stage2-bf16" / f"step-{step:08d}", folder / "checkpoint")
        (folder / "latest").write_text("checkpoint")
    run = find_run(tmp_path / "out")
    assert [checkpoint.step for checkpoint in run.open()] == [1, 2]
    assert [path.name for path in run.oldest_first()] == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]
    assert find_run(tmp_path / "out" / "epoch=0-step=2.ckpt").last().tensor("first.bias", "exp_avg").any()


def test_the_folders_name_says_the_step_and_latest_the_tag(tmp_path):
    """Several tags in a folder of a trainer: `latest` decides; a stale one is named."""
    folder = trainer_folder(small(tmp_path / "a", 3), tmp_path / "out" / "checkpoint-500", "global_step3", True)
    shutil.copytree(small(tmp_path / "b", 4), folder / "global_step4")
    assert (open_checkpoint(folder).path.name, open_checkpoint(folder).step) == ("global_step3", 500)
    (folder / "latest").write_text("global_step4\n")
    assert isinstance(open_checkpoint(folder), DeepSpeedCheckpoint) and open_checkpoint(folder).path.name == "global_step4"
    shutil.rmtree(folder / "global_step4")
    with pytest.raises(InputError, match=r"latest: names global_step4, which holds no checkpoint here: restore it, or name .*global_step3"):
        open_checkpoint(folder)
    (folder / "latest").write_text("../../b")  # no plain name: as if there were none
    assert open_checkpoint(folder).path.name == "global_step3"
    shutil.rmtree(folder / "global_step3")  # deleted to save space: the weights are what is left
    assert open_checkpoint(folder).precision == "bf16"


def test_a_trainers_folder_becomes_a_folder_of_its_own_class(tmp_path, capsys):
    """export reads the masters, takes config.json along, and compares the logits, without 16-bit weights too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    llama = LlamaForCausalLM(config)
    folder = tmp_path / "out" / "checkpoint-7"
    state = {"module": llama.state_dict(), "buffer_names": [], "global_steps": 7, "mp_world_size": 1, "optimizer": None}
    (folder / "global_step7").mkdir(parents=True)
    torch.save(state, folder / "global_step7" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step7")
    config.save_pretrained(folder)
    assert main(["export", str(folder), "--out", str(tmp_path / "whole")]) == 0
    assert "largest difference 0," in capsys.readouterr().out
    back = LlamaForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), llama.parameters(), strict=True))


def test_save_folders_stay_runs(tmp_path):
    """DeepSpeed's own, with one tag or several, and train.py's, whatever `latest` says."""
    save = tmp_path / "save"
    small(save / "global_step1", 1)
    (save / "latest").write_text("global_step1")
    assert (find_run(save).checkpoints, find_run(save).default_report()) == ([save / "global_step1"], save / "report")
    small(save / "global_step2", 2)
    assert find_run(save).checkpoints == [save / "global_step1", save / "global_step2"]
    assert not is_checkpoint(save)
    run = tmp_path / "runs" / "toy"
    small(run / "checkpoints" / "step-00000001", 1)
    assert find_run(run).checkpoints == [run / "checkpoints" / "step-00000001"] and find_run(run).folder == run
    assert find_run(run / "checkpoints").checkpoints == [run / "checkpoints" / "step-00000001"]
    assert find_run(run / "checkpoints" / "step-00000001").folder == run
