"""A judge of chat answers behind an OpenAI-compatible chat API: a commercial service, vLLM, or llama.cpp's server.

The protocol follows single-answer grading (MT-Bench, arXiv 2306.05685) and the checklist score (WildBench, arXiv
2406.04770): first an explanation, then a score of 1 to 10 in double brackets. The prompts' wording is this project's
own, so scores are comparable with each other, but only roughly with published scores. `PROMPTS` is the version of the
wording and is stored with each judgement.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lightning_danube.evaluation.exchange import exchange
from lightning_danube.outside.secrets import key_of, redacted, secret_in

PROMPTS = "danube-judge-1"
CHARACTERS_A_TOKEN = 4
"""A rough mean for English text, used in estimates."""

REPLACEABLE = {"temperature": None, "max_tokens": "max_completion_tokens"}
"""Field of a request that some servers refuse → the field that replaces it; None: it is left out."""

REDIRECTS = (301, 302, 303, 307, 308)
MOST_OF_AN_ERROR = 1 << 16
"""Bytes that are read of a server's error."""

SYSTEM = (
    "You grade answers that an assistant gave to a user. Judge how helpful, relevant, correct, thorough and clear the "
    "answer is. Length by itself earns nothing. First explain your judgement in a few sentences. Then end with a "
    "line that holds nothing but the grade, a whole number from 1 (useless) to 10 (could not be better), in double "
    "square brackets: [[N]], with the number in place of N"
)
ASK_FOR_GRADE = (
    "Your reply had no grade. Reply with the grade alone, in double square brackets: [[N]], with the number in place "
    "of N"
)


def grading_messages(
    conversation: Sequence[dict[str, str]], answer: str, reference: str | None, checklist: Sequence[str]
) -> list[dict[str, str]]:
    """Returns the messages to the judge: the conversation up to the last question, and the answer to grade."""
    parts = []
    for message in conversation:
        who = {"user": "User", "assistant": "Assistant", "system": "System"}[message["role"]]
        parts.append(f"### {who}\n{message['content']}")
    parts.append(f"### Answer to grade\n{answer or '(the answer is empty)'}")
    if reference is not None:
        parts.append(f"### A correct answer, to compare with\n{reference}")
    if checklist:
        points = "\n".join(f"- {point}" for point in checklist)
        parts.append(f"### Questions to ask yourself about the answer\n{points}")
    parts.append("Grade the answer to the last message of the user.")
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(parts)}]


def grade_in(reply: str) -> float | None:
    """Returns the last grade in a reply; None if there is no grade or the grade is not from 1 to 10.

    A server may leave a model's thoughts in the reply: between `<think>` and `</think>`, or only up to `</think>` where
    the model's chat template writes the first tag. A number in a thought is not a grade.
    """
    verdict = reply.rpartition("</think>")[2].partition("<think>")[0]
    found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", verdict)
    if not found:
        return None
    grade = float(found[-1])
    return grade if 1 <= grade <= 10 else None


class Judgement(NamedTuple):
    """A grade, or None for an answer that could not be graded, which is not the worst grade.

    `problem` says why there is no grade; `attempts` counts requests.
    """

    score: float | None
    reply: str
    attempts: int
    problem: str | None = None


class JudgeRefused(ValueError):
    """The judge refuses, and more attempts would not help: a wrong key, model or address."""


