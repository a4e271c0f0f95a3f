"""Text from a model in Python, against the same tokens drawn by its decoder."""

from typing import Any

import pytest
import torch

from lightning_danube.generation.language_model import LanguageModel
from lightning_danube.generation.packing import pack_for_generation
from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.text import TextGeneration
from lightning_danube.tokens.chat_template import encode_chat, end_ids
from tests.tiny_models import tiny_decoder, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(tiny_decoder(), TOKENIZER)


def expected(ids: list[int], new_tokens: int, seed: int = 0, **sampling: Any) -> str:
    with torch.inference_mode():
        decoder = tiny_decoder().eval()
        pack_for_generation(decoder)
        generation = TextGeneration(
            decoder,
            TOKENIZER,
            [ids],
            new_tokens,
            eos_ids=end_ids(TOKENIZER),
            sampling=Sampling(**sampling),
            seeds=[seed],
        )
        return "".join(piece for _, piece in generation)


PROMPT = [TOKENIZER.bos_token_id, *TOKENIZER("the", add_special_tokens=False).input_ids]


@pytest.mark.parametrize(
    ("settings", "without"),
    [
        ({"temperature": 1.5}, {}),
        ({"temperature": 1.5, "seed": 7}, {"temperature": 1.5}),
        ({"temperature": 1.5, "top_k": 3}, {"temperature": 1.5}),
        ({"temperature": 1.5, "top_p": 0.3}, {"temperature": 1.5}),
        ({"repetition_penalty": 3.0}, {}),
    ],
)
def test_generate_uses_every_setting(model: LanguageModel, settings: dict[str, Any], without: dict[str, Any]) -> None:
    said = model.generate("the", 16, **settings)
    assert said == expected(PROMPT, 16, **settings)
    assert said != expected(PROMPT, 16, **without), "the setting changes nothing here"


def test_generate_ends_at_a_stop_string(model: LanguageModel) -> None:
    free = model.generate("the", 16)
    assert free == expected(PROMPT, 16)
    stop = free[6:8]
    assert model.generate("the", 16, stop=["never", stop]) == free[: free.index(stop)]


def test_answers_are_drawn_with_the_temperature_and_the_seed_of_the_chat(model: LanguageModel) -> None:
    ids = encode_chat(TOKENIZER, [{"role": "user", "content": "the"}], True)
    for settings in ({}, {"temperature": 1.5}, {"temperature": 1.5, "seed": 7}):
        seed, sampling = int(settings.get("seed", 0)), Sampling(temperature=settings.get("temperature", 0.0))
        with torch.inference_mode():
            chat = model.chat(max_new_tokens=12, sampling=sampling, seed=seed)
            assert "".join(chat.ask("the")) == expected(ids, 12, seed, temperature=sampling.temperature)
    answers = {expected(ids, 12, seed, temperature=temperature) for temperature, seed in ((0, 0), (1.5, 0), (1.5, 7))}
    assert len(answers) == 3
