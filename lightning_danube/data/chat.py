"""Conversations as token ids, by the tokenizer's own chat template or, where it has none, by Danube's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""`role` ("system", "user", "assistant") and `content`."""

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
"""The format of the H2O-Danube chat models. The markers are text, not tokens of their own."""


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template, else Danube's."""
    return DANUBE_TEMPLATE if tokenizer.chat_template is None else str(tokenizer.get_chat_template())


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The text of a conversation; `add_generation_prompt` opens the assistant's next turn.

    Raises:
        ValueError: the template has no place for such messages.
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
    """Token ids of a conversation. Special tokens are those that the template writes, so none is added, and text that
    spells one becomes one."""
    text = render_chat(tokenizer, messages, add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's end, and the special token with which its template closes a turn.
    These differ where a base model's tokenizer got a chat template."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is not None:
        answer = "an answer"
        turn = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        _, _, closing = render_chat(tokenizer, turn, False).rpartition(answer)
        first = tokenizer(closing, add_special_tokens=False).input_ids[:1]
        ends += [token for token in first if token in tokenizer.all_special_ids and token not in ends]
    return ends