@dataclass
class ChatJudge:
    """A judge behind an OpenAI-compatible chat API.

    A server may refuse a field of the request: models that think take `max_completion_tokens` instead of `max_tokens`,
    and no temperature. If its answer names such a field, the request is sent again without it, and so are all later
    requests.

    Args:
        base_url: address of the API without /chat/completions, such as "http://localhost:8000/v1".
        model: the model's name in the API.
        api_key_variable: environment variable that holds the key; if it is not set, no key is sent.
        requests_per_minute: most requests that are started in a minute.
        attempts: most requests for one judgement; a reply without a grade is asked for again.
        timeout: seconds for a whole answer.
        new_tokens: most tokens of a judgement. A model that thinks first needs them for its thoughts, too.
        wait: seconds before the second attempt after an error; the wait doubles for each further attempt.
    """

    base_url: str
    model: str
    api_key_variable: str = "OPENAI_API_KEY"
    requests_per_minute: float | None = None
    attempts: int = 4
    timeout: float = 120.0
    new_tokens: int = 512
    wait: float = 2.0
    sleep: Callable[[float], object] | None = None
    _given_up: threading.Event = field(default_factory=threading.Event, init=False)
    _next: float = field(default=0.0, init=False)
    _refused: set[str] = field(default_factory=set, init=False)
    """Fields that the server has refused."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            shown = redacted(self.base_url).rpartition("@")[2]
            raise ValueError(f"the judge's base_url is {shown!r}: give one such as http://localhost:8000/v1")
        if secret_in(self.base_url) or not set(self.base_url).isdisjoint("?#@ "):
            raise ValueError(
                f"the judge's base_url is {redacted(self.base_url)!r}: leave out everything before @ and from ? on, "
                f"and give the key in the environment variable {self.api_key_variable}"
            )
        key_of(self.api_key_variable)
        if self.attempts < 1:
            raise ValueError(f"the judge's attempts is {self.attempts}: it must be at least 1")
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            raise ValueError(f"the judge's requests_per_minute is {self.requests_per_minute}: it must be above 0")

    def give_up(self) -> None:
        """Stops all waits and new attempts, because the evaluation ends."""
        self._given_up.set()

    def _wait(self, seconds: float) -> None:
        (self.sleep or self._given_up.wait)(seconds)

    def judge(self, messages: Sequence[dict[str, str]]) -> Judgement:
        """Returns the judgement of one answer, after at most `attempts` requests.

        Raises:
            JudgeRefused: more attempts would not help.
        """
        said = list(messages)
        reply, problem, wait = "", None, self.wait
        for attempt in range(1, self.attempts + 1):
            try:
                reply, cut_off = self._ask(said)
            except _Unavailable as error:
                problem = str(error)
                if self._given_up.is_set():
                    return Judgement(None, reply, attempt, problem)
                if attempt < self.attempts:
                    self._wait(error.wait if error.wait is not None else wait)
                    wait *= 2
                continue
            # A number in a reply that was cut off may belong to a thought, not to the verdict.
            grade = None if cut_off else grade_in(reply)
            if grade is not None:
                return Judgement(grade, reply, attempt)
            problem = "its reply held no grade"
            if cut_off:
                problem = f"its reply was cut off after new_tokens {self.new_tokens:,}: raise new_tokens"
                if not reply.strip():  # all tokens went into thoughts, and would again
                    return Judgement(None, reply, attempt, problem)
            said = [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": ASK_FOR_GRADE}]
        return Judgement(None, reply, self.attempts, problem)

    def _ask(self, messages: Sequence[dict[str, str]]) -> tuple[str, bool]:
        """Returns the judge's reply to one request, and whether it was cut off.

        The request uses urllib. huggingface_hub's InferenceClient sends the user's Hugging Face token to any server
        when no key is given, and refuses local servers under HF_HUB_OFFLINE=1.

        Raises:
            _Unavailable: a later attempt may succeed.
            JudgeRefused: more attempts would not help.
        """
        self._keep_to_the_rate()
        body = self._body(messages)
        headers = {"Content-Type": "application/json"}
        if key := key_of(self.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            answer = json.loads(exchange(request, self.timeout, _NoRedirects()))
        except urllib.error.HTTPError as error:
            if error.code in REDIRECTS:
                raise JudgeRefused(_redirected(url, error)) from None
            # Hidden before anything is cut off: half a key is still half a key.
            said = redacted(error.read(MOST_OF_AN_ERROR).decode("utf-8", "replace")).strip()
            reason = redacted(str(error.reason))
            message = f"the judge at {url} answers {error.code} {reason} ({' '.join(said.split())[:200]})"
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Unavailable(message, _seconds(error.headers.get("Retry-After"))) from None
            refused = {name for name in REPLACEABLE if name in body and re.search(rf"\b{name}\b", said)}
            if error.code in (400, 422) and refused:
                self._refused |= refused
                return self._ask(messages)
            raise JudgeRefused(message) from None
        except (OSError, ValueError, RecursionError) as error:
            # A refused or broken connection, a timeout, or a body that is not JSON or is nested too deep.
            raise _Unavailable(f"the judge at {url} does not answer ({redacted(str(error))})", None) from None
        try:
            choice = answer["choices"][0]
            reply = redacted(str(choice["message"]["content"] or ""))
            # JSON may hold half of a pair of code units, which no file takes.
            return reply.encode("utf-8", "replace").decode(), choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Unavailable(f"the judge at {url} gives an answer without a message", None) from None

    def _body(self, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
        fields = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.new_tokens}
        for name in tuple(self._refused):  # other threads may add to it
            value = fields.pop(name)
            if (other := REPLACEABLE[name]) is not None:
                fields[other] = value
        return fields

    def _keep_to_the_rate(self) -> None:
        if self.requests_per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + 60 / self.requests_per_minute
        if begin > now:
            self._wait(begin - now)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key to any host that a server names, and a POST as a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _redirected(url: str, error: urllib.error.HTTPError) -> str:
    there = redacted(str(error.headers.get("Location") or "another address"))[:200]
    return f"the judge at {url} is elsewhere ({error.code}): if {there} is right, set base_url to its address"


class _Unavailable(Exception):
    """The judge does not answer now. `wait` is the number of seconds that the server asks to wait."""

    def __init__(self, message: str, wait: float | None) -> None:
        super().__init__(message)
        self.wait = wait


def _seconds(retry_after: str | None) -> float | None:
    try:
        return None if retry_after is None else min(600.0, max(0.0, float(retry_after)))
    except ValueError:  # the header is a date
        return None


class JudgingCost(NamedTuple):
    """The estimated cost of judging, from the lengths of the texts. Dollars are None if no price is known."""

    requests: int
    tokens_in: int
    tokens_out: int
    dollars: float | None


def estimated_cost(
    prompts: Sequence[Sequence[dict[str, str]]], new_tokens: int, price_in: float | None, price_out: float | None
) -> JudgingCost:
    """Returns the estimated cost of judging.

    Args:
        price_in, price_out: dollars per million tokens.
    """
    characters = sum(len(message["content"]) for messages in prompts for message in messages)
    tokens_in, tokens_out = characters // CHARACTERS_A_TOKEN, len(prompts) * new_tokens
    dollars = None
    if price_in is not None and price_out is not None:
        dollars = (tokens_in * price_in + tokens_out * price_out) / 1e6
    return JudgingCost(len(prompts), tokens_in, tokens_out, dollars)


def judgement_key(messages: Sequence[dict[str, str]], model: str) -> str:
    """Returns a key of a question to a judge: a digest of the messages, the model and the version of the wording."""
    told: list[Any] = [PROMPTS, model, list(messages)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
