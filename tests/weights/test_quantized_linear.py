"""4-bit layers against plain ones with the weights that they stand for, and adapters on top of both."""

import copy
import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional

from lightning_danube.model import Decoder, next_token_loss
from lightning_danube.weights.adapters import add_adapter, merge_adapter
from lightning_danube.weights.lora import Lora
from lightning_danube.weights.quantized_linear import FrozenLinear4bit, FrozenLinear8bit, dequantize_linear_layers
from tests.tiny_models import CONFIG, tiny_decoder

IDS = torch.arange(30).view(2, 15)
QLORA = Lora(rank=4, alpha=8, dropout=0.0, targets=("q_proj", "down_proj"), quantization="nf4")


def decoder_of_even_layers() -> Decoder:
    return tiny_decoder(dataclasses.replace(CONFIG, intermediate_size=128))


def layer_and_weight() -> tuple[FrozenLinear4bit, Tensor]:
    torch.manual_seed(0)
    layer = FrozenLinear4bit(nn.Linear(64, 96, bias=False), "nf4")
    weight: Any = layer.weight
    return layer, dequantize_4bit(weight.data, weight.quant_state)


def randomized(decoder: Decoder) -> Decoder:
    """A fresh adapter changes nothing: with other values it counts."""
    torch.manual_seed(1)
    for name, parameter in decoder.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
    return decoder


def loss_of(decoder: Decoder) -> Tensor:
    total, count = next_token_loss(decoder.hidden_states(IDS[:, :-1]), decoder.lm_head.weight, IDS[:, 1:])
    return total / count


def test_a_layer_computes_with_its_weights_and_passes_the_gradient_on() -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(3, 64, requires_grad=True)
    grad = torch.randn(3, 96)
    layer(x).backward(grad)
    # The same product by another kernel: rounding of float32.
    torch.testing.assert_close(layer(x), functional.linear(x, weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-5, atol=1e-6)
    assert layer.weight.numel() * 2 == weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_after_an_evaluation_is_what_it_was_before(dtype: torch.dtype) -> None:
    """On a CPU with bfloat16 instructions, plain `Linear4bit` has no gradient from here on."""
    layer, _ = layer_and_weight()
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    results = []
    for _ in range(2):
        y = layer(x)
        y.float().sum().backward()
        assert x.grad is not None
        results.append((y.detach(), x.grad.clone()))
        x.grad = None
        layer.eval()
        with torch.no_grad():
            assert torch.equal(layer(x.detach()), y)
        layer.train()
    assert all(torch.equal(before, after) for before, after in zip(*results, strict=True))


def test_autocast_decides_the_type() -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(3, 64)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        # bfloat16 has 8 bits: 2 ** -8 of the sum of 64 products, whose size is about 1.
        torch.testing.assert_close(layer(x), functional.linear(x, weight), rtol=0, atol=2**-7)
    assert torch.equal(layer(x), plain)


def test_an_adapter_trains_as_on_the_weights_that_the_base_stands_for() -> None:
    quantized = decoder_of_even_layers()
    QLORA.apply(quantized)
    blocks = [m for m in quantized.model.layers.modules() if isinstance(m, FrozenLinear4bit)]
    assert len(blocks) == 7 * quantized.config.num_hidden_layers
    plain = decoder_of_even_layers()
    Lora(quantization="nf4").apply(other := decoder_of_even_layers())
    merge_adapter(other, dequantize=True)
    plain.load_state_dict(other.state_dict())
    add_adapter(plain, **QLORA.settings())
    randomized(quantized), randomized(plain)
    gradients = []
    for decoder in (quantized, plain):
        loss_of(decoder).backward()
        gradients.append({n: p.grad for n, p in decoder.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and all(".lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        # Two layers of float32 rounding.
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_merge_gives_the_model_that_was_trained() -> None:
    decoder = decoder_of_even_layers()
    QLORA.apply(decoder)
    randomized(decoder).eval()
    with torch.no_grad():
        logits = decoder(IDS)
    with pytest.raises(ValueError, match="base is in 4 bits, which cannot hold the sum: merge with dequantize=True"):
        merge_adapter(decoder)
    # Refused, it is as it was.
    with torch.no_grad():
        assert torch.equal(decoder(IDS), logits)
    merge_adapter(decoder, dequantize=True)
    assert not any(isinstance(m, FrozenLinear4bit) for m in decoder.modules())
    assert decoder.state_dict().keys() == decoder_of_even_layers().state_dict().keys()
    # The update is added before the product instead of after it: rounding of float32, on logits of size 1.
    torch.testing.assert_close(decoder(IDS), logits, rtol=0, atol=1e-4)
    assert all(parameter.requires_grad for parameter in decoder.parameters())


def test_four_bits_are_near_the_weights_and_take_an_eighth_of_their_memory() -> None:
    decoder = decoder_of_even_layers()
    before = copy.deepcopy(decoder)
    QLORA.apply(decoder)
    stored = sum(m.weight.nbytes for m in decoder.model.layers.modules() if isinstance(m, FrozenLinear4bit))
    linear = [m for m in before.model.layers.modules() if isinstance(m, nn.Linear)]
    assert stored * 8 == sum(m.weight.nbytes for m in linear)
    merge_adapter(decoder, dequantize=True)
    for (name, ours), theirs in zip(decoder.state_dict().items(), before.state_dict().values(), strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        # NF4's root-mean-square error on normal numbers, in blocks of 64, is 0.09 of their size.
        assert (0.05 < error < 0.15) if "_proj" in name else error == 0, (name, error)


def test_dequantizing_twice_changes_nothing() -> None:
    decoder = decoder_of_even_layers()
    QLORA.apply(decoder)
    merge_adapter(decoder, dequantize=True)
    state = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    dequantize_linear_layers(decoder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in decoder.state_dict().items())


def test_layers_that_would_be_read_wrongly_are_refused() -> None:
    decoder = tiny_decoder()
    with pytest.raises(ValueError, match="whose input is a multiple of 64; this model has some of 96: train its"):
        QLORA.apply(decoder)
    assert decoder.state_dict().keys() == tiny_decoder().state_dict().keys()


def test_bitsandbytes_still_has_the_undocumented_parts_of_its_layers() -> None:
    layer = Linear4bit(64, 64, device="meta")
    assert {"support_avx512bf16_for_cpu", "compute_dtype", "compute_type_is_set"} <= vars(layer).keys()
    assert "SCB" in vars(Linear8bitLt(64, 64, has_fp16_weights=False, device="meta").state)


@pytest.mark.parametrize("module", ["bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"])
def test_bitsandbytes_still_has_the_modules_whose_warnings_are_dropped(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_8_bits_keep_the_largest_weight_of_each_row() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=False)
    values = FrozenLinear8bit(linear).weight_values(torch.float32)
    # bitsandbytes takes weights as float16, with 11 bits.
    torch.testing.assert_close(values.abs().amax(1), linear.weight.detach().abs().amax(1), rtol=2**-10, atol=0)


def test_the_bias_of_a_quantized_layer_is_frozen() -> None:
    linear = nn.Linear(64, 96)
    for layer in (FrozenLinear4bit(linear, "nf4"), FrozenLinear8bit(linear)):
        assert torch.equal(layer.bias, linear.bias) and layer.bias is not linear.bias
        assert not any(parameter.requires_grad for parameter in layer.parameters())
