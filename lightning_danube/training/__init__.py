"""Training code that all tasks share."""
