import dataclasses
import math
from contextlib import nullcontext
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_danube.generation.token_stream import generate
from lightning_danube.model import (
    Decoder,
    DecoderConfig,
    GroupedQueryAttention,
    RopeScaling,
    RotaryEmbedding,
    document_mask,
)
from lightning_danube.model import attention as attention_module
from lightning_danube.model import decoder as decoder_module
from lightning_danube.model.attention import (
    inverse_frequencies,
    kernels_for,
    longest_context,
    repeat_heads,
    rotary_tables,
    rotate,
    without_plans,
)
from lightning_danube.model.masks import causal_mask

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2)


def exact_decoder(config: DecoderConfig = CONFIG) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config).double().eval()


def use_exact_angles(decoder: Decoder) -> None:
    """Without the float32 rounding of angles that the reference has, relative positions hold to float64."""
    head_dim = decoder.config.head_dim
    assert head_dim is not None
    decoder.model.rotary_emb.frequencies = inverse_frequencies(head_dim, decoder.config.rope_theta, torch.float64)


def test_scores_depend_only_on_relative_position() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)
    frequencies = inverse_frequencies(16, 100.0, torch.float64)

    def score(query_position: int, key_position: int) -> Tensor:
        turned = [
            rotate(x, *rotary_tables(torch.tensor([[position]]), frequencies))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    # Angles up to 8000 radians, rounded at 1e-16 of that, give 1e-12; sixteen products of order one add up to it.
    assert abs(score(7, 3) - score(8007, 8003)) < 1e-10
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_shifting_all_positions_changes_no_logit() -> None:
    decoder = exact_decoder()
    use_exact_angles(decoder)
    ids, positions = torch.randint(0, 101, (2, 20)), torch.arange(20)[None]
    # As above: rounded angles of up to 5000 radians are good to 1e-12.
    assert (decoder(ids) - decoder(ids, position_ids_BT=positions + 5000)).abs().max() < 1e-9
    assert (decoder(ids) - decoder(ids, position_ids_BT=2 * positions)).abs().max() > 1e-3


def test_rotation_keeps_lengths_and_leaves_position_0_alone() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    turned = rotate(x, *rotary_tables(torch.arange(5)[None], inverse_frequencies(8, 1e5, torch.float64)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])


def test_as_many_kv_heads_as_query_heads_is_multi_head_attention() -> None:
    """Repeating the weights of the key-value heads gives a multi-head layer with the same output."""
    torch.manual_seed(0)
    grouped = GroupedQueryAttention(64, heads=4, kv_heads=2, head_dim=16).double()
    multi = GroupedQueryAttention(64, heads=4, kv_heads=4, head_dim=16).double()
    multi.load_state_dict(
        {
            name: weight.view(2, 1, 16, 64).expand(2, 2, 16, 64).reshape(64, 64) if name[0] in "kv" else weight
            for name, weight in grouped.state_dict().items()
        }
    )
    hidden = torch.randn(2, 9, 64, dtype=torch.float64)
    cos, sin = RotaryEmbedding(16, 1e5)(torch.arange(9)[None], torch.float64)
    # The same sums, in whatever order: 64 products of order one.
    torch.testing.assert_close(grouped(hidden, cos, sin), multi(hidden, cos, sin), rtol=0, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_repeating_heads_equals_handing_them_over_grouped(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that CUDA takes where its fused kernels know no groups."""
    decoder = exact_decoder()
    ids = torch.randint(0, 101, (2, 12))
    documents = torch.tensor([0, 1]).repeat_interleave(6).expand(2, 12) if masked else None
    grouped = decoder(ids, document_ids_BT=documents)
    monkeypatch.setattr(attention_module, "takes_grouped_heads", lambda q, mask: False)
    # Same arithmetic on copies.
    torch.testing.assert_close(decoder(ids, document_ids_BT=documents), grouped, rtol=0, atol=1e-12)


def test_repeat_heads_keeps_groups_together() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(repeat_heads(x, 2), x.repeat_interleave(2, dim=1))


def test_masks() -> None:
    documents = torch.tensor([[7, 7, 8]])
    assert document_mask(documents).int().tolist() == [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    assert causal_mask(2, 2, torch.device("cpu")).int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]


def test_packed_documents_do_not_see_each_other() -> None:
    decoder = exact_decoder()
    lengths = (5, 1, 9)
    texts = [torch.randint(0, 101, (1, length)) for length in lengths]
    packed = torch.cat(texts, dim=1)
    documents = torch.repeat_interleave(torch.tensor([3, 1, 2]), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = decoder(packed, position_ids_BT=positions, document_ids_BT=documents)
    alone = torch.cat([decoder(text) for text in texts], dim=1)
    # The same numbers from sums of other lengths (masked scores add exact zeros).
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert (together - decoder(packed)).abs().max() > 1e-3


def test_one_document_is_the_plain_causal_case() -> None:
    decoder = exact_decoder()
    ids = torch.randint(0, 101, (2, 11))
    # Two kernels, one sum.
    torch.testing.assert_close(decoder(ids, document_ids_BT=torch.zeros_like(ids)), decoder(ids), rtol=0, atol=1e-12)


def test_dropout_acts_in_training_only() -> None:
    decoder = exact_decoder(dataclasses.replace(CONFIG, attention_dropout=0.5))
    ids = torch.randint(0, 101, (1, 11))
    assert torch.equal(decoder(ids), decoder(ids))
    decoder.train()
    assert not torch.equal(decoder(ids), decoder(ids))


@pytest.mark.parametrize("move", ["bfloat16", "float64", "to_empty"])
def test_rotary_tables_survive_moves(move: str) -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(16, 1e5)
    if move == "to_empty":
        rotary.to_empty(device="cpu")
    else:
        rotary.to(getattr(torch, move))
    assert not rotary.state_dict()
    cos, sin = rotary(torch.tensor([[5]]), torch.bfloat16)
    expected_cos, expected_sin = rotary_tables(torch.tensor([[5]]), inverse_frequencies(16, 1e5))
    assert cos.dtype == torch.float32
    assert torch.equal(cos, expected_cos) and torch.equal(sin, expected_sin)


def test_pytorch_still_moves_modules_by_a_private_method() -> None:
    """`RotaryEmbedding` and `Decoder` override the method, so that tables and tied weights survive a move."""
    assert list(signature(nn.Module._apply).parameters) == ["self", "fn", "recurse"]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_texts_are_causal(tokens: int) -> None:
    decoder = exact_decoder()
    ids = torch.randint(0, 101, (1, 8))
    # As above: the same numbers from sums of other lengths.
    torch.testing.assert_close(decoder(ids[:, :tokens]), decoder(ids)[:, :tokens], rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_the_form_for_the_compiler_is_the_kernel(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, 16, dtype=torch.float64) for heads, tokens in ((6, 1), (3, 7), (3, 7)))
    mask = torch.rand(2, 1, 1, 7) < 0.5 if masked else None
    if mask is not None:
        mask[..., 0] = True
    expected = attention_module.attend_once(q, k, v, mask)
    found = attention_module.sums_of_products(q.view(2, 3, 2, 16), k, v, mask)
    # Sums of 16 and of 7 terms of order one, in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


# --- lengths that change, on CUDA -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "tokens", "cached", "asked"),
    [
        ("cuda", 8192, False, True),
        ("cuda", 128, False, True),
        ("cuda", 1000, False, False),
        ("cuda", 8192, True, False),
        ("cuda", 1, True, False),
        ("cpu", 1000, False, True),
        ("cpu", 1, True, True),
    ],
)
def test_cudnn_is_asked_only_for_lengths_that_return(device: str, tokens: int, cached: bool, asked: bool) -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with kernels_for(torch.device(device), tokens, cached=cached)():
        assert torch.backends.cuda.cudnn_sdp_enabled() == asked
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_user_who_turned_cudnn_off_finds_it_off_afterwards() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with without_plans():
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_attention_of_a_call_and_of_its_recomputation_picks_among_the_same_kernels(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where no kernel changes with this: the result must not, either."""
    decoder = exact_decoder().train()
    decoder.activation_checkpointing = recompute
    ids, asked, results = torch.randint(0, 101, (2, 9)), [], []
    attend = F.scaled_dot_product_attention

    def observed(*args: Any, **named: Any) -> Tensor:
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", observed)
    for context in (nullcontext, without_plans):
        monkeypatch.setattr(decoder_module, "kernels_for", lambda *args, context=context, **named: context)
        decoder.zero_grad()
        decoder(ids).square().sum().backward()
        results.append([parameter.grad for parameter in decoder.parameters()])
    calls = CONFIG.num_hidden_layers * (2 if recompute else 1)
    assert asked == [True] * calls + [False] * calls
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_steps_with_a_cache_ask_for_changing_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def chosen(device: torch.device, tokens: int, *, cached: bool) -> Any:
        asked.append((tokens, cached))
        return nullcontext

    monkeypatch.setattr(decoder_module, "kernels_for", chosen)
    decoder = exact_decoder()
    with torch.no_grad():
        generate(decoder, [[1, 2, 3]], 2)
        decoder(torch.zeros(1, 5, dtype=torch.long))
    assert set(asked) == {(3, True), (1, True), (5, False)}


def test_the_longest_context_is_the_published_bound_of_the_rotary_base() -> None:
    """Men et al. 2024 (arXiv 2405.14591), figure 1: for heads of 128 channels the bound is about 0.0424 × L^1.628."""
    for context in (4096, 8192, 32768):
        assert 1 / 1.4 < longest_context(128, 0.0424 * context**1.628) / context < 1.4  # the points scatter by as much
    reach = longest_context(16, 1e5)
    sums = [sum(math.cos(m / 1e5 ** (2 * pair / 16)) for pair in range(8)) for m in range(reach + 1)]
    assert min(sums[:reach]) >= 0 > sums[reach]
    assert longest_context(16, 1e5, RopeScaling(factor=8.0, original_max_position_embeddings=128)) > reach
