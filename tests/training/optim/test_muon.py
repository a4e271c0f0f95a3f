"""Muon against the singular value decomposition, a plain implementation, and torch's AdamW, in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.training.optim import AdamW, Muon
from lightning_danube.training.optim.muon import QUINTICS, newton_schulz, orthogonalized

SHAPES = ((16, 40), (40, 16), (16, 16), (40, 16), (8, 16))


def tiny(tied: bool = True, dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(16, 40, 2, 2, 1, vocab_size=50, tie_word_embeddings=tied)).to(dtype)


def set_gradients(decoder: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def quintic(values: Tensor) -> Tensor:
    """What the iterations make of singular values."""
    for a, b, c in QUINTICS:
        values = a * values + b * values**3 + c * values**5
    return values


# --- the orthogonalization ------------------------------------------------------------------------------------------


def test_singular_vectors_stay_and_singular_values_become_those_of_the_polynomial() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    for matrix, result in zip(matrices, orthogonalized(matrices), strict=True):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        expected = U @ torch.diag(quintic(S / (S**4).sum() ** 0.25)) @ Vh
        # 1e-12: the iterations amplify float64's rounding of the small eigenvalues, of 1e-4 and more here.
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_singular_values_end_near_one() -> None:
    """From a hundredth of the largest one on, and below that they never grow beyond the others."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    for smallest in (1.0, 0.03, 1e-6):
        S = torch.logspace(0, math.log10(smallest), 64, dtype=torch.float64)
        values = torch.diagonal(U.mT @ newton_schulz((U * S @ V)[None])[0] @ V.mT)
        assert values.max() < 1.27
        # The norm that the iterations divide by is a few times the largest singular value.
        assert values[S / (S**4).sum() ** 0.25 > 0.01].min() > 0.73


