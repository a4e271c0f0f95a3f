"""What the parts of an evaluation ask of a model, beside a model that is asked alone."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.evaluation import asking
from lightning_danube.evaluation.asking import AskedModel, part_of, read_jsonl
from lightning_danube.files import append_line
from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.token_stream import generate
from tests.tiny_models import CONFIG, tiny_decoder, tiny_tokenizer


def asked(places: int = 100, context: int = 64) -> AskedModel:
    decoder = tiny_decoder(dataclasses.replace(CONFIG, max_position_embeddings=context)).eval()
    return AskedModel(decoder, tiny_tokenizer(), weights="mine", digest="d", places=places, chat_template=False)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 259, (length,), generator=generator).tolist() for length in lengths]


def test_losses_are_those_of_each_token_after_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "HEAD_ROWS", 7)
    model = asked()
    ids = torch.tensor(prompts(20, 20, 20))
    with torch.no_grad():
        logits = model.decoder(ids)
        expected = [[-float(logits[row, t].log_softmax(0)[ids[row, t + 1]]) for t in range(19)] for row in range(3)]
        found = model.nats(ids)
    assert found.dtype == torch.float64
    # Float32, with logits of the order of 10.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_tokens_end_before_the_first_end() -> None:
    model = asked()
    (prompt,) = prompts(9)
    (free,) = model.generate([prompt], 8, [])
    assert free == generate(model.decoder, [prompt], 8)[0] and len(free) == 8
    for end in (free[3], free[0]):
        assert model.generate([prompt], 8, [end]) == [free[: free.index(end)]]


def test_draws_follow_the_temperature_and_each_rows_seed() -> None:
    model = asked()
    two = prompts(9, 9)

    def drawn(temperature: float, seeds: Sequence[int]) -> list[list[int]]:
        return model.generate(two, 12, [], Sampling(temperature=temperature), seeds)

    found = drawn(1.0, [5, 6])
    assert found == generate(model.decoder, two, 12, sampling=Sampling(temperature=1.0), seeds=[5, 6])
    assert found == [drawn(1.0, [5, 0])[0], drawn(1.0, [0, 6])[1]]
    others = (drawn(1.0, [7, 8]), drawn(3.0, [5, 6]), model.generate(two, 12, []))
    assert all(other[row] != found[row] for other in others for row in (0, 1))


def test_continuations_are_those_of_each_prompt_alone() -> None:
    model, told = asked(places=70), []
    model.on_progress = lambda *facts: told.append(facts)
    # Of 64 tokens the last 54 are kept, so that ten new ones fit.
    many = prompts(5, 54, 60, 20, 6, 64, 19)
    found = model.continuations("part", many, 10, [])
    alone = [generate(model.decoder, [prompt[-54:]], 10)[0] for prompt in many]
    assert found == [str(model.tokenizer.decode(ids, skip_special_tokens=True)) for ids in alone]
    assert len(set(found)) == len(found)
    assert told[-1] == ("part", 7, 7) and [done for _, done, _ in told] == sorted({done for _, done, _ in told})


def test_batches_fit_the_places_and_hold_each_text_once() -> None:
    model, lengths = asked(places=100), [3, 90, 10, 40, 41, 120, 7, 7, 30]
    batches = list(model.batches(lengths, 5))
    assert sorted(number for batch in batches for number in batch) == list(range(9))
    longest = [lengths[number] for batch in batches for number in batch]
    assert longest == sorted(lengths, reverse=True)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        width = lengths[batch[0]] + 5
        assert len(batch) == 1 or len(batch) * width <= 100
        # One more would not fit.
        assert following is None or (len(batch) + 1) * width > 100


def test_a_note_says_how_many_questions_were_asked() -> None:
    assert part_of(1000, 2000) == ["1,000 of 2,000 questions, chosen by seed"] and part_of(7, 7) == []
    assert asked().note_of_cut_prompts(0) == []
    assert asked().note_of_cut_prompts(3) == ["3 prompts lost their beginning, at 64 tokens"]


def test_a_line_that_a_kill_broke_off_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows: list[dict[str, Any]] = [{"key": "a"}, {"key": "b"}]
    assert read_jsonl(file) == []
    file.write_text('{"key": "a"}\n{"key": "b"}\n{"key": "c')
    assert read_jsonl(file) == rows
    append_line(file, '{"key": "d"}')  # on a line of its own
    assert read_jsonl(file) == [*rows, {"key": "d"}]
    with file.open("ab") as opened:
        opened.write(b"\xff\n[1]\n" + b"[" * 100_000 + b"\n\n")
    assert read_jsonl(file) == [*rows, {"key": "d"}]
