"""What happened inside a training run, read from its checkpoints. Needs torch and `model`, never DeepSpeed or `training`."""
