import dataclasses
from typing import Any

import pytest
import torch

from lightning_danube.device import onednn_packs
from lightning_danube.model import Decoder, DecoderConfig, generate
from lightning_danube.model.packing import JoinedLinear, PackedLinear, pack, pack_for_generation

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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-2)])
def test_packed_decoders_give_the_same_logits(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    with torch.inference_mode():
        exact, packed = pair(SHAPES[shape], dtype)
        # Without 16-bit products oneDNN has no packed layout for bfloat16: such a decoder stays as it is.
        assert pack_for_generation(packed) is onednn_packs(dtype)
        packed_layers = 2 * 4 + 1 if onednn_packs(dtype) else 0
        assert [type(layer) for layer in packed.modules()].count(PackedLinear) == packed_layers
        for batch in ((1, 1), (3, 1), (2, 17)):
            ids = torch.randint(0, 101, batch)
            expected = exact(ids)
            # float32: a few roundings of 6e-8 in sums of up to a hundred; bfloat16: about ten of 8 bits in a row.
            assert (packed(ids) - expected).norm() < tolerance * expected.norm()


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
    attention.o_proj = torch.nn.Linear(64, 64)
    attention.o_proj.weight = torch.nn.Parameter(same[1].self_attn.o_proj.weight.float())
    torch.nn.init.zeros_(attention.o_proj.bias)
    with torch.inference_mode():
        assert pack_for_generation(rounded)
        assert first.mlp is mlp and second.self_attn is attention and type(second.mlp) is not type(mlp)
        # As above.
        assert (rounded(ids) - expected).norm() < 1e-6 * expected.norm()
