"""A run's checkpoints on disk: each checkpoint is complete or absent."""

EVERY_N_STEPS = 1000
"""Default number of optimizer steps between two checkpoints of a run."""
