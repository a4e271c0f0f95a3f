"""Controlled experiments: runs of variants × seeds, where everything else is equal."""
