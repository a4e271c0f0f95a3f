"""A model and its tokenizer in Python: text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lightning_danube.generation.conversation import ChatSession
from lightning_danube.generation.packing import pack_for_generation
from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.text import TextGeneration, encode_prompt
from lightning_danube.tokens.chat_template import end_ids
from lightning_danube.weights.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.model import Decoder


class LanguageModel:
    """A decoder with its tokenizer, ready to generate text.

    Args:
        decoder: its weights; use `load` to read them.
        tokenizer: the tokenizer that it was trained with.
    """

    def __init__(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> None:
        self.decoder, self.tokenizer = decoder.eval(), tokenizer

    def __repr__(self) -> str:
        config = self.decoder.config
        return f"LanguageModel({config.parameters:,} parameters, context of {config.max_position_embeddings:,} tokens)"

    @cached_property
    def _packed(self) -> Decoder:
        pack_for_generation(self.decoder, rows=1)
        return self.decoder

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """Returns the continuation of a text, without the text itself.

        Args:
            max_new_tokens: most tokens of the continuation.
            temperature: 0 takes the likeliest token each time.
            top_k, top_p, repetition_penalty: see `Sampling`.
            stop: strings that end the continuation; they are not part of it.
            seed: of the draws, where the temperature is not 0.

        Raises:
            ValueError: the prompt is empty or does not fit, or a number is out of its range.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        return "".join(self.stream(prompt, max_new_tokens, sampling=sampling, stop=stop, seed=seed))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """Yields the continuation of a text piece by piece.

        Raises:
            ValueError: the prompt is empty or does not fit.
        """
        if not prompt:
            raise ValueError("the prompt is empty: give at least one word")
        with torch.inference_mode():
            generation = TextGeneration(
                self._packed,
                self.tokenizer,
                [encode_prompt(self.tokenizer, prompt)],
                max_new_tokens,
                eos_ids=end_ids(self.tokenizer),
                stop=stop,
                sampling=sampling,
                seeds=[seed],
            )
            for _, piece in generation:
                yield piece

    def chat(
        self,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        seed: int = 0,
    ) -> ChatSession:
        """Returns a new conversation: `"".join(session.ask("…"))` is an answer, and the session keeps its history.

        Raises:
            ValueError: an answer would leave no room for a question, or the template has no place for a system message.
        """
        return ChatSession(
            self._packed, self.tokenizer, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, system=system
        )

    def ask(self, question: str, *, system: str | None = None, max_new_tokens: int = 256) -> str:
        """Returns the model's likeliest answer to a question, in its chat template.

        Raises:
            ValueError: the question does not fit the context.
        """
        with torch.inference_mode():
            return "".join(self.chat(system=system, max_new_tokens=max_new_tokens).ask(question))


def load(weights: str, *, adapter: str | None = None, dtype: str | None = None, device: str = "auto") -> LanguageModel:
    """Returns the model of a name.

    Args:
        weights: a run's directory, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or "smollm2".
        adapter: a LoRA adapter to merge into the weights.
        dtype: type of the parameters; as they are stored if not given.
        device: "auto" is the GPU if there is one.

    Raises:
        ValueError: nothing has this name, or it is not a model.
    """
    return LanguageModel(*load_model(str(weights), adapter=adapter, dtype=dtype, device=device))
