from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_danube.model import Decoder, DecoderConfig, KVCache, generate, sample

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2, max_position_embeddings=40)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).double()


def uncached(decoder: Decoder, ids: Tensor, new_tokens: int) -> Tensor:
    for _ in range(new_tokens):
        ids = torch.cat((ids, decoder(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


# One token at a time; a prompt, then one at a time; several after a filled cache.
@pytest.mark.parametrize("pieces", [(1,) * 12, (7, 1, 1, 1, 1, 1), (4, 5, 1, 2)])
def test_cached_logits_equal_uncached_ones(decoder: Decoder, pieces: tuple[int, ...]) -> None:
    ids = torch.randint(0, 101, (3, sum(pieces)))
    cache = KVCache.for_decoder(decoder, batch=3, length=sum(pieces))
    logits = torch.cat([decoder(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert cache.length == cache.capacity == sum(pieces)
    # The same sums, by kernels for other shapes.
    torch.testing.assert_close(logits, decoder(ids), rtol=0, atol=1e-12)


def test_the_cache_has_the_size_of_the_key_value_heads(decoder: Decoder) -> None:
    cache = KVCache.for_decoder(decoder, batch=3, length=10)
    assert cache.keys_LBGSK.shape == (2, 3, 2, 10, 16)
    assert cache.nbytes == 3 * CONFIG.cache_bytes(10, bytes_per_value=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert KVCache.for_decoder(Decoder(CONFIG), 1, 1).keys_LBGSK.dtype == torch.bfloat16


def test_a_full_cache_is_refused(decoder: Decoder) -> None:
    cache = KVCache.for_decoder(decoder, batch=1, length=3)
    decoder(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match=r"the cache holds 2 of 3 tokens; 2 more do not fit"):
        decoder(torch.tensor([[1, 2]]), cache=cache)


def test_greedy_generation_equals_the_uncached_loop_and_transformers(decoder: Decoder) -> None:
    prompts = torch.randint(0, 101, (3, 5))
    ours = generate(decoder, prompts, 20)
    assert torch.equal(ours, uncached(decoder, prompts, 20))
    theirs: Any = LlamaForCausalLM(LlamaConfig.from_dict(CONFIG.to_hf(None, None, None))).double()
    theirs.load_state_dict(decoder.state_dict())
    assert torch.equal(ours, theirs.generate(prompts, max_new_tokens=20, do_sample=False))


def test_generation_under_autocast() -> None:
    decoder = Decoder(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(decoder, torch.tensor([[1, 2, 3]]), 4).shape == (1, 7)


def test_the_whole_context_can_be_filled(decoder: Decoder) -> None:
    assert generate(decoder, torch.tensor([[1, 2, 3]]), 37).shape == (1, 40)


def test_rows_end_with_eos(decoder: Decoder) -> None:
    prompts = torch.randint(0, 101, (4, 5))
    free = generate(decoder, prompts, 12)
    eos = int(free[1, 8])  # whatever row 1 says as its fourth word at the latest
    ended = generate(decoder, prompts, 12, eos_id=eos)
    assert ended.shape[1] <= free.shape[1]
    for row, free_row in zip(ended[:, 5:], free[:, 5:], strict=True):
        ends = (free_row == eos).nonzero()
        until = int(ends[0]) + 1 if len(ends) else len(free_row)
        assert torch.equal(row[:until], free_row[:until]) and (row[until:] == eos).all()


def test_all_stop_when_the_last_row_has_ended(decoder: Decoder) -> None:
    prompt = torch.randint(0, 101, (1, 5))
    eos = int(generate(decoder, prompt, 1)[0, -1])
    assert generate(decoder, prompt, 12, eos_id=eos).shape == (1, 6)


def test_sampling_follows_the_generator(decoder: Decoder) -> None:
    prompt = torch.randint(0, 101, (2, 5))
    first, again, other = (
        generate(decoder, prompt, 20, temperature=1.5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_modules_return_to_the_mode_they_were_in() -> None:
    decoder = Decoder(CONFIG).train()
    decoder.model.layers[0].eval()
    modes = [module.training for module in decoder.modules()]
    generate(decoder, torch.tensor([[1]]), 1)
    assert [module.training for module in decoder.modules()] == modes


PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_samples_have_the_distribution_asked_for(options: dict[str, Any], expected: list[float]) -> None:
    options = {"temperature": 1.0} | options
    logits = PROBABILITIES.log().expand(20000, 4)
    drawn = sample(logits, **options, generator=torch.Generator().manual_seed(0)).flatten()
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    # The standard error of a share of 20,000 draws is at most 0.0035.
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=shares.dtype), rtol=0, atol=0.014)
    assert all(share == 0 for share, wanted in zip(shares.tolist(), expected, strict=True) if wanted == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_new_tokens": 38},
            r"3 prompt tokens and 38 new ones exceed the context of 40; at most 37 new tokens fit",
        ),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; it has to be at least 1"),
        ({"prompt_ids_BT": torch.tensor([1])}, r"prompt ids have the shape \(1,\); it has to be \(batch, tokens\)"),
        ({"prompt_ids_BT": torch.zeros(1, 0).long()}, r"prompt ids have the shape \(1, 0\)"),
        ({"prompt_ids_BT": torch.tensor([[5, 101]])}, r"prompt ids run from 5 to 101; the model knows 0 to 100"),
        ({"temperature": -0.5}, r"temperature is -0.5; it has to be at least 0"),
        ({"temperature": float("nan")}, r"temperature is nan; it has to be at least 0"),
        ({"top_k": 0}, r"top_k is 0; it has to be at least 1, or left out"),
        ({"top_p": 0.0}, r"top_p is 0.0; it has to be above 0 and at most 1, or left out"),
        ({"top_p": 1.1}, r"top_p is 1.1; it has to be above 0"),
    ],
)
def test_an_impossible_request_is_refused(decoder: Decoder, options: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"prompt_ids_BT": torch.tensor([[1, 2, 3]]), "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        generate(decoder, **request)
