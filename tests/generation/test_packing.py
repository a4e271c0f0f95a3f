import dataclasses
from typing import Any

import pytest
import torch

from lightning_danube.device import fbgemm_packs, onednn_packs
from lightning_danube.generation import packing
from lightning_danube.generation.packing import (
    ConvertingLinear,
    Float16Linear,
    JoinedLinear,
    PackedLinear,
    PackedNorm,
    SplitLinear,
    linear_of_16_bits,
    pack,
    pack_for_generation,
    pack_head,
)
from lightning_danube.generation.token_stream import generate
from lightning_danube.model import Decoder, DecoderConfig, KVCache
from lightning_danube.model.decoder import RMSNorm

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2)
SHAPES = {
    "gqa": CONFIG,
    "mha, tied": dataclasses.replace(CONFIG, num_key_value_heads=4, tie_word_embeddings=True),
    "mqa": dataclasses.replace(CONFIG, num_key_value_heads=1),
    "head_dim not hidden / heads": dataclasses.replace(CONFIG, head_dim=38),
}


def pair(config: DecoderConfig, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    """A decoder in float64, and the same rounded."""
    torch.manual_seed(0)
    rounded = Decoder(config).to(dtype).eval()
    exact = Decoder(config).double().eval()
    exact.load_state_dict(rounded.state_dict())
    return exact, rounded


def linear_layers(decoder: Decoder) -> set[type]:
    return {type(layer) for layer in decoder.modules() if type(layer).__name__.endswith("Linear")}


def differences(exact: Decoder, packed: Decoder) -> float:
    """The largest relative error of the logits, over batches of few rows and of many."""
    errors = []
    for batch in ((1, 1), (3, 1), (2, 17)):
        ids = torch.randint(0, 101, batch)
        expected = exact(ids)
        errors.append(float((packed(ids) - expected).norm() / expected.norm()))
    return max(errors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 8])
def test_packed_decoders_give_the_same_logits(shape: str, rows: int) -> None:
    with torch.inference_mode():
        exact, packed = pair(SHAPES[shape], torch.float32)
        assert pack_for_generation(packed, rows=rows)
        split = rows == 1 and torch.backends.mkl.is_available()
        assert linear_layers(packed) == {SplitLinear if split else PackedLinear}
        # A few roundings of 6e-8 in sums of up to a hundred.
        assert differences(exact, packed) < 1e-6


@pytest.mark.parametrize("linear", [PackedLinear, SplitLinear])
def test_layouts_give_the_same_logits(linear: Any) -> None:
    with torch.inference_mode():
        exact, packed = pair(CONFIG, torch.float32)
        pack(packed, linear)
        # As above.
        assert differences(exact, packed) < 1e-6


@pytest.mark.skipif(not onednn_packs(torch.bfloat16), reason="no 16-bit products here")
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_decoders_give_the_same_logits_in_bfloat16(shape: str) -> None:
    with torch.inference_mode():
        exact, packed = pair(SHAPES[shape], torch.bfloat16)
        assert pack_for_generation(packed)
        assert linear_layers(packed) == {PackedLinear}
        # About ten roundings to 8 bits in a row.
        assert differences(exact, packed) < 4e-2


