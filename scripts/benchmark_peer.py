"""A peer of scripts/benchmark.py, in a process and, for litgpt, an environment of its own: nothing of ours is imported here.

    python scripts/benchmark_peer.py hf_trainer|litgpt SHAPE       SHAPE: the network, batch and steps, in JSON

The last line of the output is JSON: the seconds of each step after the warm-up, on a GPU of all of them together, since only the end
waits; and the peak of the GPU's memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

CUDA = torch.cuda.is_available()


class Times:
    """When each step began, and the last one ended."""

    def __init__(self, shape: dict[str, Any]) -> None:
        self.clock: Callable[[], float] = time.process_time if shape["clock"] == "processor" else time.perf_counter
        self.warm_up, self.steps, self.marks = shape["warm_up"], shape["steps"], []

    def mark(self, step: int) -> None:
        """Before step number `step`, and after the last."""
        counted = step in (self.warm_up, self.warm_up + self.steps)
        if CUDA and counted:
            torch.cuda.synchronize()
        if counted or (step > self.warm_up and not CUDA):
            self.marks.append(self.clock())

    def seconds(self) -> list[float]:
        between = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [between[0] / self.steps] if CUDA else between


def gated_width(shape: dict[str, Any]) -> int:
    """Of a gated MLP, whose three matrices have the parameters of our two, up to a multiple of 64: others are slow on a GPU."""
    return 64 * round(shape["mlp_width"] * 2 / 3 / 64)


def hf_trainer(shape: dict[str, Any]) -> list[float]:
    import transformers

    times, count = Times(shape), shape["warm_up"] + shape["steps"]
    config = transformers.LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["width"], num_hidden_layers=shape["depth"], num_attention_heads=shape["heads"],
        intermediate_size=gated_width(shape), max_position_embeddings=shape["length"], tie_word_embeddings=True,
        attn_implementation="sdpa", use_cache=False,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    rows = torch.randint(shape["vocabulary"], (4 * shape["micro_batch"], shape["length"]))
    data = [{"input_ids": row, "labels": row} for row in rows] * -(-count // 4)

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.mark(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.mark(count)

    with tempfile.TemporaryDirectory() as scratch:
        options = transformers.TrainingArguments(
            output_dir=scratch, max_steps=count, per_device_train_batch_size=shape["micro_batch"], report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, bf16=shape["precision"] == "bf16", max_grad_norm=1.0, use_cpu=not CUDA,
            torch_compile=shape["compile"], dataloader_pin_memory=CUDA,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config)
        trainer = transformers.Trainer(model=model, args=options, train_dataset=data, callbacks=[Watch()])  # pyright: ignore
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return times.seconds()


def litgpt(shape: dict[str, Any]) -> list[float]:
    """litgpt's network, in a loop of the calls of its pretrain.py."""
    import lightning as L  # pyright: ignore[reportMissingImports]
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    precision = "bf16-mixed" if shape["precision"] == "bf16" else "32-true"
    fabric = L.Fabric(accelerator="cuda" if CUDA else "cpu", devices=1, precision=precision)
    fabric.launch()
    config = Config(
        name="benchmark", block_size=shape["length"], n_layer=shape["depth"], n_head=shape["heads"], n_embd=shape["width"],
        padded_vocab_size=shape["vocabulary"], vocab_size=shape["vocabulary"], rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=gated_width(shape),
    )  # fmt: skip
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight  # tied, so that the parameters are as many
    model = fabric.setup(torch.compile(model) if shape["compile"] else model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=CUDA))
    batches = [torch.randint(shape["vocabulary"], (shape["micro_batch"], shape["length"] + 1), device=fabric.device) for _ in range(4)]
    times, count = Times(shape), shape["warm_up"] + shape["steps"]
    for step in range(count):
        times.mark(step)
        tokens = batches[step % 4]
        loss = chunked_cross_entropy(model(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    times.mark(count)
    return times.seconds()


def main() -> None:
    shape = json.loads(sys.argv[2])
    if not CUDA:
        torch.set_num_threads(shape["threads"])
    seconds = {"hf_trainer": hf_trainer, "litgpt": litgpt}[sys.argv[1]](shape)
    print(json.dumps({"seconds": seconds, "peak_memory_bytes": torch.cuda.max_memory_allocated() if CUDA else None}))


if __name__ == "__main__":
    main()
