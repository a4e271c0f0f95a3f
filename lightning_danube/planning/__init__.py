"""Predicts before a run starts what it needs: memory, devices, time, checkpoints."""
