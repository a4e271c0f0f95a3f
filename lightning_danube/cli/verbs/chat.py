"""`chat`: a conversation with a model in the terminal, or with lines from a pipe."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from lightning_danube.cli.verbs.sampling import add_sampling_arguments, sampling_of
from lightning_danube.signals import ANSWERING, PROMPTING, SIGNALS
from lightning_danube.terminal import show, tell
from lightning_danube.weights.loading import add_weights_arguments, load_model, located_model

if TYPE_CHECKING:
    from lightning_danube.generation.conversation import ChatSession

COMMANDS = (
    "/reset begins a new conversation, /system TEXT one with this system message, /exit or Ctrl-D ends, Ctrl-C stops "
    "an answer"
)


def add_arguments(parser: ArgumentParser) -> None:
    add_weights_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message, where the chat template has one")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="most tokens of an answer, for which the history leaves room (1024, or half the context if that is less)",
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the first answer's draws; answer n has S + n - 1 (0)"
    )


def run(arguments: Namespace) -> None:
    model = located_model(arguments)

    import torch

    from lightning_danube.generation.conversation import ChatSession
    from lightning_danube.generation.packing import pack_for_generation

    sampling = sampling_of(arguments)
    decoder, tokenizer = load_model(model, adapter=arguments.adapter, dtype=arguments.dtype, device=arguments.device)
    decoder.eval()
    pack_for_generation(decoder)
    longest = arguments.max_new_tokens
    if longest is None:
        longest = min(1024, decoder.config.max_position_embeddings // 2)
    with torch.inference_mode():
        conversation = ChatSession(
            decoder,
            tokenizer,
            max_new_tokens=longest,
            sampling=sampling,
            seed=arguments.seed,
            system=arguments.system,
        )
        with SIGNALS.during(PROMPTING):
            converse(conversation)


def converse(conversation: ChatSession) -> None:
    """Reads questions from stdin until the input ends. Writes answers to stdout, and everything else to stderr."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 (input() has a history and editing keys once it is imported)
        remark(COMMANDS)
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                show()
            return
        except KeyboardInterrupt:
            show()
            remark("/exit or Ctrl-D ends")
            continue
        command, _, rest = line.partition(" ")
        try:
            if command == "/exit":
                return
            if command == "/reset":
                conversation.reset(conversation.system)
                remark("a new conversation begins")
            elif command == "/system":
                conversation.reset(rest.strip() or None)
                remark("a new conversation begins" + (" with this system message" if rest.strip() else ""))
            elif command.startswith("/"):
                remark(f"there is no {command}: {COMMANDS}")
            elif line:
                answer(conversation, line)
        except ValueError as error:
            remark(str(error))


def answer(conversation: ChatSession, question: str) -> None:
    """Prints an answer while it is generated."""
    coming = conversation.ask(question)
    if coming.dropped_turns:
        remark(f"the context is full: the oldest {coming.dropped_turns} of the turns are forgotten")
    interrupted = False
    try:
        with SIGNALS.during(ANSWERING), closing(iter(coming)) as pieces:
            for piece in pieces:
                show(piece, end="")
    except KeyboardInterrupt:
        interrupted = True
    show()
    said = coming.continuation
    if said is None or not said.text:
        remark("stopped before the first word, so the question is not kept")
    elif interrupted:
        remark("stopped; the text so far stays in the conversation")
    elif said.finish_reason == "length":
        remark(f"the answer was cut after {said.tokens} tokens (--max-new-tokens)")


def remark(message: str) -> None:
    """Prints a message that is not part of the conversation."""
    tell(f"({message})")
