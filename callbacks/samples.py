"""Lets the model continue a few prompts after each validation, so that a person can read how it learns."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.text import encode_prompt
from lightning_danube.generation.token_stream import generate
from lightning_danube.pretraining.position import curriculum_of


class TextSamples(Callback):
    """Writes continuations as text to TensorBoard, where rank zero holds the whole model (one device, or DDP).

    Args:
        prompts: texts to continue.
        max_new_tokens: length of a continuation.
        temperature: 0 takes the likeliest token; small models then repeat themselves.
        top_k: sample among so many likeliest tokens.
    """

    def __init__(
        self, prompts: list[str], max_new_tokens: int = 48, temperature: float = 0.7, top_k: int | None = 50
    ) -> None:
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.temperature, self.top_k = temperature, top_k
        self.latest: dict[str, str] = {}
        """prompt → prompt and continuation, of the last validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        # Rank zero alone can run a model that it holds whole; a sharded one would wait for the other ranks for ever.
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            return
        data, _ = curriculum_of(trainer)
        tokenizer = data.tokenizer
        for prompt in self.prompts:
            ids = encode_prompt(tokenizer.hf, prompt)
            room = data.context_length - len(ids)
            if room < 1:
                raise ValueError(
                    f"the sample prompt {prompt!r} has {len(ids)} tokens, the context {data.context_length}"
                )
            # Its draws have a source of their own: sampling must not move the random state of training.
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                (new,) = generate(
                    pl_module.decoder,  # type: ignore[arg-type]
                    [ids],
                    min(self.max_new_tokens, room),
                    sampling=Sampling(temperature=self.temperature, top_k=self.top_k),
                    eos_ids=[tokenizer.eos_id],
                )
            self.latest[prompt] = str(tokenizer.hf.decode(ids + new, skip_special_tokens=True))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, prompt in enumerate(self.prompts, start=1):
                    # Four spaces make it a block of code in TensorBoard, which keeps line breaks.
                    text = "\n".join("    " + line for line in self.latest[prompt].splitlines())
                    logger.experiment.add_text(f"samples/{number}", text, trainer.global_step)
