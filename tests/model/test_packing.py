from typing import Any

import pytest
import torch

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.model.packing import PackedLinear, pack_linears


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_packed_layers_give_the_same_logits(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2, tie_word_embeddings=True)
    exact = Decoder(config).double().eval()
    decoder = Decoder(config).to(dtype).eval()
    decoder.load_state_dict(exact.state_dict())
    with torch.inference_mode():
        for rows in (1, 3):
            packed: Any = Decoder(config).to(dtype).eval()
            packed.load_state_dict(decoder.state_dict())
            assert pack_linears(packed, rows) == 15
            assert isinstance(packed.lm_head, PackedLinear)
            for shape in ((1, 1), (3, 1), (2, 17)):
                ids = torch.randint(0, 101, shape)
                expected = exact(ids)
                # float32: as for the plain layers, see test_parity; bfloat16: about ten roundings of 8 bits in a row.
                assert (packed(ids) - expected).norm() < tolerance * expected.norm()


def test_layers_that_cannot_be_packed_stay() -> None:
    class Special(torch.nn.Linear):
        pass

    double, special = torch.nn.Linear(4, 4).double(), Special(4, 4)
    layers = torch.nn.Sequential(double, special)
    assert pack_linears(layers) == 0
    assert layers[0] is double and layers[1] is special
