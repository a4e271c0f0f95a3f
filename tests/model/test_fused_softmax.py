"""The loss as on a GPU: with the fused kernels, run by Triton's interpreter on CPU tensors, or with a twin of them.

The kernels' own tests need Triton (`make test-kernels`). The twin tests everything around the kernels without it.
"""

import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danube.model import loss, next_token_loss, token_losses
from lightning_danube.model.config import CHUNK_TOKENS, gpu_chunk_tokens
from lightning_danube.model.loss import LogitsBuffer, VocabularyPart

TOKENS, D = 23, 8
KERNELS = [pytest.param("twin", id="twin"), pytest.param("triton", id="triton", marks=pytest.mark.kernels)]
# The interpreter cuts float32 off where a GPU rounds to bfloat16: one unit in the last place instead of a half.
EPS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-21}


def twin_statistics(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, start: int, missing: float
) -> tuple[Tensor, Tensor, Tensor]:
    x_CV, counted_C, own_C = logits_CV.float(), labels_C != ignore_index, labels_C - start
    here_C = (own_C >= 0) & (own_C < x_CV.shape[1])
    largest_C = x_CV.amax(1)
    sums_C = (x_CV - largest_C[:, None]).exp().sum(1)
    targets_C = x_CV.gather(1, own_C.where(here_C, 0)[:, None]).squeeze(1).where(here_C, missing)
    return largest_C.where(counted_C, 0), sums_C.where(counted_C, 1), targets_C.where(counted_C, 0)


def twin_derivative(
    logits_CV: Tensor, labels_C: Tensor, largest_C: Tensor, sums_C: Tensor, scale_C: Tensor, start: int
) -> None:
    softmax_CV = (logits_CV.float() - largest_C[:, None]).exp() / sums_C[:, None]
    own_CV = torch.arange(start, start + logits_CV.shape[1]) == labels_C[:, None]
    derivative_CV = (softmax_CV - own_CV.float()) * scale_C[:, None]
    logits_CV.copy_(derivative_CV.where(scale_C[:, None] != 0, 0))


