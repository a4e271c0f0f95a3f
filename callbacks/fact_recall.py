"""How many facts of the made-up world a model knows."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.pretraining.position import curriculum_of
from lightning_danube.text.embedded.world import GROUPS, WORLD, Question, the_world

ROWS = 256


class FactRecall(Callback):
    """After each validation, the share of facts whose answer the model finds likelier than every other of its kind.

    Each is asked in a wording that training has only for other facts. Logs `recall/<group>` for facts stated in clean
    text alone, in noisy text alone, in both, and for all; says them; PretrainingSummary writes the last ones into
    `summary.json`, with the shares that guessing and the commonest answer to each question find. Data must have the
    tokenizer "world".
    """

    def __init__(self) -> None:
        self.known: dict[str, float] = {}
        """Group → share, of the last validation."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = curriculum_of(trainer)[0].tokenizer.name
        if name != WORLD:
            raise ValueError(
                f"FactRecall asks in words of the made-up world, data.tokenizer is {name!r}: say {WORLD}, or leave the "
                "callback out"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        questions = the_world().questions()
        # On every rank, because a sharded model is computed by all of them.
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            right = answered(pl_module, curriculum_of(trainer)[0].tokenizer.hf, questions)
        self.known = shares(questions, right)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"recall/{group}": share for group, share in self.known.items()}, step=trainer.global_step
            )
        found = ", ".join(f"{group} {share:.0%}" for group, share in self.known.items())
        commonest = commonest_shares(questions)["all"]
        say(trainer, f"facts known: {found} (by the commonest answer {commonest:.0%})")

    def summary(self) -> dict[str, Any]:
        """Shares of facts known, what guessing and the commonest answers find, and how many facts each group has."""
        questions = the_world().questions()
        return {
            **self.known,
            "guessing": sum(1 / len(question.candidates) for question in questions) / len(questions),
            "commonest": commonest_shares(questions),
            "n": {group: sum(question.group == group for question in questions) for group in GROUPS}
            | {"all": len(questions)},
        }

    def state_dict(self) -> dict[str, Any]:
        return {"known": self.known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.known = state_dict["known"]


def answered(task: LightningModule, tokenizer: Any, questions: list[Question]) -> list[bool]:
    """Whether each is: its answer has the highest logit among its candidates."""
    decoder: Any = task.decoder
    device = task.device
    right = []
    for begin in range(0, len(questions), ROWS):
        asked = questions[begin : begin + ROWS]
        prompts = [[tokenizer.bos_token_id, *tokenizer.encode(question.prompt)] for question in asked]
        longest = max(map(len, prompts))
        # What is padded at the right lies behind the token that is read, which does not see it.
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        hidden = decoder.hidden_states(ids)[torch.arange(len(asked), device=device), last]
        logits = decoder.lm_head(hidden).float()
        for row, question in zip(logits.cpu(), asked, strict=True):
            candidates = tokenizer.convert_tokens_to_ids(list(question.candidates))
            right.append(question.candidates[int(row[candidates].argmax())] == question.answer)
    return right


def shares(questions: list[Question], right: list[bool]) -> dict[str, float]:
    """Group → share of right answers; "all" is over all of them."""
    of = {
        group: [known for question, known in zip(questions, right, strict=True) if question.group == group]
        for group in GROUPS
    }
    return {group: sum(known) / len(known) for group, known in of.items()} | {"all": sum(right) / len(right)}


def commonest_shares(questions: list[Question]) -> dict[str, float]:
    """The same of who answers each question by the commonest answer to its kind."""
    return shares(questions, [question.commonest == question.answer for question in questions])
