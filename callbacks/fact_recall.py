"""Measures how many facts of the made-up world a model knows."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.pretraining.fact_recall import commonest_shares, recall_summary, right_answers, shares
from lightning_danube.pretraining.position import curriculum_of
from lightning_danube.text.embedded.world import WORLD, the_world
from lightning_danube.training.run_facts import run_facts_of
from lightning_danube.training.trackers.loss_curve import curve_of


class FactRecall(Callback):
    """Measures after each validation for how many facts the true answer is the likeliest of its kind.

    Each question has a wording that the training texts use only for other facts. Logs `recall/<group>` for facts stated
    only in clean text, only in noisy text, in both, and for all facts, and prints them. PretrainingSummary writes the
    last shares into `summary.json`, beside those of guessing and of the commonest answers. The data must have the
    tokenizer "world".
    """

    def __init__(self) -> None:
        self.known: dict[str, float] = {}
        """Group → share, from the last validation."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = curriculum_of(trainer)[0].tokenizer.name
        if name != WORLD:
            raise ValueError(
                f"FactRecall asks in words of the made-up world, data.tokenizer is {name!r}: say {WORLD}, or leave the "
                "callback out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or curve_of(pl_module).is_brief:
            return
        questions = the_world().questions()
        decoder: Any = pl_module.decoder
        # Every rank computes the answers, because a sharded model needs all ranks.
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            right = right_answers(decoder, curriculum_of(trainer)[0].tokenizer.hf, questions, pl_module.device)
        self.known = shares(questions, right)
        self._report(pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"recall/{group}": share for group, share in self.known.items()}, step=trainer.global_step
            )
        found = ", ".join(f"{group} {share:.0%}" for group, share in self.known.items())
        say(trainer, f"facts known: {found} (by the commonest answer {commonest_shares(questions)['all']:.0%})")

    def _report(self, task: LightningModule) -> None:
        run_facts_of(task).recall = recall_summary(the_world().questions(), self.known)

    def state_dict(self) -> dict[str, Any]:
        return {"known": self.known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.known = state_dict["known"]
