"""A template of somebody else has a limit of time and of memory, and every end of it is one line."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.tokens import chat_template
from lightning_danube.tokens.chat_template import ChatEncoder, render_chat
from lightning_danube.tokens.template_limits import TooLong, limited
from tests.tiny_models import tiny_tokenizer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MESSAGES = [{"role": "user", "content": "question"}]


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "limited", lambda: limited(0.1, 1 << 28))


@pytest.mark.parametrize(
    "template",
    [ENDLESS, "{{ 9 ** (9 ** 9) }}", "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}"],
)
@pytest.mark.usefixtures("impatient")
def test_a_template_that_computes_for_ever_ends_in_one_line(template: str) -> None:
    with pytest.raises(ValueError, match=r"\(it computes for more than 10 seconds\)") as refused:
        render_chat(with_template(template), MESSAGES, True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", r"\(ZeroDivisionError: division by zero\)"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: maximum recursion depth"),
        ("{{ 'a' * 4e9 }}", "TypeError: can't multiply"),
        ("{{ messages[9].content }}", "the chat template refuses this conversation: "),
        ("{% for", "the chat template refuses this conversation: "),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses this conversation: access to attribute"),
    ],
)
def test_what_a_template_does_to_the_machine_ends_in_one_line(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        render_chat(with_template(template), MESSAGES, True)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("impatient")
def test_a_tokenizer_with_an_endless_template_is_refused_for_training() -> None:
    with pytest.raises(ValueError, match="computes for more than"):
        ChatEncoder(with_template(ENDLESS)).check_learnable()


LARGE = """
import sys
from lightning_danube.tokens import chat_template
from lightning_danube.tokens.template_limits import limited
from tests.tiny_models import tiny_tokenizer

chat_template.limited = lambda: limited(60, 1 << 28)
tokenizer = tiny_tokenizer()
for tokenizer.chat_template in sys.argv[1:]:
    try:
        chat_template.render_chat(tokenizer, [{"role": "user", "content": "question"}], True)
    except ValueError as error:
        print(error)
print(len(bytearray(1 << 29)))
"""


@pytest.mark.medium
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_has_a_limit_that_ends_with_the_block() -> None:
    """In a new process: one that has freed much memory and kept it takes no more from the system."""
    templates = [
        "{{ 'a' * 4000000000 }}",
        "{{ 'a'.center(4000000000) }}",
        "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    ]
    command = [sys.executable, "-c", LARGE, *templates]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    *refused, after = done.stdout.splitlines()
    assert len(refused) == 3 and all("(it takes more than 1,024 MiB of memory)" in line for line in refused)
    assert after == str(1 << 29) and not done.returncode


def test_limits_of_time_end_with_the_block() -> None:
    """The timer is that of processor time alone: waiting is not counted."""
    before = signal.getsignal(signal.SIGVTALRM)
    with limited(60):
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0) and signal.getsignal(signal.SIGVTALRM) is before


def test_other_threads_render_without_a_limit_of_time() -> None:
    told: list[object] = []

    def render() -> None:
        told.append(render_chat(with_template("{{ messages[0].content }}"), MESSAGES, False))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert told == ["question"]


def test_too_long_passes_by_handlers_of_exceptions() -> None:
    assert not issubclass(TooLong, Exception)
