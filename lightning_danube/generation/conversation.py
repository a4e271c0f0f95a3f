"""A conversation with a model: its history, what of it the cache holds, what is dropped when the context is full."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import TYPE_CHECKING

from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.text import Continuation, TextGeneration
from lightning_danube.model import KVCache
from lightning_danube.tokens.chat_template import Message, encode_chat, end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.model import Decoder


class ChatSession:
    """Turns of a user and a model.

    Keys and values of what was read stay in the cache; of the next conversation, only what comes after the common
    beginning is read.

    Args:
        decoder: in evaluation mode.
        max_new_tokens: most tokens of an answer. The history always leaves so much room in the context.
        seed: of the first answer's draws; each later answer has the next number.
        system: the system's message, where the template has one.

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
        """Begin anew, with this system message or none."""
        if system is not None:
            encode_chat(self.tokenizer, [{"role": "system", "content": system}, *as_messages([], "hello")], True)
        self.system = system
        self.turns = []

    def ask(self, question: str) -> Answer:
        """The answer to a question, to be iterated for its pieces of text. Turns that no longer fit are dropped.

        Raises:
            ValueError: the question does not fit the context even alone; the conversation stays as it was.
        """
        kept = self.turns
        ids = self._encode(kept, question)
        if kept and len(ids) > self.room:
            # Down to half of the room, not just below it: what is left has to be read anew, and should not have to be
            # after every question from now on.
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
    """An answer in the making. Whoever iterates it may stop at any time: what was said so far becomes the turn."""

    conversation: ChatSession
    question: str
    prompt_ids: list[int]
    dropped_turns: int
    continuation: Continuation | None = None

    def __iter__(self) -> Generator[str]:
        conversation, ids = self.conversation, self.prompt_ids
        # The last token has to be read in any case: its logits are what the answer starts from.
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
            read = [*ids, *(int(step) for step in generation.tokens.steps)]
            conversation.cached_ids = read[: conversation.cache.length]


def as_messages(turns: list[tuple[str, str]], question: str) -> list[Message]:
    messages: list[Message] = []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]


def common_beginning(one: list[int], other: list[int]) -> int:
    """How many elements two lists have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
