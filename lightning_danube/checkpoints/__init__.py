"""A run's checkpoints on disk: each is complete or absent."""

EVERY_N_STEPS = 1000
"""Optimizer steps between two checkpoints of a run that says nothing else."""
