import dataclasses
import os
import select
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.__main__ import main
from lightning_danube.cli.verbs.chat import converse
from lightning_danube.generation import token_stream
from lightning_danube.generation.conversation import ChatSession, common_beginning
from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.token_stream import generate
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.tokens.chat_template import Message, encode_chat
from lightning_danube.tokens.tokenizer import load_hf_tokenizer
from lightning_danube.weights.huggingface import save_hf
from tests.recorded_steps import record_on

CONTEXT = 128


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(32, 48, 2, 4, 2, vocab_size=32000, initializer_range=0.2, max_position_embeddings=CONTEXT)
    return Decoder(config).eval()


@pytest.fixture(scope="module")
def weights(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model") / "weights"
    save_hf(decoder, directory, load_hf_tokenizer("mistral"))
    return str(directory)


@pytest.fixture(params=["plain", "recorded"])
def conversation(decoder: Decoder, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    """With steps as a CPU takes them, and as a GPU does."""
    if request.param == "recorded":
        monkeypatch.setattr(token_stream, "FEWEST_RECORDED", 10)
        record_on("cpu", monkeypatch)
    return ChatSession(decoder, load_hf_tokenizer("mistral"), max_new_tokens=10, sampling=Sampling())


def alone(decoder: Decoder, messages: list[Message], new_tokens: int = 10) -> str:
    """The answer to a whole conversation that is read anew."""
    tokenizer = load_hf_tokenizer("mistral")
    ids = encode_chat(tokenizer, messages, True)
    (new,) = generate(decoder, [ids], new_tokens, eos_ids=[2])
    return str(tokenizer.decode(ids + new))[len(str(tokenizer.decode(ids))) :]


def tokens_read(decoder: Decoder) -> tuple[list[int], Any]:
    read: list[int] = []
    hook = decoder.model.embed_tokens.register_forward_hook(lambda m, inputs, out: read.append(inputs[0].shape[1]))
    return read, hook


def test_answers_are_those_to_the_whole_history_but_only_its_end_is_read(
    conversation: ChatSession, decoder: Decoder
) -> None:
    messages: list[Message] = []
    read, hook = tokens_read(decoder)
    for number, question in enumerate(["Why is it so?", "Really?", "And how?"]):
        messages.append({"role": "user", "content": question})
        whole = len(encode_chat(conversation.tokenizer, messages, True))
        read.clear()
        answer = "".join(conversation.ask(question))
        # Of the last answer's tokens the last one was never read, and the template adds a few of its own.
        assert read[0] == whole if number == 0 else read[0] < 30 < whole
        assert answer == alone(decoder, messages)
        messages.append({"role": "assistant", "content": answer})
    hook.remove()
    assert [question for question, _ in conversation.turns] == ["Why is it so?", "Really?", "And how?"]


def test_oldest_turns_are_dropped_when_the_context_is_full(conversation: ChatSession, decoder: Decoder) -> None:
    dropped = []
    for number in range(12):
        answer = conversation.ask(f"Question {number}?")
        dropped.append(answer.dropped_turns)
        turns = list(conversation.turns)
        said = "".join(answer)
        history: list[Message] = [
            message
            for question, reply in turns
            for message in ({"role": "user", "content": question}, {"role": "assistant", "content": reply})
        ]
        assert said == alone(decoder, [*history, {"role": "user", "content": f"Question {number}?"}])
        assert len(answer.prompt_ids) + 10 <= CONTEXT
    # Several at once, then none for a while: not every question reads the rest anew.
    assert sum(dropped) > 2 and dropped.count(0) > 8


def test_a_question_too_long_for_the_context_changes_nothing(conversation: ChatSession) -> None:
    said = "".join(conversation.ask("Hello?"))
    with pytest.raises(
        ValueError, match=r"the question has 2\d\d tokens .* the context has room for 118, as 10 are kept"
    ):
        conversation.ask("why " * 200)
    assert conversation.turns == [("Hello?", said)]


def test_a_stopped_answer_stays_as_far_as_it_was_said(conversation: ChatSession, decoder: Decoder) -> None:
    pieces = iter(conversation.ask("Hello?"))
    said = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.turns == [("Hello?", said)]
    messages: list[Message] = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "More?"},
    ]
    assert "".join(conversation.ask("More?")) == alone(decoder, messages)


