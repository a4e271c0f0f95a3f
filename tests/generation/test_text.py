import copy
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.text import (
    Continuation,
    TextGeneration,
    encode_prompt,
    length_of_begun_stop,
    special_stops,
)
from lightning_danube.generation.token_stream import generate
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.tokens.tokenizer import load_hf_tokenizer

HARD = [
    " walks slowly",
    "  two  spaces\n\nnew\ttab ",
    "emoji 👩‍👩‍👧 \U0001f600 é ü 中文 \u200b end",
    "\n\n",
    "12345 3.14",
    "a � is a letter, too",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_hf_tokenizer("mistral")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(32, 48, 2, 4, 2, vocab_size=32000, initializer_range=0.2, max_position_embeddings=64)
    return Decoder(config).eval()


def streamed(tokenizer: Any, prompt: str, text: str, stop: Sequence[str] = ()) -> tuple[list[str], Continuation]:
    """Pieces of a text that follows a prompt, token by token."""
    head, whole = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + text)
    assert whole[: len(head)] == head, "choose a prompt that ends between tokens"
    continuation = Continuation(tokenizer, head, [tokenizer.eos_token_id], stop)
    pieces = []
    for token in whole[len(head) :]:
        if continuation.finish_reason is None:
            pieces.append(continuation.add(token))
    if continuation.finish_reason is None:
        pieces.append(continuation.end("length"))
    return pieces, continuation


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("prompt", ["The river", "", "x\n", "中"])
def test_pieces_add_up_to_the_text(tokenizer: Any, prompt: str, text: str) -> None:
    if not prompt:
        text = text.lstrip(" ")  # a text's first space is not in its tokens
    pieces, continuation = streamed(tokenizer, prompt, text)
    assert "".join(pieces) == continuation.text == text
    # Never a part of a character, other than one that is spelt so.
    assert "�" in text or not any("�" in piece for piece in pieces)


def test_pieces_come_as_soon_as_they_are_certain(tokenizer: Any) -> None:
    pieces, _ = streamed(tokenizer, "The river", " walks slowly")
    assert pieces == [" walks", " slowly", ""]


def test_bytes_that_are_no_text_are_shown_as_such(tokenizer: Any) -> None:
    """A model can say anything: half of a character, then something else."""
    half, word = tokenizer.convert_tokens_to_ids(["<0xE4>", "▁end"])
    continuation = Continuation(tokenizer, encode_prompt(tokenizer, "x"), [2], [])
    assert [continuation.add(token) for token in (half, half, word, half)] == ["", "", "�� end", ""]
    assert continuation.end("length") == "�"
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    continuation = Continuation(tokenizer, encode_prompt(tokenizer, "x"), [2], [])
    # The tokenizer reads the newline as broken, too, once a broken byte follows; it was shown already.
    assert "".join(continuation.add(token) for token in (newline, half, word)) == "\n� end"


def test_random_tokens_lose_nothing(tokenizer: Any) -> None:
    source = random.Random(0)
    for _ in range(50):
        tokens = [source.randrange(3, 32000) for _ in range(20)]
        continuation = Continuation(tokenizer, [1], [2], [])
        pieces = [continuation.add(token) for token in tokens] + [continuation.end("length")]
        text = tokenizer.decode(tokens)
        if "�" not in text:
            assert "".join(pieces) == text


def test_special_tokens_are_not_shown_and_the_end_token_ends(tokenizer: Any) -> None:
    continuation = Continuation(tokenizer, [1], [2, 5], [])
    word = tokenizer.convert_tokens_to_ids("▁end")
    assert [continuation.add(token) for token in (word, 1, word, 5)] == ["end", "", " end", ""]
    assert (continuation.finish_reason, continuation.tokens, continuation.text) == ("eos", 4, "end end")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["four", "tw", "ne"], "o"),
        ("one two three", ["xyz"], "one two three"),
        ("one two three", ["three!"], "one two three"),  # begun, never finished
        ("aaab and more", ["aab"], "a"),
        ("line\n\nline", ["\n\n"], "line"),
        ("Hi 😀 there", ["😀"], "Hi "),
    ],
)
def test_stop_strings(tokenizer: Any, text: str, stop: list[str], expected: str) -> None:
    pieces, continuation = streamed(tokenizer, "Q:\n", text, stop)
    assert "".join(pieces) == continuation.text == expected
    assert continuation.finish_reason == ("stop" if expected != text else "length")


def test_no_part_of_a_stop_string_is_ever_shown(tokenizer: Any) -> None:
    source = random.Random(0)
    for _ in range(200):
        text = "".join(source.choice("ab\n") for _ in range(source.randrange(1, 30)))
        stop = ["".join(source.choice("ab\n") for _ in range(source.randrange(1, 5))) for _ in range(2)]
        pieces, continuation = streamed(tokenizer, "Q:\n", text, stop)
        ends = [text.find(string) for string in stop if string in text]
        expected = text[: min(ends)] if ends else text
        # What is shown only ever grows towards the right text, so nothing had to be taken back.
        assert "".join(pieces) == continuation.text == expected


@pytest.mark.parametrize(
    ("text", "string", "expected"),
    [("abc", "cab", 1), ("abca", "cab", 2), ("abc", "abc", 0), ("x", "y", 0), ("", "a", 0)],
)
def test_overlap(text: str, string: str, expected: int) -> None:
    assert length_of_begun_stop(text, string) == expected


