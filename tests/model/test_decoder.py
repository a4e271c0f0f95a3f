import copy
import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.token_stream import generate
from lightning_danube.model import Decoder, DecoderConfig, RMSNorm, next_token_loss
from lightning_danube.model.config import ActivationCheckpointing
from lightning_danube.model.decoder import type_of_products

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)


class Shapes(TorchDispatchMode):
    """Remembers the shape of every tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.seen |= {tuple(each.shape) for each in results if isinstance(each, torch.Tensor)}
        return result


def test_a_future_token_cannot_change_a_past_logit() -> None:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).double()
    ids = torch.randint(0, 101, (1, 24))
    logits = decoder(ids)
    for position in (1, 11, 23):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 101
        other = decoder(changed)
        # Nothing enters these sums but what was there before: not one bit differs.
        assert torch.equal(other[:, :position], logits[:, :position])
        assert not torch.equal(other[:, position], logits[:, position])


def test_plain_causal_attention_makes_no_square_of_tokens() -> None:
    T = 37  # no other size of this model
    decoder = Decoder(CONFIG)
    ids = torch.randint(0, 101, (2, T))
    with Shapes() as shapes:
        decoder.hidden_states(ids).sum().backward()
    assert (2, T, 64) in shapes.seen, "the spy is blind"
    assert not [shape for shape in shapes.seen if shape.count(T) > 1]
    with Shapes() as shapes:
        decoder.hidden_states(ids, document_ids_BT=torch.zeros_like(ids))
    assert (2, 1, T, T) in shapes.seen, "the spy would not have noticed"


def test_initial_weights() -> None:
    config = DecoderConfig(128, 256, 2, 4, 2, vocab_size=500, initializer_range=0.01)
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones(128)), name
        else:
            # At least 8192 values: the standard error of a standard deviation is 0.8 % of it, that of a mean 1.1 %.
            assert abs(parameter.std().item() / 0.01 - 1) < 0.04, name
            assert abs(parameter.mean().item()) < 0.06 * 0.01, name


def test_initial_weights_follow_the_generator() -> None:
    first, second = Decoder(CONFIG), Decoder(CONFIG)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    for decoder in (first, second):
        decoder.init_weights(torch.Generator().manual_seed(5))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_a_decoder_built_on_meta_becomes_a_real_one(config: DecoderConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(config)
    assert decoder.lm_head.weight.is_meta
    decoder.to_empty(device="cpu")
    decoder.init_weights(torch.Generator().manual_seed(5))
    other = Decoder(config)
    other.init_weights(torch.Generator().manual_seed(5))
    ids = torch.randint(0, 101, (1, 7))
    assert torch.equal(decoder(ids), other(ids))


def test_a_tied_head_stays_tied() -> None:
    decoder = Decoder(TIED)
    with torch.device("meta"):
        empty = Decoder(TIED)
    assigned = Decoder(TIED)
    assigned.load_state_dict(decoder.state_dict(), assign=True)
    inside = nn.ModuleDict({"decoder": Decoder(TIED)})
    inside.load_state_dict({f"decoder.{k}": v.clone() for k, v in decoder.state_dict().items()}, assign=True)
    for tied in (decoder.double(), copy.deepcopy(decoder), empty.to_empty(device="cpu"), assigned, inside["decoder"]):
        assert isinstance(tied, Decoder)
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = Decoder(CONFIG).double()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 0, 1, 1, 1, 1]])])
def test_activation_checkpointing_changes_no_gradient(documents: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).train()
    ids = torch.randint(0, 101, (1, 7))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    # Before, not after: recomputing stops as soon as all that the backward pass needs is there.
    decoder.model.layers[0].register_forward_pre_hook(count)
    gradients = []
    for decoder.activation_checkpointing in (False, True):
        decoder.zero_grad()
        decoder(ids, document_ids_BT=documents).square().sum().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    assert calls == 3, "the second pass computes the block twice"
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    decoder.eval()(ids).sum().backward()
    assert calls == 4, "only training computes twice"


class Kernels(TorchDispatchMode):
    """Counts the calls of PyTorch's attention kernels in the forward and the backward pass, and the products."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_kernel, name = "attention" in str(func), str(func)
        self.forward += is_kernel and "backward" not in name
        self.backward += is_kernel and "backward" in name
        self.products += "mm" in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 0, 1, 1, 1, 1]])])
