"""Quantized decoders: what they compute, what they hold, and that the model beside them stays as it is."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_danube.model import Decoder
from lightning_danube.quantization.decoders import check_finite, full_decoder, quantized_decoder
from lightning_danube.quantization.grouped import GroupedLinear
from lightning_danube.quantization.importance import importance_matrix
from lightning_danube.quantization.levels import parse_level
from lightning_danube.quantization.task import divergence
from lightning_danube.weights.quantized_linear import FrozenLinear8bit
from tests.tiny_models import CONFIG, TIED, VARIANTS, tiny_decoder

IDS = torch.arange(60).view(2, 30)
EVEN = dataclasses.replace(CONFIG, intermediate_size=128)
TORCH_LEVELS = ("bitsandbytes:int8", "bitsandbytes:nf4", "bitsandbytes:fp4+double", "hqq:4/64", "rounding:3/16")


def rounded(weight_ND: Tensor, bits: int, group: int) -> Tensor:
    """Rounding to the nearest of 2^bits steps between the least and the greatest weight of each group, scale and zero
    point kept in float16."""
    groups = weight_ND.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    inverse = (2**bits - 1) / (high - low)
    steps = (groups * inverse - low * inverse).round().clamp(0, 2**bits - 1)
    zero, scale = (-low * inverse).half().float(), (1 / inverse).half().float()
    return ((steps - zero) * scale).reshape(weight_ND.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_plain_rounding_is_what_it_says(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    layer = GroupedLinear(weight, bits, 16, optimize=False)
    wanted = rounded(weight, bits, 16)
    torch.testing.assert_close(layer.weight_values(torch.float32), wanted, rtol=1e-6, atol=1e-6)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ wanted.T, rtol=1e-5, atol=1e-5)
    # Packed: eight bits hold 8 / bits weights, and 3 bits go by tens into 32, groups filled up to tens.
    assert layer.packed.nbytes == pytest.approx(weight.numel() * {2: 2, 3: 3.2, 4: 4, 8: 8}[bits] / 8, rel=0.05)
    assert layer.scale.dtype == layer.zero.dtype == torch.float16
    assert layer.scale.numel() == weight.numel() // 16


def test_hqq_is_nearer_than_rounding_where_bits_are_few() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((256, 64))
    errors = [
        (GroupedLinear(weight, 2, 64, optimize=optimize).weight_values(torch.float32) - weight).abs().mean()
        for optimize in (True, False)
    ]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("level", TORCH_LEVELS)
def test_a_quantized_decoder_computes_with_what_its_layers_stand_for(level: str) -> None:
    decoder = tiny_decoder(EVEN).eval()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    running = quantized_decoder(decoder, parse_level(level))
    plain = tiny_decoder(EVEN).eval()
    for name, layer in running.decoder.named_modules():
        if hasattr(layer, "weight_values"):
            plain.get_submodule(name).weight.data = layer.weight_values(torch.float32)
    with torch.no_grad():
        found, wanted = running.logits(IDS, 10), plain(IDS)[:, 10:]
        apart = (found - wanted).norm() / wanted.norm()
        # LLM.int8 rounds the inputs of each layer, too.
        assert apart < (0.1 if level.endswith("int8") else 1e-5)
        assert (wanted - decoder(IDS)[:, 10:]).norm() > 1e-3 * wanted.norm()
    for name, tensor in decoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    # What is not quantized is there once.
    assert running.decoder.model.norm.weight is decoder.model.norm.weight
    assert running.decoder.lm_head.weight is decoder.lm_head.weight


@pytest.mark.parametrize("config", [EVEN, dataclasses.replace(TIED, intermediate_size=128)], ids=["untied", "tied"])
@pytest.mark.parametrize("level", ["hqq:4/64", "bitsandbytes:nf4", "bitsandbytes:int8"])
def test_embedding_and_head_by_choice(config: Any, level: str) -> None:
    decoder = tiny_decoder(config).eval()
    running = quantized_decoder(decoder, parse_level(f"{level}+embeddings"))
    embedding: Any = running.decoder.model.embed_tokens
    table = embedding.matrix.weight_values(torch.float32)
    torch.testing.assert_close(embedding(IDS), table[IDS])
    assert 0 < (table - decoder.model.embed_tokens.weight).norm() < 0.2 * table.norm()
    if config.tie_word_embeddings:
        assert embedding.matrix is running.decoder.lm_head
    with torch.no_grad():
        running.logits(IDS, 0)
    linear = quantized_decoder(decoder, parse_level(level))
    assert running.content.tensor_bytes < linear.content.tensor_bytes < full_decoder(decoder).content.tensor_bytes
    # All matrices in 4 bits and a scale and a zero point for 64, or a scale each, or in 8 with a scale a row.
    gains = sum(p.numel() for p in decoder.parameters() if p.ndim == 1)
    matrices = config.parameters - gains
    bits = {"hqq:4/64": 4 + 32 / 64, "bitsandbytes:nf4": 4 + 32 / 64, "bitsandbytes:int8": 8}[level]
    wanted = (matrices * bits + gains * 32) / config.parameters
    assert running.content.bits_per_weight == pytest.approx(wanted, rel=0.08)


def test_a_matrix_that_does_not_fit_keeps_its_type_and_is_counted() -> None:
    decoder = tiny_decoder(CONFIG).eval()  # rows of 96 in the down projections
    running = quantized_decoder(decoder, parse_level("hqq:4/64"))
    assert running.content.fallbacks == {"float32": CONFIG.num_hidden_layers}
    assert isinstance(running.decoder.get_submodule("model.layers.0.mlp.down_proj"), nn.Linear)
    assert quantized_decoder(decoder, parse_level("hqq:4/32")).content.fallbacks == {}
    # bitsandbytes reads a block's scale at the beginning of its row, so only whole blocks are left to it.
    assert quantized_decoder(decoder, parse_level("bitsandbytes:nf4")).content.fallbacks == {"float32": 2}
    assert quantized_decoder(decoder, parse_level("bitsandbytes:int8")).content.fallbacks == {}


def test_more_bits_are_nearer() -> None:
    decoder = tiny_decoder(EVEN).eval()
    with torch.no_grad():
        wanted = decoder(IDS).log_softmax(-1)
        apart = [
            float(
                divergence(wanted, quantized_decoder(decoder, parse_level(level)).logits(IDS, 0).log_softmax(-1)).mean()
            )
            for level in ("rounding:2/64", "rounding:3/64", "rounding:4/64", "rounding:4/16", "rounding:8/64")
        ]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 0.01 * apart[0]


def test_damaged_weights_are_refused_by_name() -> None:
    decoder = tiny_decoder()
    check_finite(decoder)
    with torch.no_grad():
        decoder.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has weights that are not finite"):
        check_finite(decoder)


@pytest.mark.parametrize("method", ["hqq", "rounding"])
def test_a_group_without_a_range_is_refused_by_name(method: str) -> None:
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.get_parameter("model.layers.0.self_attn.o_proj.weight")[2] = 0.25
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.o_proj\.weight: in 1 group of 64 weights"):
        quantized_decoder(decoder, parse_level(f"{method}:4/64"))


def test_divergence_is_the_textbooks_and_keeps_its_digits() -> None:
    torch.manual_seed(0)
    wanted, noise = torch.randn(20, 1000), torch.randn(20, 1000)
    for size in (1.0, 1e-2, 1e-4):
        p, q = ((wanted + by).double().log_softmax(-1) for by in (0.0, size * noise))
        exact = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(divergence(p.float(), q.float()).double(), exact, rtol=2e-2, atol=1e-12)


def test_eight_bits_stand_for_their_weights_before_and_after_a_call() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=False)
    layer = FrozenLinear8bit(linear)
    before = layer.weight_values(torch.float32)
    layer(torch.randn(5, 64))
    torch.testing.assert_close(layer.weight_values(torch.float32), before, rtol=0, atol=0)
    assert (before - linear.weight).abs().max() <= linear.weight.abs().amax() / 127


def test_importance_is_the_mean_square_of_what_a_column_meets() -> None:
    decoder = tiny_decoder().eval()
    ids = torch.arange(700) % 259
    matrix = importance_matrix(decoder, ids)
    config = decoder.config
    assert len(matrix) == 7 * config.num_hidden_layers + 1
    with torch.no_grad():
        x = decoder.get_submodule("model.layers.0.input_layernorm")(decoder.model.embed_tokens(ids))
    torch.testing.assert_close(
        torch.from_numpy(matrix["blk.0.attn_q.weight"]), x.square().mean(0), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(matrix["blk.0.attn_k.weight"], matrix["blk.0.attn_v.weight"])
    assert matrix["blk.1.ffn_down.weight"].shape == (config.intermediate_size,)
    with pytest.raises(ValueError, match=r"lower data\.max_tokens"):
        importance_matrix(decoder, ids[:0])


def test_the_copy_of_a_decoder_can_be_thrown_away() -> None:
    decoder: Decoder = tiny_decoder(EVEN)
    quantized_decoder(decoder, parse_level("rounding:4/64+embeddings"))
    assert isinstance(decoder.model.embed_tokens, nn.Embedding)


@pytest.mark.parametrize("method", ["hqq", "rounding"])
def test_only_hqq_moves_the_zero_points(method: str) -> None:
    decoder = tiny_decoder(EVEN)
    running = quantized_decoder(decoder, parse_level(f"{method}:2/32"))
    name = "model.layers.1.mlp.up_proj"
    layer: Any = running.decoder.get_submodule(name)
    found, plain = layer.weight_values(torch.float32), rounded(decoder.get_parameter(f"{name}.weight").detach(), 2, 32)
    assert torch.allclose(found, plain, atol=1e-5) == (method == "rounding")


@pytest.mark.parametrize("level", ["bitsandbytes:int8", "bitsandbytes:nf4", "hqq:4/16"])
def test_biases_stay_as_they_are(level: str) -> None:
    decoder = tiny_decoder(VARIANTS["qwen2"])
    running = quantized_decoder(decoder, parse_level(level))
    for child in ("q_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{child}"
        with torch.no_grad():
            found = running.decoder.get_submodule(name)(torch.zeros(1, decoder.config.hidden_size))
        torch.testing.assert_close(found[0], decoder.get_parameter(f"{name}.bias").detach(), rtol=1e-3, atol=1e-3)


def test_types_of_4_bits_and_their_scales_differ() -> None:
    decoder = tiny_decoder(EVEN)
    values = {}
    for name in ("nf4", "fp4", "nf4+double"):
        running = quantized_decoder(decoder, parse_level(f"bitsandbytes:{name}"))
        layer: Any = running.decoder.get_submodule("model.layers.0.self_attn.q_proj")
        values[name] = layer.weight_values(torch.float32)
    assert not torch.allclose(values["nf4"], values["fp4"], atol=1e-3)
    assert 0 < (values["nf4"] - values["nf4+double"]).norm() < 0.02 * values["nf4"].norm()


def test_a_decoder_is_measured_without_dropout() -> None:
    decoder = tiny_decoder(EVEN).train()
    assert not full_decoder(decoder).decoder.training
    assert not quantized_decoder(decoder.train(), parse_level("hqq:4/64")).decoder.training


def test_tied_matrices_count_once() -> None:
    config = dataclasses.replace(TIED, intermediate_size=128)
    content = full_decoder(tiny_decoder(config)).content
    # The rotary frequencies are a tensor, too: 8 of them.
    assert content.tensor_bytes == 4 * (config.parameters + 8) and content.weights == config.parameters
