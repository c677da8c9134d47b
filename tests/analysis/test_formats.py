"""Every container against the library that writes it; what is damaged or hostile is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from analysis.__main__ import main
from analysis.checkpoint import block_segments
from analysis.files import load_tensor_or_dict
from analysis.formats.distributed import _Unpickler
from analysis.runs import find_run
from analysis.shards import open_checkpoint
from model.errors import InputError
from tests.analysis.conftest import UNIVERSAL
from tests.analysis.make_checkpoints import Toy


class Payload:
    """A pickle that would make a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def assert_toy(path: Path, model: nn.Module, aliases: dict | None = None, buffers=("offset",)) -> None:
    """The checkpoint holds each of the model's parameters once, bit for bit, and fills another model."""
    checkpoint = open_checkpoint(path)
    expected = dict(model.named_parameters())
    assert checkpoint.aliases == ({"head.weight": "embedding.weight"} if aliases is None else aliases)
    assert set(checkpoint.buffers) == set(buffers)
    assert checkpoint.shapes == {name: expected[name].shape for name in checkpoint.shapes}
    assert set(checkpoint.shapes) == set(expected)
    for name, parameter in expected.items():
        assert torch.equal(checkpoint.tensor(name), parameter.float())


# ---- what the libraries write ----------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_universal_checkpoints_are_the_shards_they_came_from(deepspeed_checkpoints, universal_checkpoints):
    for layout in UNIVERSAL:
        if layout == "stage2-round-robin":
            continue
        source = open_checkpoint(deepspeed_checkpoints / "2" / layout / "step-00000002")
        found = open_checkpoint(universal_checkpoints / layout)
        found.check_contents()
        assert (found.step, found.shapes, found.aliases, found.frozen) == (2, source.shapes, source.aliases, source.frozen), layout
        assert list(found.shapes) == list(source.shapes)
        assert found.buffers.keys() == {"offset"}
        for name in found.shapes:
            assert torch.equal(found.tensor(name), source.tensor(name)), (layout, name)
            if name not in found.frozen:
                assert torch.equal(found.tensor(name, "exp_avg_sq"), source.tensor(name, "exp_avg_sq"))
                assert found.adam_settings(name) == source.adam_settings(name)
        with pytest.raises(InputError, match="it is frozen"):
            found.tensor("frozen.weight", "exp_avg")


