"""Encodes conversations with the tokenizer's own chat template, or with Danube's if the tokenizer has none."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_danube.tokens.hub import first_line
from lightning_danube.tokens.template_limits import MOST_MEMORY, MOST_SECONDS, TooLong, limited
from lightning_danube.tokens.tokenizer import model_ends

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""`role` ("system", "user", "assistant") and `content`."""

ENCODING = "2"
"""The version of the encoding. Version 1 encoded an answer together with the text that opens it."""

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
        ValueError: see `apply_template`.
    """
    return apply_template(tokenizer, messages, add_generation_prompt=add_generation_prompt)


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    """Returns the text that the tokenizer's template, or Danube's, makes of a conversation.

    Args:
        options: of transformers' `apply_chat_template`.

    Raises:
        ValueError: the template refuses these messages, fails on them, or takes too much time or memory.
    """
    from jinja2.exceptions import TemplateError

    template = chat_template_of(tokenizer)
    said = [dict(message) for message in messages]
    try:
        with limited():
            return str(tokenizer.apply_chat_template(said, chat_template=template, tokenize=False, **options))
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    except TooLong:
        reason = f"it computes for more than {MOST_SECONDS:.0f} seconds"
        raise ValueError(f"the chat template fails on this conversation ({reason}): correct the template") from None
    except Exception as error:  # a template is a program of somebody else, so any error can come out of it
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, MemoryError):
            reason = f"it takes more than {MOST_MEMORY >> 20:,} MiB of memory"
        # Not `from error`: the limit is the template's, and the machine is not out of memory.
        raise ValueError(f"the chat template fails on this conversation ({reason}): correct the template") from None


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


class MessageText(NamedTuple):
    """What a template has made of a message: its text, and whether that is the message without outer white space."""

    text: str
    unchanged: bool


class _Part(NamedTuple):
    """A text of the template (`is_literal`) or a content. An answer begins with the part that `begins` it."""

    text: str
    is_literal: bool = False
    begins: bool = False
    learned: bool = False


@dataclass
class _Run:
    """The text between two special tokens: where answers begin in it, and which stretches are learned."""

    begins_text: bool = False
    text: str = ""
    cuts: list[int] = field(default_factory=list)
    learned: list[tuple[int, int]] = field(default_factory=list)

    def add(self, text: str, learned: bool) -> None:
        start, self.text = len(self.text), self.text + text
        if not learned or not text:
            return
        if self.learned and self.learned[-1][1] == start:
            start = self.learned.pop()[0]
        self.learned.append((start, len(self.text)))


class ChatEncoder:
    """Encodes conversations and finds the tokens of the answers, from the tokenizer's template alone.

    A template is a program. Rendering it with placeholders as contents shows the text that it writes around the
    contents. So no template needs its own description, and the template's markers are distinct from markers that a
    user has typed.

    An answer is encoded apart from the text that opens it, because generation encodes only that text. Otherwise the end
    of a marker and the first character of an answer could form one token, which a model never has to say.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._added = {str(token): (int(i), token) for i, token in self._backend.get_added_tokens_decoder().items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._special_pattern = _one_of(longest_first)
        self._spelled_pattern = _one_of([mark for mark in longest_first if self._added[mark][1].special])
        self._around: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
        self._openings: dict[tuple[str, bool], list[int]] = {}

    @property
    def fingerprint(self) -> str:
        """Returns a hash of everything that determines the ids of a conversation."""
        parts = (self._backend.to_str(), chat_template_of(self.tokenizer), str(self.tokenizer.special_tokens_map))
        return hashlib.sha256("\n".join((ENCODING, *parts)).encode()).hexdigest()[:16]

    def check_learnable(self) -> None:
        """Checks with small conversations that answers can be located and that they end with a special token.

        Raises:
            NotLearnable: an answer cannot be located, ends without a special token, or does not continue its prompt.
        """
        turns = _asked("question", "answer")
        around = self._rendered_around(turns, False)
        if not self._special_pattern.search(around[-1]):
            raise NotLearnable(
                "the chat template ends an answer with no special token of the tokenizer, so a model could not learn "
                "to stop: give a tokenizer whose template does"
            )
        if self._opening(("user", "assistant"), 1, around) is None:
            opened, text = render_chat(self.tokenizer, turns[:1], True), render_chat(self.tokenizer, turns, False)
            raise NotLearnable(
                f"the chat template opens an answer to come by other text than one that is there ({opened!r}, "
                f"{text!r}): what is learned would not be what is asked for"
            )
        if not any(self.encode(turns).learned):
            raise NotLearnable(self.unlearned(turns))
        for mark in self._special_pattern.findall("".join(around)):
            token = self._added[mark][1]
            if token.lstrip or token.rstrip or token.single_word:
                raise NotLearnable(
                    f"the special token {mark!r} of the chat template includes the space around it, which is not "
                    "supported"
                )
        self._check_probes()

    def _check_probes(self) -> None:
        """Checks that answers of many kinds continue their prompt, and that encoding in parts changes no text."""
        plain_are_equal = False
        for answer in PROBES:
            turns = _asked("question", answer)
            ids, asked = self.encode(turns).ids, self.encode(turns[:1], True).ids
            whole = list(self.tokenizer(render_chat(self.tokenizer, turns, False), add_special_tokens=False).input_ids)
            plain_are_equal = plain_are_equal or ids == whole
            if ids[: len(asked)] != asked or self.tokenizer.decode(ids) != self.tokenizer.decode(whole):
                raise NotLearnable(
                    f"the tokenizer encodes the answer {answer!r} differently in a conversation and in parts, which is "
                    "not supported"
                )
        if not plain_are_equal:
            raise NotLearnable(
                "the tokenizer encodes conversations differently as a whole and in parts, which is not supported"
            )

    def turn_end(self) -> int | None:
        """Returns the special token that ends an answer in the template; None if the template has none."""
        try:
            closing = self._rendered_around(_asked("a question", "an answer"), False)[-1]
        except ValueError:  # the template refuses such a conversation
            return None
        mark = self._special_pattern.search(closing)
        return None if mark is None else self._added[mark[0]][0]

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        answers: Literal["all", "last"] | Sequence[bool] = "all",
    ) -> EncodedChat:
        """Returns the ids of a conversation, and which tokens are learned.

        Learned are the tokens of all answers, of the last answer, or of the messages that are marked, and the special
        tokens that end them. An answer that the template rewrites is not learned; `unlearned` says why.

        Raises:
            ValueError: the template refuses these messages.
        """
        text = render_chat(self.tokenizer, messages, add_generation_prompt)
        try:
            parts = self._parts(messages, text, add_generation_prompt, answers)
        except NotLearnable:
            # A template that leaves out messages can still give a prompt.
            return self._encode_whole(messages, text, add_generation_prompt)
        return self._encode_parts(parts)

    def _encode_whole(self, messages: Sequence[Message], text: str, add_generation_prompt: bool) -> EncodedChat:
        """Encodes a rendered conversation whose contents cannot be located. No token is learned.

        Special tokens that a message spells are hidden from the template by placeholders, so they stay text.

        Raises:
            ValueError: the template writes other text for the placeholders.
        """
        spelled: list[str] = []

        def hide(mark: re.Match[str]) -> str:
            spelled.append(mark[0])
            return f"{_MARK}{len(spelled) - 1}{_MARK}"

        hidden = [{**message, "content": self._spelled_pattern.sub(hide, message["content"])} for message in messages]
        rendered = render_chat(self.tokenizer, hidden, add_generation_prompt) if spelled else text
        if self._spelled_pattern.findall(rendered) == self._spelled_pattern.findall(text):
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            return EncodedChat(ids, [False] * len(ids))
        texts = _HIDDEN.split(rendered)
        # The numbers of placeholders have odd places.
        texts[1::2] = [spelled[int(number)] if int(number) < len(spelled) else "" for number in texts[1::2]]
        if "".join(texts) != text:
            number = next(number for number, one in enumerate(messages) if self._spelled_pattern.search(one["content"]))
            raise ValueError(
                f"message {number + 1} spells the special token {spelled[0]!r}, and the chat template rewrites the "
                "messages so that it cannot be kept apart from the template's own: remove it from the message"
            )
        return self._encode_parts([_Part(piece, is_literal=place % 2 == 0) for place, piece in enumerate(texts)])

    def unlearned(self, messages: Sequence[Message]) -> str:
        """Returns why an answer of these messages is not learned: the last of the reasons."""
        try:
            around, contents = self._located(messages, render_chat(self.tokenizer, messages, False), False)
        except NotLearnable as error:
            return str(error)
        roles = tuple(message["role"] for message in messages)
        reasons = [self._unlearned(number, roles, around, contents) for number in range(len(roles))]
        return [reason for role, reason in zip(roles, reasons, strict=True) if role == "assistant" and reason][-1]

    def _unlearned(
        self, number: int, roles: tuple[str, ...], around: Sequence[str], contents: Sequence[MessageText]
    ) -> str | None:
        """Returns why an answer cannot be learned; None if it can."""
        if not contents[number].unchanged:
            return f"the chat template changes what message {number + 1} says"
        if self._opening(roles, number, around) is None:
            return f"the chat template opens the answer in message {number + 1} by other text than an answer to come"
        if not self._special_pattern.search(around[number + 1]):
            return f"the chat template ends message {number + 1} with no special token"
        return None

    def _located(
        self, messages: Sequence[Message], text: str, add_generation_prompt: bool
    ) -> tuple[list[str], list[MessageText]]:
        """Returns the template's texts and the contents between them.

        Raises:
            NotLearnable: the contents cannot be located.
        """
        around = self._rendered_around(messages, add_generation_prompt)
        contents = contents_within(text, around, messages)
        for number, content in enumerate(contents, start=1):
            # Such a text may have been written by the template or typed by a user.
            if not content.unchanged and self._special_pattern.search(content.text):
                raise NotLearnable(f"the chat template changes message {number}, which spells a special token")
        return around, contents

    def _parts(
        self,
        messages: Sequence[Message],
        text: str,
        add_generation_prompt: bool,
        answers: Literal["all", "last"] | Sequence[bool],
    ) -> list[_Part]:
        """Returns a rendered conversation in parts.

        Raises:
            NotLearnable: the contents cannot be located.
        """
        around, contents = self._located(messages, text, add_generation_prompt)
        roles = tuple(message["role"] for message in messages)
        wanted = [number for number, role in enumerate(roles) if role == "assistant"]
        if not isinstance(answers, str):
            wanted = [number for number in wanted if answers[number]]
        elif answers == "last":
            wanted = wanted[-1:]
        parts = []
        for number, (literal, content) in enumerate(zip(around, contents, strict=False)):
            if roles[number] != "assistant":
                parts += [_Part(literal, is_literal=True), _Part(content.text)]
                continue
            learned = number in wanted and self._unlearned(number, roles, around, contents) is None
            opening = self._opening(roles, number, around)
            at = len(literal) if opening is None else opening
            # The template's text between the prompt and the content is for the model to say.
            parts += [
                _Part(literal[:at], is_literal=True),
                _Part(literal[at:], is_literal=True, begins=True, learned=learned),
                _Part(content.text, learned=learned),
            ]
        return [*parts, _Part(around[-1], is_literal=True)]

    def _opening(self, roles: Sequence[str], number: int, around: Sequence[str]) -> int | None:
        """Returns how much of the text before an answer is in the prompt for it, in characters.

        None if the template opens an answer to come by other text than an answer that is there.
        """
        try:
            prompt = self._rendered_around([{"role": role, "content": ""} for role in roles[:number]], True)[-1]
        except ValueError:  # the template refuses a conversation that ends here
            return None
        return len(prompt) if around[number].startswith(prompt) else None

    def _encode_parts(self, parts: Sequence[_Part]) -> EncodedChat:
        encoded, run = EncodedChat([], []), _Run(begins_text=True)
        learning = False
        for part in parts:
            if part.begins and run.text:
                run.cuts.append(len(run.text))
            if part.begins or not part.is_literal:
                learning = part.learned
            place = 0
            for mark in self._special_pattern.finditer(part.text) if part.is_literal else ():
                run.add(part.text[place : mark.start()], learning)
                self._encode_run(run, encoded)
                encoded.ids.append(self._added[mark[0]][0])
                encoded.learned.append(learning)
                # The first special token behind an answer ends it.
                learning = learning and part.begins
                run, place = _Run(), mark.end()
            run.add(part.text[place:], learning)
        self._encode_run(run, encoded)
        return encoded

    def _encode_run(self, run: _Run, encoded: EncodedChat) -> None:
        """Appends the ids of the text between two special tokens. Nothing in this text becomes a special token."""
        if not run.text:
            return
        prefix = run.begins_text or not self._prefix_at_first_only
        pieces = [(0, self._encoded(run.text, prefix))]
        whole = pieces[0][1].ids
        openings = (self._ids_of_opening(run.text[:cut], prefix) for cut in run.cuts)
        if any(whole[: len(opening)] != opening for opening in openings):
            pieces = [
                (start, self._encoded(run.text[start:end], prefix and start == 0))
                for start, end in itertools.pairwise([0, *run.cuts, len(run.text)])
            ]
        for shift, encoding in pieces:
            encoded.ids.extend(encoding.ids)
            encoded.learned.extend(
                any(begin <= start + shift and end + shift <= stop for begin, stop in run.learned)
                for start, end in encoding.offsets
            )

    def _ids_of_opening(self, text: str, prefix: bool) -> list[int]:
        """Returns the ids of the text before an answer. Templates open all answers by a few texts."""
        key = (text, prefix)
        if key not in self._openings:
            if len(self._openings) == _OPENINGS_KEPT:
                self._openings.clear()
            self._openings[key] = list(self._encoded(text, prefix).ids)
        return self._openings[key]

    def _encoded(self, text: str, prefix: bool) -> Encoding:
        """Encodes a text without special tokens. Without `prefix`, no space is put before it."""
        backend = self._backend if prefix else self._backend_without_prefix
        backend.encode_special_tokens = True
        try:
            return backend.encode(text, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False

    @cached_property
    def _backend_without_prefix(self) -> Tokenizer:
        # Once: writing 32,000 pieces as text takes 60 ms.
        return without_prefix(self._backend.to_str())

    @cached_property
    def _prefix_at_first_only(self) -> bool:
        """Whether the tokenizer puts a space before a text, but not before what follows a special token."""
        splitting = self._backend.pre_tokenizer
        return splitting is not None and any(
            step.get("prepend_scheme") == "first" for step in _steps(json.loads(splitting.__getstate__()))
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
_HIDDEN = re.compile(f"{_MARK}([0-9]+){_MARK}")


PROBES = (
    "answer",
    "The",
    "42",
    '"Yes," he said.',
    "(a) b",
    "'s",
    ">= 1",
    "</b>",
    "| x |",
    "  indented",
    "\n\n- item",
    "é 你好",
)
"""Answers whose first characters can form a token with the end of a marker, and plain ones."""
_OPENINGS_KEPT = 64


def _asked(question: str, *answer: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}]
    return messages + [{"role": "assistant", "content": text} for text in answer]


def _one_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern that finds any of the texts, the first of them where several begin at one place."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


@lru_cache(maxsize=2)
def without_prefix(tokenizer_json: str) -> Tokenizer:
    """Returns a tokenizer that puts no space before a text, for a text that continues another one.

    Args:
        tokenizer_json: content of the tokenizer's tokenizer.json.
    """
    from tokenizers import Tokenizer

    description = json.loads(tokenizer_json)
    for step in _steps(description["normalizer"]):
        if step["type"] == "Prepend":
            step["prepend"] = ""
    for step in _steps(description["pre_tokenizer"]):
        if "prepend_scheme" in step:
            step["prepend_scheme"] = "never"
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
    return Tokenizer.from_str(json.dumps(description))


def _steps(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or a pre-tokenizer, those of a sequence one by one."""
    if description is None:
        return []
    inner = description.get("normalizers") or description.get("pretokenizers") or ()
    return [description, *(step for one in inner for step in _steps(one))]


def contents_within(text: str, around: Sequence[str], messages: Sequence[Message]) -> list[MessageText]:
    """Returns the contents as a template has written them.

    Raises:
        NotLearnable: the texts around the contents are not those of the template.
    """
    if not text.startswith(around[0]):
        raise NotLearnable("the chat template writes other text for these contents than for others")
    contents = []
    place = len(around[0])
    for number, (message, after) in enumerate(zip(messages, around[1:], strict=True), start=1):
        said = message["content"]
        forms = (said, said.strip(), said.lstrip(), said.rstrip())
        content = next((form for form in forms if text.startswith(form + after, place)), None)
        unchanged = content is not None
        if content is None:
            end = len(text) - len(after) if number == len(messages) else text.find(after, place)
            if end < place or not after or not text.startswith(after, end):
                raise NotLearnable(
                    f"the chat template changes what message {number} says, and what it writes around it"
                )
            content = text[place:end]
        contents.append(MessageText(content, unchanged))
        place += len(content) + len(after)
    if place != len(text):
        raise NotLearnable("the chat template writes other text for these contents than for others")
    return contents


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end an answer: eos, the special token that closes a turn, and those that a model names.

    They differ if a chat template was added to a base model's tokenizer. A model names tokens in the files beside its
    weights.
    """
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        ends.append(ChatEncoder(tokenizer).turn_end())
    ends += model_ends(tokenizer)
    return [int(end) for end in dict.fromkeys(ends) if end is not None]
