"""Callbacks that print the plan and the result of a task's run, and write them to the run's directory."""
