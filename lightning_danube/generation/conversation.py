"""A conversation with a model: its history, the cache of what was read, and which turns a full context drops."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import TYPE_CHECKING

import torch

from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.text import Continuation, TextGeneration
from lightning_danube.model import KVCache
from lightning_danube.tokens.chat_template import Message, encode_chat, end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.model import Decoder


class ChatSession:
    """Turns of a user and a model.

    Keys and values of all tokens that were read stay in the cache. For the next answer, the model reads only the tokens
    after the beginning that both texts share.

    Args:
        decoder: in evaluation mode.
        max_new_tokens: most tokens of an answer. The history always leaves this much room in the context.
        seed: for the first answer's random numbers; each later answer has the next number.
        system: the system message, if the chat template has a place for one.

    Raises:
        ValueError: an answer would leave no room for a question, or the template has no place for a system message.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        system: str | None = None,
    ) -> None:
        context = decoder.config.max_position_embeddings
        if not 1 <= max_new_tokens < context:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; it has to be at least 1 and below the context of {context}"
            )
        self.decoder, self.tokenizer, self.sampling, self.seed = decoder, tokenizer, sampling, seed
        self.max_new_tokens, self.room = max_new_tokens, context - max_new_tokens
        self.end_ids = end_ids(tokenizer)
        self.cache = KVCache.for_decoder(decoder, 1, context)
        self.cached_ids: list[int] = []
        self.answers = 0
        self.turns: list[tuple[str, str]] = []
        """Questions and their answers."""
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Begins a new conversation, with this system message or none."""
        if system is not None:
            encode_chat(self.tokenizer, [{"role": "system", "content": system}, *as_messages([], "hello")], True)
        self.system = system
        self.turns = []

    def ask(self, question: str) -> Answer:
        """The answer to a question; iterate it for its pieces of text. Turns that do not fit any more are dropped.

        Raises:
            ValueError: the question alone does not fit the context. The conversation is not changed.
        """
        kept = self.turns
        ids = self._encode(kept, question)
        if kept and len(ids) > self.room:
            # Down to half of the room, because dropping means that all the rest is read again. This way that does not
            # happen after every question.
            while kept and len(ids) > self.room // 2:
                kept = kept[1:]
                ids = self._encode(kept, question)
        if len(ids) > self.room:
            raise ValueError(
                f"the question has {len(ids)} tokens with all that the template adds; the context has room for "
                f"{self.room}, as {self.max_new_tokens} are kept for the answer"
            )
        dropped = len(self.turns) - len(kept)
        self.turns = kept
        return Answer(self, question, ids, dropped)

    def _encode(self, turns: list[tuple[str, str]], question: str) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return encode_chat(self.tokenizer, [*system, *as_messages(turns, question)], add_generation_prompt=True)


@dataclasses.dataclass
class Answer:
    """An answer that is being generated. Iteration may stop at any time; the text so far then becomes the turn."""

    conversation: ChatSession
    question: str
    prompt_ids: list[int]
    dropped_turns: int
    continuation: Continuation | None = None

    def __iter__(self) -> Generator[str]:
        conversation, ids = self.conversation, self.prompt_ids
        # The last token is always read, because the answer starts from its logits.
        common = common_beginning(conversation.cached_ids, ids[:-1])
        conversation.cache.truncate(common)
        generation = TextGeneration(
            conversation.decoder,
            conversation.tokenizer,
            [ids],
            conversation.max_new_tokens,
            eos_ids=conversation.end_ids,
            sampling=conversation.sampling,
            seeds=[conversation.seed + conversation.answers],
            cache=conversation.cache,
        )
        (self.continuation,) = generation.rows
        try:
            for _, piece in generation:
                yield piece
        finally:
            conversation.answers += 1
            if self.continuation.text:
                conversation.turns = [*conversation.turns, (self.question, self.continuation.text)]
            steps = generation.tokens.steps
            read = [*ids, *(torch.cat(steps).tolist() if steps else [])]
            conversation.cached_ids = read[: generation.tokens.cached]
            conversation.cache.truncate(generation.tokens.cached)


def as_messages(turns: list[tuple[str, str]], question: str) -> list[Message]:
    """Earlier turns and a new question as messages of a chat template."""
    messages: list[Message] = []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]


def common_beginning(one: list[int], other: list[int]) -> int:
    """How many elements two lists share at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
