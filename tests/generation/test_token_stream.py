import dataclasses
import gc
import math
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_danube.generation.sampling import Sampling, candidates, penalize, sample, uniforms
from lightning_danube.generation.token_stream import TokenStream, generate
from lightning_danube.model import Decoder, DecoderConfig, KVCache

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2, max_position_embeddings=40)
MHA, MQA = (dataclasses.replace(CONFIG, num_key_value_heads=kv_heads) for kv_heads in (4, 1))


def exact_decoder(config: DecoderConfig = CONFIG) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config).double().eval()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return exact_decoder()


def prompts_of(*lengths: int) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(101) for _ in range(length)] for length in lengths]


def uncached(decoder: Decoder, prompt: list[int], new_tokens: int, window: int | None = None) -> list[int]:
    """Greedy continuation by the definition, every step from all that the model reads, nothing kept."""
    text, start = list(prompt), 0
    for _ in range(new_tokens):
        if window is not None and len(text) - start > window:
            start = len(text) - window // 2
        text.append(int(decoder(torch.tensor([text[start:]]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("config", [CONFIG, MHA, MQA], ids=["gqa", "mha", "mqa"])
# One token at a time; a prompt, then one at a time; several after a filled cache.
@pytest.mark.parametrize("pieces", [(1,) * 12, (7, 1, 1, 1, 1, 1), (4, 5, 1, 2)])
def test_cached_logits_equal_uncached_ones(config: DecoderConfig, pieces: tuple[int, ...]) -> None:
    decoder = exact_decoder(config)
    ids = torch.randint(0, 101, (3, sum(pieces)))
    cache = KVCache.for_decoder(decoder, batch=3, length=sum(pieces))
    logits = torch.cat([decoder(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert cache.length == cache.capacity == sum(pieces)
    # The same sums, by kernels for other shapes: not one of the bits is promised, all but the last few are.
    torch.testing.assert_close(logits, decoder(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [CONFIG, MHA, MQA], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("narrow", [False, True], ids=["all slots", "visible slots"])
def test_cached_logits_of_rows_of_different_lengths_equal_uncached_ones(config: DecoderConfig, narrow: bool) -> None:
    decoder = exact_decoder(config)
    lengths, more = (5, 1, 8), 4
    texts = [torch.tensor(text) for text in prompts_of(*(length + more for length in lengths))]
    prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    # What a row is filled up with is not to be seen: anything will do.
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=77)
    cache = KVCache.for_decoder(decoder, batch=3, length=max(lengths) + more)
    first = decoder(padded, cache=cache)
    cache.set_lengths(lengths)
    steps = []
    for step in range(more):
        if narrow:
            cache.visible = max(lengths) + step + 1
        ids = torch.stack([text[length + step] for text, length in zip(texts, lengths, strict=True)])
        steps.append(decoder(ids[:, None], cache=cache)[:, 0])
    assert cache.lengths_B is not None and cache.lengths_B.tolist() == [length + more for length in lengths]
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        logits = torch.cat([first[row, :length], torch.stack(steps)[:, row]])
        # As above; what is masked adds exact zeros.
        torch.testing.assert_close(logits, decoder(text[None])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [CONFIG, MHA, MQA], ids=["gqa", "mha", "mqa"])
def test_several_continuations_of_a_beginning_equal_uncached_texts(config: DecoderConfig) -> None:
    decoder = exact_decoder(config)
    beginnings, ends = prompts_of(5, 9), prompts_of(3, 1, 4)
    owners = [1, 0, 1]
    cache = KVCache.for_decoder(decoder, batch=2, length=9)
    decoder(torch.tensor([beginnings[0] + [77] * 4, beginnings[1]]), cache=cache)
    copies = cache.copies(owners, [len(beginnings[row]) for row in owners], room=4)
    padded = torch.tensor([end + [77] * (4 - len(end)) for end in ends])
    logits = decoder(padded, cache=copies)
    for row, (owner, end) in enumerate(zip(owners, ends, strict=True)):
        alone = decoder(torch.tensor([beginnings[owner] + end]))[0, -len(end) :]
        torch.testing.assert_close(logits[row, : len(end)], alone, rtol=0, atol=1e-12)


def test_the_cache_has_the_size_of_the_key_value_heads(decoder: Decoder) -> None:
    cache = KVCache.for_decoder(decoder, batch=3, length=10)
    assert [keys.shape for keys in cache.keys_BGSK] == [(3, 2, 10, 16)] * 2
    assert cache.nbytes == 3 * CONFIG.cache_bytes(10, bytes_per_value=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert KVCache.for_decoder(Decoder(CONFIG), 1, 1).keys_BGSK[0].dtype == torch.bfloat16


def test_a_full_cache_is_refused(decoder: Decoder) -> None:
    cache = KVCache.for_decoder(decoder, batch=1, length=3)
    decoder(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match=r"the cache holds 2 of 3 tokens; 2 more do not fit"):
        decoder(torch.tensor([[1, 2]]), cache=cache)


def test_a_step_with_rows_of_different_lengths_is_one_graph_of_fixed_shapes(decoder: Decoder) -> None:
    """So it can be compiled or recorded: the lengths are in tensors, and no shape follows from them."""
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def continued(step: Callable[..., Tensor]) -> list[list[int]]:
        cache = KVCache.for_decoder(decoder, batch=2, length=12)
        ids = decoder(torch.tensor([[1, 2, 3], [4, 5, 0]]), cache=cache)[[0, 1], [2, 1]].argmax(-1)
        cache.set_lengths([3, 2])
        given = []
        for _ in range(6):
            given.append(ids.tolist())
            ids = step(ids[:, None], cache=cache)[:, 0].argmax(-1)
        return given

    with torch.no_grad():
        compiled = torch.compile(decoder, backend=count, fullgraph=True, dynamic=False)
        assert continued(compiled) == continued(decoder)
    assert graphs == 1
    torch.compiler.reset()


def test_greedy_generation_equals_the_uncached_loop_and_transformers(decoder: Decoder) -> None:
    prompts = prompts_of(5, 5, 5)
    ours = generate(decoder, prompts, 20)
    assert ours == [uncached(decoder, prompt, 20) for prompt in prompts]
    theirs: Any = LlamaForCausalLM(LlamaConfig.from_dict(CONFIG.to_hf(None, None, None))).double()
    theirs.load_state_dict(decoder.state_dict())
    assert ours == theirs.generate(torch.tensor(prompts), max_new_tokens=20, do_sample=False)[:, 5:].tolist()
    # What was generated counts as repeated, too.
    ours = generate(decoder, prompts, 20, sampling=Sampling(repetition_penalty=1.5))
    penalized = theirs.generate(torch.tensor(prompts), max_new_tokens=20, do_sample=False, repetition_penalty=1.5)
    assert ours == penalized[:, 5:].tolist()


@pytest.mark.parametrize("config", [CONFIG, MHA, MQA], ids=["gqa", "mha", "mqa"])
def test_rows_of_different_lengths_get_what_they_get_alone(config: DecoderConfig) -> None:
    decoder = exact_decoder(config)
    prompts = prompts_of(3, 11, 1, 7)
    assert generate(decoder, prompts, 25) == [uncached(decoder, prompt, 25) for prompt in prompts]


@pytest.mark.parametrize("window", [2, 7, 12])
def test_a_window_drops_all_but_its_last_half(decoder: Decoder, window: int) -> None:
    # Lengths below, at and above the window; rows that reach it at different times, and at the same.
    for prompts in (prompts_of(3, 12, 50), prompts_of(5, 5)):
        expected = [uncached(decoder, prompt, 30, window) for prompt in prompts]
        assert generate(decoder, prompts, 30, window=window) == expected


def test_a_window_takes_no_more_memory_than_it_has_tokens(decoder: Decoder) -> None:
    stream = TokenStream(decoder, prompts_of(3, 5), 1000, window=8)
    assert stream.cache.capacity == 8


def test_sampled_rows_depend_on_their_own_seed_only(decoder: Decoder) -> None:
    prompts, seeds = prompts_of(3, 9, 1, 9), [4, 5, 6, 4]
    options: dict[str, Any] = {
        "sampling": Sampling(repetition_penalty=1.2, temperature=1.5, top_k=30, top_p=0.95),
        "window": 16,
    }
    together = generate(decoder, prompts, 25, seeds=seeds, **options)
    alone = [generate(decoder, [p], 25, seeds=[s], **options)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert together != generate(decoder, prompts, 25, seeds=[5, 6, 7, 5], **options)
    # The first tokens are not others because more are asked for.
    assert [row[:7] for row in together] == generate(decoder, prompts, 7, seeds=seeds, **options)


def test_draws_begin_alike() -> None:
    assert uniforms(3, 5) == uniforms(3, 9)[:5] != uniforms(4, 5)


@pytest.mark.parametrize("drawn", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_draws_are_above_0_and_at_most_1(drawn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the ends of what Python's generator gives, [0, 1), which no test would meet by chance."""
    monkeypatch.setattr(random.Random, "random", lambda source: drawn)
    assert all(0 < number <= 1 for number in uniforms(0, 3))


def test_generation_under_autocast() -> None:
    decoder = Decoder(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(generate(decoder, prompts_of(3, 2), 4)[0]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_generate(dtype: torch.dtype) -> None:
    decoder = exact_decoder().to(dtype)
    options: dict[str, Any] = {"sampling": Sampling(repetition_penalty=1.1, temperature=1.0, top_p=0.9), "window": 9}
    rows = generate(decoder, prompts_of(3, 2), 20, **options)
    assert [len(row) for row in rows] == [20, 20]
    assert rows == generate(decoder, prompts_of(3, 2), 20, **options)


def test_the_whole_context_can_be_filled(decoder: Decoder) -> None:
    assert len(generate(decoder, [[1, 2, 3]], 37)[0]) == 37


def test_rows_end_with_any_of_the_end_tokens(decoder: Decoder) -> None:
    prompts = prompts_of(5, 8, 2, 5)
    free = generate(decoder, prompts, 12)
    ends = [free[1][3], free[2][5]]
    ended = generate(decoder, prompts, 12, eos_ids=ends)
    assert {len(row) for row in ended} > {12} or len(ended[1]) <= 4
    for row, free_row in zip(ended, free, strict=True):
        until = min((free_row.index(end) + 1 for end in ends if end in free_row), default=12)
        assert row == free_row[:until]


def test_all_stop_when_the_last_row_has_ended(decoder: Decoder) -> None:
    (prompt,) = prompts_of(5)
    end = generate(decoder, [prompt], 1)[0][0]
    stream = TokenStream(decoder, [prompt, prompt], 12, eos_ids=[end])
    assert [ids.tolist() for ids in stream] == [[end, end]]


def test_a_row_can_be_ended_from_outside(decoder: Decoder) -> None:
    stream = TokenStream(decoder, prompts_of(5, 3), 12)
    next(stream)
    stream.finish(0)
    next(stream)
    stream.finish(1)
    assert next(stream, None) is None


def test_a_cache_that_holds_the_beginning_is_gone_on_with(decoder: Decoder) -> None:
    (prompt,) = prompts_of(9)
    cache = KVCache.for_decoder(decoder, 1, 40)
    (first,) = zip(*(step.tolist() for step in TokenStream(decoder, [prompt], 6, cache=cache)), strict=True)
    assert cache.length == 9 + 5
    # A second text that has 11 tokens in common with what was read.
    other = [*prompt, *first[:2], 50, 51]
    cache.truncate(11)
    read = []
    embed = decoder.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape)
    )
    again = [int(step) for step in TokenStream(decoder, [other], 6, cache=cache)]
    embed.remove()
    assert again == uncached(decoder, other, 6)
    assert read == [(1, 2)] + [(1, 1)] * 5


def test_a_step_that_is_broken_off_leaves_the_cache_as_it_was(decoder: Decoder) -> None:
    (prompt,) = prompts_of(4)
    cache = KVCache.for_decoder(decoder, 1, 40)
    stream = TokenStream(decoder, [prompt], 8, cache=cache)
    given = [int(next(stream)), int(next(stream))]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = decoder.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    hook.remove()
    assert cache.length == 5
    assert given + [int(step) for step in stream] == uncached(decoder, prompt, 8)


def test_modules_return_to_the_mode_they_were_in() -> None:
    decoder = Decoder(CONFIG).train()
    decoder.model.layers[0].eval()
    modes = [module.training for module in decoder.modules()]
    generate(decoder, [[1]], 1)
    assert [module.training for module in decoder.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 500},
        {"top_p": 0.5},
        {"top_p": 0.01},
        {"top_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 1.7, "top_k": 20, "top_p": 0.8},
    ],
)
def test_probabilities_are_those_of_transformers(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 101, dtype=dtype)
    texts: Any = torch.randint(0, 101, (5, 12))
    sampling = Sampling(**({"temperature": 1.0} | options))
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(TopPLogitsWarper(sampling.top_p))
    scores: Any = logits
    expected = processors(texts, scores).softmax(-1)

    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, texts, True)
    probabilities, ids = candidates(penalize(logits, seen, sampling.repetition_penalty), sampling)
    if ids is not None:
        probabilities = torch.zeros_like(logits).scatter_(1, ids, probabilities)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    # A few roundings of values up to 1.
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


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
    logits = PROBABILITIES.log().expand(20000, 4)
    numbers = torch.tensor(uniforms(0, 20000))
    drawn = sample(logits, Sampling(**({"temperature": 1.0} | options)), numbers)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    # The standard error of a share of 20,000 draws is at most 0.0035.
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=shares.dtype), rtol=0, atol=0.014)
    assert all(share == 0 for share, wanted in zip(shares.tolist(), expected, strict=True) if wanted == 0)


def test_the_ends_of_the_range_draw_tokens_that_may_be_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, -torch.inf]]).expand(2, 4)
    numbers = torch.tensor([2.0**-53, 1.0])
    assert sample(logits, Sampling(temperature=1.0), numbers).tolist() == [1, 2]
    assert sample(logits, Sampling(temperature=1.0, top_p=0.5), numbers).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_new_tokens": 38},
            r"the prompt has 3 tokens, and with 38 new ones exceeds the context of 40; at most 37 new tokens fit, or "
            r"any number with a window",
        ),
        ({"prompts": [[1], [1] * 39]}, r"prompt 2 has 39 tokens, and with 2 new ones .* at most 1 new tokens fit"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; it has to be at least 1"),
        ({"prompts": torch.tensor([1])}, r"prompt ids have the shape \(\) a row; they have to be \(tokens,\)"),
        ({"prompts": []}, r"there is no prompt"),
        ({"prompts": [[1], []]}, r"prompt 2 has no tokens"),
        (
            {"prompts": [[5, 101]]},
            r"the prompt has token ids from 5 to 101; the model knows 0 to 100: is the tokenizer",
        ),
        ({"prompts": [[5, -1]]}, r"the prompt has token ids from -1 to 5"),
        ({"window": 41}, r"--window is 41: it has to be at least 2 and at most the context of 40"),
        ({"window": 1}, r"--window is 1: it has to be at least 2"),
    ],
)
def test_an_impossible_request_is_refused(decoder: Decoder, options: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"prompts": [[1, 2, 3]], "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        generate(decoder, **request)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature is -0.5; it has to be at least 0 \(0 takes the likeliest token\)"),
        ({"temperature": float("nan")}, r"temperature is nan; it has to be at least 0"),
        ({"top_k": 0}, r"top_k is 0; it has to be at least 1, or left out"),
        ({"top_p": 0.0}, r"top_p is 0.0; it has to be above 0 and at most 1, or left out"),
        ({"top_p": 1.1}, r"top_p is 1.1; it has to be above 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0; it has to be above 0 \(1 does nothing\)"),
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    decoder = Decoder(CONFIG)
    torch.nn.init.constant_(decoder.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match=r"not finite: its weights are damaged, or torch.float32 is too narrow"):
        generate(decoder, [[1]], 1)


def test_a_cache_lets_its_memory_go_at_once(decoder: Decoder) -> None:
    stream = TokenStream(decoder, [[1, 2], [3]], 3)
    list(stream)
    keys = weakref.ref(stream.cache.keys_BGSK[0])
    gc.disable()
    try:
        del stream
        assert keys() is None, "something refers to the cache in a circle"
    finally:
        gc.enable()


def test_a_share_that_is_reached_needs_no_further_token() -> None:
    """Four tokens of a quarter each: half of the probability is the first two."""
    probabilities, ids = candidates(torch.zeros(1, 4), Sampling(temperature=1.0, top_p=0.5))
    assert probabilities.tolist() == [[0.25, 0.25, 0.0, 0.0]]
    assert ids is not None and sorted(ids[0].tolist()) == [0, 1, 2, 3]


def test_each_step_draws_with_its_own_number() -> None:
    """All tokens are equally likely: the number says which share of the vocabulary lies before the token."""
    decoder = exact_decoder()
    torch.nn.init.zeros_(decoder.lm_head.weight)
    rows = generate(decoder, [[1], [2]], 12, sampling=Sampling(temperature=1.0), seeds=[8, 9])
    assert rows == [[math.ceil(number * 101) - 1 for number in uniforms(seed, 12)] for seed in (8, 9)]


def test_a_beginning_that_rows_of_different_lengths_share_is_gone_on_with(decoder: Decoder) -> None:
    beginning, *ends = prompts_of(4, 3, 1)
    cache = KVCache.for_decoder(decoder, 2, 20)
    with torch.no_grad():
        decoder(torch.tensor([beginning, beginning]), cache=cache)
    prompts = [beginning + end for end in ends]
    stream = TokenStream(decoder, prompts, 6, cache=cache)
    rows = torch.stack(list(stream), dim=1).tolist()
    assert rows == [uncached(decoder, prompt, 6) for prompt in prompts]
