"""`generate`: continues prompts. Prints each prompt with its continuation; with `--chat`, only the answer."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_danube.cli.verbs.sampling import add_sampling_arguments, sampling_of
from lightning_danube.outside.texts import printable
from lightning_danube.terminal import tell
from lightning_danube.weights.loading import add_weights_arguments, load_model, located_model
from lightning_danube.weights.tokenizers import not_tuned_for_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.generation.text import Continuation


class Prompt(NamedTuple):
    text: str
    place: str
    """Where the prompt was given, for messages."""


def add_arguments(parser: ArgumentParser) -> None:
    add_weights_arguments(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="more prompts: .txt with one on each line, .jsonl (.csv, .parquet) with the key prompt, also as .gz and "
        ".zst; -: standard input, jsonl if it begins with {, else one on each line",
    )
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is a question in the chat template; only the answer is printed"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="most tokens of a continuation (64)"
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the first prompt's draws; prompt n has S + n - 1 (0)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="prompts generated at once (8)")
    parser.add_argument(
        "--window",
        type=int,
        metavar="W",
        help="let a text outgrow the context: whenever it has more than W tokens, the model drops all but the last "
        "W / 2 and continues (without: an error)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="have PyTorch compile the decoding step first, which takes up to two minutes (on a CPU, a C++ compiler) "
        "and pays after ten to twenty thousand tokens of single prompts, in batches after some hundred thousand",
    )
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help="print one object for each prompt: prompt, text (the continuation), prompt_tokens, tokens, finish_reason, "
        "seed",
    )


def run(arguments: Namespace) -> None:
    for option in ("max_new_tokens", "batch_size"):
        if (value := getattr(arguments, option)) < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {value}: it must be at least 1")
    if "" in arguments.stop:
        raise ValueError("--stop is empty: give at least one character")
    prompts = _prompts(arguments.prompt, arguments.prompts)
    model = located_model(arguments)

    import torch

    from lightning_danube.generation.compiled_steps import CompiledStep
    from lightning_danube.generation.packing import pack_for_generation
    from lightning_danube.generation.text import TextGeneration
    from lightning_danube.tokens.chat_template import end_ids

    sampling = sampling_of(arguments)
    decoder, tokenizer = load_model(model, adapter=arguments.adapter, dtype=arguments.dtype, device=arguments.device)
    # An adapter does not say whether it was trained for chat.
    if arguments.chat and arguments.adapter is None and (warning := not_tuned_for_chat(model, tokenizer)):
        tell(f"warning: {warning}")
    ids = _encoded(prompts, tokenizer, arguments, decoder.config.max_position_embeddings)
    decoder.eval()
    pack_for_generation(decoder, rows=min(arguments.batch_size, len(prompts)))
    compiled = None
    if arguments.compile:
        compiled = CompiledStep(decoder)
        tell("compiling the decoding step")
    with torch.inference_mode():
        for start in range(0, len(prompts), arguments.batch_size):
            rows = range(start, min(start + arguments.batch_size, len(prompts)))
            generation = TextGeneration(
                decoder,
                tokenizer,
                [ids[row] for row in rows],
                arguments.max_new_tokens,
                eos_ids=end_ids(tokenizer),
                stop=arguments.stop,
                sampling=sampling,
                seeds=[arguments.seed + row for row in rows],
                window=arguments.window,
                compiled=compiled,
            )
            if len(prompts) == 1 and not arguments.jsonl:
                _print_as_it_comes("" if arguments.chat else prompts[0].text, (piece for _, piece in generation))
                continue
            for _ in generation:
                pass
            for row, continuation in zip(rows, generation.rows, strict=True):
                seed = arguments.seed + row
                _write(
                    _json_row(prompts[row], continuation, len(ids[row]), seed)
                    if arguments.jsonl
                    else ("\n" if row else "") + ("" if arguments.chat else prompts[row].text) + continuation.text
                )
            sys.stdout.flush()


def _prompts(texts: Sequence[str], file: str | None) -> list[Prompt]:
    many = len(texts) > 1
    prompts = [Prompt(text, f"--prompt number {n}" if many else "--prompt") for n, text in enumerate(texts, start=1)]
    for prompt in prompts:
        if not prompt.text.strip():
            raise ValueError(f"{prompt.place} is empty: give at least one word")
    if file is not None:
        prompts += _read_standard_input() if file == "-" else _read_file(file)
    if not prompts:
        raise ValueError("there is nothing to continue: give --prompt or --prompts")
    return prompts


def _read_file(file: str) -> Iterator[Prompt]:
    from lightning_danube.text.reading import FORMATS, format_of, read_lines, read_rows

    if not Path(file).is_file():
        raise ValueError(f"--prompts {file}: there is no such file")
    if not format_of(file):
        raise ValueError(f"--prompts {file}: the format is not known by its name: use one of {', '.join(FORMATS)}")
    if format_of(file) == "text":
        lines = enumerate(read_lines(file), start=1)
        return (_checked(line, file, row) for row, line in lines)
    return (_of_row(values, file, row) for row, values in read_rows(file))


def _read_standard_input() -> Iterator[Prompt]:
    from lightning_danube.text.reading import json_of

    name = "standard input"
    lines = sys.stdin.read().split("\n")
    if lines[-1] == "":
        lines.pop()
    for row, line in enumerate(lines, start=1):
        if lines[0].startswith("{"):
            if not line.strip():  # no row, as in a file
                continue
            yield _of_row(json_of(line, name, row, f"{name}, row {row}"), name, row)
        else:
            yield _checked(line.removesuffix("\r"), name, row)


def _of_row(values: Any, file: str, row: int) -> Prompt:
    from lightning_danube.text.reading import BadRow, text_of

    text = values if isinstance(values, BadRow) else text_of(values, "prompt", file, row, f"{file}, row {row}")
    if isinstance(text, BadRow):
        raise ValueError(text.message)
    return _checked(text, file, row)


def _checked(text: str, file: str, row: int) -> Prompt:
    """Returns a row as a prompt. A blank row is refused: a missing result would shift all later ones."""
    place = f"{file}, row {row}"
    if not text.strip():
        raise ValueError(f"{place}: the prompt is empty")
    return Prompt(text, place)


def _encoded(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, arguments: Namespace, context: int
) -> list[list[int]]:
    """Returns token ids of all prompts, so that an error in the last prompt is reported before the first generation."""
    from lightning_danube.generation.text import encode_prompt
    from lightning_danube.generation.token_stream import check_room
    from lightning_danube.tokens.chat_template import encode_chat

    encoded = []
    for prompt in prompts:
        if arguments.chat:
            ids = encode_chat(tokenizer, [{"role": "user", "content": prompt.text}], add_generation_prompt=True)
        else:
            ids = encode_prompt(tokenizer, prompt.text)
        if not ids:
            raise ValueError(f"{prompt.place} is empty: give at least one word")
        if arguments.window is None:
            check_room(len(ids), arguments.max_new_tokens, context, prompt.place)
        encoded.append(ids)
    return encoded


def _print_as_it_comes(begin: str, pieces: Iterator[str]) -> None:
    # A system call for each piece of text is worthwhile only for a terminal.
    is_terminal = sys.stdout.isatty()
    _write(begin, end="", flush=is_terminal)
    for piece in pieces:
        _write(piece, end="", flush=is_terminal)
    _write("")


def _write(text: str, *, end: str = "\n", flush: bool = False) -> None:
    """Prints a generated text. A terminal shows control characters as their codes; a file or pipe gets every one."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=flush)


def _json_row(prompt: Prompt, continuation: Continuation, prompt_tokens: int, seed: int) -> str:
    row = {
        "prompt": prompt.text,
        "text": continuation.text,
        "prompt_tokens": prompt_tokens,
        "tokens": continuation.tokens,
        "finish_reason": continuation.finish_reason,
        "seed": seed,
    }
    return json.dumps(row, ensure_ascii=False)