@pytest.mark.distributed
def test_universal_of_round_robin_is_refused(universal_checkpoints):
    """DeepSpeed writes other parameters' values there without a word."""
    with pytest.raises(InputError, match=r"fp32.pt does not hold .*round-robin"):
        open_checkpoint(universal_checkpoints / "stage2-round-robin")


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_torch_distributed_checkpoint(deepspeed_checkpoints, world_size):
    folder = deepspeed_checkpoints / str(world_size) / "distributed"
    truth = torch.load(folder / "truth.pt")
    checkpoint = open_checkpoint(folder / "step-12")
    checkpoint.check_contents()
    assert (checkpoint.step, checkpoint.world_size, checkpoint.precision) == (12, world_size, "fp32")
    assert torch.equal(checkpoint.buffers["number"], truth.pop("number"))
    assert checkpoint.shapes == {name: value.shape for name, value in truth.items() if name in checkpoint.shapes}
    assert set(checkpoint.shapes) == set(truth)
    for name, expected in truth.items():
        assert torch.equal(checkpoint.tensor(name), expected.float()), name
        middle = torch.empty(expected.numel() // 2)
        checkpoint.read(name, expected.numel() // 3, middle)
        assert torch.equal(middle, expected.float().reshape(-1)[expected.numel() // 3 :][: len(middle)])
    assert torch.equal(checkpoint.tensor("rows", "exp_avg"), truth["rows"] * 2)
    with pytest.raises(InputError, match="no exp_avg for 'whole'"):
        checkpoint.tensor("whole", "exp_avg")


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
def test_distributed_weights_beside_any_optimizer(tmp_path, flat, momentum):
    """What get_state_dict gives of a network with a tied head, and of SGD or Adam: the optimizer's tensors are no weights."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if momentum else torch.optim.Adam(model.parameters())
    model(torch.arange(9)).backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    layouts: dict[str, dict] = {"beside": {"model": weights, "optim": state}, "app": {"app": {"model": weights, "optimizer": state}}}
    layouts |= {"flat": {**weights, **state}} if flat else {}
    layouts["head first"] = {"model": dict(sorted(weights.items(), reverse=True)), "optim": state}
    for name, content in layouts.items():
        dcp.save(content, checkpoint_id=tmp_path / name, no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.aliases == {"head.weight": "embedding.weight"}
        expected = {**dict(model.named_parameters()), "offset": model.offset}  # the format does not say that a float is a buffer
        assert checkpoint.shapes == {key: expected[key].shape for key in checkpoint.shapes} and set(checkpoint.shapes) == set(expected)
        assert torch.equal(checkpoint.tensor("head.weight"), model.embedding.weight)
        if not momentum:
            moments = optimizer.state[model.embedding.weight]["exp_avg_sq"]
            assert torch.equal(checkpoint.tensor("head.weight", "exp_avg_sq"), moments)
            assert torch.equal(checkpoint.tensor("first.bias", "exp_avg_sq"), optimizer.state[model.first.bias]["exp_avg_sq"])


def test_a_distributed_head_is_tied_only_where_it_is_the_embedding(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from analysis.formats import distributed

    matrix = torch.randn(50, 8)
    changed = matrix.clone()
    changed[49, 7] += 1
    states = {name: {"exp_avg": matrix * 2} for name in ("embed_tokens.weight", "lm_head.weight")}
    cases = {
        "tied": {"embed_tokens.weight": matrix, "lm_head.weight": matrix},
        "last value": {"embed_tokens.weight": matrix, "lm_head.weight": changed},
        "equal at first": {"embed_tokens.weight": matrix, "lm_head.weight": matrix.clone(), "optimizer": {"state": states}},
        "no head": {"embed_tokens.weight": matrix, "up.weight": matrix},
    }
    for case, content in cases.items():
        dcp.save(content, storage_writer=FileSystemWriter(tmp_path / case), no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
        checkpoint = open_checkpoint(tmp_path / case)
        assert checkpoint.aliases == ({"lm_head.weight": "embed_tokens.weight"} if case == "tied" else {}), case
        assert len(checkpoint.shapes) == (1 if case == "tied" else 2)
    # runs that begin and end at different places
    flat = matrix.reshape(-1)

    def cut(values: torch.Tensor, *places: int) -> list:
        bounds = [0, *places, len(values)]
        return [distributed.Segment(a, values[a:b]) for a, b in pairwise(bounds)]

    assert distributed._equal(cut(flat, 3, 100, 399), cut(flat, 100, 101))
    assert not distributed._equal(cut(flat, 3, 100, 399), cut(changed.reshape(-1), 100, 101))
    assert not distributed._equal(cut(flat), cut(flat.bfloat16().float().bfloat16()))


def test_safetensors_and_torch_files(tmp_path):
    model = toy()
    save_model(model, str(tmp_path / "one.safetensors"))
    # safetensors keeps one of two tied names and tells the other in its metadata; which one is its own choice
    kept = open_checkpoint(tmp_path / "one.safetensors")
    assert set(kept.aliases) | set(kept.aliases.values()) == {"head.weight", "embedding.weight"}
    assert torch.equal(kept.tensor("head.weight"), model.embedding.weight)
    assert torch.equal(kept.tensor("embedding.weight"), model.embedding.weight)
    torch.save(model.state_dict(), tmp_path / "whole.bin")
    torch.save({"step": 40, "model": model.state_dict(), "optimizer": {}}, tmp_path / "nested.pt")
    torch.save(model.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name, step in (("whole.bin", 0), ("nested.pt", 40), ("legacy.pt", 0)):
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.step == step
        assert checkpoint.aliases == {"head.weight": "embedding.weight"}
        for key, expected in model.named_parameters():
            assert torch.equal(checkpoint.tensor(key), expected)


def test_a_state_dict_with_tensors_beside_it(tmp_path):
    """A loss, the random state or the step lie beside the weights in many a training loop's file; they are no weights."""
    weights = {"a": torch.randn(4, 3), "gain": torch.tensor(2.0)}
    beside = {"loss": torch.tensor(2.5), "rng_state": torch.get_rng_state(), "step": torch.tensor([100])}
    for name, content in {
        "number": {"model": weights, "step": 100, "loss": torch.tensor(2.5)},
        "tensors": {"model": weights, **beside},
        "deeper": {"model": {"state_dict": weights, "note": "x"}, **beside},
        "optimizer first": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(4, 3)}}}, "state_dict": weights, **beside},
    }.items():
        torch.save(content, tmp_path / f"{name}.pt")
        checkpoint = open_checkpoint(tmp_path / f"{name}.pt")
        assert (checkpoint.step, list(checkpoint.shapes)) == (100, ["a", "gain"]), name
        assert torch.equal(checkpoint.tensor("a"), weights["a"])
    for content in (beside, {"rng_state": beside["rng_state"]}, {"weights of another name": weights, **beside}, {"model": {}, **beside}):
        torch.save(content, tmp_path / "none.pt")
        with pytest.raises(InputError, match=r"none.pt: no weights in it; it holds"):
            open_checkpoint(tmp_path / "none.pt")
    save_file({"position": torch.arange(3)}, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"none.safetensors: no weights in it"):
        open_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "name",
    ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
)
def test_one_file_of_a_deepspeed_checkpoint_is_refused(tmp_path, capsys, name):
    torch.save({"module": {"a": torch.randn(4, 3)}, "global_steps": 3}, tmp_path / name)
    with pytest.raises(InputError, match="one file of a DeepSpeed checkpoint: name its folder"):
        open_checkpoint(tmp_path / name)
    for verb in (["inspect"], ["weights"], ["export", "--out", str(tmp_path / "x.safetensors")]):
        assert main([verb[0], str(tmp_path / name), *verb[1:]]) == 2
        assert capsys.readouterr().err == f"error: {tmp_path / name}: one file of a DeepSpeed checkpoint: name its folder\n"


