"""What a run needs before it starts: memory, devices, time, checkpoints."""