def kernels_module(monkeypatch: pytest.MonkeyPatch, *, interpreted: bool) -> Any:
    """Returns an instance of the kernels' module of its own, with one of Triton, which reads the variable when it is
    imported."""
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "triton" and not name.startswith("triton._C")
    ]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.find_spec("lightning_danube.model.fused_softmax")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loss of this process uses these kernels, on a CPU, too."""
    if request.param == "twin":
        module: Any = SimpleNamespace(row_statistics=twin_statistics, write_derivative=twin_derivative)
    else:
        module = kernels_module(monkeypatch, interpreted=True)
    monkeypatch.setattr(loss, "fused_kernels", lambda device, dtype: None if dtype == torch.float64 else module)
    return module


def problem(dtype: torch.dtype, vocabulary: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(1, TOKENS, D, generator=generator)
    weight_VD = torch.randn(vocabulary, D, generator=generator)
    labels_BT = torch.randint(0, vocabulary, (1, TOKENS), generator=generator)
    labels_BT[0, ::5] = -100
    return hidden_BTD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), labels_BT


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("vocabulary", [50, 4096, 5000])  # less than a program holds, as many, more
@pytest.mark.parametrize("dtype", EPS)
def test_statistics_and_derivative(kernels: Any, dtype: torch.dtype, vocabulary: int) -> None:
    """Against float64. A scale may be zero or negative, as the token weights of DPO are."""
    hidden, weight, labels = problem(dtype, vocabulary)
    logits_CV = (3 * hidden[0] @ weight.t()).detach()
    labels_C, exact_CV = labels[0], logits_CV.double()
    scale_C = torch.linspace(-1, 2, TOKENS).where(labels_C != -100, 0)
    scale_C[1] = 0
    one_hot_CV = F.one_hot(labels_C.clamp(0), vocabulary)
    expected_CV = (exact_CV.softmax(1) - one_hot_CV) * scale_C[:, None].double()

    largest_C, sums_C, target_C = kernels.row_statistics(logits_CV, labels_C, -100, 0, float("nan"))
    counted_C = labels_C != -100
    nats_C = (sums_C.log() + largest_C - target_C)[counted_C]
    nats = F.cross_entropy(exact_CV, labels_C, reduction="none")[counted_C]
    # float32 sums of positive numbers, less than 5000 of them.
    torch.testing.assert_close(nats_C.double(), nats, rtol=2e-6, atol=2e-6)
    kernels.write_derivative(logits_CV, labels_C, largest_C, sums_C, scale_C, 0)
    assert logits_CV.dtype == dtype
    # float16 has no small numbers: everything below 6e-8 is zero.
    assert ((logits_CV.double() - expected_CV).abs() <= EPS[dtype] * expected_CV.abs() + 1.2e-7).all()
    assert not logits_CV[scale_C == 0].any()


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("chunk_tokens", [7, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_loss_with_fused_kernels_is_the_loss_without(
    kernels: Any, dtype: torch.dtype, chunk_tokens: int | None, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels = problem(dtype)

    def computed() -> tuple[Tensor, ...]:
        if weighed:
            total = token_losses(hidden, weight, labels, chunk_tokens=chunk_tokens).square().sum()
        else:
            total, _ = next_token_loss(hidden, weight, labels, chunk_tokens=chunk_tokens)
        return (total, *torch.autograd.grad(total, (hidden, weight)))

    fused = computed()
    monkeypatch.undo()
    # float32: sums in another order. bfloat16: both round the derivative once, and the interpreter does not round.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for one, other in zip(fused, computed(), strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_validation_reads_the_logits_only(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    with_gradient, _ = next_token_loss(hidden, weight, labels)
    monkeypatch.setattr(kernels, "write_derivative", None)
    with torch.no_grad():
        assert torch.equal(next_token_loss(hidden, weight, labels)[0], with_gradient)


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_a_label_outside_the_vocabulary_gives_nan(kernels: Any) -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    labels[0, 1] = 50
    nats = token_losses(hidden, weight, labels)
    assert nats[0, 1].isnan() and nats.isnan().sum() == 1


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_divided_vocabulary_gives_the_loss_of_the_whole(
    kernels: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices, as threads, with half of the head each. The logits of the second half are larger."""
    hidden, weight, labels = problem(dtype)
    weight = torch.cat([weight[:25], 3 * weight[25:]]).detach()
    whole = loss_of(hidden, weight, labels, None)
    barrier, values = threading.Barrier(2, timeout=60), dict[int, Tensor]()
    one_at_a_time = threading.Lock()  # Triton's interpreter serves one thread

    def all_reduce(tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None) -> None:
        values[threading.get_ident()] = tensor.clone()
        one_at_a_time.release()
        barrier.wait()
        together = torch.stack([*values.values()])
        barrier.wait()
        one_at_a_time.acquire()
        tensor.copy_(together.amax(0) if op == torch.distributed.ReduceOp.MAX else together.sum(0))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def half(rows: slice) -> list[Tensor]:
        with one_at_a_time:
            return loss_of(hidden, weight[rows], labels, VocabularyPart(None, rows.start))

    with ThreadPoolExecutor(2) as devices:
        first, second = devices.map(half, [slice(0, 25), slice(25, 50)])
    joined = [first[0], first[1], torch.cat([first[2], second[2]])]
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for one, other in zip(joined, whole, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def loss_of(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, part: VocabularyPart | None) -> list[Tensor]:
    """Returns nats, and the derivatives of hidden states and head, of weighed tokens."""
    h_CD, labels_C, times_C = hidden_BTD[0].detach(), labels_BT[0], torch.linspace(0.5, 2, TOKENS)
    nats_C, derivative_CV = LogitsBuffer(TOKENS, weight_VD, part).nats(h_CD, weight_VD, labels_C, -100, times_C)
    grad_h_CD = (derivative_CV @ weight_VD).float()
    return [nats_C, grad_h_CD if part is None else part.sum(grad_h_CD), (derivative_CV.t() @ h_CD).float()]


def test_only_gpus_take_the_kernels() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert loss.fused_kernels(cpu, torch.bfloat16) is None and loss.fused_kernels(gpu, torch.float64) is None
    _, weight, _ = problem(torch.bfloat16)
    assert loss.tokens_of_a_chunk(weight, torch.bfloat16) == CHUNK_TOKENS


@pytest.mark.parametrize(
    ("vocabulary", "value_bytes", "tokens"),
    [(32_000, 2, 8192), (32_000, 4, 4096), (128_256, 2, 2048), (1_000_000, 4, 1024), (16_000, 2, 16_384)],
)
def test_a_chunk_on_a_gpu_takes_half_a_gibibyte_at_most(vocabulary: int, value_bytes: int, tokens: int) -> None:
    assert gpu_chunk_tokens(vocabulary, value_bytes) == tokens
    assert tokens == 1024 or tokens * vocabulary * value_bytes <= 2**29


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_triton_compiles_the_kernels_for_an_h100(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes code that the compiler refuses. Compiling for a GPU needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module = kernels_module(monkeypatch, interpreted=False)
    floats = {"missing": "fp32", "largest": "*fp32", "sums": "*fp32", "targets": "*fp32"}
    types = {"logits": f"*{dtype}", "labels": "*i64", "factors": "*fp32", "scales": "*fp32", "COLUMNS": "constexpr"}
    for kernel in (module.statistics_kernel, module.derivative_kernel):
        signature = {name: {**floats, **types}.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {"COLUMNS": module.COLUMNS})
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": module.WARPS})
        assert compiled.asm["cubin"] and compiled.metadata.target.arch == 90