def test_selective_checkpointing_computes_all_but_attention_again(
    documents: torch.Tensor | None, dropout: float
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, attention_dropout=dropout)).double().train()
    ids = torch.randint(0, 101, (1, 7))
    gradients, kernels = [], []
    for decoder.activation_checkpointing in (False, True, "selective"):
        torch.manual_seed(1)
        with Kernels() as counted:
            loss = decoder(ids, document_ids_BT=documents).square().sum()
            gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
        kernels.append(counted)
    for some in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(some, gradients[0], strict=True))
    if not dropout:  # PyTorch's CPU kernel has no dropout
        assert [one.forward for one in kernels] == [2, 4, 2] and {one.backward for one in kernels} == {2}
    # Recomputing stops before the last product of a block, whose result nobody needs.
    assert kernels[2].products == kernels[1].products > kernels[0].products or dropout


def test_it_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).double()
    ids = torch.randint(0, 101, (1, 7))
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    # Compiled code takes the plain operations, eager training those of elementwise.py: they sum in another order.
    torch.testing.assert_close(compiled(ids), decoder(ids), rtol=1e-10, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:Detected that context_fn")
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 0, 1, 1, 1, 1]])])
@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_a_step_is_one_graph_without_a_break(
    recompute: ActivationCheckpointing, documents: torch.Tensor | None
) -> None:
    decoder, ids = Decoder(CONFIG).train(), torch.randint(0, 101, (1, 7))
    decoder.activation_checkpointing = recompute

    def step() -> torch.Tensor:
        states = decoder.hidden_states(ids, document_ids_BT=documents)
        return next_token_loss(states, decoder.lm_head.weight, ids)[0]

    explained = torch._dynamo.explain(step)()
    torch.compiler.reset()
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_compiled_blocks_compute_the_same_under_the_same_names(recompute: ActivationCheckpointing) -> None:
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    plain = Decoder(CONFIG).double().train()
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks()
    plain.activation_checkpointing = compiled.activation_checkpointing = recompute
    ids = torch.randint(0, 101, (2, 7))
    for decoder in (plain, compiled):
        decoder(ids).square().sum().backward()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-10, atol=1e-14)
    # One compilation for all blocks and steps; with a cache none, though each step has another length.
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted == 1
    sampled = [
        generate(decoder.eval(), [[1, 2, 3]], 4, sampling=Sampling(temperature=0)) for decoder in (plain, compiled)
    ]
    assert sampled[0] == sampled[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("activations", "gains"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.filterwarnings("error")
def test_rms_norm(activations: torch.dtype, gains: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(48, eps=1e-3)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    norm.to(gains)
    x = torch.randn(10, 48).to(activations)
    exact = norm.weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    result = norm(x)
    assert result.dtype == activations
    # One rounding of the result in 16 bits (what is before is in float32); a handful in the wide types.
    roundings = 0.5 if activations == torch.bfloat16 else 4
    error = (result.double() - exact).abs()
    assert (error <= (roundings + 0.01) * torch.finfo(activations).eps * exact.abs()).all()


def test_autocast_gives_bfloat16_logits_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    ids = torch.randint(0, 101, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(ids)
        hidden = decoder.hidden_states(ids)
    assert (logits.dtype, hidden.dtype) == (torch.bfloat16, torch.float32)
    exact = decoder.double()(ids)
    # bfloat16 has 8 bits, 0.4 %; about ten roundings in a row through two layers of large weights.
    assert (logits.double() - exact).norm() < 0.04 * exact.norm()


def test_norms_on_a_gpu_write_the_type_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of a layer's matrices are then cast once. Autocast would round to the same values, once per matrix."""
    torch.manual_seed(0)
    decoder, ids = Decoder(CONFIG).train(), torch.randint(0, 101, (2, 16))

    def computed(decoder: Decoder, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = decoder(ids)
        gradients = torch.autograd.grad(logits.double().square().sum(), list(decoder.parameters()))
        return logits, torch.cat([gradient.double().flatten() for gradient in gradients])

    _, exact = computed(copy.deepcopy(decoder).double(), autocast=False)
    logits, gradients = computed(decoder, autocast=True)
    monkeypatch.setattr("lightning_danube.model.decoder.type_of_products", lambda hidden: torch.bfloat16)
    other_logits, other_gradients = computed(decoder, autocast=True)
    assert torch.equal(other_logits, logits)
    # The gradients of a norm's result are added in bfloat16 instead of float32: a small part of the roundings.
    assert not torch.equal(other_gradients, gradients)
    assert (other_gradients - exact).norm() < 1.1 * (gradients - exact).norm() < 0.1 * exact.norm()


def test_the_type_of_products_is_autocasts_on_a_gpu_only() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    states = {
        (device.type, dtype): SimpleNamespace(device=device, dtype=dtype)
        for device in (gpu, cpu)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    }
    assert all(type_of_products(cast(torch.Tensor, state)) == state.dtype for state in states.values())
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    try:
        types = {key: type_of_products(cast(torch.Tensor, state)) for key, state in states.items()}
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
    assert types.pop(("cuda", torch.float32)) == torch.float16
    assert types == {key: key[1] for key in types}