def test_answers_are_drawn_anew_each_time_and_alike_in_each_run(decoder: Decoder) -> None:
    def answers(seed: int) -> list[str]:
        sampling = Sampling(temperature=1.0)
        talk = ChatSession(decoder, load_hf_tokenizer("mistral"), max_new_tokens=10, sampling=sampling, seed=seed)
        said = []
        for _ in range(2):
            said.append("".join(talk.ask("Hello?")))
            talk.reset(None)
        return said

    assert answers(3) == answers(3)
    assert answers(3)[0] != answers(3)[1] == answers(4)[0]


def test_common_beginning() -> None:
    assert [common_beginning(*pair) for pair in (([], [1]), ([1, 2], [1, 3]), ([1, 2], [1, 2, 3]))] == [0, 1, 2]


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str, *args: str
) -> tuple[str, str]:
    """stdout and stderr of a chat whose input is piped."""
    monkeypatch.setattr(sys, "stdin", StringIO(lines))
    assert main(["chat", "--temperature", "0", "--max-new-tokens", "10", *args]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_lines_from_a_pipe_are_answered(
    weights: str, decoder: Decoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "Why?\n\n/reset\nWhy?\n/exit\nnever asked\n"
    out, err = chat(capsys, monkeypatch, lines, "--weights", weights)
    answer = alone(decoder, [{"role": "user", "content": "Why?"}])
    assert out == f"{answer}\n" * 2
    assert err.splitlines() == [
        "(the answer was cut after 10 tokens (--max-new-tokens))",
        "(a new conversation begins)",
        "(the answer was cut after 10 tokens (--max-new-tokens))",
    ]


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(
    weights: str, decoder: Decoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "/system Be kind.\n/nothing\n" + "why " * 200 + "\nHi\n"
    out, err = chat(capsys, monkeypatch, lines, "--weights", weights)
    said = err.splitlines()
    assert "(the chat template refuses this conversation: there is no system role" in said[0]
    assert said[1].startswith("(there is no /nothing: /reset begins a new conversation")
    assert said[2].startswith("(the question has 2")
    assert out == alone(decoder, [{"role": "user", "content": "Hi"}]) + "\n"


def test_dropped_turns_are_told(
    weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = chat(capsys, monkeypatch, "Why is it so?\n" * 12, "--weights", weights)
    assert "(the context is full: the oldest " in err


def test_a_system_message_is_used_where_the_template_has_one(
    weights: str,
    tmp_path: Path,
    decoder: Decoder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer: Any = load_hf_tokenizer(weights)
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}[assistant]",
    )
    out, err = chat(capsys, monkeypatch, "Hi\n/system Be quick.\nHi\n", "--weights", weights, "--system", "Be kind.")
    for system in ("Be kind.", "Be quick."):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
        ids = encode_chat(tokenizer, messages, True)
        (new,) = generate(decoder, [ids], 10, eos_ids=[2])
        assert str(tokenizer.decode(ids + new))[len(str(tokenizer.decode(ids))) :] + "\n" in out
    assert "(a new conversation begins with this system message)" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-new-tokens", "128"], "max_new_tokens is 128; it has to be at least 1 and below the context of 128"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; it has to be at least 1"),
        (["--system", "Be kind."], "the chat template refuses this conversation: there is no system role"),
        (["--temperature", "-1"], "temperature is -1.0; it has to be at least 0"),
    ],
)
def test_wrong_options_are_answered_in_one_line(
    weights: str, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["chat", "--weights", weights, *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_an_interrupt_stops_the_answer_only(
    weights: str, decoder: Decoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_danube.generation.token_stream import TokenStream

    plain, steps = TokenStream.__next__, 0

    def interrupted(self: TokenStream) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps in (4, 5):
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(TokenStream, "__next__", interrupted)
    out, err = chat(capsys, monkeypatch, "Why?\nWhy not?\nHi\n", "--weights", weights)
    assert err.splitlines()[:2] == [
        "(stopped; the text so far stays in the conversation)",
        "(stopped before the first word, so the question is not kept)",
    ]
    first, nothing, last = out.split("\n")[:3]
    assert alone(decoder, [{"role": "user", "content": "Why?"}]).startswith(first) and nothing == ""
    history: list[Message] = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": first}]
    assert last == alone(decoder, [*history, {"role": "user", "content": "Hi"}])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal(decoder: Decoder, tmp_path: Path) -> None:
    """Ctrl-C in an answer and at the prompt, readline's history of lines, Ctrl-D."""
    import pty

    # Room for an answer that takes longer than it takes to interrupt it.
    long = Decoder(dataclasses.replace(decoder.config, max_position_embeddings=20000))
    long.load_state_dict(decoder.state_dict())
    save_hf(long, tmp_path / "weights", load_hf_tokenizer("mistral"))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lightning_danube", "chat", "--weights", str(tmp_path / "weights")]
    command += ["--max-new-tokens", "19000", "--temperature", "0"]
    environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes, since: int) -> int:
        """Where the text ends in what the terminal shows."""
        nonlocal seen
        until = time.monotonic() + 60
        while text not in seen[since:]:
            assert select.select([ours], [], [], max(0, until - time.monotonic()))[0], seen
            seen += os.read(ours, 4096)
        return since + seen[since:].index(text) + len(text)

    try:
        at = wait_for(b"> ", wait_for(b"Ctrl-C stops an answer)", 0))
        process.send_signal(signal.SIGINT)
        at = wait_for(b"> ", wait_for(b"(/exit or Ctrl-D ends)", at))
        os.write(ours, b"Why is it so?\n")
        at = wait_for(b"so?", at)
        wait_for(b" ", at)  # the answer has begun
        process.send_signal(signal.SIGINT)
        at = wait_for(b"> ", wait_for(b"(stopped; the text so far stays in the conversation)", at))
        os.write(ours, b"\x1b[A?\n")  # the line before, and one more question mark
        at = wait_for(b"Why is it so??", at)
        wait_for(b" ", at)
        process.send_signal(signal.SIGINT)
        at = wait_for(b"> ", wait_for(b"(stopped;", at))
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_the_options_of_a_chat_reach_it(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number of tokens, an answer takes at most half the context."""
    held: list[ChatSession] = []
    loaded = decoder, load_hf_tokenizer("mistral")
    monkeypatch.setattr("lightning_danube.cli.verbs.chat.located_model", lambda arguments: arguments.weights)
    monkeypatch.setattr("lightning_danube.cli.verbs.chat.load_model", lambda weights, **options: loaded)
    monkeypatch.setattr("lightning_danube.generation.packing.pack_for_generation", lambda decoder: None)
    monkeypatch.setattr("lightning_danube.cli.verbs.chat.converse", held.append)
    assert main(["chat", "--weights", "x"]) == 0
    assert main(["chat", "--weights", "x", "--seed", "7", "--max-new-tokens", "20", "--top-k", "3"]) == 0
    first, second = held
    assert (first.max_new_tokens, first.seed) == (CONTEXT // 2, 0)
    assert first.sampling == Sampling(temperature=0.7, top_k=50, top_p=1.0)
    assert (second.max_new_tokens, second.seed, second.sampling.top_k) == (20, 7, 3)


def test_a_reset_keeps_the_system_message_until_it_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __init__(self) -> None:
            self.system: str | None = "Be kind."
            self.systems: list[str | None] = []

        def reset(self, system: str | None) -> None:
            self.system = system
            self.systems.append(system)

    session: Any = Session()
    monkeypatch.setattr(sys, "stdin", StringIO("/reset\n/system  Be quick. \n/reset\n/system\n/reset\n/exit\n/reset\n"))
    converse(session)
    assert session.systems == ["Be kind.", "Be quick.", "Be quick.", None, None]
