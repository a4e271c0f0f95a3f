"""The configuration of a tiny run on two ranks, with probes."""

import json
from pathlib import Path


class TinyRun:
    """A run of 26 steps in a separate directory, which takes its texts from another.

    Args:
        texts: where texts and shards are.
        directory: for the configuration, the run and what probes write.
    """

    def __init__(self, texts: Path, directory: Path) -> None:
        self.directory, self.config = directory, directory / "tiny.yaml"
        text = (texts / "tiny.yaml").read_text()
        text = text.replace(f"{texts}/runs", f"{directory}/runs")
        text = text.replace("micro_batch_size: 8", "micro_batch_size: 4")
        # Samples take time, and nobody looks at them.
        samples = "    - class_path: lightning_danube.callbacks.TextSamples\n"
        samples += '      init_args: {prompts: ["The river"], max_new_tokens: 8}\n'
        assert samples in text
        self.config.write_text(text.replace(samples, ""))

    def add(self, probe: str, **arguments: object) -> None:
        with self.config.open("a") as file:
            file.write(f"    - class_path: tests.probes.{probe}\n      init_args: {json.dumps(arguments)}\n")

    def halt(self, where: str = "on_train_batch_start", step: int = 0) -> None:
        self.add("Halt", directory=str(self.halts(where, step)), where=where, step=step)

    def halts(self, where: str = "on_train_batch_start", step: int = 0) -> Path:
        """Returns where both ranks say that they wait, and look for the file "go"."""
        return self.directory / f"halt-{where}-{step}"

    def has_halted(self, where: str = "on_train_batch_start", step: int = 0) -> bool:
        return all((self.halts(where, step) / f"halted-{rank}").exists() for rank in (0, 1))

    def save_every(self, steps: int) -> None:
        self.config.write_text(self.config.read_text().replace("every_n_steps: 5", f"every_n_steps: {steps}"))
