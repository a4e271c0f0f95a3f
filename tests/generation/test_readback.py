"""Reading tokens while the device goes on. The order is that of a GPU, made up on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_danube.generation import readback, token_stream
from lightning_danube.generation.readback import Readback
from lightning_danube.generation.text import TextGeneration
from lightning_danube.generation.token_stream import TokenStream, generate, tokens_on_host
from lightning_danube.model import Decoder, DecoderConfig

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2)


class LateReadback(Readback):
    """As on a GPU: the values are those of the moment of the copy, and are to be read later."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.clone())
        self.is_late = True


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "Readback", LateReadback)


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).eval()


PROMPTS = [[1, 2, 3], [4, 5]]


def test_values_are_those_of_the_tensor() -> None:
    ids = torch.tensor([3, 1])
    read = Readback(ids)
    assert not read.is_late and read.values() == [3, 1]
    assert Readback(torch.tensor(True)).values() is True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_values_are_those_of_the_moment_of_the_copy() -> None:
    ids = torch.tensor([3, 1], device="cuda")
    read = Readback(ids)
    ids += 1
    assert read.is_late and read.values() == [3, 1]


def test_late_tokens_are_the_same_tokens_a_step_later(late: None) -> None:
    expected = [step.tolist() for step in TokenStream(decoder(), PROMPTS, 6)]
    stream = TokenStream(decoder(), PROMPTS, 6)
    found = []
    for ids in tokens_on_host(stream):
        found.append(ids)
        # The next step was begun before the tokens of this one were read.
        assert len(stream.steps) == min(len(found) + 1, 6)
    assert found == expected


def test_a_late_end_takes_one_step_more_and_changes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(decoder(), PROMPTS, 12)
    ends = [free[0][2], free[1][4]]
    expected = generate(decoder(), PROMPTS, 12, eos_ids=ends)
    counts = []
    for kind in (Readback, LateReadback):
        monkeypatch.setattr(token_stream, "Readback", kind)
        assert generate(decoder(), PROMPTS, 12, eos_ids=ends) == expected
        counts.append(len(list(TokenStream(decoder(), PROMPTS, 12, eos_ids=ends))))
    assert counts[0] == max(map(len, expected)) < 12 and counts[1] == counts[0] + 1


class Letters:
    """A tokenizer with a letter for each token."""

    def __init__(self) -> None:
        self.backend_tokenizer = self
        self.added_tokens_decoder: dict[int, Any] = {}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(chr(200 + token) for token in ids)


def test_texts_end_at_stop_strings_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(decoder(), PROMPTS, 12)
    stop = Letters().decode(free[0][3:5])
    texts, steps = [], []
    for kind in (Readback, LateReadback):
        monkeypatch.setattr(token_stream, "Readback", kind)
        generation = TextGeneration(decoder(), Letters(), PROMPTS[:1], 12, stop=[stop])  # type: ignore[arg-type]
        pieces = "".join(piece for _, piece in generation)
        assert pieces == generation.rows[0].text and generation.rows[0].finish_reason == "stop"
        texts.append((pieces, generation.rows[0].tokens))
        steps.append(len(generation.tokens.steps))
    assert texts[0] == texts[1] and steps[1] == steps[0] + 1


def test_the_host_never_reads_a_gpus_tensor_directly(late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is left out, because it checks its logits."""
    stream = TokenStream(decoder(), PROMPTS, 6, eos_ids=[7])
    read = tokens_on_host(stream)
    next(read)

    def refuse(*args: Any) -> Any:
        raise AssertionError("the host would wait for the device")

    monkeypatch.setattr(readback.Readback, "values", lambda self: Tensor.numpy(self._host).tolist())
    for name in ("item", "tolist", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    assert len(list(read)) == 5