@pytest.mark.parametrize("safe", [True, False])
def test_shards_without_their_index_are_one_checkpoint(tmp_path, capsys, safe):
    full = {f"layers.{i}.weight": torch.randn(3, 2) for i in range(6)}
    names = [f"model-0000{i}-of-00003.safetensors" if safe else f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    for number, name in enumerate(names):
        part = dict(list(full.items())[2 * number : 2 * number + 2])
        (save_file if safe else torch.save)(part, tmp_path / name)
    found = find_run(tmp_path)
    assert found.checkpoints == [tmp_path]
    checkpoint = found.last()
    assert set(checkpoint.shapes) == set(full)
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in full.items())
    assert main(["inspect", str(tmp_path / names[2])]) == 2
    assert "one of the 3 files of a checkpoint: name its folder" in capsys.readouterr().err
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match="not all of one checkpoint's files, and no index lists them"):
        open_checkpoint(tmp_path)


def test_every_dtype_and_unaligned_data(tmp_path):
    tensors = {f"t{i}": torch.arange(7).to(dtype) for i, dtype in enumerate((torch.float64, torch.float16, torch.bfloat16, torch.float32))}
    tensors["t8"] = torch.arange(7.0).to(torch.float8_e4m3fn)
    tensors["empty"] = torch.empty(0, 4)
    save_file(tensors, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    text = json.dumps(header).encode() + b" "
    text += b" " * ((1 - len(text)) % 2)  # an odd length: nothing behind it is aligned
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + int.from_bytes(raw[:8], "little") :])
    for file in ("a", "b"):
        checkpoint = open_checkpoint(tmp_path / f"{file}.safetensors")
        assert all(torch.equal(checkpoint.tensor(name), value.float()) for name, value in tensors.items())


