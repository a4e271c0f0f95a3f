"""Loggers of a run: where they write, how they count, and that none of them can stop a run."""

TOKENS, STEPS = "tokens", "optimizer/step"
"""Names of the values that a logger adds: the training tokens, and in TensorBoard the optimizer steps."""