def test_each_polynomial_is_the_closest_to_one_on_its_interval() -> None:
    """A polynomial of three coefficients is the best one where its error takes its largest size at four points in turn
    (Chebyshev)."""
    low, high = 0.01, 1.0
    for a, b, c in QUINTICS:
        x = torch.linspace(low, high, 200001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        largest = float(error.abs().max())
        turns = [error[0], *error[1:-1][(error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) <= 0], error[-1]]
        # 1e-5: the coefficients have six decimals.
        assert [float(turn) for turn in turns] == pytest.approx([-largest, largest, -largest, largest], abs=1e-5)
        low, high = 1 - largest, 1 + largest


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_a_gradient_does_not_matter(scale: float) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(24, 48)
    (result,) = orthogonalized([matrix * scale])
    # float32 with amplification by the polynomials, see above.
    torch.testing.assert_close(result, orthogonalized([matrix])[0], rtol=0, atol=1e-5)


def test_a_zero_gradient_stays_zero() -> None:
    (result,) = orthogonalized([torch.zeros(4, 8)])
    assert torch.equal(result, torch.zeros(4, 8))


def test_matrices_of_16_bits_are_orthogonalized_in_float32() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(24, 48).bfloat16()
    (result,) = orthogonalized([matrix])
    assert result.dtype == torch.float32
    assert torch.equal(result, orthogonalized([matrix.float()])[0])


# --- the step -------------------------------------------------------------------------------------------------------


class PlainMuon:
    """Muon as its author describes it, one matrix after the other, orthogonalized by its singular values."""

    def __init__(self, rate: float, decay: float, momentum: float) -> None:
        self.rate, self.decay, self.momentum = rate, decay, momentum
        self.averages: dict[int, Tensor] = {}

    def step(self, number: int, weight: Tensor, gradient: Tensor) -> Tensor:
        average = self.momentum * self.averages.get(number, torch.zeros_like(weight)) + (1 - self.momentum) * gradient
        self.averages[number] = average
        nesterov = self.momentum * average + (1 - self.momentum) * gradient
        U, S, Vh = torch.linalg.svd(nesterov, full_matrices=False)
        direction = U @ torch.diag(quintic(S / (S**4).sum() ** 0.25)) @ Vh
        rows, columns = weight.shape
        scale = math.sqrt(rows / columns) if rows > columns else 1.0
        return weight - self.rate * self.decay * weight - self.rate * scale * direction


@pytest.mark.parametrize("tied", [False, True])
def test_three_steps_are_those_of_plain_muon_and_of_adamw(tied: bool) -> None:
    decoder, twin = tiny(tied), tiny(tied)
    settings = Muon(betas=(0.8, 0.9), weight_decay=0.1, peak=0.05, momentum=0.9)
    optimizer = settings.build(decoder, lr=0.0)
    for group in optimizer.param_groups:
        group["lr"] = settings.peak_of(group, peak=0.003)
    adamw = AdamW(betas=(0.8, 0.9), weight_decay=0.1).build(twin, lr=0.003)
    plain = PlainMuon(rate=0.05, decay=0.1, momentum=0.9)
    expected = {name: p.detach().clone() for name, p in decoder.named_parameters() if "proj" in name}
    assert len(expected) == 2 * 7
    for seed in range(3):
        set_gradients(decoder, seed)
        set_gradients(twin, seed)
        gradients = {name: p.grad for name, p in decoder.named_parameters()}
        for number, (name, weight) in enumerate(expected.items()):
            gradient = gradients[name]
            assert gradient is not None
            expected[name] = plain.step(number, weight, gradient)
        optimizer.step()
        adamw.step()
    for (name, parameter), other in zip(decoder.named_parameters(), twin.parameters(), strict=True):
        # As above: 1e-12 of rounding that the polynomials amplify, times the rate, over three steps.
        torch.testing.assert_close(parameter, expected.get(name, other), rtol=0, atol=1e-12)


def test_a_loaded_optimizer_goes_on_bitwise() -> None:
    decoder = tiny(dtype=torch.float32)
    optimizer = Muon().build(decoder, lr=0.01)
    set_gradients(decoder, 0)
    optimizer.step()
    other = tiny(dtype=torch.float32)
    other.load_state_dict(copy.deepcopy(decoder.state_dict()))
    loaded = Muon().build(other, lr=0.5)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        for model, one in ((decoder, optimizer), (other, loaded)):
            set_gradients(model, seed)
            one.step()
    for left, right in zip(decoder.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_step_that_is_left_out_changes_nothing(steps_before: int) -> None:
    decoder = tiny(dtype=torch.float32)
    optimizer = Muon().build(decoder, lr=0.01)
    for seed in range(steps_before):
        set_gradients(decoder, seed)
        optimizer.step()
    weights, state = copy.deepcopy((decoder.state_dict(), optimizer.state_dict()["state"]))
    for parameter in decoder.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in decoder.state_dict().items())
    for index, values in state.items():
        for name, value in values.items():
            assert torch.equal(value, optimizer.state_dict()["state"][index][name])
    set_gradients(decoder, 7)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(torch.equal(value, weights[name]) for name, value in decoder.state_dict().items())


# --- what it trains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_matrices_of_the_blocks_are_muons_and_the_rest_is_adamws(tied: bool) -> None:
    decoder = tiny(tied)
    muon, *rest = Muon(weight_decay=0.2).build(decoder, lr=0.1).param_groups
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    assert {names[id(p)] for p in muon["params"]} == {name for name in names.values() if "proj" in name}
    decays = {names[id(p)]: group["weight_decay"] for group in rest for p in group["params"]}
    untied = {} if tied else {"lm_head.weight": 0.2}
    assert {name: decay for name, decay in decays.items() if decay} == untied
    assert len(muon["params"]) + len(decays) == len(names)


def test_a_frozen_matrix_is_left_out() -> None:
    decoder = tiny()
    frozen = decoder.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    groups = Muon().build(decoder, lr=0.1).param_groups
    assert not any(parameter is frozen for group in groups for parameter in group["params"])


def test_biases_and_norms_of_heads_are_adamws() -> None:
    for changes in ({"qkv_bias": True}, {"qk_norm": True}):
        decoder = Decoder(DecoderConfig(16, 40, 2, 2, 1, vocab_size=50, **changes))  # type: ignore[arg-type]
        muon, *_ = Muon().build(decoder, lr=0.1).param_groups
        names = {id(parameter): name for name, parameter in decoder.named_parameters()}
        assert len(muon["params"]) == 2 * 7
        assert all(names[id(p)].endswith("_proj.weight") for p in muon["params"])


def test_of_4_bit_layers_only_the_adapter_is_trained() -> None:
    from lightning_danube.weights.lora import Lora

    decoder = Decoder(DecoderConfig(64, 64, 2, 4, 2, vocab_size=50))
    Lora(rank=2, targets=("q_proj",), quantization="nf4").apply(decoder)
    groups = Muon().build(decoder, lr=0.1).param_groups
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    assert all(".lora_" in names[id(p)] for group in groups for p in group["params"])


def test_a_model_without_a_matrix_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Muon has no matrix of a block to train: use AdamW"):
        Muon().build(nn.Linear(3, 3), lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peak": 0.0}, r"optimizer\.peak is 0\.0: give Muon's highest learning rate"),
        ({"peak": float("nan")}, r"optimizer\.peak is nan"),
        ({"momentum": 1.0}, r"optimizer\.momentum is 1\.0: give a number from 0 to below 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(**arguments)


def test_sharded_matrices_are_refused() -> None:
    decoder = tiny()
    # What tells a distributed tensor from a plain one everywhere in this project.
    sharded: Any = decoder.get_parameter("model.layers.1.self_attn.o_proj.weight")
    sharded.device_mesh = object()
    with pytest.raises(ValueError, match=r"Muon needs whole matrices, and trainer\.strategy shards them: use AdamW"):
        Muon().build(decoder, lr=0.1)


def test_pytorch_still_has_the_private_average_of_lists() -> None:
    (averaged,) = torch._foreach_lerp([torch.zeros(2)], [torch.ones(2)], 0.25)
    assert averaged.tolist() == [0.25, 0.25]


def test_what_muon_leaves_to_adamw_has_its_eps() -> None:
    decoder, twin = tiny(), tiny()
    optimizer = Muon(eps=0.5).build(decoder, lr=0.01)
    adamw = AdamW(eps=0.5).build(twin, lr=0.01)
    for model, one in ((decoder, optimizer), (twin, adamw)):
        set_gradients(model, 0)
        one.step()
    rest = {name for name, _ in decoder.named_parameters() if "proj" not in name}
    assert len(rest) == 6
    for name in rest:
        assert torch.equal(decoder.get_parameter(name), twin.get_parameter(name)), name
