"""Trains the toy network on batches that do not depend on the number of ranks; run once a rank.

    python resharding_worker.py FOLDER RANK WORLD_SIZE PORT LAYOUT...

Where FOLDER/LAYOUT holds no checkpoint yet it takes four steps from the start and saves after the second. Else it goes on from there
with steps three and four. Either way FOLDER/LAYOUT/weights.pt says where the float32 masters ended.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from make_checkpoints import LAYOUTS, Toy, fill, join

SEQUENCES = 6  # a step; divides by 1, 2 and 3 ranks


def main() -> None:
    folder, rank, world_size = join()
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for layout in sys.argv[5:]:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": SEQUENCES // world_size,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            **LAYOUTS[layout],
        }
        sharded = config["zero_optimization"]["stage"] == 3
        model = Toy()
        if sharded:
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = Toy()

        def gather(parameter, sharded=sharded):
            return deepspeed.zero.GatheredParameters([parameter] if sharded else [], modifier_rank=0)

        fill(model, gather)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [p for n, p in named if n.endswith("weight") and "norm" not in n]
        others = [p for n, p in named if not n.endswith("weight") or "norm" in n]
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        start = 0
        if (folder / layout / "latest").exists():
            path, _ = engine.load_checkpoint(str(folder / layout))
            assert path is not None
            start = engine.global_steps
        for step in range(start, 4):
            batch = torch.randint(13, (SEQUENCES, 9), generator=torch.Generator().manual_seed(step))
            for sequence in batch[rank::world_size]:
                engine.backward(engine(sequence))
                engine.step()
            if step == 1 and start == 0:
                engine.save_checkpoint(str(folder / layout), tag="step-00000002")
        weights = {}
        for name, parameter in named:
            with gather(parameter):  # DeepSpeed links a parameter to the wrong masters under round robin; in fp32 both are the same
                weights[name] = parameter.detach().clone() if "bf16" not in layout else safe_get_full_fp32_param(parameter).clone()
        if rank == 0:
            torch.save(weights, folder / layout / "weights.pt")
        engine.destroy()
    torch.distributed.barrier()
    os._exit(0)  # ZeRO-3 over gloo may abort while the interpreter shuts down


if __name__ == "__main__":
    main()
