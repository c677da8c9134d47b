"""Makes real DeepSpeed checkpoints on the CPU, with the weights DeepSpeed itself gathers beside each.

    python make_checkpoints.py FOLDER RANK WORLD_SIZE PORT LAYOUT...

Run once a rank. Each layout becomes FOLDER/LAYOUT/: a DeepSpeed save folder with tags step-00000001 and step-00000002, and
`truth-1.pt`, `truth-2.pt`: {"parameters": float32 masters, "exp_avg", "exp_avg_sq", "frozen", "buffers"} by name.
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import contextlib
import logging
from pathlib import Path

import torch
from torch import nn

logging.disable(logging.WARNING)

# name: (DeepSpeed configuration, options). Precision is bf16 where the configuration says so.
LAYOUTS = {
    "stage0-fp32": {},
    "stage0-bf16": {"bf16": {"enabled": True}},
    "stage1-fp32": {"zero_optimization": {"stage": 1}},
    "stage1-bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    # bf16 weights with float32 gradient accumulation at stage 1: DeepSpeed's BF16_Optimizer, another layout
    "stage1-bf16-optimizer": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "stage2-fp32": {"zero_optimization": {"stage": 2}},
    "stage2-bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "stage2-round-robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "stage2-alignment": {"zero_optimization": {"stage": 2, "parameter_alignment": True}},
    "stage3-fp32": {"zero_optimization": {"stage": 3}},
    "stage3-bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "stage3-sub-groups": {"zero_optimization": {"stage": 3, "sub_group_size": 40}},
}


class Toy(nn.Module):
    """Sizes that divide by neither 2 nor 3, a tied head, a frozen matrix, a buffer, a scalar gain."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 7)
        self.first = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.frozen = nn.Linear(11, 5, bias=False)
        self.second = nn.Linear(5, 7, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("offset", torch.arange(7.0) / 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.first(self.embedding(tokens))))
        hidden = self.gain * self.second(self.frozen(hidden))
        logits = self.head(hidden + self.offset.type_as(hidden))
        return nn.functional.cross_entropy(logits.float(), tokens.roll(1))


def fill(model: Toy, gather) -> None:
    for name, parameter in model.named_parameters():
        with gather(parameter), torch.no_grad():
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator))


def make(folder: Path, layout: str, rank: int, world_size: int) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **LAYOUTS[layout],
    }
    stage = config.get("zero_optimization", {}).get("stage", 0)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else contextlib.nullcontext():
        model = Toy()

    def gather(parameter):
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if stage == 3 else contextlib.nullcontext()

    fill(model, gather)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trainable.items() if n.endswith("weight") and "norm" not in n], "weight_decay": 0.1},
            {"params": [p for n, p in trainable.items() if not n.endswith("weight") or "norm" in n], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in (1, 2):
        tokens = torch.arange(rank, rank + 9) * step % 13
        engine.backward(engine(tokens))
        engine.step()
        if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # it links after its first group's step, when others have no state
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        engine.save_checkpoint(str(folder / layout), tag=f"step-{step:08d}")
        truth: dict = {"parameters": {}, "exp_avg": {}, "exp_avg_sq": {}, "frozen": {}, "buffers": {"offset": model.offset.clone()}}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                with gather(parameter):
                    truth["frozen"][name] = parameter.detach().clone()
            elif stage == 0 and "bf16" not in layout:
                truth["parameters"][name] = parameter.detach().clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    truth[key][name] = optimizer.state[parameter][key].clone()
            elif stage == 0:
                pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
                masters = {id(low): high for group in pairs for low, high in zip(*group, strict=True)}
                master = masters[id(parameter)]
                truth["parameters"][name] = master.detach().clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    truth[key][name] = engine.optimizer.optimizer.state[master][key].clone()
            elif layout == "stage2-round-robin":  # safe_get_full_fp32_param is wrong here: DeepSpeed links masters in the unshuffled order
                truth["parameters"][name] = parameter.detach().clone()
            else:
                truth["parameters"][name] = safe_get_full_fp32_param(parameter).clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    truth[key][name] = safe_get_full_optimizer_state(parameter, key).clone()
        if rank == 0:
            torch.save(truth, folder / layout / f"truth-{step}.pt")
    engine.destroy()


def save_distributed(folder: Path, rank: int, world_size: int) -> None:
    """FOLDER/distributed/step-12 by torch.distributed.checkpoint, sharded along either dimension, and its truth.pt."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    truth = {"rows": torch.randn(7, 5), "columns": torch.randn(4, 6, 3), "whole": torch.randn(5), "scalar": torch.randn(())}
    truth |= {"half": torch.randn(3, 8).bfloat16(), "number": torch.arange(4)}
    rows = distribute_tensor(truth["rows"], mesh, [Shard(0)])
    model = {
        **truth,
        "rows": rows,
        "columns": distribute_tensor(truth["columns"], mesh, [Shard(1)]),
        "whole": distribute_tensor(truth["whole"], mesh, [Replicate()]),
        "half": distribute_tensor(truth["half"], mesh, [Shard(1)]),
    }
    state = {"rows": {"exp_avg": rows * 2, "exp_avg_sq": rows * 3, "step": torch.tensor(5.0)}}
    whole = {"model": model, "optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": ["rows"]}]}, "step": 12}
    dcp.save(whole, checkpoint_id=folder / "distributed" / "step-12")  # pyright: ignore[reportPrivateImportUsage]
    if rank == 0:
        torch.save(truth, folder / "distributed" / "truth.pt")


def join() -> tuple[Path, int, int]:
    """Join the other ranks, as FOLDER RANK WORLD_SIZE PORT of the command line say; returns the first three."""
    folder, rank, world_size, port = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compiler needed
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return folder, rank, world_size


def main() -> None:
    folder, rank, world_size = join()
    for layout in sys.argv[5:]:
        make(folder, layout, rank, world_size)
    save_distributed(folder, rank, world_size)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # ZeRO-3 over gloo may abort while the interpreter shuts down


if __name__ == "__main__":
    main()
