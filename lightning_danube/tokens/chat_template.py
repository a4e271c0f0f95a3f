"""Encodes conversations with the tokenizer's own chat template, or with Danube's if the tokenizer has none."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""`role` ("system", "user", "assistant") and `content`."""

MARKERS = ("<|prompt|>", "<|answer|>")
"""The markers that open a question and an answer in `DANUBE_TEMPLATE`. In Danube's own tokenizer, a marker is ordinary
text of several tokens. In a tokenizer made by the verb `tokenizer`, each marker is one special token."""

DANUBE_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- raise_exception('there is no system role: say it in the first message of the user') -}}
    {%- elif message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('message ' ~ loop.index ~ ' is by ' ~ message['role'] ~ ': user and assistant take turns, \
and the user begins') -}}
    {%- endif -%}
    {{- ('<|prompt|>' if message['role'] == 'user' else '<|answer|>') ~ message['content'] | trim ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|answer|>' -}}
{%- endif -%}
"""
"""The format of the H2O-Danube chat models."""


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the tokenizer's own template, or Danube's if the tokenizer has none."""
    return DANUBE_TEMPLATE if tokenizer.chat_template is None else str(tokenizer.get_chat_template())


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Returns the text of a conversation. `add_generation_prompt` opens the assistant's next turn.

    Raises:
        ValueError: the template refuses these messages.
    """
    from jinja2.exceptions import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=chat_template_of(tokenizer),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> list[int]:
    """Returns the token ids of a conversation.

    Only the template writes special tokens. A message that spells a special token stays text.
    """
    return ChatEncoder(tokenizer).encode(messages, add_generation_prompt).ids


class EncodedChat(NamedTuple):
    """Token ids of a conversation, and for each token whether the model learns it as part of an answer."""

    ids: list[int]
    learned: list[bool]


class NotLearnable(ValueError):
    """Says why a model cannot learn from conversations in a chat template."""


class ChatEncoder:
    """Encodes conversations and finds the tokens of the answers, from the tokenizer's template alone.

    A template is a program. Rendering it with placeholders as contents shows the text that it writes around the
    contents. So no template needs its own description, and the template's markers are distinct from markers that a
    user has typed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._special = {str(token): int(i) for i, token in self._backend.get_added_tokens_decoder().items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._around: dict[tuple[bool, tuple[str, ...]], list[str]] = {}

    @property
    def fingerprint(self) -> str:
        """Returns a hash of everything that determines the ids of a conversation."""
        parts = (self._backend.to_str(), chat_template_of(self.tokenizer), str(self.tokenizer.special_tokens_map))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def check_learnable(self) -> None:
        """Checks with a small conversation that answers can be located and that they end with a special token.

        Raises:
            NotLearnable: an answer cannot be located, or ends without a special token.
        """
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        if not self._special_pattern.search(self._rendered_around(turns, False)[-1]):
            raise NotLearnable(
                "the chat template ends an answer with no special token of the tokenizer, so a model could not learn "
                "to stop: give a tokenizer whose template does"
            )
        text = render_chat(self.tokenizer, turns, False)
        opened = render_chat(self.tokenizer, turns[:1], True)
        if not text.startswith(opened + "answer"):
            raise NotLearnable(
                f"the chat template opens an answer to come by other text than one that is there ({opened!r}, "
                f"{text!r}): what is learned would not be what is asked for"
            )
        ids = self.encode(turns, False).ids
        if ids != list(self.tokenizer(text, add_special_tokens=False).input_ids):
            raise NotLearnable("special tokens of the tokenizer take in the space around them, which is not supported")

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        answers: Literal["all", "last"] | Sequence[bool] = "all",
    ) -> EncodedChat:
        """Returns the ids of a conversation, and which tokens are learned.

        Learned are the tokens of all answers, of the last answer, or of the messages that are marked, and the special
        tokens that end them. A token that begins before its answer (a marker and a first letter can form one token) is
        not learned.

        Raises:
            ValueError: the template refuses these messages.
        """
        text = render_chat(self.tokenizer, messages, add_generation_prompt)
        try:
            around = self._rendered_around(messages, add_generation_prompt)
            contents = contents_within(text, around, messages)
        except NotLearnable:
            # A template that rewrites messages, such as one that drops earlier reasoning, can still give a prompt.
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            return EncodedChat(ids, [False] * len(ids))
        learned = [message["role"] == "assistant" for message in messages]
        if not isinstance(answers, str):
            learned = list(answers)
        elif answers == "last":
            learned = [is_answer and not any(learned[n + 1 :]) for n, is_answer in enumerate(learned)]
        return self._encode_parts(around, contents, learned)

    def _encode_parts(self, around: Sequence[str], contents: Sequence[str], answers: Sequence[bool]) -> EncodedChat:
        encoded = EncodedChat([], [])
        run, answer_start = "", None
        learned: list[tuple[int, int]] = []

        def flush() -> None:
            nonlocal run, learned
            if run:
                self._encode_run(run, learned, encoded)
            run, learned = "", []

        for number, literal in enumerate(around):
            place = 0
            for mark in self._special_pattern.finditer(literal):
                run += literal[place : mark.start()]
                if answer_start is not None:
                    learned.append((answer_start, len(run)))
                flush()
                encoded.ids.append(self._special[mark[0]])
                encoded.learned.append(answer_start is not None)
                answer_start, place = None, mark.end()
            run += literal[place:]
            if number < len(contents):
                answer_start = len(run) if answers[number] else None
                run += contents[number]
        flush()
        return encoded

    def _encode_run(self, run: str, learned: list[tuple[int, int]], encoded: EncodedChat) -> None:
        """Appends the ids of the text between two special tokens. Nothing in this text becomes a special token."""
        self._backend.encode_special_tokens = True
        try:
            encoding = self._backend.encode(run, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = False
        encoded.ids.extend(encoding.ids)
        encoded.learned.extend(
            any(begin <= start and end <= stop for begin, stop in learned) for start, end in encoding.offsets
        )

    def _rendered_around(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[str]:
        """Returns the template's text before, between and after the contents: one string more than messages."""
        roles = tuple(message["role"] for message in messages)
        key = add_generation_prompt, roles
        if key not in self._around:
            marked = [{"role": role, "content": f"{_MARK}{number}{_MARK}"} for number, role in enumerate(roles)]
            parts = render_chat(self.tokenizer, marked, add_generation_prompt).split(_MARK)
            if parts[1::2] != [str(number) for number in range(len(roles))]:
                raise NotLearnable("the chat template leaves out, repeats or reorders messages")
            self._around[key] = parts[::2]
        return self._around[key]


_MARK = "\ue000"
"""A placeholder from Unicode's private use area, which no template and no tokenizer uses."""


def contents_within(text: str, around: Sequence[str], messages: Sequence[Message]) -> list[str]:
    """Returns the contents as a template has written them: unchanged, or without surrounding white space.

    Raises:
        NotLearnable: the template has changed a content in another way.
    """
    contents = []
    place = len(around[0])
    for number, message in enumerate(messages):
        forms = (message["content"], message["content"].strip())
        content = next((form for form in forms if text.startswith(form + around[number + 1], place)), None)
        if content is None or not text.startswith(around[0]):
            raise NotLearnable(f"the chat template changes what message {number + 1} says")
        contents.append(content)
        place += len(content) + len(around[number + 1])
    if place != len(text):
        raise NotLearnable("the chat template writes other text for these contents than for others")
    return contents


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's eos token, and the special token that closes a turn.

    The two differ if a chat template was added to a base model's tokenizer.
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is not None:
        answer = "an answer"
        turn = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        _, _, closing = render_chat(tokenizer, turn, False).rpartition(answer)
        first = tokenizer(closing, add_special_tokens=False).input_ids[:1]
        ends += [token for token in first if token in tokenizer.all_special_ids and token not in ends]
    return ends
