"""Lets the model continue a few prompts after each validation, so that a person can follow what it learns."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.text import encode_prompt
from lightning_danube.generation.token_stream import generate
from lightning_danube.pretraining.position import curriculum_of
from lightning_danube.terminal import markdown_code
from lightning_danube.training.position import holds_whole_model, place_in_tensorboard, tensorboards
from lightning_danube.training.run_facts import run_facts_of
from lightning_danube.training.trackers import text_tag
from lightning_danube.training.trackers.loss_curve import curve_of


class TextSamples(Callback):
    """Writes continuations as text to TensorBoard, where rank zero holds the whole model (one device, or DDP).

    Args:
        prompts: texts to continue.
        max_new_tokens: length of a continuation.
        temperature: 0 takes the likeliest token. Small models then repeat themselves.
        top_k: sample among this number of likeliest tokens.
    """

    def __init__(
        self, prompts: list[str], max_new_tokens: int = 48, temperature: float = 0.7, top_k: int | None = 50
    ) -> None:
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.temperature, self.top_k = temperature, top_k

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not holds_whole_model(trainer):
            return
        if curve_of(pl_module).is_brief:
            return
        samples = run_facts_of(pl_module).samples
        for prompt in self.prompts:
            samples[prompt] = self._continue(trainer, pl_module, prompt)
        for tensorboard in tensorboards(trainer):
            for number, prompt in enumerate(self.prompts, start=1):
                text = markdown_code(samples[prompt])
                tensorboard.add_text(text_tag("samples", number, prompt), text, place_in_tensorboard(trainer))

    def _continue(self, trainer: Trainer, task: LightningModule, prompt: str) -> str:
        """Returns a prompt and its continuation.

        Raises:
            ValueError: the prompt fills the context.
        """
        data, _ = curriculum_of(trainer)
        tokenizer = data.tokenizer
        decoder: Any = task.decoder
        ids = encode_prompt(tokenizer.hf, prompt)
        room = data.context_length - len(ids)
        if room < 1:
            raise ValueError(f"the sample prompt {prompt!r} has {len(ids)} tokens, the context {data.context_length}")
        # `generate` has a random generator of its own: sampling does not change the random state of training.
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            (new,) = generate(
                decoder,
                [ids],
                min(self.max_new_tokens, room),
                sampling=Sampling(temperature=self.temperature, top_k=self.top_k),
                eos_ids=[tokenizer.eos_id],
            )
        return str(tokenizer.hf.decode(ids + new, skip_special_tokens=True))
