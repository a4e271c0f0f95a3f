"""The command line, called in the process of the tests."""

from pathlib import Path

from lightning_danube.__main__ import main


def run(folder: Path, *options: str, verb: str = "fit") -> int:
    """Runs a verb of the trainer with the only configuration in a folder. Returns the exit code."""
    (config,) = folder.glob("*.yaml")
    return main([verb, "--config", str(config), *options])


def fit(folder: Path, *options: str) -> int:
    return run(folder, *options)
