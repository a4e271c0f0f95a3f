"""The decoder against transformers' LlamaForCausalLM, an independent implementation, on the same random weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_danube.model import Decoder, DecoderConfig, next_token_loss

# Weights ten times the usual size: with 0.02 attention is all but uniform, and an error in it would hardly show.
SHAPES = {
    "gqa": DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2),
    "mha": DecoderConfig(64, 96, 2, 4, 4, vocab_size=101, initializer_range=0.2),
    "mqa": DecoderConfig(64, 96, 2, 4, 1, vocab_size=101, initializer_range=0.2),
    "tied": DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2, tie_word_embeddings=True),
    "head_dim 96": DecoderConfig(192, 96, 2, 2, 1, vocab_size=101, initializer_range=0.2),
    "head_dim 120": DecoderConfig(480, 96, 2, 4, 1, vocab_size=101, initializer_range=0.1, rms_norm_eps=1e-3),
    "head_dim not hidden / heads": DecoderConfig(
        64, 96, 2, 4, 2, head_dim=38, vocab_size=101, initializer_range=0.2, rope_theta=500.0
    ),
}


def norm_in_its_own_precision(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def pair(config: DecoderConfig, dtype: torch.dtype) -> tuple[Decoder, LlamaForCausalLM]:
    torch.manual_seed(0)
    ours = Decoder(config).to(dtype)
    for parameter in ours.parameters():
        if parameter.ndim == 1:  # gains of 1 would hide a gain that is left out
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    # With a padding id they drop the gradient of its embedding.
    theirs = LlamaForCausalLM(LlamaConfig.from_dict(config.to_hf(pad_id=None)))
    torch.nn.Module.to(theirs, dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_and_gradients(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float64:
        # Theirs drops to float32 inside the norm, which alone is worth 1e-6 in the logits. The formula stays theirs.
        monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_its_own_precision)
    ours, theirs = pair(SHAPES[shape], dtype)
    ids = torch.randint(0, 101, (2, 33))
    inputs, labels = ids[:, :-1], ids[:, 1:]

    logits, reference = ours(inputs), theirs(inputs).logits
    # float64: a few hundred roundings of 1e-16 in each sum, grown by two layers of large weights, stay far below 1e-10.
    # float32: 1e-5 of the largest value is about 80 roundings; sums of up to 480 products in another order reach ten.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert (logits - reference).abs().max() <= tolerance * reference.abs().max()

    total, count = next_token_loss(ours.hidden_states(inputs), ours.lm_head.weight, labels)
    (total / count).backward()
    F.cross_entropy(reference.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    if dtype == torch.float32:
        # Against float64 the gradients of both err by up to 2e-5 of the largest value: norms add up in another order.
        tolerance = 5e-5
    for name, parameter in theirs.named_parameters():
        ours_grad = gradients[name]
        assert ours_grad is not None and parameter.grad is not None
        assert (ours_grad - parameter.grad).abs().max() <= tolerance * parameter.grad.abs().max(), name


def test_bfloat16_logits_are_as_close_to_the_truth_as_theirs() -> None:
    exact, _ = pair(SHAPES["gqa"], torch.float64)
    ours, theirs = pair(SHAPES["gqa"], torch.bfloat16)
    exact.load_state_dict({name: tensor.double() for name, tensor in ours.state_dict().items()})
    ids = torch.randint(0, 101, (4, 32))
    with torch.no_grad():
        truth = exact(ids)
        error, their_error = ((model.double() - truth).square().mean() for model in (ours(ids), theirs(ids).logits))
    # Ours rounds less often (norms, rotation), so it should win; the factor leaves room for luck.
    assert error <= 1.2 * their_error


def test_state_dict_keys_are_theirs() -> None:
    for tied in ("gqa", "tied"):
        ours, theirs = pair(SHAPES[tied], torch.float32)
        assert list(ours.state_dict()) == list(theirs.state_dict())
