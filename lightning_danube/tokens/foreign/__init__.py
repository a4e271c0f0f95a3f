"""Token files that other tools wrote, as sources of a pre-training run: nothing is copied, each format is one file."""