@pytest.fixture
def slow_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that does not multiply 16-bit matrices fast."""
    real = packing.onednn_packs
    monkeypatch.setattr(packing, "onednn_packs", lambda dtype: dtype == torch.float32 and real(dtype))
    monkeypatch.setattr(packing, "onednn_multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(packing, "fastest_type", lambda: torch.float32)


@pytest.mark.skipif(not fbgemm_packs(), reason="this build of PyTorch has no FBGEMM")
@pytest.mark.usefixtures("slow_16_bit_products")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_compute_in_float32(shape: str, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        exact, packed = pair(SHAPES[shape], dtype)
        assert pack_for_generation(packed)
        assert linear_layers(packed) == {Float16Linear}
        # Weights are exact, all else is float32: as in a decoder with float32 weights.
        assert differences(exact, packed) < 1e-6
        assert KVCache.for_decoder(packed, 1, 8).keys_BGSK[0].dtype == torch.float32


@pytest.mark.usefixtures("slow_16_bit_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_without_fbgemm_are_converted_for_many_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "fbgemm_packs", lambda: False)
    with torch.inference_mode():
        exact, packed = pair(CONFIG, dtype)
        assert pack_for_generation(packed)
        assert linear_layers(packed) == {ConvertingLinear}
        ids = torch.randint(0, 101, (2, 17))
        expected = exact(ids)
        assert (packed(ids) - expected).norm() < 1e-6 * expected.norm()
        # Few rows are rounded to the 16 bits of the weight.
        assert differences(exact, packed) < {torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
        matrices = [tensor for tensor in packed.state_dict().values() if tensor.ndim > 1]
        assert {tensor.dtype for tensor in matrices} == {dtype}


@pytest.mark.skipif(not fbgemm_packs(), reason="this build of PyTorch has no FBGEMM")
def test_weights_beyond_float16_are_not_packed_as_float16() -> None:
    plain = torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    assert type(linear_of_16_bits([plain])) is Float16Linear
    x = torch.randn(9, 8)
    one_too_small = torch.ones(4, 8)
    one_too_small[2, 3] = -(2.0**20)
    for weight in (torch.randn(4, 8) * 2.0**20, torch.randn(4, 8) * 2.0**-20, one_too_small):
        with torch.no_grad():
            plain.weight.copy_(weight)
        layer = linear_of_16_bits([plain])
        assert type(layer) is ConvertingLinear
        torch.testing.assert_close(layer(x), x @ plain.weight.float().t())


@pytest.mark.usefixtures("slow_16_bit_products")
def test_16_bit_decoders_with_other_layers_stay() -> None:
    class Special(torch.nn.Linear):
        pass

    _, rounded = pair(CONFIG, torch.bfloat16)
    first: Any = rounded.model.layers[0]
    first.mlp.up_proj = Special(64, 96, bias=False, dtype=torch.bfloat16)
    modules = list(rounded.modules())
    assert not pack_for_generation(rounded)
    assert list(rounded.modules()) == modules


def test_packed_decoders_generate_the_same() -> None:
    _, plain = pair(CONFIG, torch.float32)
    _, packed = pair(CONFIG, torch.float32)
    pack_for_generation(packed)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    # float32 leaves no two logits of this model so close that another order of sums would matter.
    assert generate(packed, prompts, 20) == generate(plain, prompts, 20)


@pytest.mark.parametrize("shape", SHAPES)
def test_joined_decoders_give_the_same_logits(shape: str) -> None:
    """What a GPU gets; here on a CPU, in float64."""
    exact, joined = pair(SHAPES[shape], torch.float64)
    pack(joined, JoinedLinear)
    assert [type(layer) for layer in joined.modules()].count(JoinedLinear) == 2 * 4
    for batch in ((1, 1), (2, 17)):
        ids = torch.randint(0, 101, batch)
        torch.testing.assert_close(joined(ids), exact(ids), rtol=0, atol=1e-12)


def test_a_tied_head_is_not_copied() -> None:
    with torch.inference_mode():
        _, packed = pair(SHAPES["mha, tied"], torch.float32)
        pack(packed, SplitLinear)
        packing.pack_head(packed, SplitLinear)
        head: Any = packed.lm_head
        assert head.weight_PNK.data_ptr() == packed.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_pytorch(dtype: torch.dtype) -> None:
    plain = RMSNorm(48, 1e-3)
    torch.nn.init.normal_(plain.weight)
    plain.to(dtype)
    x = torch.randn(2, 5, 48, dtype=dtype)
    x[0, 0], x[0, 1] = 0, 1e-3 * x[0, 1]  # eps decides
    with torch.no_grad():
        exact = torch.nn.functional.rms_norm(x.double(), (48,), plain.weight.double(), 1e-3)
        torch.testing.assert_close(PackedNorm(plain)(x), exact.to(dtype))


@pytest.mark.parametrize("linear", [PackedLinear, SplitLinear, JoinedLinear])
def test_biases_of_every_matrix_are_kept(linear: Any) -> None:
    """No family has more than those of queries, keys and values: a new variant may."""
    with torch.inference_mode():
        exact, packed = pair(CONFIG, torch.float32)
        matrices = [name for name, layer in exact.named_modules() if type(layer) is torch.nn.Linear]
        for name in matrices:
            bias = torch.randn(int(exact.get_submodule(name).out_features))  # type: ignore[arg-type]
            for decoder, dtype in ((exact, torch.float64), (packed, torch.float32)):
                decoder.get_submodule(name).bias = torch.nn.Parameter(bias.to(dtype))
        pack(packed, linear)
        pack_head(packed, linear)
        assert linear_layers(packed) == {linear}
        # As above, after more additions.
        assert differences(exact, packed) < 2e-6


def test_what_cannot_be_packed_stays() -> None:
    class Special(torch.nn.Linear):
        pass

    exact, rounded = pair(CONFIG, torch.float32)
    modules = list(exact.modules())
    assert not pack_for_generation(exact)
    assert list(exact.modules()) == modules

    ids = torch.tensor([[1, 2, 3]])
    expected = exact(ids)
    layers: Any = rounded.model.layers
    first, second = layers
    same: Any = exact.model.layers
    first.mlp.up_proj = Special(64, 96, bias=False)
    first.mlp.up_proj.load_state_dict(same[0].mlp.up_proj.state_dict())
    mlp, attention = first.mlp, second.self_attn
    # One of three joined layers has a bias.
    attention.q_proj = torch.nn.Linear(64, 64)
    attention.q_proj.weight = torch.nn.Parameter(same[1].self_attn.q_proj.weight.float())
    torch.nn.init.zeros_(attention.q_proj.bias)
    with torch.inference_mode():
        assert pack_for_generation(rounded)
        assert first.mlp is mlp and second.self_attn is attention and type(second.mlp) is not type(mlp)
        # As above.
        assert (rounded(ids) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_linear_pointwise", ["X", "W", "B", "attr", "scalars", "algorithm"]),
        ("_reorder_linear_weight", ["self", "batch_size"]),
    ],
)
def test_onednns_private_operators_take_the_same_arguments(name: str, arguments: list[str]) -> None:
    schema = getattr(packing.OPERATORS, name).default._schema
    assert [argument.name for argument in schema.arguments] == arguments


@pytest.mark.parametrize("name", ["linear_prepack_fp16", "linear_dynamic_fp16"])
def test_fbgemms_operators_are_there(name: str) -> None:
    assert hasattr(torch.ops.quantized, name)
