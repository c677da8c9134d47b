"""The network: pure torch, one process, no files, no DeepSpeed."""
