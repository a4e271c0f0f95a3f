"""Blocked attention beside the fused kernel, and both beside float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danube.model import GroupedQueryAttention, RotaryEmbedding, document_mask
from lightning_danube.model.blocked_attention import blocked_attention

B, G, R, T, K = 3, 2, 3, 13, 8


def problem(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Queries, keys and values laid out as a projection leaves them, and a gradient."""
    torch.manual_seed(0)
    inputs = [torch.randn(B, T, heads, K).to(dtype) for heads in (G * R, G, G, G * R)]
    inputs[0] = inputs[0] * scale
    return [x.transpose(1, 2) for x in inputs]


def results(attention, inputs: list[Tensor], mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    out = attention(q, k, v, mask)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))]


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def documents() -> Tensor:
    return document_mask(torch.tensor([[0] * 5 + [1] * 8, [0] * T, [0, 1, 2] + [3] * 10]))


@pytest.fixture(params=[(4, 10**6), (5, 1), (64, 100)], ids=["blocks", "row by row", "one block of queries"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, scores = request.param
    monkeypatch.setattr("lightning_danube.model.blocked_attention.BLOCK_QUERIES", queries)
    monkeypatch.setattr("lightning_danube.model.blocked_attention.BLOCK_SCORES", scores)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("blocks")
def test_in_float64_it_is_the_kernel(masked: bool) -> None:
    inputs, mask = problem(torch.float64), documents() if masked else None
    for ours, theirs in zip(
        results(blocked_attention, inputs, mask, torch.float64),
        results(kernel, inputs, mask, torch.float64),
        strict=True,
    ):
        # Sums of at most 13 terms of order one, in another order.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("blocks")
def test_in_bfloat16_it_is_as_exact_as_the_kernel(masked: bool, scale: float) -> None:
    inputs, mask = problem(torch.bfloat16, scale), documents() if masked else None
    exact = results(kernel, inputs, mask, torch.float64)
    pairs = zip(
        exact,
        results(blocked_attention, inputs, mask, torch.bfloat16),
        results(kernel, inputs, mask, torch.bfloat16),
        strict=True,
    )
    for truth, ours, theirs in pairs:
        error, of_kernel = ((x.double() - truth).norm() / truth.norm() for x in (ours, theirs))
        # Probabilities are rounded before the values are taken, which the kernel leaves out in the forward pass; one
        # rounding is 2^-9 = 0.002. Scores rounded as they are would give 0.03 at scale 5.
        assert error < 2 * of_kernel + 0.003


def test_the_first_tokens_know_nothing_of_the_later() -> None:
    q, k, v, _ = problem(torch.bfloat16)
    before = blocked_attention(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 7:], v[:, :, 7:] = 100.0, -100.0
    torch.testing.assert_close(blocked_attention(q, k, v)[:, :, :7], before[:, :, :7], rtol=0, atol=0)


def test_the_layer_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return blocked_attention(*x)

    monkeypatch.setattr("lightning_danube.model.attention.blocked_attention", counted)
    layer, rotary = GroupedQueryAttention(16, 4, 2, 4, dropout=0.5), RotaryEmbedding(4, 1e4)
    hidden, tables = torch.randn(2, 6, 16), rotary(torch.arange(6)[None], torch.float32)

    def uses() -> int:
        calls.clear()
        layer(hidden, *tables)
        return len(calls)

    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "highest")
    assert uses() == 0  # neither way is faster: the curves of earlier runs stay what they were
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "medium")
    layer.eval()
    expected = int(torch.backends.mkldnn.is_available())
    assert uses() == expected
    layer.train()
    assert uses() == 0  # dropout is the kernel's
    layer.dropout = 0.0
    assert uses() == expected


def test_pytorch_still_has_the_private_gradient_of_a_softmax() -> None:
    schema = torch.ops.aten._softmax_backward_data.default._schema
    assert [argument.name for argument in schema.arguments] == ["grad_output", "output", "dim", "input_dtype"]


@pytest.mark.usefixtures("blocks")
def test_an_all_true_mask_is_causal_attention() -> None:
    """A mask can hide keys, and never shows a later one."""
    inputs = problem(torch.float64)
    masked, plain = (
        results(blocked_attention, inputs, mask, torch.float64)
        for mask in (torch.ones(B, 1, T, T, dtype=torch.bool), None)
    )
    for one, other in zip(masked, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_large_scores_that_differ_little_are_told_apart_in_bfloat16() -> None:
    """Scores of 362 and more, a third apart: bfloat16 has steps of 2 there, so the largest is subtracted first."""
    tokens = 8
    q = torch.full((1, 1, tokens, K), 8.0)
    k = torch.full((1, 1, tokens, K), 16.0)
    k[..., 0] += 0.125 * torch.arange(tokens)
    v = torch.randn(1, 1, tokens, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = kernel(q.double(), k.double(), v.double(), None)
    found = blocked_attention(q.bfloat16(), k.bfloat16(), v)
    assert (found.double() - exact).norm() < 0.01 * exact.norm()
