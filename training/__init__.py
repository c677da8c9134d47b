"""Everything between a recipe and a checkpoint."""