def test_rows_are_told_apart_and_ended_one_by_one(decoder: Decoder, tokenizer: Any) -> None:
    prompts = [encode_prompt(tokenizer, text) for text in ("The river", "x", "Seven green mountains")]
    options: dict[str, Any] = {"sampling": Sampling(temperature=1.0), "seeds": [1, 2, 3]}
    free = generate(decoder, prompts, 12, **options)
    texts = [
        tokenizer.decode(prompt + row)[len(tokenizer.decode(prompt)) :]
        for prompt, row in zip(prompts, free, strict=True)
    ]
    stop = texts[1][5:9]
    assert stop not in texts[0] and stop not in texts[2]
    generation = TextGeneration(decoder, tokenizer, prompts, 12, stop=[stop], **options)
    shown = ["", "", ""]
    for row, piece in generation:
        shown[row] += piece
    assert shown == [row.text for row in generation.rows] == [texts[0], texts[1][: texts[1].index(stop)], texts[2]]
    assert [row.finish_reason for row in generation.rows] == ["length", "stop", "length"]
    assert generation.rows[0].tokens == 12 > generation.rows[1].tokens


def test_all_end_when_the_last_row_has_met_its_stop_string(decoder: Decoder, tokenizer: Any) -> None:
    prompt = encode_prompt(tokenizer, "The river")
    generation = TextGeneration(decoder, tokenizer, [prompt, prompt], 40, stop=["a", "e", "o"])
    for _ in generation:
        pass
    assert [row.finish_reason for row in generation.rows] == ["stop", "stop"]
    assert len(generation.tokens.steps) == generation.rows[0].tokens < 40


def test_a_prompt_begins_as_documents_do(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "a</s>") == [1, *tokenizer("a</s>", add_special_tokens=False).input_ids]
    assert encode_prompt(tokenizer, "a</s>")[-1] == 2


def test_a_token_for_both_ends_ends_a_text_only_after_the_prompt(tokenizer: Any, decoder: Decoder) -> None:
    free = TextGeneration(decoder, tokenizer, [[1, 5]], 6)
    text = "".join(piece for _, piece in free)
    said = [int(step) for step in free.tokens.steps]
    ended = TextGeneration(decoder, tokenizer, [[1, 5]], 6, eos_ids=[1, said[3]])
    shown = "".join(piece for _, piece in ended)
    assert 1 not in said and said[3] not in said[:3] and text.startswith(shown) and shown
    assert ended.rows[0].finish_reason == "eos" and ended.rows[0].tokens == 4


def test_a_special_token_stops_a_text(tokenizer: Any, decoder: Decoder) -> None:
    ids = tokenizer("one two</s> three", add_special_tokens=False).input_ids
    continuation = Continuation(tokenizer, [1], [], ["</s>"], special_stops(tokenizer, ["</s>", "two"]))
    for token in ids:
        if continuation.finish_reason is None:
            continuation.add(token)
    assert (continuation.text, continuation.finish_reason, continuation.tokens) == ("one two", "stop", 3)
    # The stream ends the row, too.
    first = next(iter(TextGeneration(decoder, tokenizer, [[1, 5]], 2).tokens)).item()
    copied = copy.deepcopy(tokenizer)
    copied.add_special_tokens({"additional_special_tokens": [copied.convert_ids_to_tokens(first)]})
    generation = TextGeneration(decoder, copied, [[1, 5]], 9, stop=[copied.convert_ids_to_tokens(first)])
    assert list(generation) == [] and generation.rows[0].finish_reason == "stop" and len(generation.tokens.steps) == 1
    with pytest.raises(
        ValueError, match="the stop text '</s>x' holds the special token '</s>', and a special token is"
    ):
        TextGeneration(decoder, tokenizer, [[1, 5]], 9, stop=["</s>x"])


def test_a_prompt_begins_with_the_token_that_the_tokenizer_puts_before_texts() -> None:
    class Tokenizer:
        """Makes a token of each character."""

        init_kwargs: dict[str, Any]

        def __init__(self, bos_token_id: int | None, eos_token_id: int, adds: str) -> None:
            self.bos_token_id, self.eos_token_id, self.adds, self.init_kwargs = bos_token_id, eos_token_id, adds, {}

        def __len__(self) -> int:
            return 128

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [chr(i) for i in ids]

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            head = [self.bos_token_id] if add_special_tokens and "bos" in self.adds else []
            tail = [self.eos_token_id] if add_special_tokens and "eos" in self.adds else []
            return SimpleNamespace(input_ids=[*head, *(ord(letter) for letter in text), *tail])

    cases: dict[tuple[int | None, int, str], list[int]] = {
        (1, 2, "bos"): [1, 97],
        (1, 2, ""): [97],
        (0, 2, "bos"): [0, 97],
        (None, 2, ""): [97],
        # One token for both ends, as in OPT, and only named, as in GPT-2 and SmolLM.
        (2, 2, "bos"): [2, 97],
        (2, 2, ""): [97],
        # A token after texts begins none.
        (2, 2, "eos"): [97],
        (1, 2, "eos"): [97],
        (1, 2, "bos, eos"): [1, 97],
    }
    tokenizers: dict[Any, Any] = {case: Tokenizer(*case) for case in cases}
    assert {case: encode_prompt(tokenizers[case], "a") for case in cases} == cases


@pytest.mark.parametrize("stop", [["tain", "oun"], ["oun", "tain"]])
def test_the_first_of_several_stop_strings_ends_a_text(tokenizer: Any, stop: list[str]) -> None:
    assert "▁mountain" in tokenizer.get_vocab(), "both come in one piece"
    pieces, continuation = streamed(tokenizer, "The river", " mountain walks", stop)
    assert "".join(pieces) == continuation.text == " m"
