"""The network: pure torch, one process, no files, no DeepSpeed."""

import logging

# Before anything imports transformers, and torchao with it, which warns of GPU kernels that a CPU has no use for.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
