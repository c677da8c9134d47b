"""Commands around training: benchmark, quickstart, checks."""
