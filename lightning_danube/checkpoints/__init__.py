"""A run's checkpoints on disk: each is complete or absent."""
