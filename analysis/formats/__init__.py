"""One file a family of checkpoint formats; each makes a `Checkpoint` of what it finds. `analysis.shards.FORMATS` lists them."""
