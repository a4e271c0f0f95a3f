"""Callbacks that only tests name: one writes down what was trained on, the other poisons a step."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class KeysOfSteps(Callback):
    """Writes the keys of each micro-batch to `<directory>/keys-<rank>.jsonl`, with the step it belongs to."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        line = [trainer.global_step, batch_idx, [list(key) for key in batch["keys"]]]
        with (self.directory / f"keys-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def samples_of_steps(directory: Path) -> list[list[list[int]]]:
    """Keys of each step in the order of the run: micro-batch after micro-batch, in each the ranks in turn."""
    lines = [
        (step, batch, rank, keys)
        for rank, path in enumerate(sorted(directory.glob("keys-*.jsonl")))
        for step, batch, keys in map(json.loads, path.read_text().splitlines())
    ]
    steps: dict[int, list[list[int]]] = {}
    for step, _, _, keys in sorted(lines, key=lambda line: line[:3]):
        steps.setdefault(step, []).extend(keys)
    return [steps[step] for step in sorted(steps)]


class Poison(Callback):
    """Spoils chosen optimizer steps.

    Args:
        steps: numbers of the steps, from 1.
        what: "loss" makes the loss nan, and with it the gradient; "gradient" one entry of the gradient inf, after the
            ranks have averaged theirs; "spike" multiplies the loss by a hundred.
        rank: the only rank that does it; all do without.
        micro_batch: the only micro-batch of the step that is spoilt.
    """

    def __init__(self, steps: list[int], what: str, rank: int | None = None, micro_batch: int = 0) -> None:
        self.steps, self.what, self.rank, self.micro_batch = steps, what, rank, micro_batch

    def _now(self, trainer: Trainer, batch_idx: int) -> bool:
        mine = self.rank is None or self.rank == trainer.global_rank
        here = batch_idx % trainer.accumulate_grad_batches == self.micro_batch
        return mine and here and trainer.global_step + 1 in self.steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = pl_module.training_step
        factor = {"loss": float("nan"), "spike": 100.0, "gradient": 1.0}[self.what]

        def training_step(batch: Any, batch_idx: int) -> Any:
            if not self._now(trainer, batch_idx):
                return step(batch, batch_idx)
            loss: Any = step(batch, batch_idx)
            loss = loss * factor
            pl_module._losses[-1] = loss.detach()  # type: ignore[operator]
            return loss

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        mine = self.rank is None or self.rank == trainer.global_rank
        if self.what == "gradient" and mine and trainer.global_step + 1 in self.steps:
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[0] = float("inf")