def test_hugging_face_folders_of_one_and_many_files(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    torch.manual_seed(0)
    neox, llama = GPTNeoXForCausalLM(GPTNeoXConfig(**shape)), LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    neox.save_pretrained(tmp_path / "neox" / "step1")
    neox.save_pretrained(tmp_path / "neox" / "step20", max_shard_size="20KB")
    assert len(list((tmp_path / "neox" / "step20").glob("*.safetensors"))) > 2
    expected = load_file(tmp_path / "neox" / "step1" / "model.safetensors")
    checkpoints = find_run(tmp_path / "neox").open()
    assert [checkpoint.step for checkpoint in checkpoints] == [1, 20]
    for checkpoint in checkpoints:
        assert checkpoint.format == "Hugging Face folder, safetensors"
        assert set(checkpoint.shapes) == set(expected)
        assert all(torch.equal(checkpoint.tensor(name), value) for name, value in expected.items())
    llama.save_pretrained(tmp_path / "llama")  # the head is not in the file: config.json says that it is the embedding
    checkpoint, filled = open_checkpoint(tmp_path / "llama"), LlamaForCausalLM(llama.config)
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    checkpoint.load_into(filled)
    assert all(torch.equal(a, b) for a, b in zip(filled.parameters(), llama.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_old_hugging_face_masks_are_buffers(tmp_path, capsys, dtype):
    """Old releases of transformers saved what attention masks with beside the weights; in float16 it is minus infinity."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    neox = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    causal = torch.ones(16, 16).tril().view(1, 1, 16, 16)
    never = torch.tensor(-1e9).to(dtype)
    masks = {"bias": causal.to(dtype), "masked_bias": never}
    for model, place in (
        (GPT2LMHeadModel(GPT2Config(**small)), "transformer.h.{}.attn"),
        (GPTJForCausalLM(GPTJConfig(**small, rotary_dim=4)), "transformer.h.{}.attn"),
        (GPTNeoXForCausalLM(GPTNeoXConfig(**neox)), "gpt_neox.layers.{}.attention"),
    ):
        model = model.to(dtype)
        own = {f"{place.format(layer)}.{name}": value for layer in (0, 1) for name, value in masks.items()}
        weights = {name: value.detach() for name, value in model.state_dict().items()}
        folder = tmp_path / type(model).__name__
        folder.mkdir()
        torch.save({**weights, **own}, folder / "pytorch_model.bin")
        checkpoint = open_checkpoint(folder)
        assert set(checkpoint.shapes) == {name for name, _ in model.named_parameters()}  # among them attn.c_attn.bias
        assert set(checkpoint.buffers) == set(own)
        assert main(["inspect", str(folder)]) == 0, capsys.readouterr().out


# ---- tensor-parallel files, made here from the full model --------------------------------------------------------------


def split_neox(folder: Path, full: dict[str, torch.Tensor], ranks: int) -> None:
    """Write GPT-NeoX's layer files of a two-layer model: its own rules, the other way round."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in full.items():
            _, layer, rest = name.split(".", 2)
            if rest.endswith(("dense.weight", "4h_to_h.weight")):
                piece = value.chunk(ranks, 1)[rank]
            elif rest.endswith(("dense.bias", "4h_to_h.bias")):
                piece = value / ranks
            elif rest.endswith("inv_freq"):
                piece = value
            elif "norm" in rest:
                piece = value + (rank - (ranks - 1) / 2) * 2**-10  # they drift apart; the mean is the value
            else:
                piece = value.chunk(ranks, 0)[rank]
            layers.setdefault(int(layer), {})[rest] = piece.clone()
        for layer, tensors in layers.items():
            torch.save(tensors, folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
        torch.save({"global_steps": 9}, folder / f"mp_rank_{rank:02d}_model_states.pt")


NEOX = {
    "layers.0.word_embeddings.weight": (16, 8),
    **{
        f"layers.{layer}.{name}": shape
        for layer in (2, 3)
        for name, shape in {
            "attention.query_key_value.weight": (24, 8),
            "attention.query_key_value.bias": (24,),
            "attention.dense.weight": (8, 8),
            "attention.dense.bias": (8,),
            "mlp.dense_h_to_4h.weight": (32, 8),
            "mlp.dense_4h_to_h.weight": (8, 32),
            "mlp.dense_4h_to_h.bias": (8,),
            "input_layernorm.weight": (8,),
        }.items()
    },
    "layers.5.norm.weight": (8,),
    "layers.6.final_linear.weight": (16, 8),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_neox_slices_join(tmp_path, ranks):
    torch.manual_seed(0)
    full = {name: (torch.randn(shape) * 64).round() / 64 for name, shape in NEOX.items()}  # sums and means are exact
    rotary = {"layers.2.attention.rotary_emb.inv_freq": torch.tensor([1.0, 0.1])}
    split_neox(tmp_path / "global_step9", {**full, **rotary}, ranks)
    checkpoint = open_checkpoint(tmp_path / "global_step9")
    assert (checkpoint.step, checkpoint.format) == (9, f"GPT-NeoX, {ranks} tensor-parallel ranks")
    assert checkpoint.shapes == {name: value.shape for name, value in full.items()} and checkpoint.buffers.keys() == rotary.keys()
    for name, value in full.items():
        assert torch.equal(checkpoint.tensor(name), value), name
        out = torch.empty(5)
        checkpoint.read(name, 2, out)
        assert torch.equal(out, value.reshape(-1)[2:7])
    if ranks == 2:
        (tmp_path / "global_step9" / "layer_03-model_01-model_states.pt").unlink()
        with pytest.raises(InputError, match=r"rank 1, layer 3 are missing"):
            open_checkpoint(tmp_path / "global_step9")


def test_megatron_slices_stages_and_gates_join(tmp_path):
    """Two tensor ranks, two pipeline stages of one layer; SwiGLU's gate and rest are interleaved by rank."""
    import argparse

    torch.manual_seed(0)
    shapes = {
        "self_attention.linear_qkv.weight": (24, 8),
        "self_attention.linear_proj.weight": (8, 8),
        "self_attention.linear_proj.bias": (8,),
    }
    shapes |= {"mlp.linear_fc1.weight": (24, 8), "mlp.linear_fc2.weight": (8, 12), "mlp.linear_fc1.layer_norm_weight": (8,)}
    full = {f"decoder.layers.{layer}.{name}": torch.randn(shape) for layer in (0, 1) for name, shape in shapes.items()}
    full["embedding.word_embeddings.weight"] = torch.randn(16, 8)
    for rank in range(2):
        for stage in range(2):
            model = {"embedding.word_embeddings.weight": full["embedding.word_embeddings.weight"].chunk(2)[rank]}  # tied: on both stages
            for name in shapes:
                value = full[f"decoder.layers.{stage}.{name}"]
                if "fc1.weight" in name:
                    gate, up = value.chunk(2)
                    piece = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
                elif name.endswith(("linear_proj.weight", "fc2.weight")):
                    piece = value.chunk(2, 1)[rank]
                elif "qkv" in name:
                    piece = value.chunk(2)[rank]
                else:
                    piece = value
                model[f"decoder.layers.0.{name}"] = piece.clone()
            folder = tmp_path / "iter_0000700" / f"mp_rank_{rank:02d}_{stage:03d}"
            folder.mkdir(parents=True)
            content = {"args": argparse.Namespace(hidden_size=8), "checkpoint_version": 3.0, "iteration": 700, "model": model}
            torch.save(content, folder / "model_optim_rng.pt")
    checkpoint = open_checkpoint(tmp_path / "iter_0000700")
    assert (checkpoint.step, set(checkpoint.shapes)) == (700, set(full))
    for name, value in full.items():
        torch.testing.assert_close(checkpoint.tensor(name), value, rtol=1e-6, atol=0)  # the mean of equal norms rounds
    content["model"]["decoder.layers.0.strange.weight"] = torch.randn(3, 3)
    for rank in range(2):
        content["model"]["decoder.layers.0.strange.weight"] = torch.randn(3, 3)
        torch.save(content, tmp_path / "iter_0000700" / f"mp_rank_{rank:02d}_001" / "model_optim_rng.pt")
    with pytest.raises(InputError, match=r"differs from the same in an earlier|strange.weight \(3, 3\) join is not known"):
        open_checkpoint(tmp_path / "iter_0000700")


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes"), [((4, 5), (1, 2), (2, 3)), ((4, 5), (2, 0), (2, 5)), ((3, 4, 5), (0, 1, 0), (3, 2, 5))]
)
def test_block_segments_are_the_block(shape, offsets, sizes):
    whole = torch.full(shape, -1.0)
    block = torch.randn(sizes)
    segments = list(block_segments(torch.Size(shape), offsets, block))
    assert [s.offset for s in segments] == sorted(s.offset for s in segments)
    for offset, values in segments:
        whole.view(-1)[offset : offset + len(values)] = values
    place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    assert torch.equal(whole[place], block)
    assert int((whole == -1).sum()) == whole.numel() - block.numel()


# ---- damage and malice -------------------------------------------------------------------------------------------------


def problem_of(path: Path, capsys) -> str:
    """What `inspect` says; it must end with exit code 2."""
    assert main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out + captured.err


def test_damaged_safetensors_are_named(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.arange(100.0)}, folder / "model-1.safetensors")
    save_file({"b": torch.arange(10.0)}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["inspect", str(folder)]) == 0
    original = (folder / "model-1.safetensors").read_bytes()

    def header(**changes) -> bytes:
        length = int.from_bytes(original[:8], "little")
        entry = json.loads(original[8 : 8 + length])
        entry["a"] |= changes
        text = json.dumps(entry).encode()
        return struct.pack("<Q", len(text)) + text + original[8 + length :]

    for content, problem in (
        (original[:-10], "model-1.safetensors: truncated"),
        (original + b"x", "model-1.safetensors: damaged"),
        (struct.pack("<Q", 1 << 40) + original[8:], "truncated or damaged: a header of 1099511627776 bytes"),
        (header(shape=[10**12]), "cannot be bytes 0 to 400"),
        (header(data_offsets=[-400, 0]), "cannot be bytes -400 to 0"),
        (header(dtype="F128"), "its header is damaged"),
        (header(shape=[-1, -100]), "cannot be bytes"),
        (b"", "truncated or damaged"),
    ):
        (folder / "model-1.safetensors").write_bytes(content)
        assert problem in problem_of(folder, capsys)
    (folder / "model-1.safetensors").write_bytes(original)
    for weight_map, problem in (
        ({"a": "../../secret.safetensors"}, "refused: it lists '../../secret.safetensors', which is not a plain file name"),
        ({"a": "/etc/passwd"}, "which is not a plain file name"),
        ({"a": "model-3.safetensors"}, "model-3.safetensors: missing"),
        ({"a": "model-1.safetensors", "c": "model-2.safetensors"}, "the index lists c, which no file holds"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert problem in problem_of(folder, capsys)


def test_damaged_and_hostile_torch_files_are_named(tmp_path, capsys):
    path, proof = tmp_path / "model.pt", tmp_path / "proof"
    weights = {"a": torch.arange(1000.0), "b": torch.randn(50, 3)}
    torch.save(weights, path)
    assert main(["inspect", str(path)]) == 0
    original = path.read_bytes()
    path.write_bytes(original[:-300])
    assert "truncated or damaged" in problem_of(path, capsys)
    flipped = bytearray(original)
    flipped[original.index(torch.arange(990.0, 1000.0).numpy().tobytes())] ^= 1
    path.write_bytes(flipped)
    assert "altered since it was saved: the CRC-32 of" in problem_of(path, capsys)
    for protocol in (True, False):
        torch.save({**weights, "x": Payload(proof)}, path, _use_new_zipfile_serialization=protocol)
        assert "refused: it asks to run posix.system" in problem_of(path, capsys) or not protocol
        assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()  # the payload works where pickles run
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    assert "refused: a claims shape (1000000000000,), more than the file holds" in problem_of(path, capsys)
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record))
    assert "is compressed, which torch never does" in problem_of(path, capsys)
    torch.save({"a": torch.tensor([1.0, float("nan")])}, path)
    assert "a: values that are not finite" in problem_of(path, capsys)


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 do with the member of an enumeration."""

    def __init__(self, enumeration: object, name: str) -> None:
        self.parts = enumeration, name

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, self.parts


def test_members_of_enumerations_that_are_pickled_by_name(tmp_path: Path) -> None:
    path = tmp_path / "states.pt"
    torch.save({stage.name: ByName(ZeroStageEnum, stage.name) for stage in ZeroStageEnum}, path)
    assert load_tensor_or_dict(path) == {stage.name: int(stage) for stage in ZeroStageEnum}
    torch.save({"x": ByName(torch.Size, "__init__")}, path)
    with pytest.raises(InputError, match=r"states\.pt: refused: it asks for '__init__' of .*torch\.Size"):
        load_tensor_or_dict(path)
    metadata = pickle.dumps(ByName(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"))
    assert _Unpickler(io.BytesIO(metadata)).load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    with pytest.raises(InputError, match="refused: it asks for '__init__' of"):
        _Unpickler(io.BytesIO(pickle.dumps(ByName(torch.Size, "__init__")))).load()


@pytest.mark.distributed
def test_damaged_and_hostile_distributed_checkpoints_are_named(deepspeed_checkpoints, tmp_path, capsys):
    source, proof = deepspeed_checkpoints / "2" / "distributed" / "step-12", tmp_path / "proof"

    def copy() -> Path:
        folder = tmp_path / "step-12"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        return folder

    folder = copy()
    assert main(["inspect", str(folder)]) == 0
    (folder / "__1_0.distcp").unlink()
    assert "__1_0.distcp: missing" in problem_of(folder, capsys)
    file = copy() / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert "__0_0.distcp: truncated" in problem_of(folder, capsys)
    first = torch.load(source.parent / "truth.pt")["rows"][:4].contiguous().numpy().tobytes()
    flipped = bytearray(content)
    flipped[content.index(first) + 5] ^= 64
    file.write_bytes(flipped)
    assert "the block of model.rows: altered since it was saved" in problem_of(folder, capsys)
    metadata = copy() / ".metadata"
    metadata.write_bytes(pickle.dumps(Payload(proof)))
    assert "refused: it asks to run posix.system" in problem_of(folder, capsys)
    assert not proof.exists()
    honest = pickle.loads((source / ".metadata").read_bytes())
    for where in honest.storage_data.values():
        where.relative_path = "../" + where.relative_path
    metadata.write_bytes(pickle.dumps(honest))
    assert "which is not a plain file name" in problem_of(folder, capsys)


@pytest.mark.parametrize("part", [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"])
def test_a_damaged_block_is_named_wherever_it_is_damaged(part, tmp_path, capsys):
    """The archive's directory, a record's header, and the directory's end; of the block that is not the last of its file."""
    folder = tmp_path / "step-1"
    weights = {"first": torch.arange(12.0), "second": torch.randn(5, 2)}
    torch.distributed.checkpoint.save(weights, checkpoint_id=folder, no_dist=True)
    assert main(["inspect", str(folder)]) == 0
    (file,) = folder.glob("*.distcp")
    original = file.read_bytes()
    for byte in range(len(part)):
        content = bytearray(original)
        content[original.index(part) + byte] ^= 64
        file.write_bytes(content)
        assert "the block of first" in problem_of(folder, capsys)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["stage2-fp32", "stage3-bf16"])
def test_damaged_deepspeed_checkpoints_are_named(deepspeed_checkpoints, tmp_path, capsys, layout):
    source = deepspeed_checkpoints / "2" / layout
    folder = tmp_path / "step"
    name = next((source / "step-00000002").glob("*rank_1_mp*optim_states.pt")).name
    shutil.copytree(source / "step-00000002", folder)
    assert main(["inspect", str(folder)]) == 0
    shutil.copy(source / "step-00000001" / name, folder / name)
    assert f"{name}: its optimizer took 1 steps, another rank's 2; files of two checkpoints are mixed" in problem_of(folder, capsys)
    content = bytearray((source / "step-00000002" / name).read_bytes())
    with zipfile.ZipFile(source / "step-00000002" / name) as archive:
        largest = max((r for r in archive.infolist() if "/data/" in r.filename), key=lambda record: record.file_size)
        position = content.index(archive.read(largest))
    content[position + 3] ^= 1
    (folder / name).write_bytes(content)
    assert f"{name}: altered since it was saved: the CRC-32" in problem_of(folder, capsys)
    (folder / name).unlink()
    assert f"missing: {name}" in problem_of(folder, capsys)
    if layout == "stage3-bf16":
        shutil.copy(source / "step-00000002" / name, folder / name)
        states = "zero_pp_rank_1_mp_rank_00_model_states.pt"
        shutil.copy(source / "step-00000001" / states, folder / states)
        assert f"{states}: of step 1, among files of step 2" in problem_of(folder, capsys)
