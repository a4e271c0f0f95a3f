import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_danube.model import Decoder, DecoderConfig, next_token_loss, token_losses
from lightning_danube.model.loss import VocabularyPart

B, T, D, V = 3, 13, 8, 50


def problem(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D, dtype=dtype)
    weight = scale * torch.randn(V, D, dtype=dtype)
    labels = torch.randint(0, V, (B, T))
    labels[0, :4] = labels[2, -1] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels.flatten(), reduction="sum")


# 39 tokens: one at a time, no divisor, one short, exactly, more than there are.
@pytest.mark.parametrize("chunk_tokens", [1, 5, 38, 39, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradients_are_those_of_cross_entropy(dtype: torch.dtype, chunk_tokens: int) -> None:
    hidden, weight, labels = problem(dtype)
    total, count = next_token_loss(hidden, weight, labels, chunk_tokens=chunk_tokens)
    expected = reference(hidden, weight, labels)
    assert total.dtype == dtype and count.item() == (labels != -100).sum() == B * T - 5
    # Sums of at most 50 terms of order one in another order: a few dozen roundings.
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=0)
    # Scaled, so that a backward pass that forgets its incoming gradient is found out.
    ours = torch.autograd.grad(total * 0.37, (hidden, weight))
    theirs = torch.autograd.grad(expected * 0.37, (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_gradients_agree_with_finite_differences() -> None:
    hidden, weight, labels = problem(torch.float64)
    hidden, weight, labels = hidden[:, :5].detach(), weight[:20].detach(), labels[:, :5] % 20
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, labels, chunk_tokens=7)[0], inputs)


def test_backward_twice_gives_the_same() -> None:
    hidden, weight, labels = problem(torch.float64)
    total, _ = next_token_loss(hidden, weight, labels)
    first = torch.autograd.grad(total * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total * 3, (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_autocast_is_as_good_as_cross_entropy_under_autocast() -> None:
    hidden, weight, labels = problem(torch.float32)
    exact_hidden, exact_weight, _ = problem(torch.float32)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (exact_hidden, exact_weight))
    truth = reference(exact_hidden, exact_weight, labels)
    true_gradients = torch.autograd.grad(truth, (exact_hidden, exact_weight))
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = next_token_loss(hidden, weight, labels, chunk_tokens=16)
        expected = reference(hidden, weight, labels)
    assert total.dtype == torch.float32
    # The same bfloat16 logits, then float32 in both.
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(total, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for one, other, true in zip(ours, theirs, true_gradients, strict=True):
        assert one.dtype == torch.float32
        # Both round the logits' derivative to bfloat16, ours adds chunks up in float32; the factor is for bad luck.
        assert (one - true).norm() <= 1.2 * (other - true).norm()
        assert (one - true).norm() < 0.01 * true.norm()  # 8 bits, 0.4 %


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, labels = problem(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = next_token_loss(hidden, weight, labels)
    assert torch.equal(total, next_token_loss(hidden, weight, labels)[0])


def test_bfloat16_weights_get_bfloat16_gradients_summed_in_float32() -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    total, _ = next_token_loss(hidden, weight, labels, chunk_tokens=4)
    assert total.dtype == torch.float32
    total.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    truth = torch.autograd.grad(reference(hidden.double(), weight.double(), labels), weight)[0].double()
    # Ten chunks, each rounded to 8 bits once, and once at the end.
    assert (weight.grad.double() - truth).norm() < 0.01 * truth.norm()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = problem(torch.float64, scale=1000.0)
    total, _ = next_token_loss(hidden, weight, labels)
    torch.testing.assert_close(total, reference(hidden, weight, labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_to_count_gives_zero(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)
    total, count = next_token_loss(hidden, weight, torch.full_like(labels, -100), chunk_tokens=7)
    assert total.item() == 0 and count.item() == 0
    for gradient in torch.autograd.grad(total, (hidden, weight)):
        assert not gradient.any()


def test_another_ignore_index() -> None:
    hidden, weight, labels = problem(torch.float64)
    expected, count = next_token_loss(hidden, weight, labels)
    total, other_count = next_token_loss(hidden, weight, labels.masked_fill(labels < 0, V + 7), ignore_index=V + 7)
    assert torch.equal(total, expected) and torch.equal(count, other_count)


def test_labels_of_32_bits() -> None:
    hidden, weight, labels = problem(torch.float64)
    assert torch.equal(next_token_loss(hidden, weight, labels.int())[0], next_token_loss(hidden, weight, labels)[0])


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_only_what_trains_gets_a_gradient(trained: tuple[bool, bool]) -> None:
    hidden, weight, labels = problem(torch.float64)
    expected = torch.autograd.grad(next_token_loss(hidden, weight, labels)[0], (hidden, weight))
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    next_token_loss(hidden, weight, labels)[0].backward()
    for tensor, gradient, trains in zip((hidden, weight), expected, trained, strict=True):
        assert torch.equal(tensor.grad, gradient) if trains and tensor.grad is not None else tensor.grad is None


def test_a_tied_weight_gets_both_gradients() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(16, 24, 1, 2, 1, vocab_size=V, tie_word_embeddings=True, initializer_range=0.2)
    decoder = Decoder(config).double()
    ids = torch.randint(0, V, (2, 9))
    next_token_loss(decoder.hidden_states(ids[:, :-1]), decoder.lm_head.weight, ids[:, 1:])[0].backward()
    ours = decoder.model.embed_tokens.weight.grad
    decoder.zero_grad()
    F.cross_entropy(decoder(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(ours, decoder.model.embed_tokens.weight.grad)


def test_token_losses() -> None:
    hidden, weight, labels = problem(torch.float64)
    nats = token_losses(hidden, weight, labels, chunk_tokens=7)
    logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(B, T)
    torch.testing.assert_close(nats, expected)
    assert not nats[labels == -100].any()
    torch.testing.assert_close(nats.sum(), next_token_loss(hidden, weight, labels)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert token_losses(hidden.float(), weight.float(), labels).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 34, 1000])
def test_token_losses_can_be_weighed_by_each_other(dtype: torch.dtype, chunk_tokens: int) -> None:
    """As losses of whole sequences do: what a token counts follows from all of them."""
    hidden, weight, labels = problem(dtype)
    nats = token_losses(hidden, weight, labels, chunk_tokens=chunk_tokens)
    logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(B, T)
    ours, theirs = (
        torch.autograd.grad(F.softplus(each.sum(1)[0] - 2 * each.sum(1)[1]) + each.square().sum(), (hidden, weight))
        for each in (nats, expected)
    )
    # As above: sums of at most 50 terms in another order.
    tolerance = 40 * torch.finfo(dtype).eps
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_token_losses_agree_with_finite_differences() -> None:
    hidden, weight, labels = problem(torch.float64)
    hidden, weight, labels = hidden[:, :5].detach(), weight[:20].detach(), labels[:, :5] % 20
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: token_losses(h, w, labels, chunk_tokens=4), inputs)


def test_token_losses_under_autocast_have_gradients_of_the_parameters_type() -> None:
    hidden, weight, labels = problem(torch.float32)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    truth = torch.autograd.grad(reference(exact[0], exact[1], labels), exact)
    with torch.autocast("cpu", torch.bfloat16):
        total = token_losses(hidden, weight, labels, chunk_tokens=16).sum()
    for one, true in zip(torch.autograd.grad(total, (hidden, weight)), truth, strict=True):
        assert one.dtype == torch.float32
        assert (one - true).norm() < 0.01 * true.norm()  # 8 bits, 0.4 %


def test_token_losses_without_a_counted_token() -> None:
    hidden, weight, labels = problem(torch.float32)
    nats = token_losses(hidden, weight, torch.full_like(labels, -100))
    assert not nats.any()
    for gradient in torch.autograd.grad(nats.sum(), (hidden, weight)):
        assert not gradient.any()


class Spy(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation gives, and how many matrices were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.largest = max([self.largest, *(x.numel() for x in results if isinstance(x, Tensor))])
        self.products += "mm" in str(func)
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_never_all_logits_at_once(autocast: bool) -> None:
    tokens, vocabulary, chunk = 400, 300, 20
    hidden = torch.randn(2, tokens // 2, D, requires_grad=True)
    weight = torch.randn(vocabulary, D, requires_grad=True)
    labels = torch.randint(0, vocabulary, (2, tokens // 2))
    with Spy() as spy, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        next_token_loss(hidden, weight, labels, chunk_tokens=chunk)[0].backward()
        token_losses(hidden, weight, labels, chunk_tokens=chunk).sum().backward()
    assert spy.largest == chunk * vocabulary < tokens * vocabulary
    with Spy() as spy:
        reference(hidden, weight, labels)
    assert spy.largest == tokens * vocabulary, "the spy would not have noticed"


def test_validation_does_no_gradient_work() -> None:
    hidden, weight, labels = problem(torch.float32)
    with Spy() as training:
        next_token_loss(hidden, weight, labels, chunk_tokens=13)
    with Spy() as validation, torch.no_grad():
        total, _ = next_token_loss(hidden, weight, labels, chunk_tokens=13)
    assert (training.products, validation.products) == (9, 3)
    assert not total.requires_grad


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, labels = problem(torch.float32)
    for call in (next_token_loss, token_losses):
        with pytest.raises(
            ValueError, match=r"hidden states \(3, 13, 8\), head \(50, 8\) and labels \(3, 12\) do not fit"
        ):
            call(hidden, weight, labels[:, 1:])
        with pytest.raises(ValueError, match=r"head \(50, 7\) .* do not fit together"):
            call(hidden, weight[:, 1:], labels)
        with pytest.raises(ValueError, match=r"chunk_tokens is 0; it has to be at least 1"):
            call(hidden, weight, labels, chunk_tokens=0)


class Devices:
    """Stands for a group of devices: threads that meet at each reduction."""

    def __init__(self, number: int) -> None:
        self.barrier, self.values = threading.Barrier(number, timeout=60), dict[int, Tensor]()

    def all_reduce(self, values: Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None) -> None:
        assert group is self
        self.values[threading.get_ident()] = values.clone()
        self.barrier.wait()
        together = torch.stack([*self.values.values()])
        self.barrier.wait()
        values.copy_(together.amax(0) if op == torch.distributed.ReduceOp.MAX else together.sum(0))


@pytest.mark.parametrize("weighed", [False, True])
def test_a_divided_vocabulary_gives_the_loss_of_the_whole(weighed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices have half of the head each. The logits of the second half are far larger."""
    hidden, weight, labels = problem(torch.float64)
    weight = torch.cat([weight[: V // 2], 100 * weight[V // 2 :]]).detach()
    group, parts = Devices(2), dict[int, VocabularyPart | None]()
    monkeypatch.setattr(torch.distributed, "all_reduce", group.all_reduce)
    monkeypatch.setattr("lightning_danube.model.loss.local_head", lambda head: (head, parts[id(head)]))

    def loss_of(head: Tensor, part: VocabularyPart | None) -> list[Tensor]:
        head, states = head.clone().requires_grad_(), hidden.detach().clone().requires_grad_()
        parts[id(head)] = part
        if weighed:
            total = token_losses(states, head, labels, chunk_tokens=7).square().sum()
        else:
            total, _ = next_token_loss(states, head, labels, chunk_tokens=7)
        total.backward()
        assert states.grad is not None and head.grad is not None
        return [total.detach(), states.grad, head.grad]

    with ThreadPoolExecutor(2) as devices:
        halves = [
            devices.submit(loss_of, rows, VocabularyPart(group, start))
            for rows, start in ((weight[: V // 2], 0), (weight[V // 2 :], V // 2))
        ]
        first, second = (half.result() for half in halves)
    total, states, head = loss_of(weight, None)
    for device in (first, second):
        torch.testing.assert_close(device[0], total, rtol=1e-12, atol=0)
        torch.testing.assert_close(device[1], states, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([first[2], second[2]]), head, rtol=1e-10, atol=1e-12)
