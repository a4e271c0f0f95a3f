"""Weights: what a name means, and loading and saving them in each format."""
