"""Loggers of a run: where they write, how they count, and that none of them can stop a run."""
