import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.training.optim import AdamW, parameter_groups


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_embeddings_and_norms_do_not(tied: bool) -> None:
    decoder = Decoder(DecoderConfig(16, 32, 2, 2, 1, vocab_size=50, tie_word_embeddings=tied))
    decayed, others = parameter_groups(decoder, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    assert all("proj" in names[id(p)] or names[id(p)] == "lm_head.weight" for p in decayed["params"])
    assert all("norm" in names[id(p)] or "embed" in names[id(p)] for p in others["params"])
    counted = len(decayed["params"]) + len(others["params"])
    assert counted == len(names) == len({id(p) for p in [*decayed["params"], *others["params"]]})


def test_what_is_frozen_is_not_optimized() -> None:
    decoder = Decoder(DecoderConfig(16, 32, 2, 2, 1, vocab_size=50))
    decoder.model.embed_tokens.requires_grad_(False)
    optimizer = AdamW().build(decoder, lr=0.1)
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.95)


def set_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True}])
def test_a_loaded_optimizer_goes_on_bitwise(changes: dict[str, bool]) -> None:
    def begun(lr: float) -> tuple[Decoder, torch.optim.Optimizer]:
        decoder = Decoder(DecoderConfig(16, 32, 2, 2, 1, vocab_size=50, **changes))  # type: ignore[arg-type]
        return decoder, AdamW().build(decoder, lr=lr)

    decoder, optimizer = begun(0.01)
    for seed in (0, 1):
        set_gradients(decoder, seed)
        optimizer.step()
    other, loaded = begun(0.5)
    other.load_state_dict(copy.deepcopy(decoder.state_dict()))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        for model, one in ((decoder, optimizer), (other, loaded)):
            set_gradients(model, seed)
            one.step()
    for left, right in zip(decoder.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_biases_and_norms_of_heads_do_not_decay() -> None:
    for changes in ({"qkv_bias": True}, {"qk_norm": True}):
        decoder = Decoder(DecoderConfig(16, 32, 2, 2, 1, vocab_size=50, **changes))  # type: ignore[arg-type]
        decayed, _ = parameter_groups(decoder, 0.1)
        names = {id(parameter): name for name, parameter in decoder.named_parameters()}
        assert all(names[id(p)].endswith(("_proj.weight", "lm_head.weight")) for p in decayed["params"])


def test_three_steps_are_those_of_the_formula() -> None:
    """Kingma and Ba, with the decay of Loshchilov and Hutter. With so large an eps it counts in every weight."""
    module = nn.Linear(5, 3).double()
    rate, decay, (first, second), eps = 0.01, 0.2, (0.8, 0.9), 0.5
    expected = {name: parameter.detach().numpy().copy() for name, parameter in module.named_parameters()}
    moments = {name: [np.zeros_like(value), np.zeros_like(value)] for name, value in expected.items()}
    optimizer = AdamW(betas=(first, second), eps=eps, weight_decay=decay).build(module, lr=rate)
    generator = np.random.default_rng(0)
    for step in (1, 2, 3):
        for name, parameter in module.named_parameters():
            gradient = generator.standard_normal(parameter.shape)
            parameter.grad = torch.from_numpy(gradient)
            mean, square = moments[name]
            mean[:] = first * mean + (1 - first) * gradient
            square[:] = second * square + (1 - second) * gradient**2
            expected[name] *= 1 - rate * (decay if name == "weight" else 0)
            unbiased = np.sqrt(square / (1 - second**step))
            expected[name] -= rate * mean / (1 - first**step) / (unbiased + eps)
        optimizer.step()
    for name, parameter in module.named_parameters():
        # Some dozen roundings of float64.
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-12, atol=0)
