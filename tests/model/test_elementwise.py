"""The autograd functions of elementwise.py beside the plain operations that they replace."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danube.model import RotaryEmbedding
from lightning_danube.model.attention import rotate
from lightning_danube.model.decoder import RMSNorm, SwiGLU
from lightning_danube.model.elementwise import Gate, RootMeanSquareNorm, Turn, gains

B, T, H, K = 3, 7, 2, 8
D = H * K


@pytest.fixture(params=[1, 40, 2**16], ids=["a row at a time", "some rows", "all rows"], autouse=True)
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_danube.model.elementwise.PIECE", request.param)


def values(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    out = function(*inputs)
    grad = values(*out.shape, dtype=out.dtype, seed=1).detach()
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return RotaryEmbedding(K, 1e4)(torch.arange(T)[None] + torch.arange(B)[:, None], dtype)


def assert_equal_to(plain: list[Tensor], own: list[Tensor], tolerance: float) -> None:
    for one, other in zip(own, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


# Sums of at most 16 terms of order one in another order: a few roundings.
DTYPES = [(torch.float64, 1e-14), (torch.float32, 2e-6)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_norm(dtype: torch.dtype, tolerance: float) -> None:
    x, weight = values(B, T, D, dtype=dtype), values(D, dtype=dtype, seed=2)
    own = results(lambda x, w: RootMeanSquareNorm.apply(x, w, 1e-5), x, weight)
    assert_equal_to(results(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), x, weight), own, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [*DTYPES, (torch.bfloat16, 0.0)])
def test_gate(dtype: torch.dtype, tolerance: float) -> None:
    gate, up = values(B, T, D, dtype=dtype), values(B, T, D, dtype=dtype, seed=2)
    assert_equal_to(results(lambda g, u: F.silu(g) * u, gate, up), results(Gate.apply, gate, up), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", [1, B])
def test_turn(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    cos, sin = (table[:rows] for table in tables(dtype))
    x = values(B, T, H, K, dtype=dtype)
    own = results(lambda x: Turn.apply(x, cos, sin), x)
    with torch.no_grad():
        assert_equal_to([rotate(x, cos, sin)], own[:1], tolerance)
    assert_equal_to(results(lambda x: x * cos + x.roll(K // 2, dims=-1) * sin, x), own, tolerance)


def test_gradients_agree_with_finite_differences() -> None:
    x, weight, other = values(2, 3, D), values(D, seed=2), values(2, 3, D, seed=3)
    assert torch.autograd.gradcheck(lambda x, w: RootMeanSquareNorm.apply(x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(Gate.apply, (x, other))
    cos, sin = (table[:1, :3] for table in tables(torch.float64))
    assert torch.autograd.gradcheck(lambda x: Turn.apply(x, cos, sin), values(2, 3, H, K))


def test_inputs_in_another_memory_layout() -> None:
    """Gradients and inputs arrive as views: transposed, expanded, or every second channel."""
    x, weight = values(T, B, D).transpose(0, 1), values(D, seed=2)
    wide = values(B, T, 2 * D, seed=3)[..., ::2]

    def total(normed: Tensor, gated: Tensor, turned: Tensor) -> Tensor:
        return normed.sum() + gated.sum() + turned.sum()  # their gradients are expanded scalars

    cos, sin = tables(torch.float64)
    own = total(
        RootMeanSquareNorm.apply(x, weight, 1e-5), Gate.apply(x, wide), Turn.apply(x.unflatten(-1, (H, K)), cos, sin)
    )
    heads = x.unflatten(-1, (H, K))
    plain = total(
        F.rms_norm(x, weight.shape, weight, 1e-5),
        F.silu(x) * wide,
        heads * cos + heads.roll(K // 2, dims=-1) * sin,
    )
    leaves = (x, weight, wide)
    assert_equal_to(
        [plain.detach(), *torch.autograd.grad(plain, leaves)],
        [own.detach(), *torch.autograd.grad(own, leaves)],
        1e-12,
    )


def test_a_frozen_gain_gets_no_gradient() -> None:
    x, weight = values(B, T, D), values(D, seed=2).detach()
    out = RootMeanSquareNorm.apply(x, weight, 1e-5)
    out.sum().backward()
    assert x.grad is not None and weight.grad is None


def test_the_layers_take_them_in_eager_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def spy(name: str, function: type[torch.autograd.Function]) -> type:
        def apply(*inputs: object) -> object:
            used.append(name)
            return function.apply(*inputs)

        return type(name, (), {"apply": staticmethod(apply)})

    monkeypatch.setattr("lightning_danube.model.decoder.Gate", spy("gate", Gate))
    monkeypatch.setattr("lightning_danube.model.decoder.RootMeanSquareNorm", spy("norm", RootMeanSquareNorm))
    monkeypatch.setattr("lightning_danube.model.attention.Turn", spy("turn", Turn))
    norm, feed_forward, (cos, sin) = RMSNorm(D, 1e-5), SwiGLU(D, 24), tables(torch.float32)
    x = values(B, T, D, dtype=torch.float32)

    def run() -> list[str]:
        used.clear()
        feed_forward(norm(x))
        rotate(x.unflatten(-1, (H, K)), cos, sin)
        return list(used)

    assert run() == ["norm", "gate", "turn"]
    with torch.no_grad():
        assert run() == []


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    x, weight = values(rows, D), values(D, seed=2)
    assert gains(x)
    assert RootMeanSquareNorm.apply(x, weight, 1e-5).shape == Gate.apply(x, x).shape == (rows, D)


def test_no_result_is_a_view() -> None:
    """FSDP2 warns of a module that returns a view: an operation in place on it would drop a hook."""
    x, gate = values(B, T, D), values(B, T, D, seed=1)
    norm, gated = RootMeanSquareNorm.apply(x, values(D), 1e-5), Gate.apply(gate, x)
    turned = Turn.apply(values(B, T, H, K), *tables(torch.float64))
    assert [one._base for one in (norm, gated, turned)] == [None] * 3
